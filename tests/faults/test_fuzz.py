"""Rows, configs and files that are wrong in ways that nobody thought of."""

import json
import os
import pickle
import string

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from mdm_plugin.config.components import instantiate
from mdm_plugin.config.loading import load_config
from mdm_plugin.config.options import Options
from mdm_plugin.config.secrets import redacted
from mdm_plugin.data import chat_dataset, text_dataset
from mdm_plugin.errors import UserError
from mdm_plugin.models import ChatTokenizer
from tests.conftest import TINY

EXAMPLES = 250 if os.environ.get("MDM_FAULTS") == "all" else 60
QUIET = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
turns = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "ipython", "tool", ""]) | values,
        "content": st.text(max_size=40) | values,
        "other": values,
    },
)
rows = st.one_of(
    values,
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=4) | values}),
    st.fixed_dictionaries(
        {"messages": st.lists(turns, max_size=4), "id": values, "text": st.text() | values}
    ),
)
lines = st.one_of(
    rows.map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=60),
    st.just(b"[" * 100_000),
    st.just('{"messages": [{"role": "user", "content": "\\ud800"}]}'.encode("utf-8", "ignore")),
)
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
GOOD = json.dumps({"text": "a", "messages": TALK}).encode()


@QUIET
@given(bad=st.lists(lines, min_size=20, max_size=20))
def test_no_row_does_more_than_the_policy_says(bad, tokenizer, tmp_path):
    """60 × 20 × 2 rows, or in `make faults` 250 × 20 × 2 = 10,000."""
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD, *bad, GOOD]) + b"\n")
    for build in (chat_dataset, text_dataset):
        report = tmp_path / "bad.jsonl"
        found = build(tokenizer, source=str(file), on_bad_row="skip", bad_rows_file=str(report))
        assert len(found) >= 2
        for line in report.read_text().splitlines():
            assert json.loads(line)["place"].startswith(str(file))
        try:
            build(tokenizer, source=str(file))
        except UserError as error:
            assert str(error).startswith(f"{file}") and "\n" not in str(error).strip()


KEYS = """batch_size model.num_layers loss.normalize optimizer.lr epochs masking timesteps device
seed model._component_ checkpointer.checkpoint_dir clip_grad_norm dataset dataset.source ema x.y
lr_scheduler.num_warmup_steps"""
names = st.sampled_from(KEYS.split())
texts = st.text(alphabet=string.printable, max_size=20)


@QUIET
@given(overrides=st.lists(st.tuples(names, texts).map("=".join) | texts, max_size=4))
def test_no_override_ends_in_anything_but_a_config_or_one_line(overrides):
    try:
        cfg = load_config(str(TINY), ["data_dir=d", "output_dir=o", *overrides], Options)
    except UserError as error:
        assert str(error).strip()
    else:
        assert cfg.batch_size is not None


@QUIET
@given(content=st.binary(max_size=200) | texts.map(str.encode))
def test_no_config_file_ends_in_anything_but_one_line(content, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(UserError):
        load_config(str(file), [], Options)


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "subprocess.run",
        "builtins.exec",
        "torch.hub.load",
        "torch.load",
        "mdm_plugin.cli.sys.exit",
        "mdm_plugin.quickstart.data.Path",
        "torchtune.utils._logging.os.system",
        "mdm_plugin.config.loading.os.system",
    ],
)
def test_a_component_outside_the_allowed_packages_is_refused(path, tmp_path, monkeypatch):
    file = tmp_path / "shared.yaml"
    file.write_text(
        TINY.read_text().replace("mdm_plugin.masking.Bernoulli", path) + "\nallow_components: [os]"
    )
    given_ = ["data_dir=d", "output_dir=o"]
    with pytest.raises(UserError, match="allow_components: unknown key"):
        load_config(str(file), given_, Options)
    file.write_text(file.read_text().replace("allow_components: [os]", ""))
    with pytest.raises(
        UserError, match=r"masking\._component_: .*(allow_components=\[|cannot be imported)"
    ):
        load_config(str(file), given_, Options)


def test_the_user_s_own_component_is_allowed_by_the_command_line_or_the_environment(
    tmp_path, monkeypatch
):
    (tmp_path / "own_masks.py").write_text(
        "from mdm_plugin.masking import Bernoulli\nclass Own(Bernoulli): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "own.yaml"
    file.write_text(TINY.read_text().replace("mdm_plugin.masking.Bernoulli", "own_masks.Own"))
    given_ = ["data_dir=d", "output_dir=o"]
    cfg = load_config(str(file), [*given_, "allow_components=[own_masks]"], Options)
    assert type(instantiate(cfg, "masking")).__name__ == "Own"
    assert "allow_components" not in cfg
    with pytest.raises(UserError, match="own_masks"):
        load_config(str(file), given_, Options)
    monkeypatch.setenv("MDM_ALLOW_COMPONENTS", "own_masks")
    load_config(str(file), given_, Options)


def test_secrets_are_in_no_saved_config():
    cfg = OmegaConf.create(
        {
            "dataset": {"token": "hf_abc", "hf_token": "hf_abc", "source": "x"},
            "metric_logger": {"api_key": "s3cr3t", "password": "s3cr3t", "entity": "me"},
            "tokenizer": {"mask_token": "<m>", "max_new_tokens": 5},
        }
    )
    text = str(redacted(cfg))
    assert "hf_abc" not in text and "s3cr3t" not in text and "<m>" in text and "me" in text


class Exploit:
    def __reduce__(self):
        return os.mkdir, (os.environ["EXPLOITED"],)


def test_a_pickle_is_never_loaded_whatever_it_is_called(tmp_path, monkeypatch, tokenizer):
    from mdm_plugin.checkpoint.weights import Weights

    monkeypatch.setenv("EXPLOITED", str(tmp_path / "exploited"))
    directory = tmp_path / "weights"
    directory.mkdir()
    for name in ("model.safetensors", "pytorch_model.bin"):
        (directory / name).write_bytes(pickle.dumps(Exploit()))
        with pytest.raises(UserError):
            Weights(directory)
        (directory / name).unlink()
    assert not (tmp_path / "exploited").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ self._TemplateReference__context }}{{ self.__init__.__globals__ }}",
        "{% set _ = messages.append({}) %}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_malicious_template_is_refused(template, data_dir):
    with pytest.raises(UserError, match="chat_template"):
        ChatTokenizer(str(data_dir), chat_template=template).prompt(
            [{"role": "user", "content": "a"}]
        )
