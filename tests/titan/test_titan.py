"""torchtitan's Trainer with our parts: the recipe's steps, any parallelism, checkpoints across."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints import oracle, write
from tests.conftest import BIN, scalars
from tests.forks import free_port

pytest.importorskip("torchtitan")

METHODS = {
    "Standard": ("Uniform", "Bernoulli"),
    "MIRROR": ("Stratified", "Mirror"),
    "P-POTS": ("ParetoOptimal", "Bernoulli"),
    "FixedCount": ("Stratified", "FixedCount"),
}
# Of a step by counts; Widening is at (0.5, 1), (0.25, 1) and (0, 1) in three steps.
OBJECTIVES = {"Window": {"low": 0.3, "high": 0.8}, "Widening": {"low": 0.5, "high": 1.0}}
PROBE = {"grid": 4, "rows": 4, "masks": 2}


@pytest.fixture(scope="session")
def home(data_dir, tmp_path_factory):
    """MDM_PLUGIN_HOME with the quickstart's data, and checkpoints of both families; and one in the
    second's layout of a model that writes block by block."""
    place = tmp_path_factory.mktemp("home")
    (place / "quickstart").symlink_to(data_dir)
    sizes = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 256}
    for family, kv_heads in (("llada", 4), ("Dream", 2), ("Fast_dLLM_Qwen", 2)):
        model = oracle(family, kv_heads, num_hidden_layers=3, num_attention_heads=4, **sizes)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
        write(model, place / family, family)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(data_dir / file, place / family)
    return place


@pytest.fixture
def titan(torchtitan, home, data_dir, tmp_path):
    """Runs of torchtitan on some ranks: {name: {rank: what it wrote}}."""

    some = (data_dir / "val.jsonl").read_text().splitlines(keepends=True)[:16]
    (tmp_path / "some.jsonl").write_text("".join(some))

    def run(ranks, runs):
        spec = []
        for name, given in runs.items():
            family = given.pop("family", "llada")
            arguments = [
                *("--hf_assets_path", str(home / family), "--checkpoint.initial_load_in_hf"),
                *("--dataloader.dataset_path", str(data_dir / "val.jsonl")),
                *("--validator.dataset_path", str(tmp_path / "some.jsonl")),
                *("--dataloader.seed", "7", "--training.seq_len", "64"),
                *("--training.local_batch_size", "8", "--training.global_batch_size", "8"),
                *("--training.steps", "3", "--metrics.log_freq", "1", "--validator.freq", "3"),
                *given.pop("arguments", ()),
            ]
            spec.append(
                {
                    "config": "llada_debugmodel_sft",
                    **given,
                    "arguments": arguments,
                    "out": str(tmp_path / name),
                    "port": free_port(),
                }
            )
        (tmp_path / "spec.json").write_text(json.dumps(spec))
        torchtitan(ranks, "tests.titan.runs", tmp_path / "spec.json", home=home)
        return {
            name: [
                json.loads((tmp_path / name / f"rank_{r}.json").read_text()) for r in range(ranks)
            ]
            for name in runs
        }

    return run


def method(timesteps, masking, **given):
    given = PROBE if timesteps == "ParetoOptimal" else given
    arguments = f"={json.dumps(given)}" if given else ""
    return [
        *("--dataloader.timesteps", f"mdm_plugin.timesteps.{timesteps}{arguments}"),
        *("--dataloader.masking", f"mdm_plugin.masking.{masking}"),
        "--validator.no-enable",
    ]


def steps(found, rank=0):
    assert "error" not in found[rank], found[rank]
    return torch.tensor(found[rank]["steps"])


def assert_close(a, b, near=1e-5):
    assert a.shape == b.shape == (3, 2)
    assert ((a - b).abs() / b.abs()).max() < near, (a, b)


