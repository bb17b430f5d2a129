"""Models that write block by block against transformers' Qwen2 and Qwen3 under the block mask."""

import pytest
import torch

from mdm_plugin.models import bidirectional, dream, lora_qwen3, qwen3
from mdm_plugin.models.blocks import BlockAttention
from mdm_plugin.models.naming import FAMILIES

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    "max_position_embeddings": 32,
    "attn_implementation": "eager",
}
OURS = {
    "vocab_size": 97,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "intermediate_dim": 160,
    "max_seq_len": 32,
}


@pytest.fixture(scope="module", params=["SDAR", "SDAR, tied", "Fast-dLLM"])
def pair(request):
    """Ours and transformers' with the same random weights, by the checkpoint's names."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tied = "tied" in request.param
    if request.param == "Fast-dLLM":
        oracle = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
        ours = dream(**OURS, block_length=4)
        for name, parameter in oracle.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter)
    else:
        oracle = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24, tie_word_embeddings=tied))
        ours = qwen3(**OURS, head_dim=24, tie_word_embeddings=tied, block_length=4)
        for name, parameter in oracle.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 2)  # the order of norm and turn matters
    family = FAMILIES["Fast_dLLM_Qwen" if request.param == "Fast-dLLM" else "sdar"]
    theirs = oracle.state_dict()
    weights = {name: theirs[family.to_hf(name)] for name in ours.state_dict()}
    assert len(weights) == len(theirs) - tied
    ours.load_state_dict(weights)
    return ours.eval(), oracle.eval()


def test_logits_under_the_block_mask(pair):
    ours, oracle = pair
    tokens = torch.randint(97, (3, 20), generator=torch.Generator().manual_seed(1))
    block = torch.arange(20) // 4
    allowed = block[:, None] >= block
    mask = torch.zeros(1, 1, 20, 20).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        truth = oracle(tokens, attention_mask=mask.expand(3, -1, -1, -1)).logits
        mine = ours(tokens, mask=allowed[None])
        causal = oracle(tokens).logits
    assert (mine - truth).abs().max() < 1e-4
    assert (mine - causal).abs().max() > 1e-2


def test_the_training_layout_gives_the_oracle_s_logits(pair):
    """A view's block sees itself and the clean ones before it: the oracle, a block at a time."""
    ours, oracle = pair
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(97, (2, 16), generator=generator)
    views = torch.randint(97, (2, 2, 16), generator=generator)
    attend = BlockAttention(4, 16, 4, 2)
    view, row, column = (
        x.flatten()
        for x in torch.meshgrid(
            torch.arange(2), torch.arange(2), torch.arange(4, 16), indexing="ij"
        )
    )
    shifted, ours.shift = ours.shift, False
    with torch.no_grad():
        mine = ours(
            attend.lay_out(views, clean),
            mask=attend,
            input_pos=attend.columns().expand(2, -1),
            positions=attend.positions(view, row, column),
            head=lambda head, h: head(h),
        )
    ours.shift = shifted
    for logits, v, r, i in zip(mine, view.tolist(), row.tolist(), column.tolist(), strict=True):
        start = i // 4 * 4
        tokens = torch.cat((clean[r, :start], views[v, r, start : start + 4]))
        block = torch.arange(len(tokens)) // 4
        mask = torch.zeros(1, 1, len(tokens), len(tokens)).masked_fill(
            block[:, None] < block, torch.finfo(torch.float32).min
        )
        with torch.no_grad():
            truth = oracle(tokens[None], attention_mask=mask).logits[0, i]
        assert (logits - truth).abs().max() < 1e-4


def test_adapters_begin_as_the_model_without_them():
    torch.manual_seed(0)
    plain = qwen3(**OURS, head_dim=24, block_length=4).eval()
    adapted = lora_qwen3(
        ["q_proj", "v_proj", "output_proj"],
        **OURS,
        head_dim=24,
        block_length=4,
        apply_lora_to_mlp=True,
        lora_rank=4,
        lora_alpha=8,
    ).eval()
    missing, unexpected = adapted.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and all("lora" in name for name in missing)
    tokens = torch.randint(97, (2, 12))
    with torch.no_grad():
        assert torch.equal(adapted(tokens), plain(tokens))
    with pytest.raises(ValueError, match="lora_attn_modules"):
        lora_qwen3(["w1"], **OURS)
    with pytest.raises(ValueError, match="head_dim"):
        qwen3(**OURS, head_dim=7)


def test_blocks_do_not_go_with_a_causal_model():
    from torchtune.models.llama2 import llama2

    sizes = {"vocab_size": 9, "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "embed_dim": 4}
    for wrong in ({"block_length": 0}, {"block_length": 4, "causal": True}):
        with pytest.raises(ValueError, match="block_length"):
            bidirectional(llama2(**sizes, max_seq_len=8), **wrong)
