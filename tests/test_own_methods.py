"""The file of docs/adding-a-method.md: unbiased, and treated by each recipe as ours are."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mdm_plugin.contract import Masking, Probe
from mdm_plugin.data import GlobalBatches, Padding, Rows, Split
from mdm_plugin.distributed.world import World
from mdm_plugin.errors import UserError
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, FixedCount
from mdm_plugin.timesteps import Stratified
from mdm_plugin.training.corruption import corrupted_step
from mdm_plugin.training.estimators import as_estimator
from mdm_plugin.training.probe import fit
from tests.conftest import scalars
from tests.forks import free_port
from tests.toy import ELBO, Toy, row_losses, z_score

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/adding-a-method.md").read_text()
CODE = "\n\n".join(re.findall(r"```python\n(.*?)```", TEXT, re.S))
KINDS = {
    "fixed": ("my_methods.Early", "mdm_plugin.masking.Bernoulli"),
    "probed": ("my_methods.Probed", "my_methods.BothEnds"),
    "learning": ("my_methods.Learning", "mdm_plugin.masking.FixedCount"),
    "by count": ("mdm_plugin.timesteps.Stratified", "my_methods.BothEnds"),
}
OBJECTIVE = ("my_methods.Probed", "my_methods.BothEnds")  # with an objective of one's own as well


def parts(kind):
    """Of the recipe's config: the sampler, the mask, and the objective."""
    if kind == "objective":
        return (*OBJECTIVE, "my_methods.Middle")
    return (*KINDS[kind], "mdm_plugin.objectives.ELBO")


@pytest.fixture
def methods(tmp_path, monkeypatch):
    """The module, in a directory of its own."""
    (tmp_path / "my_methods.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_methods", None)
    import my_methods

    yield my_methods
    sys.modules.pop("my_methods", None)


def taught(sampler, w=ELBO):
    """A sampler after what a recipe would teach it."""
    if plan := sampler.probe_plan(w):
        sampler.fit(Probe(plan.t, plan.t, plan.t, 3 - 2 * plan.t, 0), w)
    if sampler.learns:
        t = torch.linspace(0.01, 0.99, 50).double()
        sampler.update(sampler.tally(t, 0.5 + t))
    return sampler


@pytest.mark.parametrize("name", ["Early", "Probed", "Learning", "BothEnds"])
def test_each_is_an_estimator_of_the_objective(methods, name):
    toy, masks = Toy(4), methods.BothEnds()
    if name == "BothEnds":
        pairs = [(Stratified(), masks), (taught(methods.Probed()), masks)]
    else:
        sampler = taught(getattr(methods, name)())
        assert float(sampler(4096, torch.Generator().manual_seed(0), ELBO).weight.std()) > 0.1
        pairs = [(sampler, Bernoulli(1e-3)), (sampler, FixedCount())]
    for sampler, masking in pairs:
        losses = row_losses(toy, sampler, masking, MDMLoss(), groups=4096, size=32)
        truth = toy.objective_by_counts() if masking.by_count else toy.objective(1e-3)
        assert abs(z_score(losses, truth)) < 4


@pytest.mark.parametrize("name", ["Early", "Probed", "Learning", "Stratified"])
def test_each_is_an_estimator_of_an_objective_of_one_s_own(methods, name):
    """Of w(t) = 4·min(t, 1 − t), which is not the ELBO."""
    toy, w = Toy(4), methods.Middle()(0.0)
    sampler = Stratified() if name == "Stratified" else taught(getattr(methods, name)(), w)
    for masking, eps in ((Bernoulli(1e-3), 1e-3), (methods.BothEnds(), 0.0)):
        losses = row_losses(toy, sampler, masking, MDMLoss(), groups=2048, size=32, w=w)
        truth = toy.objective(eps, lambda t: 4 * torch.minimum(t, 1 - t), (0.0, 0.5, 1.0))
        assert abs(z_score(losses, truth)) < 4
        assert abs(z_score(losses, toy.objective(eps))) > 4


@pytest.mark.parametrize("kind", [*KINDS, "objective"])
def test_in_the_recipe_it_is_saved_and_resumed_bit_equal(tune, tmp_path, kind):
    (tmp_path / "my_methods.py").write_text(CODE)
    timesteps, masking, objective = parts(kind)
    common = (f"timesteps={timesteps}", f"masking={masking}", "save_every_n_steps=4")
    common += (f"objective._component_={objective}",)
    common += ("max_steps_per_epoch=8", "epochs=1", "allow_components=[my_methods]")
    tune(*common, out="whole")
    tune(*common, f"resume_from_checkpoint={tmp_path / 'whole/step_4'}", out="resumed")
    whole, resumed = (scalars(tmp_path / x)["train/loss"] for x in ("whole", "resumed"))
    assert whole[4:] == resumed
    ends = [load_file(tmp_path / x / "step_8/model.safetensors") for x in ("whole", "resumed")]
    assert all(torch.equal(ends[1][name], x) for name, x in ends[0].items())
    states = [
        json.loads((tmp_path / x / "step_8/state.json").read_text()) for x in ("whole", "resumed")
    ]
    assert states[0]["parts"] == states[1]["parts"]
    state = states[0]["parts"]["timesteps"]
    assert state["kind"] == timesteps
    assert bool(state["state"]) == (kind in ("probed", "learning", "objective"))
    if kind in ("probed", "objective"):
        fitted = json.loads((tmp_path / "whole/timesteps_step_0.json").read_text())
        assert fitted["highest"] > 0 and fitted["density"] == state["state"]["density"]
        # The probe is at the same shares of the objective; of Middle, s = 2t² up to t = 1/2.
        assert fitted["s"] == pytest.approx([0.1, 0.3, 0.6, 0.9])
        first = 0.1 if kind == "probed" else 0.05**0.5
        assert fitted["t"][0] == pytest.approx(first)


