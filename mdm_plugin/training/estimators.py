"""The estimator that a config names: read, and looked at before it is used."""

from typing import TypeVar

from omegaconf import DictConfig

from mdm_plugin.config.components import instantiate
from mdm_plugin.contract import Estimator, Masking, Objective, TimestepSampler
from mdm_plugin.density import Density, uniform_density
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.models import MDMTransformer
from mdm_plugin.objectives import ELBO

T = TypeVar("T")


def read_estimator(cfg: DictConfig, mask_id: int) -> Estimator:
    """The estimator that ``cfg``'s timesteps, masking and loss make up, at the ELBO.

    Where ``cfg`` has a ``bound`` it is that in place of ``loss``, which is then a loss of bounds.

    Raises:
        UserError: if a part is not what ``mdm_plugin.contract`` says.
    """
    timesteps, masking = instantiate(cfg, "timesteps"), instantiate(cfg, "masking")
    key = "bound" if "bound" in cfg else "loss"
    return as_estimator(timesteps, masking, instantiate(cfg, key), mask_id)


def read_objective(cfg: DictConfig) -> Objective:
    """The objective that ``cfg`` names, or the ELBO.

    Raises:
        UserError: if it is not what ``mdm_plugin.contract`` says.
    """
    return as_objective(instantiate(cfg, "objective"), "objective")


def as_objective(given: object, key: str) -> Objective:
    """An objective that a user may have written, None for the ELBO; looked at through training.

    Raises:
        UserError: if it is none, or what it gives is no density.
    """
    objective = derived(key, ELBO() if given is None else given, Objective)
    name = type(objective).__name__
    for progress in (0.0, 0.5, 1.0):
        try:
            w = objective(progress)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"{key}: {name} at {progress:.0%} of training: {error}") from error
        if not isinstance(w, Density):
            raise UserError(
                f"{key}: {name} gives a {type(w).__name__}: return a mdm_plugin.density.Density"
            )
    return objective


def as_estimator(
    timesteps: object, masking: object, loss: object, mask_id: int, where: str = ""
) -> Estimator:
    """An estimator of parts that a user may have written; ``where`` precedes the keys in messages.

    Raises:
        UserError: if a part is not what ``mdm_plugin.contract`` says.
    """
    sampler = derived(f"{where}timesteps", timesteps, TimestepSampler)
    mask = derived(f"{where}masking", masking, Masking)
    _check_written(sampler, mask, where)
    return Estimator(sampler, mask, derived(f"{where}loss", loss, MDMLoss), mask_id)


def derived(key: str, part: object, wanted: type[T]) -> T:
    """A part that a config names by ``key``, as what it is to be derived from.

    Raises:
        UserError: if it is not.
    """
    if not isinstance(part, wanted):
        raise UserError(
            f"{key}: {type(part).__name__} is no {wanted.__name__}: derive it from "
            f"{wanted.__module__}.{wanted.__name__}"
        )
    return part


def _check_written(timesteps: TimestepSampler, masking: Masking, where: str) -> None:
    """Check that a class has written the methods that go with what it declares."""
    own, base, mask = type(timesteps), TimestepSampler, type(masking)
    probed, learns = timesteps.probe_plan(uniform_density()) is not None, timesteps.learns
    for key, kind, written, wanted, reason in (
        ("timesteps", own, own.__call__ is not base.__call__, True, "__call__ gives the times"),
        ("timesteps", own, own.fit is not base.fit, probed, "fit goes with probe_plan"),
        ("timesteps", own, own.tally is not base.tally, learns, "tally goes with learns = True"),
        ("masking", mask, mask.__call__ is not Masking.__call__, True, "__call__ gives the views"),
    ):
        if written != wanted:
            without = "is not written" if wanted else "is written without it"
            raise UserError(f"{where}{key}: {kind.__name__}: {reason}: it {without}")
    if timesteps.learns_from not in ("loss", "gradient"):
        raise UserError(
            f"{where}timesteps: {own.__name__}: learns_from is {timesteps.learns_from!r}: say loss "
            "or gradient"
        )


def check_estimator(estimator: Estimator, causal: bool, where: str = "") -> None:
    """Refuse what does not go together.

    Args:
        estimator: the parts, by what they declare.
        causal: whether the model attends to earlier positions alone.
        where: precedes the keys that the line names.

    Raises:
        UserError: with the reason.
    """
    timesteps, masking, loss, _, w, _ = estimator
    sampler, mask = type(timesteps).__name__, type(masking).__name__
    if timesteps.weighted and loss.normalize == "masked":
        raise UserError(
            f"{where}timesteps: {sampler} with loss.normalize masked: the mean over masked tokens "
            "would count each t as often as it is drawn, and undo the weights: use response or "
            "tokens"
        )
    if causal != masking.causal:
        raise UserError(
            f"{where}masking: {mask} with a {'causal' if causal else 'bidirectional'} model: "
            "NextToken goes with model.causal: True, every other masking without it"
        )
    if not masking.uses_t and (timesteps.weighted or not w.is_uniform):
        raise UserError(
            f"{where}timesteps: {mask} uses no t: set it to timesteps.Uniform, and no objective"
        )


def check_throughout(estimator: Estimator, objective: Objective, model: MDMTransformer) -> None:
    """``check_estimator`` at the start, the middle and the end of training.

    Raises:
        UserError: with the reason.
    """
    for progress in (0.0, 0.5, 1.0):
        check_estimator(estimator._replace(w=objective(progress)), is_causal(model))


def is_causal(model: MDMTransformer) -> bool:
    """Whether a model attends to earlier positions alone."""
    return any(layer.attn.is_causal for layer in model.layers)
