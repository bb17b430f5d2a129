"""Loading at the models' true width, and on ranks of which none holds the whole."""

import json
import os
import re

import pytest
import torch
from safetensors.torch import save_file

from mdm_plugin.checkpoint.files import hf_name
from mdm_plugin.checkpoint.weights import Weights
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.parameters import named_parameters
from mdm_plugin.distributed.world import World
from mdm_plugin.models import llada
from mdm_plugin.models.naming import FAMILIES
from tests import forks
from tests.checkpoints import full_attention

GIB = 2**30


def write_shards(directory, tensors, config, shards):
    """A checkpoint of ``tensors`` (name → callable that makes one), a shard at a time."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    names, where, total = list(tensors), {}, 0
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name]() for name in names[number::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(part, file))
        total += sum(x.nbytes for x in part.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def random_checkpoint(directory, build, shards, dtype):
    """LLaDA's names, random values of the usual size. Its bytes."""
    with torch.device("meta"):
        shapes = {hf_name(FAMILIES["llada"], k): p for k, p in named_parameters(build()).items()}

    # Uniform of variance 1/D. A prime number of values are drawn, and each tensor takes them from
    # a place of its own on, again and again: no row is another one, in a fraction of the time.
    drawn = torch.empty(4_194_301, dtype=dtype).uniform_(-(3**0.5), 3**0.5)

    def make(shape):
        if len(shape) == 1:
            return lambda: torch.ones(shape, dtype=dtype)
        values = (drawn / shape[-1] ** 0.5).roll(int(torch.randint(len(drawn), ())))
        return lambda: values.repeat(-(-shape.numel() // len(drawn)))[: shape.numel()].view(shape)

    tensors = {name: make(p.shape) for name, p in shapes.items()}
    return write_shards(directory, tensors, {"model_type": "llada"}, shards)


@pytest.mark.slow
def test_logits_at_the_true_width_from_sharded_bf16(tmp_path):
    """d 4,096, vocabulary 126,464, two layers: 1.47 B parameters, against transformers' Llama."""
    import transformers

    def build():
        return llada(126_464, 2, 32, 4096, 4096, 12_288)

    torch.manual_seed(0)
    random_checkpoint(tmp_path / "hf", build, 3, torch.bfloat16)
    source = Weights(tmp_path / "hf")
    config = transformers.LlamaConfig(
        vocab_size=126_464,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=2,
        num_attention_heads=32,
        num_key_value_heads=32,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        attn_implementation="eager",
    )
    tokens = torch.randint(126_464, (1, 33))
    logits = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build_model(build, World(0, 1, torch.device("cpu"), None), dtype=dtype).eval()
        source.load(model)
        own = {name: parameter.data for name, parameter in named_parameters(model).items()}
        with torch.device("meta"):
            truth = transformers.LlamaForCausalLM(config).to(dtype).eval()
        llama = {hf_name(FAMILIES["llama"], name): x for name, x in own.items()}
        truth.load_state_dict(llama, strict=True, assign=True)
        truth.model.rotary_emb = type(truth.model.rotary_emb)(config)  # on the meta device too
        with torch.no_grad():
            logits[dtype] = model(tokens), full_attention(truth, tokens)
    exact, theirs = logits[torch.float32]
    assert (exact - theirs).abs().max() <= 1e-4
    # In bf16 the step between two logits of 4 to 8 is 3e-2, and either is off by two of them.
    ours, theirs = logits[torch.bfloat16]
    assert (ours - theirs).abs().max() <= 2e-2 * exact.abs().max()
    assert (ours - exact).abs().max() <= 1.1 * (theirs - exact).abs().max()
    print((ours - theirs).abs().max(), (ours - exact).abs().max(), (theirs - exact).abs().max())


SCRIPT = """
import os, resource, sys, threading, time
from pathlib import Path
import psutil, torch
from mdm_plugin.models import llada
from mdm_plugin.models.naming import FAMILIES
from mdm_plugin.distributed.build import build_model
from mdm_plugin.distributed.world import distributed
from mdm_plugin.checkpoint.weights import Weights

process, peak = psutil.Process(), 0
def watch():
    global peak
    while True:
        # What the process itself holds; pages of the mapped files are the kernel's, and go.
        memory = process.memory_info()
        peak = max(peak, memory.rss - memory.shared)
        time.sleep(0.001)

with distributed("cpu") as world:
    memory = process.memory_info()
    before = memory.rss - memory.shared
    threading.Thread(target=watch, daemon=True).start()
    model = build_model(lambda: llada(8000, 8, 8, 1024, 64, 4096), world, torch.float32)
    Weights(Path(sys.argv[1])).load(model)
    time.sleep(0.1)
    print(f"RANK{world.rank} PEAK {peak - before}", flush=True)
"""


@pytest.mark.slow
def test_on_two_ranks_none_holds_much_more_than_its_half(tmp_path):
    torch.manual_seed(0)
    total = random_checkpoint(
        tmp_path / "hf", lambda: llada(8000, 8, 8, 1024, 64, 4096), 8, torch.float32
    )
    assert total > 0.5 * GIB
    shard = max(f.stat().st_size for f in (tmp_path / "hf").glob("*.safetensors"))
    words = ["python", "-c", SCRIPT, str(tmp_path / "hf")]
    done = forks.RECIPES.run(words, 2, tmp_path, {"OMP_NUM_THREADS": "1", **os.environ})
    assert done.returncode == 0, done.stderr
    peaks = [int(x) for x in re.findall(r"PEAK (\d+)", done.stdout)]
    print(total, shard, peaks)
    assert len(peaks) == 2
    for peak in peaks:
        assert 0.4 * total < peak <= 0.6 * total + shard


@pytest.mark.gpu
def test_gpu_loading_leaves_one_copy(tmp_path):
    def build():
        return llada(8000, 8, 8, 1024, 64, 4096)

    total = random_checkpoint(tmp_path / "hf", build, 8, torch.float32)
    torch.cuda.reset_peak_memory_stats()
    model = build_model(build, World(0, 1, torch.device("cuda", 0), None), dtype=torch.float32)
    Weights(tmp_path / "hf").load(model)
    assert torch.cuda.max_memory_allocated() < 1.3 * total
