"""The recipe as users run it: the same run for any number of ranks, across kills, compiled."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forks
from tests.conftest import TINY, scalars
from tests.forked import Forked

TWO_RANKS = ("--nproc_per_node", "2")


def curves(tmp_path, out):
    """Loss and grad norm of each step."""
    found = scalars(tmp_path / out)
    return torch.tensor([found["train/loss"], found["train/grad_norm"]])


def assert_same(a, b, tolerance):
    assert a.shape == b.shape == (2, 20)
    assert ((a - b).abs() / b.abs()).max() < tolerance


@pytest.mark.parametrize("normalize", ["response", "tokens", "masked"])
def test_one_rank_two_ranks_and_accumulation_are_the_same_run(tune, tmp_path, normalize):
    common = (f"loss.normalize={normalize}", "masking=mdm_plugin.masking.Mirror")
    tune(*common, "batch_size=8", out="one")
    tune(*common, "batch_size=4", "gradient_accumulation_steps=2", out="accumulated")
    tune(*common, "batch_size=4", "train_eos_padding=True", launch=TWO_RANKS, out="two")
    one = curves(tmp_path, "one")
    assert_same(curves(tmp_path, "accumulated"), one, 1e-5)
    assert_same(curves(tmp_path, "two"), one, 1e-5)
    # The weights too, in files that one rank and two ranks wrote alike.
    weights = [load_file(tmp_path / out / "step_20/model.safetensors") for out in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=1e-5)


def test_a_run_begins_with_a_line_of_what_it_is(tune):
    said = tune("max_steps_per_epoch=1", "masking=mdm_plugin.masking.Mirror").stdout.splitlines()
    line = (
        "1 rank on cpu; fp32; timesteps Stratified, masking Mirror, objective ELBO; optimizer AdamW"
    )
    assert said.index(line) < next(i for i, x in enumerate(said) if x.startswith("dataset: "))
    assert sum("cpu" in x for x in said) == 1  # said once
    assert any(x.endswith(" steps of 8 rows, 1 per epoch") and " parameters; 1" in x for x in said)


def test_every_option_of_memory_and_layout_is_the_same_run(tune, tmp_path):
    """Padding that is ignored; HSDP, activation checkpointing, weights kept gathered."""
    common = ("train_eos_padding=False", "loss.normalize=tokens")
    tune(*common, "global_batch_size=8", "batch_size=2", out="plain")
    tune(
        *common,
        "batch_size=4",
        "data_parallel_replicate_dim=2",
        "data_parallel_shard_dim=1",
        "enable_activation_checkpointing=True",
        "fsdp_reshard_after_forward=False",
        launch=TWO_RANKS,
        out="hsdp",
    )
    assert_same(curves(tmp_path, "hsdp"), curves(tmp_path, "plain"), 1e-5)


def test_a_launch_on_two_nodes_is_the_same_run(tune, tmp_path, data_dir):
    """Two agents of torchrun on this machine that meet by c10d rendezvous."""
    tune("batch_size=8", out="one")
    # fmt: off
    launch = [
        str(forks.PYTHON), "tune", "run", "--nnodes", "2", "--nproc_per_node", "1",
        "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{forks.free_port()}",
        "--rdzv_id", "tiny", "--local_addr", "127.0.0.1",
        "mdm_full_finetune", "--config", str(TINY), f"data_dir={data_dir}",
        f"output_dir={tmp_path / 'nodes'}", "batch_size=4",
    ]
    # fmt: on
    env = {"OMP_NUM_THREADS": "1", **os.environ, **forks.RECIPES.environment()}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    nodes = [subprocess.Popen(launch, cwd=tmp_path, env=env, **pipes) for _ in range(2)]
    outputs = [node.communicate(timeout=240)[0].decode() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    assert sum("984" in o or "2 ranks on cpu" in o for o in outputs) == 1  # rank 0 speaks
    assert_same(curves(tmp_path, "nodes"), curves(tmp_path, "one"), 1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_compiled_is_the_same_run_without_recompilation(layout, tmp_path, data_dir, command, tune):
    varying = ("batch_size=2", "train_eos_padding=False", f"batch_layout={layout}")
    tune(*varying, out="eager")
    script = f"""
