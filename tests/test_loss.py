import pytest
import torch
import torch.nn.functional as F

from mdm_plugin.loss import LinearHead, MDMLoss, Targets
from mdm_plugin.masking import Mirror
from tests.toy import ELBO

R, L, D, V = 5, 9, 8, 13


def a_batch(seed=0, masking=None):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (R, L), generator=generator)
    eligible = torch.zeros(R, L, dtype=torch.bool)
    for row in range(R):
        eligible[row, 2 : 4 + row] = True
    t = torch.rand(R, generator=generator, dtype=torch.float64)
    u = torch.rand(R, L, generator=generator, dtype=torch.float64)
    mask, inverse_p, _ = (masking or Mirror())(t, u, eligible, ELBO)
    importance = torch.rand(R, generator=generator, dtype=torch.float64) + 0.5
    hidden = torch.randn(2 * R, L, D, generator=generator, dtype=torch.float64)
    head = torch.nn.Linear(D, V, bias=False, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(V, D, generator=generator))
    return tokens, eligible, mask, inverse_p, importance, hidden, head


def plain(loss, tokens, eligible, mask, inverse_p, importance, hidden, head):
    """The definition, one position at a time, over full logits."""
    logits = head(hidden)
    total = torch.zeros((), dtype=torch.float64)
    n = eligible.sum(1)
    for view in range(2):
        for row in range(R):
            for i in range(L):
                if not mask[view, row, i]:
                    continue
                ce = F.cross_entropy(logits[view * R + row, i], tokens[row, i])
                weight = importance[row] * inverse_p[view, row]
                total = (
                    total
                    + {
                        "response": ce * weight / n[row] / 2 / R,
                        "tokens": ce * weight / n.sum() / 2,
                        "masked": ce * weight / mask.sum(),
                    }[loss.normalize]
                )
    return total


@pytest.mark.parametrize("normalize", ["response", "tokens", "masked"])
def test_equals_the_definition_over_full_logits_and_so_does_its_gradient(normalize):
    loss = MDMLoss(normalize, chunk_size=4)
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    n = eligible.sum(1)
    results = []
    for compute in ("ours", "plain"):
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        if compute == "ours":
            targets = loss.targets(tokens, mask, inverse_p, importance, n)
            total, _ = loss(head, h, targets)
            value = total / loss.normalizer(mask, n)
        else:
            value = plain(loss, tokens, eligible, mask, inverse_p, importance, h, head)
        value.backward()
        results.append((value.detach(), h.grad, head.weight.grad.clone()))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("chunk_size", [1, 3, 1000])
def test_chunks_do_not_change_loss_or_gradient(chunk_size):
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    n = eligible.sum(1)
    grads = []
    for size in (chunk_size, 10_000):
        loss = MDMLoss(chunk_size=size)
        h = hidden.clone().requires_grad_()
        head.zero_grad()
        total, ce = loss(head, h, loss.targets(tokens, mask, inverse_p, importance, n))
        total.backward()
        grads.append((total.detach(), ce, h.grad, head.weight.grad.clone()))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_masked_positions_reach_the_head():
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    loss = MDMLoss(chunk_size=4)
    targets = loss.targets(tokens, mask, inverse_p, importance, eligible.sum(1))
    elsewhere = torch.ones(hidden.shape[:2], dtype=torch.bool).flatten()
    elsewhere[targets.positions] = False
    hidden.flatten(0, 1)[elsewhere] = torch.nan
    total, ce = loss(head, hidden, targets)
    assert len(ce) == mask.sum() and total.isfinite()
    head.zero_grad()
    total.backward()
    assert head.weight.grad.isfinite().all()


class Scaled(torch.nn.Module):
    """A head of another kind: a bias, and a scale of its own that is not trained."""

    def __init__(self, weight):
        super().__init__()
        self.linear = torch.nn.Linear(D, V, dtype=torch.float64)
        self.scale = torch.nn.Parameter(torch.full((V,), 1.5, dtype=torch.float64), False)
        with torch.no_grad():
            self.linear.weight.copy_(weight)

    def forward(self, h):
        return self.linear(h) * self.scale


def tied(weight):
    """A head that is the embeddings' matrix."""
    return LinearHead(weight.clone().requires_grad_())


