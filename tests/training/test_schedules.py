import pytest
import torch

from mdm_plugin.training import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup


def rates(build, warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = build(optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    found = []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_linear_goes_up_and_down_in_straight_lines():
    assert rates(get_linear_schedule_with_warmup, 2, 6) == pytest.approx([0, 1, 2, 1.5, 1, 0.5, 0])
    assert rates(get_linear_schedule_with_warmup, 0, 4) == pytest.approx([2, 1.5, 1, 0.5, 0])


def test_cosine_goes_through_its_half_at_half_time():
    found = rates(get_cosine_schedule_with_warmup, 2, 10)
    assert found[:3] == pytest.approx([0, 1, 2])
    assert found[6] == pytest.approx(1) and found[10] == pytest.approx(0)