import sys, torch
from torch._dynamo.utils import counters
import mdm_full_finetune as recipe
graphs = []
train_step = recipe.MDMFinetune.train_step
def counted(self, step):
    train_step(self, step)
    lengths.append(self.batches.micro_batches(step)[0].tokens.shape[1])
    graphs.append(counters["stats"]["unique_graphs"])
lengths = []
recipe.MDMFinetune.train_step = counted
sys.argv = ["x", "--config", {str(TINY)!r}, "data_dir={data_dir}",
            "output_dir={tmp_path / "compiled"}", "compile=True", *{varying}]
recipe.main()
print("GRAPHS", graphs, "BREAKS", sum(counters["graph_break"].values()), "LENGTHS", set(lengths))
assert len(set(lengths)) >= 3, lengths  # the batches' lengths do vary
assert graphs[2] > 0 and graphs[2] == graphs[-1], graphs
# Rows of a packed sequence attend one by one, outside the graphs.
assert {layout!r} == "packed" or not counters["graph_break"], counters["graph_break"]
"""
    command(sys.executable, "-c", script)
    assert_same(curves(tmp_path, "compiled"), curves(tmp_path, "eager"), 1e-4)


def test_every_layout_is_the_same_run(tmp_path, tune):
    same = ("batch_size=4", "gradient_accumulation_steps=4", "train_eos_padding=False")
    for layout in ("padded", "grouped", "packed"):
        tune(*same, f"batch_layout={layout}", "max_steps_per_epoch=10", "epochs=2", out=layout)
    for layout in ("grouped", "packed"):
        assert_same(curves(tmp_path, layout), curves(tmp_path, "padded"), 1e-5)


def kill_at(step: int, arguments: list[str], cwd: Path, log: Path) -> None:
    """Start a run and kill -9 it once its log shows the step."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    with log.open("w") as out:
        streams = (0, out.fileno(), out.fileno())
        run = Forked(forks.RECIPES.socket, arguments, str(cwd), env, streams)
        deadline = time.monotonic() + 120
        while f"AT STEP {step}\n" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        run.signal(signal.SIGKILL)
        assert run.exit_code() == -signal.SIGKILL


# Prints each step, slowly enough to be killed at one.
ANNOUNCED = """
import sys, time
import mdm_full_finetune as recipe
train_step = recipe.MDMFinetune.train_step
def announced(self, step):
    train_step(self, step)
    print("AT STEP", step + 1, flush=True)
    time.sleep(0.05)
recipe.MDMFinetune.train_step = announced
recipe.main()
"""


def test_a_killed_run_resumes_to_bit_equal_parameters(tune, tmp_path, data_dir):
    common = ["save_every_n_steps=5", "masking=mdm_plugin.masking.Mirror"]
    tune(*common, out="whole")
    arguments = [
        *(sys.executable, "-c", ANNOUNCED, "--config", str(TINY)),
        *(f"data_dir={data_dir}", f"output_dir={tmp_path / 'killed'}", *common),
    ]
    kill_at(12, arguments, tmp_path, tmp_path / "log")
    assert sorted(d.name for d in (tmp_path / "killed").glob("step_*")) == ["step_10", "step_5"]
    tune(*common, out="killed")  # the same command line
    whole, killed = (tmp_path / out / "step_20" for out in ("whole", "killed"))
    for name, weight in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(killed / "model.safetensors")[name], weight), name
    assert json.loads((whole / "state.json").read_text()) == json.loads(
        (killed / "state.json").read_text()
    )


