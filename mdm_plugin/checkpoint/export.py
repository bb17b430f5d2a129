"""A checkpoint as a Hugging Face directory, by one command.

    python -m mdm_plugin.checkpoint.export runs/step_1000 exported
    python -m mdm_plugin.checkpoint.export runs/step_1000 exported --average --dtype fp32
    python -m mdm_plugin.checkpoint.export runs/step_1000 exported --base LLaDA-8B-Instruct

Weights come out in the dtype that the run computed in, whatever they were trained in. Of a run from
random weights the tensors are renamed, and a config.json is made from the model. Adapters are
merged: a checkpoint of adapters alone takes its base from where its run did, or from ``--base``.
Every file is first compared with the checkpoint's manifest.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mdm_plugin.checkpoint.adapters import StoredAdapters
from mdm_plugin.checkpoint.files import ADAPTER, ADAPTER_CONFIG, INDEX, hf_name, read_json
from mdm_plugin.checkpoint.manifest import MANIFEST, verify
from mdm_plugin.checkpoint.parts import AVERAGE
from mdm_plugin.checkpoint.saving import BESIDE
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.config.components import instantiate
from mdm_plugin.errors import UserError
from mdm_plugin.models.naming import FAMILIES

_OWN = {MANIFEST, "state.json", "config.yaml", "config.json", ADAPTER_CONFIG}
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def export(
    step: Path,
    out: Path,
    family: str = "llada",
    average: bool = False,
    dtype: str | None = None,
    base: Path | None = None,
) -> None:
    """Write the weights of ``step`` (``step_N``), or their average, into the new directory ``out``.

    Args:
        family: whose names and config.json, ``llada`` or ``llama``, for a run from random weights.
        average: the average of the weights.
        dtype: ``bf16`` or ``fp32``; None for the one that the run computed in.
        base: the weights that adapters alone belong to; None for those that the run began with.

    Raises:
        UserError: if ``step`` is damaged, has no average or no base, ``out`` exists, or the model
            has parameters that the family has not.
    """
    if family not in ("llada", "llama"):
        raise UserError(f"--family {family}: use llada or llama")
    if dtype not in (None, *_DTYPES):
        raise UserError(f"--dtype {dtype}: use bf16 or fp32")
    if out.exists():
        raise UserError(f"{out} exists: name a new directory")
    verify(step)
    source = step / AVERAGE if average else step
    if not source.is_dir():
        raise UserError(f"{source} does not exist: the run had no ema")
    weights, adapters = _read(source, base)
    run: Any = OmegaConf.load(step / "config.yaml")
    wanted = _DTYPES.get(dtype or run.get("dtype"))
    config = weights.config or _config(step, family)
    names = None if weights.naming else FAMILIES[family]
    partial = out.with_name(f".{out.name}_in_the_making")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    total, kept = 0, torch.float32
    for file in sorted(set(weights.where.values())):
        tensors = {}
        for name, tensor in _tensors(file, adapters):
            tensors[hf_name(names, name)] = tensor if wanted is None else tensor.to(wanted)
        save_file(tensors, partial / file.name, metadata={"format": "pt"})
        total += sum(x.nbytes for x in tensors.values())
        kept = next(iter(tensors.values())).dtype
        del tensors
    if adapters:
        adapters.check_all_used()
    stated = [x for x in ("torch_dtype", "dtype") if x in config] or ["torch_dtype"]
    config = {**config, **dict.fromkeys(stated, str(kept).removeprefix("torch."))}
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    _write_beside([weights.directory, source], partial, total)
    partial.rename(out)


def _write_beside(places: list[Path], out: Path, total: int) -> None:
    """What goes with the weights: tokenizer, the model's own code, and the index, of ``total``
    bytes."""
    for place in places:
        for pattern in BESIDE:
            for path in place.glob(pattern):
                if path.name not in _OWN:
                    shutil.copyfile(path, out / path.name)
    index = out / INDEX
    if index.is_file():
        index.write_text(json.dumps({**read_json(index), "metadata": {"total_size": total}}))


def _read(source: Path, base: Path | None) -> tuple[Weights, StoredAdapters | None]:
    """The weights of a checkpoint; or those of its base, and its adapters."""
    alone = [x.name for x in source.glob("*.safetensors")] == [ADAPTER]
    if base and not alone:
        raise UserError(f"--base: {source} has its weights, with adapters merged if it had any")
    if not alone:
        return Weights(source), None
    stated = read_json(source / ADAPTER_CONFIG).get("base_model_name_or_path")
    directory = base or (Path(stated) if stated else None)
    if directory is None or not directory.is_dir():
        raise UserError(
            f"{source}: adapters alone, and the weights that they belong to are not at "
            f"{directory}: name their directory with --base"
        )
    weights = Weights(directory)
    return weights, StoredAdapters(source, weights.naming)


def _tensors(file: Path, adapters: StoredAdapters | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a file, adapters merged, by their stored names."""
    with safe_open(file, framework="pt") as opened:
        for name in sorted(opened.keys()):
            tensor = opened.get_tensor(name)
            if adapters and adapters.of(name):
                tensor = adapters.merge(name, tensor).to(tensor.dtype)
            yield name, tensor


def _config(step: Path, family: str) -> dict[str, Any]:
    """A config.json for a run from random weights."""
    cfg: Any = OmegaConf.load(step / "config.yaml")
    with torch.device("meta"):
        model = instantiate(cfg, "model")
    layer, vocabulary = model.layers[0], model.tok_embeddings.num_embeddings
    rotary = layer.attn.pos_embeddings.angles
    common = {
        "rope_theta": float(rotary.base),
        "rms_norm_eps": layer.sa_norm.eps,
        "vocab_size": vocabulary,
    }
    if model.block_length:
        common["block_size"] = model.block_length
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
    parser.add_argument("--dtype", help="bf16 or fp32 (default: what the run computed in)")
    parser.add_argument("--base", type=Path, help="the weights that adapters alone belong to")
    given = parser.parse_args()
    try:
        export(given.step, given.out, given.family, given.average, given.dtype, given.base)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"Written to {given.out}")


if __name__ == "__main__":
    main()