@pytest.mark.parametrize("kind", [Scaled, tied])
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_heads_of_other_kinds_get_the_gradients_of_autograd(kind, scale):
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    torch.manual_seed(0)
    other = kind(head.weight.detach())
    parameters = list(other.parameters()) if kind is Scaled else [other.weight]
    loss, found = MDMLoss(chunk_size=3), []
    targets = loss.targets(tokens, mask, inverse_p, importance, eligible.sum(1))
    for ours in (True, False):
        h = hidden.clone().requires_grad_()
        if ours:
            total, _ = loss(other, h, targets)
        else:
            logits = other(h.flatten(0, 1)[targets.positions])
            ce = F.cross_entropy(logits, targets.labels, reduction="none")
            total = (ce * targets.weights).sum()
        trained = [p for p in parameters if p.requires_grad]
        found.append([total, *torch.autograd.grad(total * scale, [h, *trained])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-6)


def some_targets(positions, seed=0):
    """Hidden states of ``positions`` masked positions, one after another, and their targets."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.arange(positions)
    labels = torch.randint(V, (positions,), generator=generator)
    weights = torch.rand(positions, generator=generator)
    hidden = torch.randn(positions, D, generator=generator).requires_grad_()
    return hidden, Targets(place, labels, place, weights)


def assert_same_as_eager(compiled, head, positions):
    """Loss, CE and gradients of ``compiled`` against those over full logits."""
    hidden, targets = some_targets(positions)
    total, ce = compiled(head, hidden, targets)
    exact = F.cross_entropy(head(hidden), targets.labels, reduction="none")
    right = (exact * targets.weights).sum()
    ours = [ce, total, *torch.autograd.grad(total, [hidden, head.weight])]
    truth = [exact, right, *torch.autograd.grad(right, [hidden, head.weight])]
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_chunks_are_not_filled_up_and_compile_once_for_every_number_of_masks():
    torch._dynamo.reset()  # other tests' graphs of the same code
    head, loss = torch.nn.Linear(D, V, bias=False), MDMLoss(chunk_size=16)
    graphs, rows = [], []

    def backend(graph, inputs):
        graphs.append(graph)

        def run(*arguments):
            labels = [x for x in arguments if isinstance(x, torch.Tensor) and x.dtype == torch.long]
            rows.append(len(labels[0]))
            return graph(*arguments)

        return run

    loss.compile_chunks(backend)
    assert_same_as_eager(loss, head, 5)  # the warm-up
    assert len(graphs) == 1
    for positions in (*range(1, 20), D, V, 31, 32, 33, 49):
        with torch.no_grad():  # as in validation
            loss(head, *some_targets(positions))
        rows.clear()
        assert_same_as_eager(loss, head, positions)
        whole, rest = divmod(positions, 16)
        # All in the graph, none in eager; one row alone goes twice.
        assert rows == [16] * whole + [max(rest, 2)] * (rest > 0)
    assert len(graphs) == 1


@pytest.mark.slow
def test_chunks_compiled_by_inductor_are_the_same_and_one_graph_for_every_number_of_masks():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    head, loss = torch.nn.Linear(D, V, bias=False), MDMLoss(chunk_size=16)
    loss.compile_chunks()
    for positions in (1, 5, 16, 17, 40, D, V):
        assert_same_as_eager(loss, head, positions)
        with torch.no_grad():
            loss(head, *some_targets(positions))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["recompiles"] and not counters["graph_break"]


@pytest.mark.parametrize("chunk_size", [4, 7, 1000])  # the room for collecting is 2·D = 16
def test_bf16_is_near_fp32(chunk_size):
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    loss = MDMLoss(chunk_size=chunk_size)
    targets = loss.targets(tokens, mask, inverse_p, importance, eligible.sum(1))
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        own = torch.nn.Linear(D, V, bias=False, dtype=dtype)
        with torch.no_grad():
            own.weight.copy_(head.weight.bfloat16())
        h = hidden.bfloat16().to(dtype).requires_grad_()
        total, _ = loss(own, h, targets)
        total.backward()
        assert own.weight.grad.dtype == h.grad.dtype == dtype
        found.append((total.detach(), h.grad.float(), own.weight.grad.float()))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_batch_without_masked_positions_has_zero_loss_and_a_gradient():
    """Under FSDP every rank must run the backward pass, also one that drew no mask."""
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    loss = MDMLoss()
    targets = loss.targets(tokens, mask & False, inverse_p, importance, eligible.sum(1))
    h = hidden.requires_grad_()
    total, ce = loss(head, h, targets)
    total.backward()
    assert total == 0 and len(ce) == 0
    assert torch.equal(h.grad, torch.zeros_like(h)) and head.weight.grad.abs().sum() == 0


def test_evaluation_computes_no_gradients():
    tokens, eligible, mask, inverse_p, importance, hidden, head = a_batch()
    loss = MDMLoss(chunk_size=4)
    targets = loss.targets(tokens, mask, inverse_p, importance, eligible.sum(1))
    products = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            products.append(function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_))
            return function(*arguments, **keywords or {})

    with torch.no_grad(), Count():
        loss(head, hidden, targets)
    assert sum(products) == -(-int(mask.sum()) // 4)


@pytest.mark.parametrize("arguments", [{"normalize": "rows"}, {"chunk_size": 0}])
def test_unknown_options_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        MDMLoss(**arguments)
