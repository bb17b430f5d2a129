"""`make gpu` on a CPU at tiny sizes: each part, its JSON, and the report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as command_line
from benchmarks.gpu import job, tables
from benchmarks.gpu.data import mixed, write_rows, write_tokenizer
from benchmarks.gpu.parts import Case, Given, parts
from mdm_plugin.data import chat_dataset, preference_dataset
from mdm_plugin.models import ChatTokenizer, dream, llada, lora_llada
from tests.conftest import TINY

ROOT = Path(__file__).parents[1]
SCRIPTS = ("training", "generation", "blocks")


@pytest.fixture
def given(command, tmp_path):
    """Where parts run, in processes of the fork server."""

    def run(words):
        where = ROOT / "benchmarks" if words[1] in SCRIPTS else ROOT
        return command(sys.executable, *words, cwd=where).stdout

    return Given(tmp_path, "cpu", True, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", parts(tiny=True))
def test_each_part_runs_tiny_on_a_cpu_and_ends_in_a_whole_json_and_a_table(name, given, tmp_path):
    assert command_line.measure_all([name], given, minutes=9) == 0
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert list(found["cases"]) == found["names"] and found["device"] == "CPU"
    for case, figures in found["cases"].items():
        refused = name == "float8" and case != "bf16"
        assert ("refused" in figures) == refused, figures
        if refused:
            assert figures["refused"].startswith("enable_fp8_training: cpu")
        numbers = [x for x in figures.values() if not isinstance(x, str)]
        assert refused or (numbers and all(0 <= x < float("inf") for x in numbers))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.report(tmp_path, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert f"### {name}" in text and all(case in text for case in found["cases"])


def test_what_is_there_is_not_measured_again_and_a_failed_case_is_tried_again(tmp_path):
    calls = []

    def case(name, *outcomes):
        left = iter(outcomes)

        def measure(_):
            calls.append(name)
            if (found := next(left)) is None:
                raise command_line.Failed("broken")
            return found

        return Case(name, measure)

    cases = [case("a", {"x": 1}), case("b", None, {"x": 2}), case("c", {"x": 3})]
    given = Given(tmp_path, "cpu", True, str)
    assert command_line.measure("part", cases, given, until=float("inf")) == 1
    assert command_line.measure("part", cases, given, until=0) == 75  # no time for b
    assert calls == ["a", "b", "c"]
    assert command_line.measure("part", cases, given, until=float("inf")) == 0
    assert calls == ["a", "b", "c", "b"]
    found = json.loads((tmp_path / "part.json").read_text())["cases"]
    assert found == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}}
    assert not list(tmp_path.glob("*.new"))
    with pytest.raises(command_line.Failed, match=r"part.json was measured with tiny True: use an"):
        command_line.measure("part", cases, given._replace(tiny=False), until=float("inf"))


def test_the_report_says_what_is_left_and_wants_its_marks(tmp_path):
    part = {"part": "speed", "device": "X", "torch": "2", "date": "2026-01-01", "tiny": False}
    part |= {"names": ["a", "b"], "cases": {"a": {"device": "X", "s": 1.23456}}}
    (tmp_path / "speed.json").write_text(json.dumps(part))
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="measured: begin"):
        tables.report(tmp_path, page)
    page.write_text(f"{tables.BEGIN}{tables.END}")
    tables.report(tmp_path, page)
    assert "| s | 1.23 |" in page.read_text() and "Not run yet: b." in page.read_text()


def test_rows_are_as_long_as_they_are_said_to_be(tmp_path):
    write_tokenizer(tmp_path, 100)
    write_rows(tmp_path, [64, 33], 100)
    tokenizer = ChatTokenizer(str(tmp_path))
    rows = chat_dataset(tokenizer, source=str(tmp_path / "rows.jsonl"))
    pairs = preference_dataset(tokenizer, source=str(tmp_path / "pairs.jsonl"))
    assert rows.lengths_of(torch.arange(2)).tolist() == [64, 33]
    assert pairs.lengths_of(torch.arange(4)).tolist() == [64, 64, 33, 33]
    lengths = mixed(64, 1024, 4096)
    assert max(lengths) <= 4096 and 700 < sum(lengths) / 64 < 1100 and len(set(lengths)) > 40


@pytest.mark.parametrize("frozen", [False, True])
def test_the_flops_of_a_step_are_those_that_torch_counts(frozen, data_dir, tmp_path):
    """FlopCounterMode on a real forward and backward pass, of plain attention's products."""
    from torch.utils.flop_counter import FlopCounterMode

    from mdm_plugin.training.step import forward_loss

    recipe = a_recipe(data_dir, tmp_path)
    batches = job.corrupted_step(recipe.batches, 0, recipe.estimator)
    shape = {"vocab_size": 320, "num_layers": 2, "num_heads": 2}
    shape |= {"embed_dim": 32, "max_seq_len": 96}
    torch.manual_seed(0)
    if frozen:
        model = lora_llada(["q_proj"], **shape, intermediate_dim=64, lora_rank=4, lora_alpha=8)
        for name, p in model.named_parameters():
            p.requires_grad_("lora" in name)
    else:
        model = llada(**shape, intermediate_dim=64)
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counted,
    ):
        for batch in batches:
            forward_loss(model, recipe.estimator.loss, batch)[0].backward()
    # Gradients of a frozen model end at its first adapter, which is one layer of two here.
    near = 0.2 if frozen else 1e-9
    assert counted.get_total_flops() == pytest.approx(job.flops(model, batches), rel=near)


def a_recipe(data_dir, tmp_path):
    """The tests' recipe on a CPU, set up."""
    import mdm_full_finetune

    from mdm_plugin.config.loading import load_config
    from mdm_plugin.config.options import Options
    from mdm_plugin.distributed.world import World

    given = [f"data_dir={data_dir}", f"output_dir={tmp_path}"]
    cfg = load_config(str(TINY), given, Options)
    recipe = mdm_full_finetune.MDMFinetune(cfg, World(0, 1, torch.device("cpu"), None))
    recipe.setup()
    return recipe


@pytest.mark.parametrize("build", [llada, dream])
def test_weights_drawn_on_the_device_are_of_the_scale_that_others_begin_with(build):
    heads = {} if build is llada else {"num_kv_heads": 2}
    model = build(64, 2, 2, embed_dim=32, max_seq_len=8, intermediate_dim=64, **heads)
    torch.manual_seed(0)
    job.draw_weights(model, torch.device("cpu"))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert (p == 1).all(), name
        else:
            assert p.detach().std() * p.shape[-1] ** 0.5 == pytest.approx(1, abs=0.1), name


def test_make_gpu_passes_its_part_on():
    words = ["make", "--dry-run", "gpu", "PART=speed"]
    shown = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "-m benchmarks.gpu speed " in shown and "benchmarks.gpu report" in shown
