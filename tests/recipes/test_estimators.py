"""Samplers that learn from the model, in the recipe: any split, resumed, refused; mdm_variance."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import scalars
from tests.recipes.test_full_finetune import TWO_RANKS, assert_same, curves

ROOT = Path(__file__).parents[2]
PARETO = (
    "timesteps._component_=mdm_plugin.timesteps.ParetoOptimal",
    "timesteps.grid=5",
    "timesteps.rows=4",
    "timesteps.masks=2",
)
ADAPTIVE = (
    "timesteps._component_=mdm_plugin.timesteps.Adaptive",
    "timesteps.bins=4",
    "timesteps.warmup_rows=4",
)
OBJECTIVE = "objective._component_"
WINDOW = (f"{OBJECTIVE}=mdm_plugin.objectives.Window", "objective.low=0.5")
WIDENING = (f"{OBJECTIVE}=mdm_plugin.objectives.Widening",)  # of (0.5, 1) at first


@pytest.mark.parametrize("sampler", [PARETO, ADAPTIVE], ids=["ParetoOptimal", "Adaptive"])
def test_two_ranks_and_accumulation_are_the_run_of_one_rank(tune, tmp_path, sampler):
    common = (*sampler, "masking=mdm_plugin.masking.FixedCount")
    tune(*common, out="one")
    tune(*common, "batch_size=2", "gradient_accumulation_steps=2", launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-4)
    weights = scalars(tmp_path / "one")["train/importance_weight_max"]
    assert max(weights) > 1.01


def test_resuming_does_not_probe_again_and_is_the_same_run(tune, tmp_path):
    common = (*PARETO, "ema._component_=mdm_plugin.training.EMA", "save_every_n_steps=10")
    first = tune(*common, out="run")
    assert first.stdout.count("fitted the density of t") == 1
    fitted = json.loads((tmp_path / "run/timesteps_step_0.json").read_text())
    assert fitted["kl"] <= fitted["kl_uniform"]
    files = {
        name: load_file(tmp_path / f"run/step_20/{name}.safetensors")
        for name in ("model", "ema/model")
    }
    assert not torch.equal(files["model"]["output.weight"], files["ema/model"]["output.weight"])
    (tmp_path / "run/step_20").rename(tmp_path / "whole")
    again = tune(*common, "resume_from_checkpoint=True", out="run")
    assert "fitted" not in again.stdout
    for name, before in files.items():
        after = load_file(tmp_path / f"run/step_20/{name}.safetensors")
        assert all(torch.equal(after[key], before[key]) for key in before)
    tune("max_steps_per_epoch=1", out="plain")
    for key, more, words in (
        ("ema", ("ema._component_=mdm_plugin.training.EMA",), "written with none, and the config"),
        ("timesteps", ADAPTIVE, "written with Stratified, and the config has Adaptive"),
        (
            "lr_scheduler",
            ("lr_scheduler=null",),
            "with get_linear_schedule_with_warmup, and the config has none",
        ),
    ):
        resume = ("max_steps_per_epoch=1", "epochs=2", "resume_from_checkpoint=True")
        refused = tune(*resume, *more, out="plain", check=False)
        line = refused.stderr.strip().splitlines()[-1]
        assert refused.returncode == 2 and line.startswith(f"error: {key}: ") and words in line
    refused = tune(*ADAPTIVE, common[-2], "resume_from_checkpoint=True", out="run", check=False)
    line = refused.stderr.strip().splitlines()[-1]
    assert "with ParetoOptimal, and the config has Adaptive: restore it" in line
    tune(*ADAPTIVE, "max_steps_per_epoch=1", out="bins")
    more = ("max_steps_per_epoch=1", "epochs=2", "resume_from_checkpoint=True")
    refused = tune(*ADAPTIVE, "timesteps.bins=7", *more, out="bins", check=False)
    line = refused.stderr.strip().splitlines()[-1]
    assert "timesteps: the checkpoint's state does not fit" in line and "bins is 7" in line


def test_an_objective_that_moves_is_one_run_on_two_ranks_and_stopped_and_resumed(tune, tmp_path):
    common = (*PARETO, *WIDENING, "masking=mdm_plugin.masking.FixedCount", "save_every_n_steps=10")
    tune(*common, out="one")
    masked = scalars(tmp_path / "one")["train/masked_fraction"]
    assert sum(masked[:4]) / 4 > 0.65 and sum(masked[-4:]) / 4 < 0.6  # t ~ U(0.5, 1) to U(0, 1)
    tune(*common, "batch_size=4", launch=TWO_RANKS, out="two")
    assert_same(curves(tmp_path, "two"), curves(tmp_path, "one"), 1e-4)
    start = f"resume_from_checkpoint={tmp_path / 'one/step_10'}"
    tune(*common, start, out="resumed")
    assert torch.equal(curves(tmp_path, "resumed"), curves(tmp_path, "one")[:, 10:])
    ends = [load_file(tmp_path / x / "step_20/model.safetensors") for x in ("one", "resumed")]
    assert all(torch.equal(ends[1][name], x) for name, x in ends[0].items())


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((*PARETO, "loss.normalize=masked"), "would count each t as often as it is drawn"),
        (("masking=mdm_plugin.masking.NextToken",), "with a bidirectional model"),
        (
            ("masking=mdm_plugin.masking.NextToken", "model.causal=True", *PARETO),
            "NextToken uses no t",
        ),
        (
            (
                *("masking=mdm_plugin.masking.NextToken", "model.causal=True"),
                *("timesteps=mdm_plugin.timesteps.Uniform", *WINDOW),
            ),
            "NextToken uses no t: set it to timesteps.Uniform, and no objective",
        ),
        (("model.causal=True",), "with a causal model"),
        (("masking._component_=mdm_plugin.masking.Rotation", "masking.k=1"), "k is 1"),
    ],
)
def test_what_does_not_go_together_is_refused_with_the_reason(tune, overrides, words):
    done = tune(*overrides, check=False)
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]


def test_an_autoregressive_model_trains(tune, tmp_path):
    tune(
        "masking=mdm_plugin.masking.NextToken",
        "timesteps=mdm_plugin.timesteps.Uniform",
        "model.causal=True",
        "optimizer.lr=1e-2",
    )
    loss = scalars(tmp_path / "out")["train/loss"]
    assert loss[-1] < 0.5 * loss[0]


VARIANCE = """
output_dir: ???
data_dir: ???
tokenizer: {_component_: mdm_plugin.models.ChatTokenizer, path: "${data_dir}", max_seq_len: 96}
dataset: {_component_: mdm_plugin.data.chat_dataset, source: "${data_dir}/val.jsonl"}
model:
  _component_: mdm_plugin.models.llada
  vocab_size: 320
  num_layers: 2
  num_heads: 2
  embed_dim: 32
  intermediate_dim: 64
  max_seq_len: 96
