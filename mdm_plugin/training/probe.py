"""Probing the model for P-POTS: how large its losses and gradients are at each t."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mdm_plugin import pareto
from mdm_plugin.data.batches import GlobalBatches
from mdm_plugin.loss import MDMLoss
from mdm_plugin.noise import keyed_generator
from mdm_plugin.timesteps import ParetoOptimal
from mdm_plugin.training.distributed import World, total_norm
from mdm_plugin.training.step import (
    NO_OFFLOADING,
    Masking,
    backward,
    corrupt,
    forward_loss,
    row_losses,
)


class Probe(NamedTuple):
    """What the model showed at T values of t, the same on every rank.

    t, g, v: [T], the grid, E[l | t] and E_{x0} Var_m(l | x0, t).
    w: [T], the root of the second moment of the target.
    forwards: rows that went through the model, each of a row's views counted.
    """

    t: Tensor
    g: Tensor
    v: Tensor
    w: Tensor
    forwards: int


def probe_due(sampler: Any, step: int) -> bool:
    """Whether ``sampler`` is to be fitted to the model before ``step``."""
    if not isinstance(sampler, ParetoOptimal):
        return False
    every = sampler.refit_every_n_steps
    return sampler.density is None or bool(every and step % every == 0)


def probe(
    model: nn.Module,
    loss: MDMLoss,
    sampler: ParetoOptimal,
    masking: Masking,
    batches: GlobalBatches,
    mask_id: int,
    world: World,
    step: int,
    offloading: AbstractContextManager = NO_OFFLOADING,
    norm: Callable[[nn.Module], Tensor] = total_norm,
) -> Probe:
    """Measure losses, or gradients, at the grid of ``sampler``. Called on every rank.

    The same rows at every t, with new masks, drawn by (seed, step, t, mask, row): the ranks
    share the rows, and the result does not depend on how.

    For the gradient, the rows of one mask draw get random signs s_i = ±1 and go through one
    backward pass: E‖Σ s_i·∇l_i‖² = Σ‖∇l_i‖², whatever the gradients' correlations, so no row
    needs a backward pass of its own and sharded gradients are no obstacle.
    """
    grid = pareto.probe_grid(sampler.family, sampler.grid)
    rows, masks, seed = min(sampler.rows, len(batches.rows)), sampler.masks, batches.seed
    chosen = torch.randperm(len(batches.rows), generator=keyed_generator(seed, "probe rows", step))
    chosen = chosen[:rows]
    longest = int(batches.rows.lengths[chosen].max())
    by_gradient = sampler.target == "gradient"
    losses = torch.zeros(len(grid), rows, masks, device=world.device)
    second = torch.zeros(len(grid), dtype=torch.float64)
    one, views = torch.ones((), device=world.device), 0
    jobs = [(j, m) for j in range(len(grid)) for m in range(masks)]
    for j, m in tqdm(jobs, desc="Probing", disable=world.rank != 0, leave=False, mininterval=1):
        key = ("probe", step, j, m)
        sign = torch.randint(2, (rows,), generator=keyed_generator(seed, *key, "sign")) * 2.0 - 1
        for places in _shares(rows, world, batches.batch_size):
            real = places < rows  # a rank without a row of its own runs one at weight 0
            places = torch.where(real, places, 0)
            batch = batches.collate(chosen[places], places, key, longest)
            t, weight = grid[j].expand(rows), (sign if by_gradient else torch.ones(rows)).double()
            if not real.all():
                weight = torch.zeros_like(weight)
            noisy = corrupt(batch, t, weight, masking, loss, mask_id)
            views = len(noisy.row_weight) // len(places)
            if by_gradient:
                _, row = backward(model, loss, noisy, one, world, offloading)
            else:
                noisy = noisy.to(world.device)
                with torch.no_grad():
                    row = row_losses(noisy, forward_loss(model, loss, noisy)[1])
            losses[j, places.to(world.device), m] += row * real.to(world.device)
        if by_gradient:
            second[j] += norm(model).double().cpu() ** 2 / (rows * masks)
            model.zero_grad(set_to_none=True)
    losses = world.sum(losses).double().cpu()
    g, v = pareto.moments(losses)
    w = second.sqrt() if by_gradient else losses.square().mean((1, 2)).sqrt()
    return Probe(grid, g, v, w, len(jobs) * rows * views)


def _shares(rows: int, world: World, batch_size: int) -> Iterator[Tensor]:
    """This rank's places of ``rows``, in micro-batches, as many on every rank.

    Places from ``rows`` on stand for none.
    """
    each = -(-rows // world.size)
    own = torch.arange(world.rank * each, (world.rank + 1) * each)
    real = own[own < rows]
    size = min(batch_size, each)
    for i in range(-(-each // size)):
        part = real[i * size : (i + 1) * size]
        yield part if len(part) else torch.tensor([rows])


def fit(sampler: ParetoOptimal, measured: Probe, world: World) -> dict[str, Any]:
    """Fit ``sampler``'s density to a probe, the same on every rank; what to keep of it.

    Raises:
        ValueError: if the probe's second moments are zero or not finite.
    """
    # To 1 in 1,000, far below the probe's own error: the fit can have several optima of nearly one
    # height, and the order in which ranks summed must not choose between them.
    w = (measured.w.log() * 1000).round().div(1000).exp()
    fitted = pareto.fit(measured.t, w, family=sampler.family, mix=sampler.mix)
    shared = [fitted]
    if world.size > 1:  # the same to the last bit, whatever machines the ranks are
        dist.broadcast_object_list(shared, src=0)
    fitted = shared[0]
    sampler.density = fitted.density
    return {
        "family": sampler.family,
        "target": sampler.target,
        "mix": sampler.mix,
        "t": measured.t.tolist(),
        "g": measured.g.tolist(),
        "v": measured.v.tolist(),
        "w": measured.w.tolist(),
        "q": fitted.density(measured.t).tolist(),
        "kl": fitted.kl,
        "kl_uniform": fitted.kl_uniform,
        "epr": fitted.epr._asdict() if fitted.epr else None,
        "forwards": measured.forwards,
        "backwards": measured.forwards if sampler.target == "gradient" else 0,
        "density": fitted.density.state_dict(),
    }


def write_fit(report: dict[str, Any], file: Path) -> None:
    """The report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report))