WATCHED = """

class Watched(Learning):
    def update(self, tally):
        super().update(tally)
        with open("taught", "a") as file:
            file.write(f"{float(tally[1].sum())}\\n")
"""


def test_in_mdm_variance_they_are_probed_and_taught(command, data_dir, tmp_path):
    (tmp_path / "my_methods.py").write_text(CODE + WATCHED)
    more = [
        f"estimators.{kind.title().replace(' ', '')}.{key}._component_={value}"
        for kind, given in KINDS.items()
        for key, value in zip(("timesteps", "masking"), given, strict=True)
    ]
    more = [
        x.replace(
            "Learning.timesteps._component_=my_methods.Learning",
            "Learning.timesteps._component_=my_methods.Watched",
        )
        for x in more
    ]
    from tests.recipes.test_estimators import VARIANCE

    (tmp_path / "variance.yaml").write_text(VARIANCE)
    command(
        *("tune", "run", "mdm_variance", "--config", "variance.yaml", f"data_dir={data_dir}"),
        *("output_dir=out", "batches=4", "batches_per_round=2", "warmup_batches=3", *more),
        "allow_components=[my_methods]",
    )
    found = json.loads((tmp_path / "out/variance.json").read_text())["estimators"]
    views = {x["name"]: x["forwards_per_row"] for x in found}
    assert {"Fixed": 1, "Probed": 2, "Learning": 1, "ByCount": 2}.items() <= views.items()
    probed = json.loads((tmp_path / "out/timesteps_Probed.json").read_text())
    assert probed["t"] == [0.1, 0.3, 0.6, 0.9] and probed["highest"] > 0
    assert (tmp_path / "taught").read_text().split() == ["8.0"] * 3  # rows of each warm-up batch


def test_a_contract_that_is_not_kept_is_one_line(tune, tmp_path):
    text = CODE.replace("    views = 2\n", "")
    text += "\n\nclass Pair(Early):\n    def __call__(self, n, generator, w):\n"
    text += "        return tuple(super().__call__(n, generator, w))\n"
    text += (
        "\n\nclass Numbers(Middle):\n    def __call__(self, progress):\n        return [0, 1, 0]\n"
    )
    text += "\n\nclass Falling(Middle):\n    def __call__(self, progress):\n"
    text += (
        "        return Density(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.5 - progress]))\n"
    )
    (tmp_path / "my_methods.py").write_text(text)
    own = "objective._component_=my_methods"
    for given, words in (
        ("masking=my_methods.BothEnds", "masking: BothEnds gives 2 views and declares 1"),
        ("timesteps=my_methods.Pair", "timesteps: Pair gives a tuple: return mdm_plugin.contract"),
        (f"{own}.Early", "objective: Early is no Objective: derive it from"),
        (f"{own}.Numbers", "objective: Numbers gives a list: return a mdm_plugin.density"),
        (
            f"{own}.Falling",
            "objective: Falling at 100% of training: a density is finite and not negative",
        ),
    ):
        done = tune(given, "allow_components=[my_methods]", check=False)
        assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]


def test_in_torchtitan_it_is_saved_and_resumed_bit_equal(torchtitan, data_dir, tmp_path):
    (tmp_path / "my_methods.py").write_text(CODE)
    home = tmp_path / "home"
    home.mkdir()
    (home / "quickstart").symlink_to(data_dir)
    spec = []
    for kind in (*KINDS, "objective"):
        timesteps, masking, objective = parts(kind)
        for run, steps in (("first", 2), ("whole", 4), ("resumed", 4)):
            out = tmp_path / kind / ("first" if run == "resumed" else run)
            arguments = [
                *("--dataloader.timesteps", timesteps, "--dataloader.masking", masking),
                *("--dataloader.objective", objective),
                *("--training.steps", str(steps), "--training.local_batch_size", "4"),
                *("--training.global_batch_size", "8", "--metrics.log_freq", "1"),
                *("--checkpoint.interval", "2", "--validator.no-enable", "--debug.seed", "5"),
                # The schedule of the whole, also where it ends early.
                *("--lr_scheduler.total_steps", "4", "--dataloader.seed", "3"),
            ]
            spec.append(
                {
                    "config": "llada_debugmodel_sft",
                    "arguments": arguments,
                    "out": str(out),
                    "name": run,
                    "port": free_port(),
                }
            )
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    torchtitan(1, "tests.titan.runs", tmp_path / "spec.json", home=home)
    for kind in (*KINDS, "objective"):
        first, whole, resumed = (
            json.loads((tmp_path / kind / place / f"{run}_0.json").read_text())
            for run, place in (("first", "first"), ("whole", "whole"), ("resumed", "first"))
        )
        for found in (first, whole, resumed):
            assert "error" not in found, found
        assert first["steps"] == whole["steps"][:2]
        assert resumed["steps"] == whole["steps"][2:]
        weights = whole["logged"]["train/importance_weight_max"]
        assert (max(weights) > 1.0001) == (kind != "by count")