checkpointer: {_component_: mdm_plugin.training.Checkpointer, output_dir: "${output_dir}"}
loss: {_component_: mdm_plugin.loss.MDMLoss}
device: cpu
estimators:
  Standard:
    timesteps: {_component_: mdm_plugin.timesteps.Uniform}
    masking: {_component_: mdm_plugin.masking.Bernoulli}
  P-POTS:
    timesteps: {_component_: mdm_plugin.timesteps.ParetoOptimal, grid: 5, rows: 4, masks: 2}
    masking: {_component_: mdm_plugin.masking.Bernoulli}
  Complement:
    timesteps: {_component_: mdm_plugin.timesteps.Stratified}
    masking: {_component_: mdm_plugin.masking.Complement}
batch_size: 8
batches: 8
batches_per_round: 4
"""


@pytest.fixture
def variance(command, data_dir, tmp_path):
    (tmp_path / "variance.yaml").write_text(VARIANCE)

    def run(*overrides, launch=(), out="v", **kwargs):
        paths = (f"data_dir={data_dir}", f"output_dir={tmp_path / out}")
        arguments = (*launch, "mdm_variance", "--config", "variance.yaml", *paths, *overrides)
        return command("tune", "run", *arguments, **kwargs)

    return run


def result(directory):
    return json.loads((directory / "variance.json").read_text())


def test_mdm_variance_writes_table_json_csv_and_figures(variance, tmp_path):
    shown = variance().stdout
    assert "equal forwards" in shown and "Complement" in shown
    found = result(tmp_path / "v")
    assert [e["name"] for e in found["estimators"]] == ["Standard", "P-POTS", "Complement"]
    for e in found["estimators"]:
        for kind in ("loss", "gradient"):
            parts = {k: v["value"] for k, v in e[kind].items()}
            assert parts["A"] + parts["B"] + parts["C"] == pytest.approx(parts["sum"])
            assert all(v["low"] <= v["value"] <= v["high"] for v in e[kind].values())
    rows, forwards = (
        found["estimators"][2]["gradient_ratio"][k]["value"]
        for k in ("equal_rows", "equal_forwards")
    )
    assert rows < 1 and forwards == pytest.approx(2 * rows)
    with (tmp_path / "v/variance.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3
    for name in ("variance_parts.png", "variance_compute.png", "timesteps_P_POTS.png"):
        assert (tmp_path / "v" / name).stat().st_size > 5000


def test_mdm_variance_on_two_ranks_is_that_of_one_and_projected_is_near(variance, tmp_path):
    variance(out="one")
    variance("batch_size=4", launch=TWO_RANKS, out="two")
    variance("projection=2000", out="folded")
    one, two, folded = (result(tmp_path / out) for out in ("one", "two", "folded"))
    for a, b, c in zip(*(x["estimators"] for x in (one, two, folded)), strict=True):
        for part in ("A", "total", "variance"):
            truth = a["gradient"][part]["value"]
            assert b["gradient"][part]["value"] == pytest.approx(truth, rel=1e-3)
            assert c["gradient"][part]["value"] == pytest.approx(truth, rel=0.25)


def test_mdm_variance_measures_an_objective_at_a_moment_of_training(variance, tmp_path):
    few = ("batches=4", "batches_per_round=2")
    runs = {
        "elbo": (),
        "end": (*WIDENING, "progress=1"),
        "start": WIDENING,
        "window": WINDOW,
    }
    found = {}
    for name, more in runs.items():
        variance(*few, *more, out=name)
        found[name] = [
            [{k: v["value"] for k, v in e[kind].items()} for kind in ("loss", "gradient")]
            for e in result(tmp_path / name)["estimators"]
        ]
    assert found["end"] == found["elbo"] and found["start"] == found["window"]
    for one, other in zip(found["window"], found["elbo"], strict=True):
        assert one[1]["variance"] < 0.7 * other[1]["variance"]  # no small t, which are the noisiest
    probed = json.loads((tmp_path / "window/timesteps_P_POTS.json").read_text())
    assert min(probed["t"]) > 0.5


def test_an_interrupted_measurement_reports_what_it_has(tmp_path, data_dir, command):
    (tmp_path / "variance.yaml").write_text(VARIANCE)
    script = f"""
