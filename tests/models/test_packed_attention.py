"""Flex attention's block masks of packed rows, made on a CPU, against masks written out.

On CUDA these masks are what keeps packed rows apart; flex attention runs eagerly here.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from mdm_plugin.contract import Blocks, Estimator
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Complement, FixedCount
from mdm_plugin.models import llada
from mdm_plugin.models.transformer import flex_row_mask, row_mask
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training.corruption import corrupted_step, pack

CPU = torch.device("cpu")
SIZES = (70, 9, 1, 130, 33)  # of the rows, in tokens
SHAPE = {"vocab_size": 64, "num_layers": 1, "num_heads": 2, "embed_dim": 16, "max_seq_len": 256}


def attended(mask, dense, total):
    """Flex attention by a ``BlockMask``, and the plain one by [T, T] or [1, T, T]."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, total, 8) for _ in range(3))
    return (
        flex_attention(q, k, v, block_mask=mask),
        F.scaled_dot_product_attention(q, k, v, attn_mask=dense),
    )


def a_packed_batch(masking, blocks=None):
    """Rows of ``SIZES``, packed on a CPU to a multiple of 128 tokens, as on CUDA."""
    torch.manual_seed(0)
    rows = Rows(
        (torch.randint(62, (n,)).tolist(), [False] * (n // 2) + [True] * (n - n // 2))
        for n in SIZES
    )
    batches = GlobalBatches(rows, Split(len(SIZES)), Padding(62), seed=0, shuffle=False)
    length = blocks and Blocks(blocks)
    estimator = Estimator(Stratified(), masking, MDMLoss(), 63, blocks=length)
    (noisy,) = corrupted_step(batches, 0, estimator)
    model = llada(**SHAPE, intermediate_dim=32, block_length=blocks)
    return pack(noisy, model, CPU, multiple=1 if blocks else 128)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masking", [FixedCount(), Complement()], ids=["rows", "pairs"])
def test_the_block_mask_of_packed_rows_and_pairs_is_the_dense_one(masking, causal):
    """Each sequence sees itself alone, and so does what fills the whole."""
    packed = a_packed_batch(masking)
    lengths, total = packed.attend, packed.noisy.shape[1]
    assert lengths.tolist()[: 5 * masking.views] == list(SIZES) * masking.views
    assert total % 128 == 0 and int(lengths.sum()) == total
    parts = [torch.ones(n, n, dtype=torch.bool) for n in lengths]
    dense = torch.block_diag(*parts).bool()
    if causal:
        dense = dense.tril()
    found, truth = attended(flex_row_mask(lengths, CPU, causal), dense, total)
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-5)
    # On a CPU the lengths themselves are the mask: a call for each row.
    assert row_mask(lengths, CPU, causal) is lengths


def test_the_block_mask_of_packed_rows_and_pairs_in_blocks_is_the_dense_one():
    """Of each row: the views, which see their own block and clean ones before it, and the clean
    copy."""
    packed = a_packed_batch(Complement(), blocks=4).attend
    dense = torch.block_diag(*(x.allowed()[0] for x in packed.rows)).bool()
    total = sum(packed.widths)
    kept = dense.any(1)  # what fills a last block may see nothing
    found, truth = attended(packed.flex(CPU), dense, total)
    assert kept.float().mean() > 0.9 and {x.views for x in packed.rows} == {2}
    torch.testing.assert_close(found[:, :, kept], truth[:, :, kept], rtol=1e-5, atol=1e-5)


def test_a_mask_that_lets_rows_see_each_other_is_told_apart():
    """The comparison above is one that can fail."""
    lengths = torch.tensor([64, 64])
    dense = torch.ones(128, 128, dtype=torch.bool)
    found, truth = attended(flex_row_mask(lengths, CPU), dense, 128)
    assert (found - truth).abs().max() > 0.1