def test_a_step_is_the_recipes(titan, tune, home, tmp_path):
    """Same weights, rows and seed: loss and gradient norm of three steps. In bf16, of fp32 masters
    and summed in fp32, to what bf16 keeps of them."""
    runs = {name: {"lr": 0.0, "arguments": method(*parts)} for name, parts in METHODS.items()}
    runs["Dream"] = {
        **{"module": "mdm_plugin.titan.dream", "config": "dream_debugmodel", "family": "Dream"},
        **{"lr": 0.0, "arguments": method("Stratified", "Bernoulli")},
    }
    for name, values in OBJECTIVES.items():
        objective = f"mdm_plugin.objectives.{name}={json.dumps(values)}"
        more = [*method("Stratified", "FixedCount"), "--dataloader.objective", objective]
        runs[name] = {"lr": 0.0, "arguments": more}
    half = ["--training.mixed_precision_param", "bfloat16"]
    runs["bf16"] = {"lr": 0.0, "arguments": [*method("Stratified", "Bernoulli"), *half]}
    found = titan(1, runs)
    for name in runs:
        plain = "FixedCount" if name in OBJECTIVES else "Bernoulli"
        timesteps, masking = METHODS.get(name, ("Stratified", plain))
        family = "Dream" if name == "Dream" else "llada"
        more = [f"timesteps.{k}={v}" for k, v in PROBE.items()] if name == "P-POTS" else []
        if name in OBJECTIVES:
            more += [f"objective._component_=mdm_plugin.objectives.{name}"]
            more += [f"objective.{k}={v}" for k, v in OBJECTIVES[name].items()]
        if name == "bf16":
            more += ["dtype=bf16"]
        if name == "Dream":
            more += ["model._component_=mdm_plugin.models.dream", "model.num_kv_heads=2"]
        tune(
            f"checkpointer.checkpoint_dir={home / family}",
            *("model.num_layers=3", "model.num_heads=4", "model.embed_dim=64"),
            *("model.intermediate_dim=256", "max_steps_per_epoch=3", "optimizer.lr=0"),
            f"timesteps._component_=mdm_plugin.timesteps.{timesteps}",
            f"masking._component_=mdm_plugin.masking.{masking}",
            *more,
            out=f"recipe_{name}",
        )
        curves = scalars(tmp_path / f"recipe_{name}")
        recipe = torch.tensor([curves["train/loss"], curves["train/grad_norm"]]).T
        assert_close(steps(found[name]), recipe, 2e-3 if name == "bf16" else 1e-5)
        logged = found[name][0]["logged"]
        for tag in ("train/masked_fraction", "train/importance_weight_max"):
            assert logged[tag] == pytest.approx(curves[tag], rel=1e-6)
    # An objective that ends at the bound is it there, and before it is not.
    moving, bound = steps(found["Widening"]), steps(found["FixedCount"])
    assert torch.equal(moving[2], bound[2])
    assert ((moving - bound).abs() > 1e-3).all(1)[:2].all()


def test_two_ranks_of_each_kind_are_one_rank(titan):
    """FSDP2, tensor parallel with the vocabulary split, and a pipeline, with training between."""
    pareto = method("ParetoOptimal", "FixedCount")[:-1]  # with validation
    mirror = method("Uniform", "Mirror")
    learning = method("Adaptive", "FixedCount", bins=2, warmup_rows=1)
    stream = method("ParetoStream", "FixedCount", grid=4, rows=4, masks=2, bins=4, decay=0.5)
    one = titan(
        1,
        {
            "one": {"arguments": pareto},
            "one_mirror": {"arguments": mirror},
            "one_learning": {"arguments": learning},
            "one_stream": {"arguments": stream},
        },
    )
    pipeline = [
        *("--parallelism.pipeline_parallel_degree", "2"),
        *("--parallelism.pipeline_parallel_microbatch_size", "2"),
    ]
    split = ["--parallelism.tensor_parallel_degree", "2"]
    two = titan(
        2,
        {
            "fsdp": {"arguments": [*pareto, "--training.local_batch_size", "4"]},
            "fsdp_learning": {"arguments": [*learning, "--training.local_batch_size", "2"]},
            "fsdp_stream": {"arguments": [*stream, "--training.local_batch_size", "2"]},
            "tensor_stream": {"arguments": [*stream, *split]},
            "tensor": {"arguments": [*pareto, *split]},
            "tensor_mirror": {"arguments": [*mirror, *split]},
            "pipeline_mirror": {"arguments": [*mirror, *pipeline]},
            "compiled": {
                "arguments": [
                    *mirror,
                    *("--training.local_batch_size", "2", "--compile.enable"),
                    *("--compile.components", "model,loss"),
                ]
            },
        },
    )
    nelbo = one["one"][0]["logged"]["val/nelbo_nats_per_token"]
    assert len(nelbo) == 2  # after the first step and the third
    for name in ("fsdp", "tensor"):
        assert_close(steps(two[name]), steps(one["one"]))
        assert two[name][0]["logged"]["val/nelbo_nats_per_token"] == pytest.approx(nelbo, rel=1e-5)
    key = "train/importance_weight_max"
    weights = one["one_stream"][0]["logged"][key]
    assert len({round(x, 4) for x in weights}) == 3  # it follows, from the first step on
    for name in ("fsdp_stream", "tensor_stream"):
        assert two[name][0]["logged"][key] == pytest.approx(weights)
        assert_close(steps(two[name]), steps(one["one_stream"]))
    weights = one["one_learning"][0]["logged"][key]
    assert (
        weights[0] == pytest.approx(1) and weights[2] > 1.0003
    )  # it has learnt, from all ranks' losses
    assert two["fsdp_learning"][0]["logged"][key] == pytest.approx(weights)
    assert_close(steps(two["fsdp_learning"]), steps(one["one_learning"]))
    assert_close(steps(two["tensor_mirror"]), steps(one["one_mirror"]))
    assert_close(steps(two["compiled"]), steps(one["one_mirror"]))
    # The last stage has the loss; all have the gradient's norm.
    assert_close(steps(two["pipeline_mirror"], rank=1), steps(one["one_mirror"]))


