import pytest
import torch
from torchtune.models.llama2 import llama2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

from mdm_plugin.models import bidirectional, dream, llada

SHAPE = {"vocab_size": 97, "num_layers": 3, "num_heads": 4, "embed_dim": 64, "max_seq_len": 32}


@pytest.fixture(scope="module", params=[4, 2], ids=["MHA", "GQA"])
def pair(request):
    """Ours and transformers' Llama with the same random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    oracle = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=request.param,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
            max_position_embeddings=32,
            attn_implementation="eager",
            tie_word_embeddings=False,
        )
    ).eval()
    ours = llada(**SHAPE, intermediate_dim=160, num_kv_heads=request.param).eval()
    weights = qwen2_hf_to_tune(oracle.state_dict())  # names alone; no rows are reordered
    ours.load_state_dict(weights)
    return ours, oracle


def full_attention(attend):
    """[B, L] bool → transformers' additive mask without causality."""
    mask = torch.zeros(attend.shape[0], 1, attend.shape[1], attend.shape[1])
    return mask.masked_fill(~attend[:, None, None, :], torch.finfo(torch.float32).min)


def test_equals_transformers_llama_without_its_causal_mask(pair):
    ours, oracle = pair
    tokens = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        truth = oracle(tokens, attention_mask=full_attention(torch.ones(3, 21).bool())).logits
        causal = oracle(tokens).logits
        mine = ours(tokens)
    assert (mine - truth).abs().max() < 1e-5
    assert (mine - causal).abs().max() > 1e-2  # the mask makes a difference


def test_equals_transformers_llama_with_padding(pair):
    ours, oracle = pair
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(2))
    attend = torch.ones(2, 12, dtype=torch.bool)
    attend[1, 7:] = False
    with torch.no_grad():
        truth = oracle(tokens, attention_mask=full_attention(attend)).logits
        mine = ours(tokens, mask=attend[:, None])
    assert (mine - truth)[attend].abs().max() < 1e-5


def test_padding_does_not_change_a_row():
    torch.manual_seed(0)
    model = llada(**SHAPE, intermediate_dim=160).eval()
    row = torch.randint(97, (1, 9))
    padded = torch.cat((row, torch.full((1, 6), 5)), dim=1)
    attend = (torch.arange(15) < 9)[None, None]
    with torch.no_grad():
        assert torch.allclose(model(padded, mask=attend)[:, :9], model(row), atol=1e-6)


def test_every_position_sees_every_other():
    torch.manual_seed(0)
    model = llada(**SHAPE, intermediate_dim=160).eval()
    tokens = torch.randint(97, (1, 8))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 97
    with torch.no_grad():
        difference = (model(tokens) - model(changed)).abs().amax(-1)
    assert (difference > 1e-6).all()


def test_bidirectional_keeps_the_decoder_s_parameters():
    decoder = llama2(**SHAPE, num_kv_heads=4, intermediate_dim=160)
    names = list(decoder.state_dict())
    model = bidirectional(decoder)
    assert list(model.state_dict()) == names
    assert model.output.weight is decoder.output.weight


def test_head_receives_the_lm_head_and_the_hidden_states():
    torch.manual_seed(0)
    model = llada(**SHAPE, intermediate_dim=160).eval()
    tokens = torch.randint(97, (2, 8))
    with torch.no_grad():
        logits = model(tokens, head=lambda head, hidden: head(hidden))
        assert torch.equal(logits.float(), model(tokens))


def test_too_long_and_ill_shaped_is_refused():
    with pytest.raises(ValueError, match=r"33 tokens exceeds .* 32"):
        llada(**SHAPE, intermediate_dim=160)(torch.zeros(1, 33, dtype=torch.long))
    with pytest.raises(ValueError, match="embed_dim 64"):
        llada(**{**SHAPE, "num_heads": 5}, intermediate_dim=160)
    with pytest.raises(ValueError, match="num_kv_heads 3"):
        llada(**SHAPE, num_kv_heads=3, intermediate_dim=160)


@pytest.mark.gpu
def test_gpu_logits_equal_the_cpu_s():
    torch.manual_seed(0)
    model = llada(**SHAPE, intermediate_dim=160).eval()
    tokens = torch.randint(97, (2, 16))
    with torch.no_grad():
        on_cpu = model(tokens)
        on_gpu = model.cuda()(tokens.cuda()).cpu()
    assert (on_cpu - on_gpu).abs().max() < 1e-3


def test_positions_alone_are_those_of_all(pair):
    ours, _ = pair
    tokens = torch.randint(97, (3, 21), generator=torch.Generator().manual_seed(6))
    chosen = torch.tensor([0, 5, 20, 21, 40, 62])
    with torch.no_grad():
        whole = ours(tokens, head=lambda head, hidden: head(hidden)).flatten(0, 1)
        some = ours(tokens, positions=chosen, head=lambda head, hidden: head(hidden))
    assert (some - whole[chosen]).abs().max() < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_a_shifted_model_predicts_from_the_position_before(packed):
    """Against the logits at every place: a row's first token from its own, others from the last."""
    torch.manual_seed(0)
    model = dream(**SHAPE, num_kv_heads=2, intermediate_dim=96).eval()
    assert model.shift and not llada(**SHAPE, intermediate_dim=96).shift
    assert llada(**SHAPE, intermediate_dim=96, causal=True).shift
    rows = [torch.randint(97, (n,)) for n in (5, 9)]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    attend = torch.arange(9) < torch.tensor([[5], [9]])
    wanted = [(0, 0), (0, 1), (0, 4), (1, 0), (1, 8)]
    with torch.no_grad():
        truth = model(tokens, mask=attend[:, None])
        given = {"positions": torch.tensor([row * 9 + place for row, place in wanted])}
        if packed:
            starts = (0, 5)
            given = {
                "positions": torch.tensor([starts[row] + place for row, place in wanted]),
                "mask": torch.tensor([5, 9]),
                "input_pos": torch.cat([torch.arange(5), torch.arange(9)])[None],
            }
            tokens = torch.cat(rows)[None]
        else:
            given["mask"] = attend[:, None]
        found = model(tokens, head=lambda head, h: head(h).float(), **given)
    expected = torch.stack([truth[row, max(place - 1, 0)] for row, place in wanted])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embeddings_matrix():
    from torchtune.models.qwen2 import qwen2

    torch.manual_seed(0)
    sizes = {**SHAPE, "intermediate_dim": 96, "num_kv_heads": 2, "tie_word_embeddings": True}
    model = bidirectional(qwen2(**sizes))
    tokens = torch.randint(97, (2, 7))
    logits = model(tokens)
    by_head = model(tokens, head=lambda head, h: head(h))
    torch.testing.assert_close(by_head, logits)
    (found,) = torch.autograd.grad(logits[..., 3].sum(), [model.tok_embeddings.weight])
    assert found[3].abs().sum() > 0
