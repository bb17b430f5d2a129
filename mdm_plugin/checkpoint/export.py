"""A checkpoint as a Hugging Face directory, by one command.

    python -m mdm_plugin.checkpoint.export runs/step_1000 exported
    python -m mdm_plugin.checkpoint.export runs/step_1000 exported --average --family llama

What was trained from a Hugging Face checkpoint is one already, and its files are copied. Of a run
from random weights the tensors are renamed, and a config.json is made from the model. Every file is
first compared with the checkpoint's manifest.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from mdm_plugin.checkpoint.files import WEIGHTS, hf_name
from mdm_plugin.checkpoint.manifest import MANIFEST, verify
from mdm_plugin.checkpoint.parts import AVERAGE
from mdm_plugin.config.components import instantiate
from mdm_plugin.errors import UserError
from mdm_plugin.models.naming import FAMILIES

_OWN = {MANIFEST, "state.json", "config.yaml", AVERAGE, "optimizer"}


def export(step: Path, out: Path, family: str = "llada", average: bool = False) -> None:
    """Write the weights of ``step`` (``step_N``), or their average, into the new directory ``out``.

    Args:
        family: whose names and config.json, ``llada`` or ``llama``, for a run from random weights.

    Raises:
        UserError: if ``step`` is damaged or has no average, ``out`` exists, or the model has
            parameters that the family has not.
    """
    if family not in ("llada", "llama"):
        raise UserError(f"--family {family}: use llada or llama")
    if out.exists():
        raise UserError(f"{out} exists: name a new directory")
    verify(step)
    source = step / AVERAGE if average else step
    if not source.is_dir():
        raise UserError(f"{source} does not exist: the run had no ema")
    carried = (source / "config.json").is_file()
    if not carried and not (source / WEIGHTS).is_file():
        raise UserError(f"{source}: adapters alone, without the weights that they belong to")
    out.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in _OWN and (carried or file.name != WEIGHTS):
            shutil.copyfile(file, out / file.name)
    if carried:
        return
    stored = load_file(source / WEIGHTS)
    tensors = {hf_name(FAMILIES[family], name): tensor for name, tensor in stored.items()}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config = _config(step, family, stored["output.weight"].dtype)
    (out / "config.json").write_text(json.dumps(config, indent=2))


def _config(step: Path, family: str, dtype: torch.dtype) -> dict[str, Any]:
    cfg: Any = OmegaConf.load(step / "config.yaml")
    with torch.device("meta"):
        model = instantiate(cfg, "model")
    layer, vocabulary = model.layers[0], model.tok_embeddings.num_embeddings
    rotary = layer.attn.pos_embeddings.angles
    common = {
        "torch_dtype": str(dtype).removeprefix("torch."),
        "rope_theta": float(rotary.base),
        "rms_norm_eps": layer.sa_norm.eps,
        "vocab_size": vocabulary,
    }
    heads, key_heads = layer.attn.num_heads, layer.attn.num_kv_heads
    width, inner = model.tok_embeddings.embedding_dim, layer.mlp.w1.out_features
    if family == "llada":
        return {
            "model_type": "llada",
            "architectures": ["LLaDAModelLM"],
            "embedding_size": vocabulary,
            "d_model": width,
            "n_heads": heads,
            "n_kv_heads": key_heads,
            "n_layers": len(model.layers),
            "mlp_hidden_size": inner,
            "max_sequence_length": model.max_seq_len,
            **common,
        }
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "num_hidden_layers": len(model.layers),
        "intermediate_size": inner,
        "max_position_embeddings": model.max_seq_len,
        "tie_word_embeddings": False,
        **common,
    }


def main() -> None:
    """Export a checkpoint."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", type=Path, help="step_N")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--family", default="llada", help="llada (default) or llama")
    parser.add_argument("--average", action="store_true", help="the weights that ema averaged")
    given = parser.parse_args()
    try:
        export(given.step, given.out, given.family, given.average)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
