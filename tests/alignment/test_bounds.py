"""Bounds of responses against exact enumeration, and their gradients against one graph."""

import itertools
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.rlhf.loss import DPOLoss

from mdm_plugin.alignment import Drawn, DrawPlan, add_gradient, bounds, drawn
from mdm_plugin.alignment.bounds import packed
from mdm_plugin.alignment.preferences import compare
from mdm_plugin.contract import Estimator, Masking, Times, TimestepSampler, Views
from mdm_plugin.data.batches import Batch
from mdm_plugin.density import Density
from mdm_plugin.distributed.world import World
from mdm_plugin.loss import MDMLoss
from mdm_plugin.masking import Bernoulli, Complement, FixedCount, Mirror, Rotation, Systematic
from mdm_plugin.models import llada
from mdm_plugin.timesteps import Adaptive, Stratified, Uniform
from tests.toy import Toy, z_score

WORLD = World(0, 1, torch.device("cpu"), None)
MASK = 31


class Tilted(TimestepSampler):
    """P-POTS with a density that is given: what its importance weights must undo."""

    def __call__(self, n, generator, w):
        density = Density(torch.tensor([0.0, 0.4, 1.0]), torch.tensor([1.6, 0.5, 1.3]))
        u = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
        t = density.quantile(u.double())
        return Times(w.quantile(t), 1 / density(t), density)


SAMPLERS = {"Uniform": Uniform(), "Stratified": Stratified(), "Tilted": Tilted()}
SAMPLERS["Adaptive"] = Adaptive()
MASKS = {
    "Bernoulli": Bernoulli(eps=0.0),
    "Mirror": Mirror(eps=0.0),
    "Systematic": Systematic(),
    "FixedCount": FixedCount(),
    "Complement": Complement(),
    "Rotation": Rotation(3, fixed_count=True),
}


def copies(n: int, count: int) -> Batch:
    """``count`` times the toy's row: the label of a position is its index."""
    eligible = torch.ones(count, n, dtype=torch.bool)
    tokens = torch.arange(n).repeat(count, 1)
    return Batch(tokens, eligible, None, torch.zeros(count, n).double(), torch.arange(count))


def toy_bounds(toy: Toy, draws: Drawn) -> torch.Tensor:
    """B of each sequence by the table of the toy's CE. [R]."""
    total = torch.zeros(len(draws.n), dtype=torch.float64)
    for noisy in draws.draws:
        mask = torch.zeros(len(noisy.noisy), toy.n, dtype=torch.bool)
        mask.view(-1)[noisy.targets.positions] = True
        ce = toy.ce[toy.codes(mask)[noisy.targets.rows], noisy.targets.labels]
        rows = noisy.targets.rows % len(draws.n)
        total.index_add_(0, rows, -noisy.targets.weights.double() * ce * toy.n)
    return total / len(draws.draws)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("masking", MASKS)
def test_the_mean_over_draws_is_the_bound_by_enumeration(sampler, masking):
    toy, masks = Toy(6), MASKS[masking]
    estimator = Estimator(SAMPLERS[sampler], masks, MDMLoss(), -1)
    found = drawn(copies(6, 1500), estimator, DrawPlan(3, seed=1), ("mask", 0))
    truth = -6 * toy.objective_by_counts()
    values = toy_bounds(toy, found)
    assert abs(z_score(values[:, None], truth)) < 4
    assert abs(z_score(values[:, None], truth * 1.1)) > 4  # the test sees a tenth


def test_a_sequence_s_draws_are_spread_evenly_over_its_counts():
    estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), -1)
    found = drawn(copies(8, 50), estimator, DrawPlan(8, seed=1), ("mask", 0))
    counts = torch.stack([x.targets.rows.bincount(minlength=50) for x in found.draws], 1)
    assert torch.equal(counts.sort(1).values, torch.arange(1, 9).repeat(50, 1))


def test_noise_is_a_function_of_the_place_and_both_answers_can_share_it():
    estimator = Estimator(Stratified(), Bernoulli(), MDMLoss(), -1)
    both = drawn(copies(8, 6), estimator, DrawPlan(4, 1, shared=2), ("mask", 3)).draws
    for noisy in both:
        assert torch.equal(noisy.noisy[0::2], noisy.noisy[1::2])
        assert len(noisy.noisy.unique(dim=0)) > 1
    whole = copies(8, 6)
    part = whole._replace(**{k: getattr(whole, k)[2:4] for k in ("tokens", "eligible", "u")})
    part = part._replace(places=torch.tensor([4, 1]))
    all_of_it = drawn(whole, estimator, DrawPlan(4, 1), ("mask", 3)).draws
    own_part = drawn(part, estimator, DrawPlan(4, 1), ("mask", 3)).draws
    for noisy, own in zip(all_of_it, own_part, strict=True):
        assert torch.equal(noisy.noisy[[4, 1]], own.noisy)
        assert torch.equal(noisy.t[[4, 1]], own.t)