WRONG = {
    "no call": ("class X(TimestepSampler): pass", "__call__ gives the times: it is not written"),
    "no tally": ("class X(Early):\n    learns = True", "tally goes with learns = True"),
    "learns from what": (
        'class X(Learning):\n    learns_from = "noise"',
        "learns_from is 'noise': say loss or gradient",
    ),
    "forgot learns": ("class X(Learning):\n    learns = False", "tally goes with learns = True"),
    "no fit": (
        "class X(Early):\n    def probe_plan(self, w):\n        return Probed().probe_plan(w)",
        "fit goes with probe_plan",
    ),
    "no mask": ("class X(Masking): pass", "__call__ gives the views: it is not written"),
    "float32": (
        "class X(Early):\n    def __call__(self, n, generator, w):\n"
        "        t, weight, h = super().__call__(n, generator, w)\n"
        "        return Times(t.float(), weight, h)",
        r"gives t of shape \[8\] and torch.float32: 8 rows want \[8\]",
    ),
    "too few": (
        "class X(Early):\n    def __call__(self, n, generator, w):\n"
        "        return super().__call__(n - 1, generator, w)",
        r"gives t of shape \[7\]",
    ),
    "beyond 1": (
        "class X(Early):\n    def __call__(self, n, generator, w):\n"
        "        t, weight, h = super().__call__(n, generator, w)\n"
        "        return Times(t + 1, weight, h)",
        r"gives a t outside of \[0, 1\]",
    ),
    "prompt": (
        "class X(BothEnds):\n    def __call__(self, t, u, eligible, w):\n"
        "        views = super().__call__(t, u, eligible, w)\n"
        "        return views._replace(mask=views.mask | True)",
        "masks what is not eligible",
    ),
    "flat weight": (
        "class X(BothEnds):\n    def __call__(self, t, u, eligible, w):\n"
        "        views = super().__call__(t, u, eligible, w)\n"
        "        return views._replace(inverse_p=views.inverse_p[0])",
        r"and inverse_p of \[8\]: 2 views of 8 rows",
    ),
    "tuple": (
        "class X(BothEnds):\n    def __call__(self, t, u, eligible, w):\n"
        "        return tuple(super().__call__(t, u, eligible, w))",
        "X gives a tuple: return mdm_plugin.contract.Views",
    ),
    "no Fitted": (
        "class X(Probed):\n    def fit(self, measured, w):\n        super().fit(measured, w)",
        "X.fit gives no mdm_plugin.contract.Fitted",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_not_as_the_contract_says_is_one_line(methods, case):
    """As the recipe would find it: when it is built, at the first step, or at the probe."""
    code, words = WRONG[case]
    namespace = dict(vars(methods))
    exec(code, namespace)
    part = namespace["X"]()
    rows = Rows(([1] * 2 + [2] * 4, [False] * 2 + [True] * 4) for _ in range(8))
    batches = GlobalBatches(rows, Split(8), Padding(0), seed=0)
    timesteps = Stratified() if isinstance(part, Masking) else part
    masking = part if isinstance(part, Masking) else Bernoulli()
    with pytest.raises(UserError, match=words):
        estimator = as_estimator(timesteps, masking, MDMLoss(), 7)
        if plan := timesteps.probe_plan(ELBO):
            measured = Probe(plan.t, plan.t, plan.t, plan.t, 0)
            fit(estimator, plan, measured, World(0, 1, torch.device("cpu"), None))
        corrupted_step(batches, 0, estimator)


def test_an_error_within_the_user_s_file_is_named(tune, tmp_path):
    (tmp_path / "imports.py").write_text("import nosuchthing\n")
    (tmp_path / "syntax.py").write_text("x = 1\ndef f(:\n")
    (tmp_path / "my_methods.py").write_text(CODE)
    for path, words in (
        ("imports.A", "imports.A cannot be imported: No module named 'nosuchthing'"),
        ("syntax.A", "syntax.py:2: "),
        ("my_methods.Learnin", "my_methods has no Learnin: did you mean Learning?"),
    ):
        done = tune(f"timesteps={path}", check=False)
        assert done.returncode == 2 and words in done.stderr.strip().splitlines()[-1]
