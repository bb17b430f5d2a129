"""The packaged configs for LLaDA-8B and Dream-7B, on checkpoints of their layout at a small size:
text by the published loops on transformers' models, and an evaluation of each kind of task."""

import json
import math
import sys

import pytest
import torch

from mdm_plugin.models import ChatTokenizer
from tests.checkpoints import full_attention, oracle, write, write_tokenizer
from tests.recipes.test_eval import GENERATION

CONFIGS = {"llada": "llada/8B", "Dream": "dream/7B"}
MASK_TOKENS = {"llada": "<|mdm_mask|>", "Dream": "<|mask|>"}
# Of the model alone, and what has no CUDA here: everything else is as it is packaged.
SMALL = [
    *("model.vocab_size=640", "model.embed_dim=64", "model.intermediate_dim=160"),
    *("model.num_layers=3", "model.num_heads=4", "model.max_seq_len=160", "device=cpu"),
]


@pytest.fixture(scope="module", params=CONFIGS)
def released(request, tmp_path_factory, data_dir):
    """A family, and a directory as ``tune download`` leaves it; and its model, by transformers."""
    family, directory = request.param, tmp_path_factory.mktemp(request.param)
    model = oracle(family, dtype=torch.bfloat16, vocab_size=640)
    with torch.no_grad():  # far from even predictions, and other ones at each place
        for weight in model.parameters():
            weight.mul_(8 if weight.dim() == 2 else 1)
    write(model, directory, family)
    rows = [json.loads(line) for line in (data_dir / "train.jsonl").open()]
    texts = [turn["content"] for row in rows for turn in row["messages"]]
    write_tokenizer(directory, family, texts, data_dir)
    if family == "llada":  # as the checkpoint says
        assert ChatTokenizer(str(directory), mask_token="<|mdm_mask|>").mask_id == 1
    return family, directory, model


@pytest.fixture
def run(released, monkeypatch, tmp_path):
    """A recipe with its packaged config, in this process."""
    import mdm_eval
    import mdm_generate

    family, directory, _ = released
    monkeypatch.chdir(tmp_path)
    builder = f"model=mdm_plugin.models.{family.lower()}"
    kv = ["model.num_kv_heads=4"] if family == "Dream" else []

    def call(kind, *overrides):
        arguments = [builder, *SMALL, *kv, f"checkpoint_dir={directory}", *overrides]
        monkeypatch.setattr(sys, "argv", ["x", "--config", f"{CONFIGS[family]}_{kind}", *arguments])
        {"eval": mdm_eval, "generate": mdm_generate}[kind].main()

    return call


def published(family, model, prompt, n, mask_id, block):
    """LLaDA's generate.py with as many steps as tokens, or Dream's diffusion_generate with entropy
    at temperature 0 and top_p 0.95: a plain loop, of one row."""
    x = torch.cat((torch.tensor(prompt), torch.full((n,), mask_id)))
    times = torch.linspace(1, 1e-3, n + 1)
    for step in range(n):
        logits = full_attention(model, x[None])[0]
        if family == "Dream":
            logits = torch.cat((logits[:1], logits[:-1]))
        logits[:, mask_id] = -math.inf
        best, masked = logits.argmax(-1), (x == mask_id).nonzero()[:, 0].tolist()
        if family == "llada":
            end = len(prompt) + (step // block + 1) * block
            surest = logits.softmax(-1).amax(-1)
            chosen = [max((i for i in masked if i < end), key=lambda i: surest[i])]
        else:
            order = logits.sort(-1, descending=True)
            p = order.values.softmax(-1)
            p = torch.where(p.cumsum(-1) - p < 0.95, p, 0)
            p = p / p.sum(-1, keepdim=True)
            surest = (p * (p + 1e-10).log()).sum(-1)
            count = int(len(masked) * (1 - times[step + 1] / times[step]))
            count = count if step < n - 1 else len(masked)
            chosen = sorted(masked, key=lambda i: -surest[i])[:count]
        x[chosen] = best[chosen]
    return x[len(prompt) :].tolist()


def test_llada_and_dream_write_as_their_authors_code_does(released, run, tmp_path):
    family, directory, model = released
    questions = ["7 - 2 + 9 =", "State the answer to 3 + 4."]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": x}) + "\n" for x in questions))
    n = 64 if family == "llada" else 24  # two blocks; one
    given = ("prompts=p.jsonl", f"max_new_tokens={n}", "dtype=fp32", "decoding.temperature=0")
    run("generate", *given, "output=texts.jsonl")
    found = [json.loads(x)["completion"] for x in (tmp_path / "texts.jsonl").open()]
    tokenizer = ChatTokenizer(str(directory), mask_token=MASK_TOKENS[family])
    reference = model.float()
    for text, question in zip(found, questions, strict=True):
        prompt = tokenizer.prompt([{"role": "user", "content": question}])
        ids = published(family, reference, prompt, n, tokenizer.mask_id, block=32)
        assert text == tokenizer.decode(ids)
    assert len(set(found)) == 2
    model.to(torch.bfloat16)


def test_text_as_it_is_packaged_and_by_the_seed(released, run, capsys):
    for seed in (0, 0, 1):
        run("generate", "prompt=7 - 2 + 9 =", "max_new_tokens=32", f"seed={seed}")
    texts = [json.loads(x)["completion"] for x in capsys.readouterr().out.splitlines()]
    assert texts[0] == texts[1]
    assert (texts[0] == texts[2]) == (released[0] == "llada")  # Dream's are drawn


@pytest.mark.slow  # lm-eval reads its thousands of files
def test_the_bound_right_answers_and_lm_eval_s_tasks_by_their_packaged_configs(
    released, run, data_dir, tmp_path
):
    pytest.importorskip("lm_eval")
    lines = (data_dir / "val.jsonl").read_text().splitlines()[:6]
    (tmp_path / "test.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "q.jsonl").write_text('{"question": "4 + 5 ="}\n')
    (tmp_path / "tasks").mkdir()
    task = GENERATION.replace("FILE", str(tmp_path / "q.jsonl")).replace("toks: 4", "toks: 32")
    (tmp_path / "tasks/generate.yaml").write_text(task)
    run(
        "eval",
        *("dataset.source=test.jsonl", "rows=test.jsonl", "tokenizer.max_seq_len=160"),
        *(
            "tasks=[nelbo,exact_match,sums_generate]",
            "verifier._component_=mdm_plugin.quickstart.verifier",
        ),
        *("max_new_tokens=32", "draws=2", "lm_eval.include_path=tasks", "output_dir=e"),
    )
    found = json.loads((tmp_path / "e/results.json").read_text())
    assert found["checkpoint"] == str(released[1])
    found = found["tasks"]
    assert found["nelbo"]["rows"] == found["exact_match"]["rows"] == 6
    assert found["nelbo"]["nats_per_token"] > math.log(640)  # worse than even predictions
    assert found["exact_match"]["accuracy"] == found["sums_generate"]["exact_match"] == 0
