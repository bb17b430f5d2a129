"""The page that plays a text's unmasking: its data, its script, and what a browser shows of it."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from mdm_plugin.generation import Decoding, Remasking, Step, Threshold, TokenIds, generate
from mdm_plugin.generation.replay import Recorder, Replay, write_replays

NODE = shutil.which("node")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NASTY = "</script><script>alert(1)</script><!-- & \u2028 \u2029 😀 \"'\\ ]]>\nREPLAY_DATA"


def page_data(file):
    """The replays in a page, read as a browser does: up to the first end of the element."""
    text = file.read_text()
    found = re.search(r'<script type="application/json" id="data">(.*?)</script', text, re.S)
    return json.loads(found[1])


def played(replay, done):
    """Pieces and confidences at each position after some steps, by a plain loop."""
    state = [None] * replay["length"]
    for step in replay["steps"][:done]:
        for place, piece, _, confidence in step:
            state[place] = (piece, confidence)
    return state


def joined(state):
    return "".join(x[0] for x in state)


def recorded(model, tokenizer, prompts, decoding, special=None, n=16):
    recorder = Recorder()
    result = generate(
        model,
        prompts,
        decoding,
        special=special or tokenizer,
        max_new_tokens=n,
        on_step=recorder.add,
    )
    names = [f"prompt {i}" for i in range(len(prompts))]
    return result.tokens.tolist(), recorder, recorder.replays(tokenizer, names)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(),
        Decoding(block_length=4, sampler=Threshold(0.011)),
        Decoding(temperature=1.5, sampler=Remasking("random", "linear"), steps=6),
        Decoding(block_length=4, cache="dual"),
    ],
    ids=["llada", "threshold", "warm", "cached"],
)
def test_a_replay_ends_at_the_generated_text(tiny_model, tokenizer, tmp_path, decoding):
    prompts = [tokenizer.encode(x) for x in ("3 + 4", "a longer second prompt", "x")]
    tokens, _, replays = recorded(tiny_model, tokenizer, prompts, decoding)
    write_replays(tmp_path / "r.html", replays)
    for ids, replay in zip(tokens, page_data(tmp_path / "r.html"), strict=True):
        assert replay["text"] == tokenizer.decode(ids)
        assert joined(played(replay, len(replay["steps"]))) == replay["text"]


def test_steps_and_confidences_are_those_of_a_plain_loop(tiny_model, tokenizer):
    """One token a step, LLaDA's order: the loop's likeliest position with its probability."""
    prompt, special = torch.tensor(tokenizer.encode("3 + 4")), TokenIds(tokenizer.mask_id, 0)
    _, recorder, _ = recorded(tiny_model, tokenizer, [prompt], Decoding(), special, n=8)
    x = torch.cat((prompt, torch.full((8,), tokenizer.mask_id)))
    for step in recorder.steps:
        with torch.no_grad():
            logits = tiny_model(x[None])[0]
        logits[:, tokenizer.mask_id] = -torch.inf
        p, best = logits.softmax(-1).max(-1)
        place = int(p.masked_fill(x != tokenizer.mask_id, -1).argmax())
        x[place] = best[place]
        assert step.response[0].tolist() == x[len(prompt) :].tolist()
        assert step.put[0].nonzero().tolist() == [[place - len(prompt)]]
        expected = torch.zeros(8).index_fill(0, torch.tensor(place - len(prompt)), float(p[place]))
        torch.testing.assert_close(step.confidence[0], expected)
    assert len(recorder.steps) == 8


def test_a_replay_is_the_same_in_a_batch_and_alone(tiny_model, tokenizer):
    prompts = [tokenizer.encode(x) for x in ("3 + 4", "a longer second prompt", "x")]
    tiny_model.output.weight.data *= 40  # surer of some tokens than of others
    decoding = Decoding(block_length=4, sampler=Threshold(0.6))  # rows are done at other steps
    _, recorder, together = recorded(tiny_model, tokenizer, prompts, decoding)
    assert min(len(x.steps) for x in together) < len(recorder.steps)
    for prompt, replay in zip(prompts, together, strict=True):
        alone = recorded(tiny_model, tokenizer, [prompt], decoding)[2][0]
        near = [
            (a[:3] == b[:3] and a[3] == pytest.approx(b[3], abs=2e-4))
            for one, other in zip(alone.steps, replay.steps, strict=True)
            for a, b in zip(one, other, strict=True)
        ]
        assert all(near) and alone.text == replay.text


class Backwards:
    """Fills a block from its end, one position a step."""

    needs_steps = False

    def __call__(self, step, late):
        last = step.masked.shape[1] - 1 - step.masked.flip(1).int().argmax(1)
        return torch.zeros_like(step.masked).scatter(1, last[:, None], True)


def test_what_an_end_overwrites_is_played_and_has_no_confidence(tiny_model, tokenizer):
    """The first token, written last, is the end: all behind it become the end, too."""
    prompt, decoding = tokenizer.encode("3 + 4"), Decoding(sampler=Backwards())
    free, _, _ = recorded(
        tiny_model, tokenizer, [prompt], decoding, TokenIds(tokenizer.mask_id, 0), n=8
    )
    end = free[0][0]
    special = TokenIds(tokenizer.mask_id, 0, end)
    tokens, recorder, replays = recorded(tiny_model, tokenizer, [prompt], decoding, special, n=8)
    assert tokens[0] == 8 * [end]
    assert recorder.steps[-1].put[0].tolist() == [True] + 7 * [False]
    last = {place: sure for place, _, _, sure in replays[0].steps[-1]}
    assert last.keys() == {0} | {i for i in range(8) if free[0][i] != end} and len(last) > 1
    assert last.pop(0) > 0 and set(last.values()) == {None}
    for place, step in zip(reversed(range(8)), replays[0].steps, strict=True):
        assert step[0][0] == (place if place else 0)


def test_characters_of_several_tokens_are_whole(tokenizer):
    """Bytes of one character in several tokens, written from the end: no piece has half of it."""
    text = "5 € – 😀 ok"
    ids = [*tokenizer.encode(text), tokenizer.eos_id, tokenizer.eos_id]
    assert len(ids) > len(text) + 2  # some characters are several tokens
    recorder, response = Recorder(), torch.full((1, len(ids)), tokenizer.mask_id)
    for i in reversed(range(len(ids))):
        response, put = response.clone(), torch.zeros_like(response, dtype=torch.bool)
        response[0, i], put[0, i] = ids[i], True
        recorder.add(Step(response, put, put.float()))
    replay = recorder.replays(tokenizer, ["p"])[0]
    assert joined(played(replay._asdict(), len(ids))) == text == replay.text
    assert not any("\ufffd" in piece for step in replay.steps for _, piece, _, _ in step)
    end = tokenizer.tokenizer.id_to_token(tokenizer.eos_id)
    assert [step[0][1:3] for step in replay.steps[:2]] == 2 * [("", end)]


@pytest.fixture
def nasty(tmp_path):
    """A page whose texts would break out of it, if they could."""
    steps = [[(1, NASTY, NASTY, 0.5)], [(0, "4 ", "4 ", 0.25), (2, "", "<|end|>", None)]]
    replays = [Replay(NASTY, "4 " + NASTY, 3, steps), Replay("two", "x", 1, [[(0, "x", "x", 1.0)]])]
    write_replays(tmp_path / "nasty.html", replays)
    return tmp_path / "nasty.html", replays


def test_texts_cannot_leave_their_place_in_the_page(nasty):
    file, replays = nasty
    assert [Replay(**x).text for x in page_data(file)] == [x.text for x in replays]
    text = file.read_text()
    assert text.count("<script") == text.count("</script>") == 2 and "alert(1)<" not in text
    assert "\u2028" not in text and "\u2029" not in text
    assert not re.search(r"https?://|src=|@import|url\(", text)  # nothing from elsewhere


@pytest.mark.skipif(not NODE, reason="needs node, and there is none here")
def test_the_page_s_script_plays_what_a_plain_loop_does(nasty, tmp_path):
    file, _ = nasty
    script = re.findall(r"<script>(.*?)</script>", file.read_text(), re.S)[0]
    call = (
        "const fs = require('fs');"
        f"const replays = JSON.parse(fs.readFileSync({json.dumps(str(tmp_path / 'd.json'))}));"
        "console.log(JSON.stringify(replays.map(r => "
        "[...Array(r.steps.length + 1).keys()].map(i => stateAt(r, i).map("
        "x => x && [x.piece, x.confidence, x.step, described(x)])))));"
    )
    (tmp_path / "d.json").write_text(json.dumps(page_data(file)))
    done = subprocess.run([NODE, "-e", script + call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for replay, states in zip(page_data(file), json.loads(done.stdout), strict=True):
        assert len(states) == len(replay["steps"]) + 1
        for step, state in enumerate(states):
            mine = [x and (x[0], x[1]) for x in state]
            assert mine == played(replay, step)
    shown = json.loads(done.stdout)[0][2]
    assert [x[2] for x in shown] == [2, 1, 2]
    assert shown[0][3] == '"4 " · step 2 · confidence 0.250'
    assert shown[2][3] == '"<|end|>" · step 2 · set by the end before it'


@pytest.mark.skipif(not BROWSER, reason="needs chromium, and there is none here")
def test_a_browser_plays_a_page_to_its_end(nasty):
    """The page plays when it is opened; the browser's clock is run ahead."""
    file, replays = nasty
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu"),
            *(f"--user-data-dir={file.parent / 'profile'}", "--virtual-time-budget=5000"),
            *("--dump-dom", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = done.stdout
    shown = re.search(r'id="response">(.*?)</div>', dom, re.S)[1]
    assert 'class="mask"' not in shown and shown.count('class="token') == 3
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)) == replays[0].text
    assert ">2 of 2</output>" in dom and ">Play</button>" in dom
