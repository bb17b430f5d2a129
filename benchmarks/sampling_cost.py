"""What noise, masks and t cost, as a share of the training step that they are part of.

    python benchmarks/sampling_cost.py

The quickstart's model and rows; both are timed in turn in one run, and the median of the ratios
over steps is shown. The quickstart's data must be there: run ``make demo`` once.
"""

import time

import torch

from mdm_plugin.data import GlobalBatches
from mdm_plugin.masking import Bernoulli, Complement, FixedCount, Mirror, Systematic
from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import Density, ParetoOptimal
from mdm_plugin.training.config import instantiate, load_config
from mdm_plugin.training.distributed import World, build_model, initialize_parameters
from mdm_plugin.training.options import Options
from mdm_plugin.training.step import backward, corrupt, global_normalizer

STEPS = 40


def main() -> None:
    """Print a table of ratios."""
    cfg = load_config("quickstart", [], Options)
    world = World(0, 1, torch.device("cpu"), None)
    tokenizer = instantiate(cfg, "tokenizer")
    batches = GlobalBatches(
        instantiate(cfg, "dataset", tokenizer),
        batch_size=cfg.batch_size,
        seed=0,
        pad_id=tokenizer.pad_id,
        eos_padding_id=tokenizer.eos_id,
    )
    model = build_model(lambda: instantiate(cfg, "model"), world, dtype=torch.float32)
    initialize_parameters(model, 0)
    optimizer = instantiate(cfg, "optimizer", list(model.parameters()))
    loss = instantiate(cfg, "loss")
    sampler = ParetoOptimal()
    sampler.density = Density(torch.linspace(0, 1, 1025), torch.linspace(3, 0.5, 1025))
    print(f"{'masking':12} {'share of a step':>16}   noise + t + masks, ms   step, ms")
    for masking in (Bernoulli(), FixedCount(), Systematic(), Mirror(), Complement()):
        sampling, steps = [], []
        for step in range(STEPS):
            start = time.perf_counter()
            # Laying out the rows is a part of it: the noise is drawn there.
            micro = batches.micro_batches(step)
            t, weight = sampler(batches.size, keyed_generator(0, "t", step))
            noisy = [
                corrupt(x, t, weight, masking, loss, tokenizer.mask_id, sampler.density)
                for x in micro
            ]
            drawn = time.perf_counter()
            normalizer = global_normalizer(noisy, world)
            for batch in noisy:
                backward(model, loss, batch, normalizer, world)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            sampling.append(drawn - start)
            steps.append(time.perf_counter() - start)
        half = STEPS // 2
        ratio = sorted(a / b for a, b in zip(sampling, steps, strict=True))[half]
        print(
            f"{type(masking).__name__:12} {ratio:16.2%}   {1e3 * sorted(sampling)[half]:21.2f}   "
            f"{1e3 * sorted(steps)[half]:8.1f}"
        )


if __name__ == "__main__":
    main()
