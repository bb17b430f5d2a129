"""Time and memory of a torchtitan step on many GPUs, from a model: the tables of docs/scaling.md.

    python benchmarks/scaling.py            # the tables
    python benchmarks/scaling.py --check    # the model beside torchtitan's published figures, and
                                            # its traffic beside what two ranks here send

A step takes the time of its products at a fraction of the peak, or of FSDP2's traffic where that is
longer (they overlap), then tensor parallelism's traffic (which does not), a pipeline's bubble, and
the optimizer's passes over memory. The fraction is the one constant that is fitted: to torchtitan's
published 8B on 8 H100s.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

GIB = 2**30


class Shape(NamedTuple):
    """A dense transformer: layers, width, MLP width, heads of keys and values, vocabulary."""

    layers: int
    width: int
    mlp: int
    kv_share: float  # heads of keys and values per head
    vocabulary: int

    @property
    def layer(self) -> float:
        """Parameters of a layer."""
        return (2 + 2 * self.kv_share) * self.width**2 + 3 * self.width * self.mlp

    @property
    def parameters(self) -> float:
        """All, with embeddings and an untied head."""
        return self.layers * self.layer + 2 * self.vocabulary * self.width


LLADA_8B = Shape(32, 4096, 12_288, 1.0, 126_464)
LLADA_70B = Shape(80, 8192, 28_672, 0.125, 126_464)  # Llama-3-70B's layers
LLAMA_8B = Shape(32, 4096, 14_336, 0.25, 128_256)
LLAMA_70B = Shape(80, 8192, 28_672, 0.125, 128_256)


class Machine(NamedTuple):
    """An H100 and its network. FLOP/s, bytes/s, seconds.

    efficiency: of matrix products, fitted. bus: what a ring of all a node's links carries per GPU,
        8 × 400 Gb/s at 85 % (NVLink within a node is not slower). hop: of a ring, per rank.
    """

    peak: float = 989e12
    efficiency: float = 0.47
    memory_bandwidth: float = 2.4e12
    bus: float = 0.85 * 8 * 50e9
    nvlink: float = 0.75 * 450e9
    hop: float = 3e-6


H100 = Machine()


class Layout(NamedTuple):
    """How ranks are used: shard × replicate × tensor × pipeline of them.

    rows: per rank of the batch and micro-batch; micro_batches: in a step.
    recompute: share of the forward pass that is done again (1 for full checkpointing, 0.15 for
        selective).
    float8: factor on the layers' products.
    """

    shard: int
    replicate: int = 1
    tensor: int = 1
    pipeline: int = 1
    rows: int = 1
    micro_batches: int = 1
    recompute: float = 1.0
    float8: float = 1.0

    @property
    def ranks(self) -> int:
        return self.shard * self.replicate * self.tensor * self.pipeline


class Step(NamedTuple):
    """Seconds of the parts of a step, the whole, tokens per second and GPU, bytes of a rank."""

    compute: float
    fsdp: float
    tensor: float
    bubble: float
    optimizer: float
    seconds: float
    tokens: float
    memory: float


def step(
    shape: Shape,
    layout: Layout,
    length: int = 4096,
    masked: float = 0.5,
    causal: bool = False,
    machine: Machine = H100,
) -> Step:
    """A step's time and a rank's memory; ``masked``: share of the tokens that the head sees."""
    split = layout.tensor * layout.pipeline
    tokens = layout.rows * length * layout.micro_batches  # of one rank of the batch
    attention = (6 if causal else 12) * shape.layers * length * shape.width
    layers = (6 * shape.layers * shape.layer + attention) / layout.float8
    head = 6 * masked * shape.vocabulary * shape.width
    flops = tokens * (layers * (1 + layout.recompute / 3) + head) / split
    compute = flops / (machine.peak * machine.efficiency)

    traffic = fsdp_bytes(shape, layout)
    collectives = 3 * (shape.layers / layout.pipeline + 2)
    fsdp = traffic / machine.bus + collectives * machine.hop * layout.shard * (layout.shard > 1)
    if layout.replicate > 1:  # gradients of the shards, once more
        reduced = 2 * 4 * shape.parameters / (split * layout.shard)
        fsdp += reduced / machine.bus + machine.hop * math.log2(layout.replicate) * collectives / 3
    tensor = tensor_bytes(shape, layout, tokens) / machine.nvlink
    bubble = (layout.pipeline - 1) / max(1, layout.micro_batches) * (compute + tensor)

    own = shape.parameters / (split * layout.shard)
    optimizer = 28 * own / machine.memory_bandwidth  # read and write fp32 weights and moments
    seconds = max(compute, fsdp) + 0.1 * min(compute, fsdp) + tensor + bubble + optimizer
    return Step(
        compute,
        fsdp,
        tensor,
        bubble,
        optimizer,
        seconds,
        tokens / split / seconds,
        memory(shape, layout, length),
    )


def fsdp_bytes(shape: Shape, layout: Layout, itemsize: int = 2) -> float:
    """What a rank receives in a step's all-gathers, in the compute dtype, forward and backward, and
    sends in its reduce-scatters, in fp32. The head is gathered once: nothing runs between its
    forward and its backward."""
    split = layout.tensor * layout.pipeline
    share = (layout.shard - 1) / layout.shard
    layers = shape.layers * shape.layer / split
    rest = 2 * shape.vocabulary * shape.width / split
    times = layout.micro_batches if layout.pipeline == 1 else 1
    gathered = itemsize * (2 * layers + 1.5 * rest) * times
    return share * (gathered + 4 * (layers + rest) * times)


def tensor_bytes(shape: Shape, layout: Layout, tokens: float, itemsize: int = 2) -> float:
    """What a rank receives for tensor parallelism: four gathers or scatters of the activations in a
    layer's forward, in its backward, and in what is recomputed of it."""
    share = (layout.tensor - 1) / layout.tensor
    times = 8 + 4 * layout.recompute
    return share * times * itemsize * tokens * shape.width * shape.layers / layout.pipeline


