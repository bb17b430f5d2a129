"""Who attends to whom in [views | clean] rows, three ways."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from mdm_plugin.models.blocks import QUERIES, BlockAttention

LAYOUTS = [(4, 16, 4, 2), (1, 8, 2, 1), (8, 8, 0, 3), (4, 3 * QUERIES, 100, 2), (192, 576, 192, 1)]


def layouts():
    for block, length, first, views in LAYOUTS:
        real = torch.arange(length) < torch.tensor([length, length - block // 2 - 1])[:, None]
        for rows in (None, real):
            yield BlockAttention(block, length, first, views, rows)


def test_the_definition_token_by_token():
    real = torch.tensor([[True] * 7 + [False], [True] * 8])
    attend = BlockAttention(2, 8, 2, 2, real)
    names = [(v, i) for v in range(2) for i in range(2, 8)] + [("clean", i) for i in range(6)]
    assert attend.width == len(names)
    for row in range(2):
        for a, (view, i) in enumerate(names):
            for b, (other, j) in enumerate(names):
                if view == "clean":
                    sees = other == "clean" and j // 2 <= i // 2
                else:
                    sees = (other == view and j // 2 == i // 2) or (
                        other == "clean" and j // 2 < i // 2
                    )
                assert attend.allowed()[row, a, b] == (sees and bool(real[row, j]))


@pytest.mark.parametrize("attend", layouts(), ids=lambda x: f"{x.block}-{x.length}-{x.views}")
def test_calls_by_block_and_flex_attention_are_the_dense_mask_s(attend):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, attend.width, 8) for _ in range(3))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=attend.allowed()[:, None])
    torch.testing.assert_close(attend(q, k, v, 0.0), dense, rtol=1e-5, atol=1e-5)
    mask = attend.flex(torch.device("cpu"))
    torch.testing.assert_close(
        flex_attention(q, k, v, block_mask=mask), dense, rtol=1e-5, atol=1e-5
    )


def test_a_place_is_laid_out_and_found_again():
    attend = BlockAttention(4, 16, 4, 3)
    views, clean = torch.arange(3 * 2 * 16).view(3, 2, 16), -torch.arange(2 * 16).view(2, 16)
    flat = attend.lay_out(views, clean).flatten()
    view, row, column = (
        x.flatten()
        for x in torch.meshgrid(
            torch.arange(3), torch.arange(2), torch.arange(4, 16), indexing="ij"
        )
    )
    at = attend.positions(view, row, column)
    assert torch.equal(flat[at], views[view, row, column])
    assert torch.equal(attend.column_of(at), column)
    for place, i, r in zip(attend.before(at).tolist(), column.tolist(), row.tolist(), strict=True):
        # A block's first token is predicted from the clean copy, the others from their own view.
        before = int(flat[place])
        assert (before == int(clean[r, i - 1])) if i % 4 == 0 else before % 16 == i - 1
        assert (before <= 0) == (i % 4 == 0)


def test_lengths_that_are_no_whole_blocks_are_refused():
    for length, first in ((10, 0), (12, 2), (12, 12)):
        with pytest.raises(ValueError, match="multiples"):
            BlockAttention(4, length, first)