def keep_fit(report: dict[str, Any], directory: Path, logger: Any, step: int) -> None:
    """The report as timesteps_step_N.json, and as a figure where ``logger`` takes one."""
    write_fit(report, directory / f"timesteps_step_{step}.json")
    if hasattr(logger, "log_figure"):
        logger.log_figure("timesteps", draw_fit(report), step)


def draw_fit(report: dict[str, Any]) -> Any:
    """A matplotlib figure: g and v, and w beside the density q, over t."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    t = report["t"]
    left.plot(t, report["g"], ".-", label="g(t) = E[l | t]")
    left.plot(t, [x**0.5 for x in report["v"]], ".-", label="sqrt(v(t)), v = E Var_m(l | x0, t)")
    left.set(xlabel="t", ylabel="nats", title="the model's losses")
    left.legend()
    w = torch.tensor(report["w"])
    w = w / torch.trapezoid(w, torch.tensor(t)) * (t[-1] - t[0])
    right.plot(t, w, "o", label=f"probe ({report['target']})", alpha=0.6)
    density = report["density"]
    right.plot(density["knots"], density["values"], label=f"q(t), {report['family']}")
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(xlabel="t", ylim=(0, 1.15 * max(max(density["values"]), float(w.max()))))
    right.set_title(f"KL {report['kl']:.4f} (uniform {report['kl_uniform']:.4f})")
    right.legend()
    return figure