class EverySet(Masking):
    """Mask k of all 2^N − 1 at t = (k + 1/2)/(2^N − 1), with the weight that makes the mean over
    them the bound: J = Σ_S CE(S) · (l − 1)!(N − l)!/N!, by ∫ t^(l−1)(1 − t)^(N−l) dt."""

    def __call__(self, t, u, eligible, w):
        n = int(eligible.sum(1)[0])
        sets = 2**n - 1
        code = (t * sets).long() + 1
        bits = (code[:, None] >> torch.arange(n) & 1).bool()
        mask = torch.zeros_like(eligible)
        mask[eligible] = bits.flatten()
        count = bits.sum(1)
        beta = torch.exp(
            torch.lgamma(count.double())
            + torch.lgamma((n - count + 1).double())
            - torch.lgamma(torch.tensor(n + 1.0).double())
        )
        return Views(mask[None], (sets * beta)[None])


class Grid(TimestepSampler):
    weighted = False

    def __call__(self, n, generator, w):
        return Times((torch.arange(n).double() + 0.5) / n, torch.ones(n).double())


def model(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 32, "num_layers": 2, "num_heads": 2, "embed_dim": 16}
    made = llada(**{**sizes, "intermediate_dim": 32, "max_seq_len": 16, **kwargs}).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def pairs(prompt=2, answer=4, count=2) -> Batch:
    torch.manual_seed(5)
    tokens = torch.randint(0, 30, (2 * count, prompt + answer))
    tokens[1::2, :prompt] = tokens[0::2, :prompt]
    eligible = torch.zeros_like(tokens, dtype=torch.bool)
    eligible[:, prompt:] = True
    return Batch(
        tokens, eligible, None, torch.zeros(tokens.shape).double(), torch.arange(2 * count)
    )


def exact_bound(net, batch: Batch, row: int) -> torch.Tensor:
    """−Σ_S CE(S) · (l − 1)!(N − l)!/N! · N, one forward for each set S, with its graph."""
    places = batch.eligible[row].nonzero()[:, 0].tolist()
    n, total = len(places), torch.zeros((), dtype=torch.float64)
    for size in range(1, n + 1):
        chosen = list(itertools.combinations(places, size))
        for subset in chosen:
            noisy = batch.tokens[row].clone()
            noisy[list(subset)] = MASK
            logits = net(noisy[None]).double()[0, list(subset)]
            labels = batch.tokens[row, list(subset)]
            ce = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            total = total - ce / len(chosen) / size
    return total


def grads(net):
    return torch.cat([p.grad.flatten().double() for p in net.parameters()])


def two_passes(net, reference, draws: Drawn, loss, **options):
    """The recipe's step: bounds, slopes, gradients."""
    ours, theirs = (bounds(x, loss, draws, WORLD, ("k",)) for x in (net, reference))
    found = compare(DPOLoss(0.2), ours, theirs, draws.n, sft_weight=0.05, **options)
    net.zero_grad()
    add_gradient(net, loss, draws, found.slopes, WORLD, ("k",))
    return found, grads(net)


def test_with_all_masks_the_gradient_is_autograd_s_through_the_exact_bounds():
    net, reference, batch = model(0), model(1), pairs()
    estimator = Estimator(Grid(), EverySet(), MDMLoss(), MASK)
    found, gradient = two_passes(
        net, reference, drawn(batch, estimator, DrawPlan(15, 0), ("mask", 0)), MDMLoss()
    )
    ours = torch.stack([exact_bound(net, batch, i) for i in range(4)])
    theirs = torch.stack([exact_bound(reference, batch, i) for i in range(4)]).detach()
    score = (ours - theirs)[0::2] - (ours - theirs)[1::2]
    truth = -torch.nn.functional.logsigmoid(0.2 * score).mean() - 0.05 * (ours[0::2] / 4).mean()
    net.zero_grad()
    truth.backward()
    assert abs(found.loss / truth.item() - 1) < 1e-6
    assert ((gradient - grads(net)).norm() / grads(net).norm()) < 1e-5