def test_two_ranks_resume_to_the_run_that_would_have_been(tune, tmp_path):
    common = ("batch_size=4", "save_every_n_steps=10")
    tune(*common, launch=TWO_RANKS, out="whole")
    (tmp_path / "part").mkdir()
    os.rename(tmp_path / "whole/step_10", tmp_path / "part/step_10")
    tune(*common, launch=TWO_RANKS, out="part")
    weights = [load_file(tmp_path / out / "step_20/model.safetensors") for out in ("whole", "part")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_half_written_checkpoint_is_not_resumed_from(tune, tmp_path):
    tune("save_every_n_steps=10")
    half = tmp_path / "out/.staging_step_30"
    half.mkdir()
    (half / "state.json").write_text("{")
    done = tune("resume_from_checkpoint=True", "epochs=2", "max_steps_per_epoch=20")
    assert "resuming from" in done.stdout and "step_20, step 20 of 40" in done.stdout


def test_keep_last_n_and_the_same_command_again(tune, tmp_path):
    tune("save_every_n_steps=4", "keep_last_n=2")
    names = ["step_16", "step_20"]
    assert sorted(d.name for d in (tmp_path / "out").glob("step_*")) == names
    done = tune("save_every_n_steps=4", "keep_last_n=2")
    assert "step_20, step 20 of 20" in done.stdout and "the run is complete" in done.stdout
    done = tune("max_steps_per_epoch=2", check=False)
    assert done.returncode == 2 and "max_steps_per_epoch is 20 there, and 2" in done.stderr
    assert sorted(d.name for d in (tmp_path / "out").glob("step_*")) == names


def test_weights_of_a_checkpoint_start_a_new_run(tune, tmp_path):
    """checkpoint_dir loads them exactly: at lr 0 they come out again, on one rank and on two."""
    tune(out="first")
    first = load_file(tmp_path / "first/step_20/model.safetensors")
    start = f"checkpointer.checkpoint_dir={tmp_path / 'first/step_20'}"
    still = ("max_steps_per_epoch=1", "optimizer.lr=0", "optimizer.weight_decay=0", "batch_size=4")
    tune(start, *still, out="one")
    tune(start, *still, launch=TWO_RANKS, out="two")
    for out in ("one", "two"):
        again = load_file(tmp_path / out / "step_1/model.safetensors")
        assert all(torch.equal(again[name], first[name]) for name in first)


def even_length():
    return lambda text, row: len(text) % 2 == 0


def test_training_learns_and_shows_it(tune, tmp_path, data_dir):
    done = tune(
        "+dataset_val._component_=mdm_plugin.data.chat_dataset"[1:],
        f"dataset_val.source={data_dir}/val.jsonl",
        "run_val_every_n_steps=10",
        "val_draws=2",
        "sample_rows=2",
        "sample_new_tokens=8",
        "optimizer.lr=1e-2",
        f"questions={data_dir}/val.jsonl",
        "max_questions=6",
        "verifier._component_=tests.recipes.test_full_finetune.even_length",
    )
    lines = [line for line in done.stdout.splitlines() if "val/nelbo" in line]
    assert [line.split(":")[0] for line in lines] == ["step 0/20", "step 10/20", "step 20/20"]
    found = scalars(tmp_path / "out")
    assert len(found["val/exact_match"]) == 3
    assert all((6 * x) % 1 == pytest.approx(0, abs=1e-5) for x in found["val/exact_match"])
    nats = found["val/nelbo_nats_per_token"]
    assert nats[-1] < nats[0] - 0.5
    assert len(found["train/loss"]) == 20
    assert found["train/lr"][:4] == pytest.approx([0, 0.005, 0.01, 0.01 * 17 / 18])
    assert found["train/importance_weight_mean"] == [1.0] * 20
    assert all(0 < x < 1 for x in found["train/masked_fraction"])
    assert {f"train_loss_by_t/{i / 10:.1f}-{(i + 1) / 10:.1f}" for i in range(10)} <= set(found)
    for tag in ("speed/tokens_per_second", "speed/masked_tokens_per_second"):
        assert min(found[tag]) > 0
    assert found["memory/peak_resident_gib"][-1] > 0.1
    content = b"".join(f.read_bytes() for f in (tmp_path / "out").rglob("events*"))
    assert b"mdm_plugin.timesteps.Stratified" in content  # the config
    assert b"**reference**" in content  # the samples


def test_bf16_follows_fp32_s_run(tune, tmp_path):
    """Each step's loss to bf16's precision, the gradient's norm nearly so; and it learns. What is
    trained is fp32, on one rank and on two, which are the same run."""
    common = ("optimizer.lr=1e-2",)
    tune(*common, out="fp32")
    tune(*common, "dtype=bf16", out="bf16")
    tune(*common, "dtype=bf16", "batch_size=4", launch=TWO_RANKS, out="two")
    tune(*common, "dtype=bf16", *PLAIN_BF16, out="plain")
    full = scalars(tmp_path / "fp32")
    for out in ("bf16", "two", "plain"):
        half = scalars(tmp_path / out)
        for name, near in (("train/loss", 0.02), ("train/grad_norm", 0.1)):
            a, b = (torch.tensor(x[name]) for x in (half, full))
            assert ((a - b).abs() / b).max() < near, (out, name)
            assert (a != b).any()
        assert sum(half["train/loss"][-5:]) < 0.9 * sum(half["train/loss"][:5])
        stored = load_file(tmp_path / out / "step_20/model.safetensors")
        kept = torch.bfloat16 if out == "plain" else torch.float32
        assert {x.dtype for x in stored.values()} == {kept}
    one, two = (load_file(tmp_path / out / "step_20/model.safetensors") for out in ("bf16", "two"))
    for name, x in one.items():
        torch.testing.assert_close(two[name], x, rtol=0.05, atol=5e-3)


PLAIN_BF16 = ("master_dtype=bf16", "stochastic_rounding=False")


def test_mixed_precision_resumes_to_the_same_bits_on_any_number_of_ranks(tune, tmp_path):
    common = ("dtype=bf16", "save_every_n_steps=10", "ema._component_=mdm_plugin.training.EMA")
    common += ("model.attn_dropout=0.1",)  # whose draws are no matter of history either
    for ranks, rows in ((1, 8), (2, 4)):
        launch, given = ("--nproc_per_node", ranks) if ranks > 1 else (), f"batch_size={rows}"
        tune(*common, given, launch=launch, out=f"whole{ranks}")
        part = tmp_path / f"part{ranks}"
        part.mkdir()
        os.rename(tmp_path / f"whole{ranks}/step_10", part / "step_10")
        done = tune(*common, given, launch=launch, out=f"part{ranks}")
        assert "resuming from" in done.stdout
        for place in ("", "ema/"):
            a, b = (
                load_file(tmp_path / f"{x}{ranks}/step_20/{place}model.safetensors")
                for x in ("whole", "part")
            )
            assert all(torch.equal(a[name], b[name]) for name in a)
            assert {x.dtype for x in a.values()} == {torch.float32}


def test_another_logger_gets_the_figures(tune, tmp_path):
    tune("max_steps_per_epoch=2", "metric_logger=torchtune.training.metric_logging.DiskLogger")
    text = "".join(f.read_text() for f in (tmp_path / "out").rglob("log*.txt"))
    assert text.count("train/loss:") == 2


@pytest.mark.gpu
def test_gpu_runs_compiled_bf16_with_offloading(tune, tmp_path):
    tune(
        "device=cuda",
        "dtype=bf16",
        "compile=True",
        "enable_activation_checkpointing=True",
        "enable_activation_offloading=True",
    )
    assert torch.isfinite(curves(tmp_path, "out")).all()


@pytest.mark.gpu
def test_gpu_is_the_cpu_s_run(tune, tmp_path):
    tune(out="cpu")
    tune("device=cuda", out="gpu")
    assert_same(curves(tmp_path, "gpu"), curves(tmp_path, "cpu"), 1e-3)
