"""What noise, masks and t cost, as a share of the training step that they are part of.

    python benchmarks/sampling_cost.py

The quickstart's model and rows. Every step is timed in three parts, one after the other: sampling
(noise, t and masks), the rest of the preparation (rows laid out, targets), and the training step on
them. Shown are medians over steps of their shares of the whole. The quickstart's data must be
there: run ``make demo`` once.
"""

import time

import torch

from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.contract import Estimator
from mdm_plugin.data import GlobalBatches, Padding, Split
from mdm_plugin.density import Density
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.parameters import initialize_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.masking import Bernoulli, Complement, FixedCount, Mirror, Systematic
from mdm_plugin.noise import keyed_generator, keyed_uniform
from mdm_plugin.timesteps import ParetoOptimal
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.step import backward, global_normalizer

STEPS = 40


def main() -> None:
    """Print a table of ratios."""
    cfg = load_config("quickstart", [], Options)
    world = World(0, 1, torch.device("cpu"), None)
    tokenizer = instantiate(cfg, "tokenizer")
    batches = GlobalBatches(
        instantiate(cfg, "dataset", tokenizer),
        Split(cfg.batch_size),
        Padding(tokenizer.pad_id, tokenizer.eos_id),
        seed=0,
    )
    model = build_model(lambda: instantiate(cfg, "model"), world, torch.float32)
    initialize_parameters(model, 0)
    optimizer = instantiate(cfg, "optimizer", list(model.named_parameters()))
    loss = instantiate(cfg, "loss")
    sampler = ParetoOptimal()
    sampler.density = Density(torch.linspace(0, 1, 1025), torch.linspace(3, 0.5, 1025))
    print(f"{'masking':12} {'sampling':>10} {'+ layout':>10}   sampling, ms   whole step, ms")
    for masking in (Bernoulli(), FixedCount(), Systematic(), Mirror(), Complement()):
        estimator = Estimator(sampler, masking, loss, tokenizer.mask_id)
        timed = []
        for step in range(STEPS):
            batch = batches.micro_batches(step)[0]
            clock = [time.perf_counter()]
            u = keyed_uniform(0, "mask", step, places=batch.places, length=batch.u.shape[1])
            times = sampler(batches.size, keyed_generator(0, "t", step), estimator.w)
            masking(times.t, u, batch.eligible, estimator.w)
            clock.append(time.perf_counter())
            noisy = corrupt(batches.micro_batches(step)[0], times, estimator)
            clock.append(time.perf_counter())
            backward(model, loss, noisy, global_normalizer([noisy], world), world)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            clock.append(time.perf_counter())
            timed.append(clock)
        sampling, layout, training = torch.tensor(timed, dtype=torch.float64).diff().T
        # The second part draws the noise and the masks again, so it holds the first.
        whole = layout + training
        shares = [float((part / whole).median()) for part in (sampling, layout)]
        print(
            f"{type(masking).__name__:12} {shares[0]:10.2%} {shares[1]:10.2%}   "
            f"{1e3 * float(sampling.median()):12.2f}   {1e3 * float(whole.median()):14.1f}"
        )


if __name__ == "__main__":
    main()