@pytest.mark.parametrize("masking", MASKS)
@pytest.mark.parametrize("per_token", [False, True])
def test_two_passes_are_one_graph(masking, per_token):
    net, reference, batch = model(0), model(1), pairs(3, 7)
    estimator = Estimator(Stratified(), MASKS[masking], MDMLoss(), MASK)
    draws = drawn(batch, estimator, DrawPlan(4, 0), ("mask", 0))
    found, gradient = two_passes(net, reference, draws, MDMLoss(), per_token=per_token)

    def graph(one):
        parts = []
        for noisy in draws.draws:
            targets = noisy.targets
            logits = one(noisy.noisy).double().flatten(0, 1)[targets.positions]
            ce = torch.nn.functional.cross_entropy(logits, targets.labels, reduction="none")
            total = torch.zeros(4, dtype=torch.float64)
            parts.append(-total.index_add(0, targets.rows % 4, ce * targets.weights.double() * 7))
        return torch.stack(parts).mean(0)

    ours, theirs = graph(net), graph(reference).detach()
    scale = 1 / 7 if per_token else 1
    score = scale * ((ours - theirs)[0::2] - (ours - theirs)[1::2])
    truth = -torch.nn.functional.logsigmoid(0.2 * score).mean() - 0.05 * (ours[0::2] / 7).mean()
    net.zero_grad()
    truth.backward()
    assert abs(found.loss - truth.item()) < 1e-6 * abs(truth.item())
    assert (gradient - grads(net)).norm() < 1e-6 * grads(net).norm()


def test_packed_bounds_and_gradients_are_the_padded_ones():
    net, reference, batch = model(0), model(1), pairs(3, 7)
    real = torch.ones_like(batch.eligible)
    real[1, 8:] = real[2, 9:] = False
    batch = batch._replace(eligible=batch.eligible & real, attend=real[:, None])
    estimator = Estimator(Stratified(), Complement(), MDMLoss(), MASK)
    draws = drawn(batch, estimator, DrawPlan(3, 0), ("mask", 0))
    plain = two_passes(net, reference, draws, MDMLoss())
    dense = two_passes(net, reference, packed(draws, net, WORLD.device, 1), MDMLoss())
    assert abs(plain[0].loss - dense[0].loss) < 1e-9
    assert (plain[1] - dense[1]).norm() < 1e-6 * plain[1].norm()
    assert plain[0].figures == pytest.approx(dense[0].figures)


def test_dropout_is_the_same_in_both_passes():
    from mdm_plugin.models import lora_llada

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "num_layers": 1, "num_heads": 2, "embed_dim": 16}
    net = lora_llada(
        lora_attn_modules=["q_proj", "v_proj"],
        **{"lora_rank": 2, "lora_alpha": 4, "lora_dropout": 0.5, "apply_lora_to_mlp": True},
        **{"intermediate_dim": 32, "max_seq_len": 16, **sizes},
    )
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    net.train()
    estimator = Estimator(Stratified(), FixedCount(), MDMLoss(), MASK)
    draws, loss = drawn(pairs(), estimator, DrawPlan(2, 0), ("mask", 0)), MDMLoss()
    first = bounds(net, loss, draws, WORLD, ("k", 1))
    results = add_gradient(net, loss, draws, torch.ones(4).double(), WORLD, ("k", 1))
    again = torch.stack([-x.row_losses.double() * 4 for x in results], 1)
    assert torch.allclose(first, again, rtol=1e-5)
    other = bounds(net, loss, draws, WORLD, ("k", 2))
    assert not torch.allclose(first, other, rtol=1e-3)


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at once."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.free, size)

    def free(self, size):
        self.alive -= size


def test_memory_does_not_grow_with_the_draws():
    batch, loss = pairs(4, 12, 8), MDMLoss()
    estimator = Estimator(Stratified(), FixedCount(), loss, MASK)
    peaks = []
    for count in (1, 8):
        net = model(0, vocab_size=256, embed_dim=64, intermediate_dim=128)
        draws = drawn(batch, estimator, DrawPlan(count, 0), ("mask", 0))
        # Each draw masks all that there is, so that both are alike in that.
        draws = draws._replace(draws=[_full(x, batch) for x in draws.draws])
        for parameter in net.parameters():  # a step's first gradients are not made in its middle
            parameter.grad = torch.zeros_like(parameter)
        with Peak() as peak:
            for parameter in net.parameters():
                peak.add(parameter.untyped_storage())
                peak.add(parameter.grad.untyped_storage())
            own = bounds(net, loss, draws, WORLD, ("k",))
            slopes = compare(DPOLoss(0.2), own, torch.zeros(16, count).double(), draws.n).slopes
            add_gradient(net, loss, draws, slopes, WORLD, ("k",))
        peaks.append(peak.peak)
    assert peaks[1] < 1.05 * peaks[0]
    logits = 8 * 2 * 8 * 12 * 256 * 8  # what a single graph would hold of the draws' logits alone
    assert peaks[1] - peaks[0] < logits / 20


def _full(noisy, batch):
    targets = MDMLoss().targets(
        batch.tokens,
        batch.eligible[None],
        torch.ones(1, len(batch.tokens)).double(),
        torch.ones(len(batch.tokens)).double(),
        batch.eligible.sum(1),
    )
    return noisy._replace(targets=targets)
