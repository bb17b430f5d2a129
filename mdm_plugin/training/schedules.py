"""Learning-rate schedules; the cosine one is torchtune's."""

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchtune.training import get_cosine_schedule_with_warmup

__all__ = ["get_cosine_schedule_with_warmup", "get_linear_schedule_with_warmup"]


def get_linear_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int, last_epoch: int = -1
) -> LambdaLR:
    """From 0 up to the optimizer's lr in ``num_warmup_steps``, then down to 0 in a straight line.

    Args:
        optimizer: whose lr is scheduled.
        num_warmup_steps: optimizer steps of warm-up; 0 for none.
        num_training_steps: of the whole run; the recipe gives it.
        last_epoch: as in torch's schedulers.
    """

    def factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        left = num_training_steps - step
        return max(0.0, left / max(1, num_training_steps - num_warmup_steps))

    return LambdaLR(optimizer, factor, last_epoch)
