"""Probing the model, for samplers of t that ask for it: how large losses and gradients are at t."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from mdm_plugin import pareto
from mdm_plugin.contract import Estimator, Fitted, Probe, ProbePlan, Times
from mdm_plugin.data.batches import GlobalBatches
from mdm_plugin.distributed.gradients import total_norm
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.noise import keyed_generator
from mdm_plugin.training.corruption import corrupt
from mdm_plugin.training.step import NO_OFFLOADING, backward, forward_loss, row_losses, wants_norms


def probe_due(estimator: Estimator, step: int) -> ProbePlan | None:
    """The sampler's plan if the model is to be probed before ``step``, else None."""
    plan = estimator.timesteps.probe_plan(estimator.w)
    if plan is None or step == 0:
        return plan
    return plan if plan.every_n_steps and step % plan.every_n_steps == 0 else None


def probe(
    model: nn.Module,
    estimator: Estimator,
    plan: ProbePlan,
    batches: GlobalBatches,
    world: World,
    step: int,
    offloading: AbstractContextManager = NO_OFFLOADING,
    norm: Callable[[nn.Module], Tensor] = total_norm,
) -> Probe:
    """Measure losses, or gradients, at the t of ``plan``. Called on every rank.

    The same rows at every t, with new masks, drawn by (seed, step, t, mask, row): the ranks
    share the rows, and the result does not depend on how.

    For the gradient, the rows of one mask draw get random signs s_i = ±1 and go through one
    backward pass: E‖Σ s_i·∇l_i‖² = Σ‖∇l_i‖², whatever the gradients' correlations, so no row
    needs a backward pass of its own and sharded gradients are no obstacle.
    """
    grid, by_gradient = plan.t, plan.target == "gradient"
    rows, masks, seed = min(plan.rows, len(batches.rows)), plan.masks, batches.seed
    chosen = torch.randperm(len(batches.rows), generator=keyed_generator(seed, "probe rows", step))
    chosen = chosen[:rows]
    longest = int(batches.rows.lengths_of(chosen).max())
    losses, norms = torch.zeros(2, len(grid), rows, masks, device=world.device)
    shows = by_gradient and wants_norms(estimator.timesteps)
    second = torch.zeros(len(grid), dtype=torch.float64)
    one = torch.ones((), device=world.device)
    jobs = [(j, m) for j in range(len(grid)) for m in range(masks)]
    for j, m in tqdm(jobs, desc="Probing", disable=world.rank != 0, leave=False, mininterval=1):
        key = ("probe", step, j, m)
        generator = keyed_generator(seed, "probe", step, j, m, "sign")
        sign = torch.randint(2, (rows,), generator=generator) * 2.0 - 1
        for places in _shares(rows, world, batches.split.batch_size):
            real = places < rows  # a rank without a row of its own runs one at weight 0
            places = torch.where(real, places, 0)
            batch = batches.collate(chosen[places], places, key, longest)
            weight = (sign if by_gradient else torch.ones(rows)).double()
            if not real.all():
                weight = torch.zeros_like(weight)
            noisy = corrupt(batch, Times(grid[j].expand(rows), weight), estimator)
            if by_gradient:
                found = backward(model, estimator.loss, noisy, one, world, offloading, shows)
                row = found.row_losses
                if found.row_norms is not None:
                    norms[j, places.to(world.device), m] += found.row_norms  # 0 where not real
            else:
                here = noisy.to(world.device)
                with torch.no_grad():
                    row = row_losses(here, forward_loss(model, estimator.loss, here)[1])
            row = noisy.row_means(row).to(world.device)
            losses[j, places.to(world.device), m] += row * real.to(world.device)
        if by_gradient:
            second[j] += norm(model).double().cpu() ** 2 / (rows * masks)
            model.zero_grad(set_to_none=True)
    losses, norms = world.sum(torch.stack((losses, norms))).double().cpu()
    g, v = pareto.moments(losses)
    root = second.sqrt() if by_gradient else losses.square().mean((1, 2)).sqrt()
    shown = norms.square().mean((1, 2)).sqrt() if shows else None
    return Probe(grid, g, v, root, len(jobs) * rows * estimator.masking.views, shown)


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


def fit(estimator: Estimator, plan: ProbePlan, measured: Probe, world: World) -> dict[str, Any]:
    """Have the sampler of t take in a probe, the same on every rank; what to keep of it.

    Raises:
        UserError: if nothing can be made of the probe.
    """
    # To 1 in 1,000, far below the probe's own error: the fit can have several optima of nearly one
    # height, and the order in which ranks summed must not choose between them.
    rounded = measured._replace(
        root=_rounded(measured.root),
        shown=None if measured.shown is None else _rounded(measured.shown),
    )
    sampler, w = estimator.timesteps, estimator.w
    try:
        fitted = sampler.fit(rounded, w)
        if not isinstance(fitted, Fitted):
            raise ValueError(f"{type(sampler).__name__}.fit gives no mdm_plugin.contract.Fitted")
        density, figures = fitted.density, json.loads(json.dumps(fitted.figures))
    except (ValueError, TypeError) as error:
        raise UserError(f"timesteps: {error}") from error
    shared: list[Any] = [(sampler.state_dict(), density)]
    if world.size > 1:  # the same to the last bit, whatever machines the ranks are
        dist.broadcast_object_list(shared, src=0)
        state, density = shared[0]
        sampler.load_state_dict(state)
    s = w.cdf(rounded.t)
    h = density(s)
    return {
        **figures,
        "target": plan.target,
        "t": rounded.t.tolist(),
        "s": s.tolist(),
        "g": measured.g.tolist(),
        "v": measured.v.tolist(),
        "root": measured.root.tolist(),
        "h": h.tolist(),
        "kl": float(pareto.divergence(rounded.root, h.log(), s)),
        "kl_uniform": float(pareto.divergence(rounded.root, torch.zeros_like(s), s)),
        "forwards": measured.forwards,
        "backwards": measured.forwards if plan.target == "gradient" else 0,
        "density": density.state_dict(),
    }


def _rounded(root: Tensor) -> Tensor:
    return (root.log() * 1000).round().div(1000).exp()


def fit_line(report: dict[str, Any]) -> str:
    """A report in a line for the console."""
    return (
        f"fitted the density of t to {report['forwards']} forwards, KL {report['kl']:.4f} "
        f"(uniform {report['kl_uniform']:.4f})"
    )


def write_fit(report: dict[str, Any], file: Path) -> None:
    """The report as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report))


def plot_fit(report: dict[str, Any]) -> Any:
    """A matplotlib figure: g and v over t, and the root beside the density h over s = W(t)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    t = report["t"]
    left.plot(t, report["g"], ".-", label="g(t) = E[l | t]")
    left.plot(t, [x**0.5 for x in report["v"]], ".-", label="sqrt(v(t)), v = E Var_m(l | x0, t)")
    left.set(xlabel="t", ylabel="nats", title="the model's losses")
    left.legend()
    s, root = report["s"], torch.tensor(report["root"])
    root = root / torch.trapezoid(root, torch.tensor(s)) * (s[-1] - s[0])
    right.plot(s, root, "o", label=f"probe ({report['target']})", alpha=0.6)
    density = report["density"]
    right.plot(density["knots"], density["values"], label="h(s)")
    right.axhline(1, color="grey", linewidth=0.8)
    highest = max(max(density["values"]), float(root.max()))
    right.set(xlabel="s, the objective's share of smaller t", ylim=(0, 1.15 * highest))
    right.set_title(f"KL {report['kl']:.4f} (uniform {report['kl_uniform']:.4f})")
    right.legend()
    return figure