def test_float8_layers_train_beside_fp32_ones(titan):
    """torchtitan's converter, emulated where the hardware has no float8."""
    count = method("Stratified", "FixedCount")
    found = titan(1, {"fp32": {"arguments": count}, "float8": {"arguments": count, "float8": True}})
    fp32, float8 = steps(found["fp32"]), steps(found["float8"])
    assert not torch.equal(fp32, float8)
    assert ((fp32 - float8).abs() / fp32).max() < 0.05


def test_hybrid_sharding_on_four_ranks_is_one_rank(titan):
    count = method("Stratified", "FixedCount")
    one = titan(1, {"one": {"arguments": count}})
    hybrid = [
        *("--parallelism.data_parallel_replicate_degree", "2"),
        *("--parallelism.data_parallel_shard_degree", "2", "--training.local_batch_size", "2"),
    ]
    four = titan(4, {"hybrid": {"arguments": [*count, *hybrid]}})
    assert_close(steps(four["hybrid"]), steps(one["one"]))


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_checkpoints_cross_over_bit_equal(titan, tune, home, tmp_path, family):
    """Hugging Face files → torchtitan → Hugging Face files → the recipe → Hugging Face files."""
    save = ["--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only"]
    module = {"module": "mdm_plugin.titan.dream", "config": "dream_debugmodel"}
    run = {
        **(module if family == "Dream" else {}),
        **{"family": family, "lr": 0.0, "arguments": [*method("Uniform", "Bernoulli"), *save]},
    }
    steps(titan(1, {"crossing": run})["crossing"])
    (saved,) = (tmp_path / "crossing" / "checkpoint").glob("step-3")
    expected = read(home / family)
    assert_equal(read(saved), expected)

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(home / family / file, saved)
    dream = ("model._component_=mdm_plugin.models.dream", "model.num_kv_heads=2")
    tune(
        f"checkpointer.checkpoint_dir={saved}",
        *("model.num_layers=3", "model.num_heads=4", "model.embed_dim=64"),
        *("model.intermediate_dim=256", "max_steps_per_epoch=1", "optimizer.lr=0"),
        *(dream if family == "Dream" else ()),
    )
    assert_equal(read(tmp_path / "out" / "step_1"), expected)