import sys
import mdm_variance as recipe
measure_round = recipe.MDMVariance.measure_round
def interrupted(self, estimator, number, bar):
    if number == 1 and estimator.name == "P-POTS":
        raise KeyboardInterrupt
    measure_round(self, estimator, number, bar)
recipe.MDMVariance.measure_round = interrupted
sys.argv = ["x", "--config", "variance.yaml", "data_dir={data_dir}", "output_dir={tmp_path}/v"]
recipe.main()
"""
    import sys

    done = command(sys.executable, "-c", script)
    assert "interrupted: reporting" in done.stdout and "Complement" in done.stdout
    assert result(tmp_path / "v")["batches"] == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("estimators.P-POTS.masking=null",), "estimators.P-POTS"),
        (("estimators.P-POTS.timesteps.grids=5",), "estimators.P-POTS.timesteps.grids"),
        (("batches=2",), "batches_per_round"),
        (("dataset=null",), "dataset: missing: name the rows to measure on"),
        (("progress=1.5",), "progress: 1.5: use 0, the start of training, up to 1"),
        ((f"{OBJECTIVE}=mdm_plugin.timesteps.Uniform",), "objective: Uniform is no Objective"),
    ],
)
def test_mdm_variance_names_what_is_wrong(variance, overrides, words):
    done = variance(*overrides, check=False)
    assert done.returncode == 2
    assert words in done.stderr.strip().splitlines()[-1]
