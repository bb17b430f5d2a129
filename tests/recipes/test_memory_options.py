"""Optimizers within the backward pass, in few bits, float8, checks of what no shape shows."""

import json

import pytest
import torch

from tests.checkpoints import oracle, tensors, write
from tests.conftest import scalars
from tests.recipes.test_full_finetune import TWO_RANKS

IN_BACKWARD = ("optimizer_in_bwd=True", "clip_grad_norm=null")


def weights(tmp_path, out, step=20):
    return tensors(tmp_path / out / f"step_{step}")


def assert_equal(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name, x in a.items():
        torch.testing.assert_close(b[name], x, **tolerance)


def test_the_optimizer_within_the_backward_pass_is_the_same_run(tune, tmp_path):
    """P-POTS runs backward passes too, which must not step."""
    pareto = ("timesteps=mdm_plugin.timesteps.ParetoOptimal", "timesteps.target=gradient")
    pareto += ("timesteps.grid=5", "timesteps.rows=4", "timesteps.masks=4")
    tune("clip_grad_norm=null", *pareto, out="plain")
    tune(*IN_BACKWARD, *pareto, "save_every_n_steps=10", out="within")
    assert_equal(weights(tmp_path, "plain"), weights(tmp_path, "within"), rtol=0, atol=0)
    assert "train/grad_norm" not in scalars(tmp_path / "within")
    resume = f"resume_from_checkpoint={tmp_path / 'within/step_10'}"
    tune(*IN_BACKWARD, *pareto, resume, out="resumed")
    assert_equal(weights(tmp_path, "plain"), weights(tmp_path, "resumed"), rtol=0, atol=0)
    tune(*IN_BACKWARD, *pareto, "batch_size=4", launch=TWO_RANKS, out="two")
    assert_equal(weights(tmp_path, "plain"), weights(tmp_path, "two"), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_optimizers_in_few_bits_learn_and_resume(tune, tmp_path, optimizer):
    wide = ("model.embed_dim=64", "model.intermediate_dim=128", "optimizer.lr=3e-3")
    few = (f"optimizer=torchao.optim.{optimizer}", *wide)
    # torchao compiles its step; one of them is enough for that.
    plain = {"TORCH_COMPILE_DISABLE": "1"}
    if optimizer == "AdamW8bit":  # which rounds its weights at random
        few, plain = (*few, "dtype=bf16", "master_dtype=bf16"), {}
    tune(*few, "save_every_n_steps=10", out="whole", **plain)
    loss = scalars(tmp_path / "whole")["train/loss"]
    assert sum(loss[-5:]) < 0.8 * sum(loss[:5])
    tune(*few, f"resume_from_checkpoint={tmp_path / 'whole/step_10'}", out="resumed", **plain)
    assert_equal(weights(tmp_path, "whole"), weights(tmp_path, "resumed"), rtol=0, atol=0)


def test_an_autoregressive_model_gets_a_mask_token_and_keeps_it(tune, tmp_path, data_dir):
    """From a Llama checkpoint whose tokenizer has none, to an export that names it."""

    truth = oracle("llama", kv_heads=4, vocab_size=320, num_hidden_layers=2)
    write(truth, tmp_path / "base", "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (data_dir / name).read_text().replace("<|mdm_mask|>", "<|unused|>")
        (tmp_path / "base" / name).write_text(text)
    size = len(json.loads((data_dir / "tokenizer.json").read_text())["model"]["vocab"])
    model = {
        "_component_": "mdm_plugin.models.from_autoregressive",
        "builder": "torchtune.models.llama3.llama3",
        "vocab_size": 320,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 4,
        "embed_dim": 64,
        "intermediate_dim": 160,
        "max_seq_len": 96,
        "norm_eps": 1e-6,
        "rope_base": 1_000_000,
    }
    text = (tmp_path / "base/tokenizer.json").read_text()
    grown = max(0, _tokens(text) - 320 + 1)
    shape = [f"model.{k}={v}" for k, v in model.items()] + [f"model.new_tokens={grown}"]
    common = (
        *shape,
        f"checkpointer.checkpoint_dir={tmp_path / 'base'}",
        f"tokenizer.path={tmp_path / 'base'}",
        "tokenizer.add_mask_token=True",
        "tokenizer.mask_token=<|mask|>",
        "model.shift=True",
        "optimizer.lr=3e-3",
    )
    tune(*common, "save_every_n_steps=10", out="whole")
    loss = scalars(tmp_path / "whole")["train/loss"]
    assert sum(loss[-5:]) < 0.9 * sum(loss[:5])
    tune(*common, f"resume_from_checkpoint={tmp_path / 'whole/step_10'}", out="resumed")
    assert_equal(weights(tmp_path, "whole"), weights(tmp_path, "resumed"), rtol=0, atol=0)
    end = tmp_path / "whole/step_20"
    mask = json.loads((end / "config.json").read_text())["mask_token_id"]
    assert mask == _tokens(text) >= size
    saved = json.loads((end / "tokenizer.json").read_text())["added_tokens"]
    assert {"id": mask, "content": "<|mask|>"}.items() <= saved[-1].items()
    # The export is a place to start from, with no word on the mask token.
    again = [x for x in common if not x.startswith(("tokenizer.add", "tokenizer.mask", "checkp"))]
    again = [x.replace(str(tmp_path / "base"), str(end)) for x in again]
    again = [x for x in again if "new_tokens" not in x and "vocab_size" not in x]
    again += [f"model.vocab_size={320 + grown}", f"checkpointer.checkpoint_dir={end}"]
    tune(*again, "max_steps_per_epoch=1", out="again")


def _tokens(tokenizer_json: str) -> int:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(tokenizer_json).get_vocab_size(with_added_tokens=True)


WRONG = {
    "float8 without the hardware": (["enable_fp8_training=True"], "enable_fp8_training: cpu"),
    "steps within backward, clipped": (["optimizer_in_bwd=True"], "clip_grad_norm: null"),
    "steps within backward, accumulated": (
        [*IN_BACKWARD, "gradient_accumulation_steps=2", "batch_size=4"],
        "optimizer_in_bwd: a step has 2 micro-batches",
    ),
    "no text for the new mask token": (["tokenizer.add_mask_token=True"], "give its text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_together_is_refused(tune, case):
    overrides, expected = WRONG[case]
    done = tune(*overrides, check=False)
    assert done.returncode == 2
    assert expected in done.stderr.splitlines()[-1]


STATED = {
    "heads": ({"n_heads": 1, "n_kv_heads": 1}, "model.num_heads: 2, and "),
    "rotary base": ({"rope_theta": 10_000.0}, "model.rope_base: 500000.0, and "),
    "norm": ({"rms_norm_eps": 1e-6}, "model.norm_eps: 1e-05, and "),
    "mask token": ({"mask_token_id": 126_336}, "tokenizer.mask_token: its id is 1, and "),
}


@pytest.mark.parametrize("case", STATED)
def test_what_no_shape_shows_is_compared_with_config_json(tune, tmp_path, case):

    changes, expected = STATED[case]
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64}
    truth = oracle("llada", 2, num_attention_heads=2, num_hidden_layers=2, **sizes)
    write(truth, tmp_path / "base", "llada")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    done = tune(f"checkpointer.checkpoint_dir={tmp_path / 'base'}", check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: {expected}")


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_gpu_float8_learns_as_bf16_does(tune, tmp_path, recipe):
    wide = ("model.embed_dim=256", "model.intermediate_dim=512", "model.num_heads=4")
    cuda = (*wide, "device=cuda", "dtype=bf16", "compile=True")
    tune(*cuda, out="bf16")
    tune(*cuda, "enable_fp8_training=True", f"fp8_recipe_name={recipe}", out="fp8")
    found = [torch.tensor(scalars(tmp_path / x)["train/loss"]) for x in ("bf16", "fp8")]
    assert ((found[1] - found[0]).abs() / found[0]).max() < 0.1