def memory(shape: Shape, layout: Layout, length: int, logits: bool = False) -> float:
    """Bytes of a rank: weights, gradients and moments in fp32; two layers gathered in bf16, and the
    gradient of one in fp32; inputs of the checkpointed layers, and one layer's activations. With
    ``logits``, those of all tokens too, in bf16 and fp32, with their gradient: as torchtitan had
    them in 2024."""
    split = layout.tensor * layout.pipeline
    resting = 16 * shape.parameters / (split * layout.shard)
    outside = shape.vocabulary * shape.width / layout.tensor
    gathered = 2 * 2 * shape.layer / layout.tensor + 4 * outside
    tokens = layout.rows * length / layout.tensor
    layers = shape.layers / layout.pipeline
    kept = (1 - layout.recompute) * 0.5  # of a layer's activations, by selective checkpointing
    one = tokens * (16 * shape.width + 6 * shape.mlp)
    in_flight = min(layout.pipeline, layout.micro_batches)
    inputs = 2 * tokens * shape.width * layers
    whole = 10 * tokens * shape.vocabulary if logits else 0
    return resting + gathered + in_flight * (inputs + kept * one * layers) + one + whole


def fitted(machine: Machine = H100) -> Machine:
    """``efficiency`` such that Llama 8B on 8 GPUs, compiled, has its published 6,667 tokens/s."""
    layout = Layout(8, rows=2, recompute=0.15)
    low, high = 0.1, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        found = step(LLAMA_8B, layout, 8192, 1.0, True, machine._replace(efficiency=middle)).tokens
        low, high = (middle, high) if found < 6667 else (low, middle)
    return machine._replace(efficiency=low)


# torchtitan's benchmarks/llama3_h100_202412_torchtitan.md, at 8,192 tokens: tokens/s/GPU and GiB.
PUBLISHED = [
    ("8B, 8 GPUs (fitted)", LLAMA_8B, Layout(8, rows=2, recompute=0.15), 6667, 77.0),
    ("8B, 128 GPUs", LLAMA_8B, Layout(128, rows=2, recompute=0.15), 6514, 62.0),
    (
        "8B, 128 GPUs, float8",
        LLAMA_8B,
        Layout(128, rows=2, recompute=0.15, float8=1.40),
        8380,
        61.8,
    ),
    (
        "70B, 256 GPUs, TP 8, float8",
        LLAMA_70B,
        Layout(32, tensor=8, rows=16, recompute=1.0, float8=1.40),
        829,
        71.9,
    ),
]


def failures(shape: Shape, ranks: int) -> tuple[float, float, float]:
    """Hours between failures; the best interval between checkpoints in minutes (Young 1974, Daly
    2006: √(2·δ·M)); the share of time lost by it.

    A failure in 50,000 GPU hours (419 in 54 days of 16,384 GPUs: the Llama 3 report, section
    3.3.4). δ: asynchronous saving holds training for the copy to the host, 12 bytes a parameter at
    25 GB/s for each rank; a restart costs 10 minutes.
    """
    between = 50_000 * 3600 / ranks
    delta = max(1.0, 12 * shape.parameters / ranks / 25e9)
    interval = math.sqrt(2 * delta * between)
    lost = delta / interval + (interval / 2 + 600) / between
    return between / 3600, interval / 60, lost


PLANS = {
    "8B": (
        LLADA_8B,
        [
            Layout(8, rows=4, recompute=1.0),
            Layout(64, rows=4, recompute=1.0),
            Layout(64, 8, rows=4, recompute=1.0),
            Layout(512, rows=4, recompute=1.0),
            Layout(64, 64, rows=4, recompute=1.0),
            Layout(4096, rows=4, recompute=1.0),
        ],
    ),
    "70B": (
        LLADA_70B,
        [
            Layout(8, tensor=8, rows=4, recompute=1.0),
            Layout(64, rows=1, recompute=1.0),
            Layout(64, tensor=8, rows=8, recompute=1.0),
            Layout(512, rows=1, recompute=1.0),
            Layout(64, 8, tensor=8, rows=8, recompute=1.0),
            Layout(16, 8, tensor=8, pipeline=4, rows=1, micro_batches=16, recompute=1.0),
        ],
    ),
}


