"""The training stream's gradients in torchtitan: sharded, tensor parallel, and one rank's."""

import pytest

from tests.titan.test_titan import assert_close, home, method, steps, titan  # noqa: F401


def test_a_stream_of_two_ranks_of_each_kind_is_one_rank_s(titan):  # noqa: F811
    stream = method("ParetoStream", "FixedCount", grid=4, rows=4, masks=2, bins=4, decay=0.5)
    split = ["--parallelism.tensor_parallel_degree", "2"]
    one = titan(1, {"one": {"arguments": stream}})["one"]
    two = titan(
        2,
        {
            "fsdp": {"arguments": [*stream, "--training.local_batch_size", "2"]},
            "tensor": {"arguments": [*stream, *split]},
        },
    )
    weights = [x[0]["logged"]["train/importance_weight_max"] for x in (one, *two.values())]
    assert weights[1] == pytest.approx(weights[0]) and weights[2] == pytest.approx(weights[0])
    assert len({round(x, 4) for x in weights[0]}) == 3  # it follows, from the first step on
    for name in ("fsdp", "tensor"):
        assert_close(steps(two[name]), steps(one))