def read(directory):
    return {k: v for f in directory.rglob("*.safetensors") for k, v in load_file(f).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def losses(printed):
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    return {int(s): float(x) for s, x in re.findall(r"step: +(\d+) +loss: +([\d.]+)", text)}


def test_torchtitans_own_command_trains_and_resumes(torchtitan, home, tmp_path):
    """50 steps on text by two ranks; a half of them again, by one rank, from the checkpoint."""
    arguments = (
        *("torchtitan.train", "--module", "mdm_plugin.titan.llada"),
        *("--config", "llada_debugmodel", "--dump_folder", tmp_path / "run"),
        *("--checkpoint.async_mode", "async"),
    )
    whole = losses(torchtitan(2, *arguments, home=home))
    assert max(whole) == 50 and whole[50] < 0.7 * whole[1]
    shutil.rmtree(tmp_path / "run" / "checkpoint" / "step-50")
    again = losses(torchtitan(1, *arguments, home=home))
    assert min(again) > 25 and max(again) == 50
    for step, loss in again.items():
        assert loss == pytest.approx(whole[step], rel=1e-5, abs=2e-5)


def test_pareto_density_is_restored_with_a_checkpoint(titan, tmp_path):
    """Steps 2 and 3 after a resume are those of the whole run, without a new probe; what moves the
    objective must be as it was."""
    key = "--dataloader.objective"
    pareto = [*method("ParetoOptimal", "Bernoulli"), "--checkpoint.interval", "2"]
    pareto += [key, "mdm_plugin.objectives.Widening"]
    whole = titan(1, {"pareto": {"arguments": pareto}})
    shutil.rmtree(tmp_path / "pareto" / "checkpoint" / "step-3")
    (tmp_path / "pareto" / "timesteps_step_0.json").unlink()
    for name in ("another", "longer"):
        shutil.copytree(tmp_path / "pareto", tmp_path / name)
    resumed = titan(
        1,
        {
            "pareto": {"arguments": pareto},
            "another": {"arguments": [*pareto[:-1], "mdm_plugin.objectives.ELBO"]},
            "longer": {"arguments": [*pareto, "--training.steps", "5"]},
        },
    )
    assert "was trained with mdm_plugin.objectives.Widening" in resumed["another"][0]["error"]
    assert "was to have 3, by which the objective moves" in resumed["longer"][0]["error"]
    assert torch.equal(steps(resumed["pareto"]), steps(whole["pareto"])[2:])
    assert not list((tmp_path / "pareto").glob("timesteps_step_*.json"))


REFUSED = {
    "torchao newer than 0.15": {"config": "llada_8b_mxfp8"},
    "config.json says bd_size 8: the model writes block by block": {"family": "Fast_dLLM_Qwen"},
    "context_parallel_degree": ["--parallelism.context_parallel_degree", "2"],
    "expert_parallel_degree": ["--parallelism.expert_parallel_degree", "2"],
    "spmd_backend": ["--parallelism.spmd_backend", "full_dtensor"],
    "disable_cuda_graphs": ["--training.no-disable_cuda_graphs"],
    "validator.enable": ["--parallelism.pipeline_parallel_degree", "2"],
    "dataloader.timesteps": [
        *("--validator.no-enable", "--parallelism.pipeline_parallel_degree", "2"),
    ],
    "the losses to learn from": [
        *("--validator.no-enable", "--parallelism.pipeline_parallel_degree", "2"),
        *("--dataloader.timesteps", "mdm_plugin.timesteps.Adaptive"),
    ],
    "would count each t": [
        *("--dataloader.timesteps", "mdm_plugin.timesteps.Adaptive", "--loss.normalize", "masked"),
    ],
    "is no Objective": ["--dataloader.objective", "torch.nn.Identity"],
    "low and high 0.8 and 0.3": [
        *("--dataloader.objective", 'mdm_plugin.objectives.Window={"low": 0.8, "high": 0.3}'),
    ],
    "is no TimestepSampler": ["--dataloader.timesteps", "torch.nn.Identity"],
    "is no Masking": ["--dataloader.masking", "torch.nn.Identity"],
    "no attribute 'Miror'": ["--dataloader.masking", "mdm_plugin.masking.Miror"],
    "dataloader.dataset_path": ["--dataloader.dataset_path", ""],
    "does not exist": ["--dataloader.dataset_path", "nowhere.jsonl"],
    "max_seq_len": ["--training.seq_len", "16"],
}


def test_what_does_not_work_is_refused_at_the_start(titan):
    runs = [x if isinstance(x, dict) else {"arguments": x} for x in REFUSED.values()]
    found = titan(1, {str(i): dict(run) for i, run in enumerate(runs)})
    for (reason, _), (ended,) in zip(REFUSED.items(), found.values(), strict=True):
        assert reason in " ".join(ended["error"].split()), (reason, ended)


def test_without_torchtitan_it_says_what_to_install(command):
    code = (
        "import sys; sys.modules['torchtitan'] = None\n"
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'torchtitan' else find(name, *a)\n"
        "import mdm_plugin.titan"
    )
    done = command(BIN / "python", "-c", code, check=False)
    assert done.returncode == 1 and "pip install 'mdm-plugin[titan]'" in done.stderr


@pytest.mark.gpu
def test_flex_attention_and_compilation_on_a_gpu(titan):
    found = titan(1, {"gpu": {"arguments": ["--compile.enable", "--training.steps", "3"]}})
    assert steps(found["gpu"])[:, 0].isfinite().all()