def tables(machine: Machine) -> None:
    """Print the tables of docs/scaling.md."""
    print(
        "| shape | GPUs | shard × replicate × TP × PP | rows/GPU | step, s | compute | FSDP | TP |"
        " tokens/s/GPU | of peak | GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, (shape, layouts) in PLANS.items():
        for layout in layouts:
            x = step(shape, layout, machine=machine)
            useful = 6 * (shape.layers * shape.layer + 0.5 * shape.vocabulary * shape.width)
            useful += 12 * shape.layers * 4096 * shape.width
            rows = layout.rows * layout.micro_batches / (layout.tensor * layout.pipeline)
            print(
                f"| {name} | {layout.ranks:,} | {layout.shard} × {layout.replicate} × "
                f"{layout.tensor} × {layout.pipeline} | {rows:g} | {x.seconds:.2f} | "
                f"{x.compute:.2f} | {x.fsdp:.2f} | {x.tensor:.2f} | {x.tokens:,.0f} | "
                f"{100 * x.tokens * useful / machine.peak:.0f} % | {x.memory / GIB:.0f} |"
            )
    print("\n| shape | GPUs | hours between failures | minutes between checkpoints | time lost |")
    print("|---|---|---|---|---|")
    for name, (shape, _) in PLANS.items():
        for ranks in (8, 64, 512, 4096):
            hours, minutes, lost = failures(shape, ranks)
            print(f"| {name} | {ranks:,} | {hours:,.0f} | {minutes:.0f} | {100 * lost:.1f} % |")


def check(machine: Machine) -> None:
    """The model beside published figures, and its traffic beside two ranks' own."""
    print("| torchtitan's figures | tokens/s/GPU | model | GiB | model |")
    print("|---|---|---|---|---|")
    for name, shape, layout, published, gib in PUBLISHED:
        x = step(shape, layout, 8192, 1.0, True, machine)
        needed = memory(shape, layout, 8192, logits=True) / GIB
        print(f"| {name} | {published:,} | {x.tokens:,.0f} | {gib} | {needed:.0f} |")
    small = Shape(3, 64, 256, 1.0, 320)
    print("\n| bytes for a rank of 2 in a step of the debug model, fp32 | counted | model |")
    print("|---|---|---|")
    fsdp, tensor = Layout(2), Layout(1, tensor=2)
    for name, layout, model in (
        ("FSDP2", fsdp, fsdp_bytes(small, fsdp, 4)),
        ("tensor parallel", tensor, tensor_bytes(small, tensor, 32 * 64, 4)),
    ):
        degree = "tensor_parallel" if layout.tensor > 1 else "data_parallel_shard"
        print(f"| {name} | {counted(degree):,.0f} | {model:,.0f} |")


def counted(degree: str) -> float:
    """Bytes of the collectives of a step of ``llada_debugmodel``, counted on one of two ranks."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "bytes.json"
        # fmt: off
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            __file__, "--count", str(file), f"--parallelism.{degree}_degree", "2",
            "--dump_folder", place, "--training.steps", "2", "--training.local_batch_size",
            "32" if degree == "tensor_parallel" else "16", "--checkpoint.no-enable",
        ]
        # fmt: on
        subprocess.run(command, check=True, capture_output=True)
        return json.loads(file.read_text())


def count(file: Path, arguments: list[str]) -> None:
    """Train the debug model and write the bytes of the last step's collectives; on each rank."""
    import torch.distributed as dist
    from torch.utils._python_dispatch import TorchDispatchMode
    from torchtitan.config import ConfigManager

    class Counter(TorchDispatchMode):
        total = 0.0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out, name = func(*args, **(kwargs or {})), str(func)
            whole = 0
            if "c10d" in name and "allgather_base" in name:
                whole = args[0].nbytes
            elif "c10d" in name and "reduce_scatter_base" in name:
                whole = args[1].nbytes
            elif "c10d_functional.all_gather" in name:
                whole = out.nbytes
            elif "c10d_functional.reduce_scatter" in name:
                whole = args[0].nbytes
            elif "c10d_functional.all_reduce" in name and args[0].numel() > 1:
                whole = 2 * args[0].nbytes
            self.total += whole / 2  # one of two ranks has a half already
            return out

    module = ["--module", "mdm_plugin.titan.llada", "--config", "llada_debugmodel"]
    trainer = ConfigManager().parse_args([*module, *arguments]).build()
    plain, counter = trainer.train_step, Counter()

    def train_step(batches):  # type: ignore[no-untyped-def]
        counter.total = 0.0
        with counter:
            plain(batches)

    trainer.train_step = train_step
    trainer.train()
    trainer.close()
    if dist.get_rank() == 0:
        file.write_text(json.dumps(counter.total))
    dist.destroy_process_group()


def main() -> None:
    """Print what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--count", type=Path, help=argparse.SUPPRESS)
    given, rest = parser.parse_known_args()
    if given.count:
        return count(given.count, rest)
    machine = fitted()
    print(f"efficiency of products, fitted: {machine.efficiency:.3f}\n")
    (check if given.check else tables)(machine)


if __name__ == "__main__":
    main()
