"""`~` and environment variables mean the same in every key that holds a path, and in --config."""

import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.config.inputs import ModelConfig
from finetune.config.load import ConfigError, load_config, to_yaml
from finetune.config.schema import Config

KEYS = ["output_dir", "data.source", "model.pretrained", "checkpoint.resume", "validation.quality.features"]
BASE = """
output_dir: run
model: {pretrained: user/model}
data: {source: digits}
training: {micro_batch_size: 1, gradient_accumulation_steps: 1, max_train_steps: 1}
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("BAD", "a\nb")
    monkeypatch.delenv("MISSING", raising=False)


def load(folder, *overrides: str) -> Config:
    (folder / "config.yaml").write_text(BASE)
    return load_config(folder / "config.yaml", overrides)


def value(config: Config, key: str) -> str:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def problem(folder, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, *overrides)
    (line,) = caught.value.problems
    return line


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("~/x", "/home/me/x"),
        ("'~'", "/home/me"),  # a bare ~ is YAML's null
        ("~root/x", f"{pwd.getpwnam('root').pw_dir}/x"),
        ("$DATA/x", "/data/x"),
        ("${DATA}x", "/datax"),
        ("~/$DATA", "/home/me//data"),
        ("a~/b", "a~/b"),
        ("./~x", "./~x"),
        ("cost$/x", "cost$/x"),
        ("user/name", "user/name"),
        ("digits", "digits"),
        ("auto", "auto"),
        ("never", "never"),
        ("a b/ü", "a b/ü"),
    ],
)
def test_paths_are_expanded_in_every_key(tmp_path, key, given, expected):
    config = load(tmp_path, f"{key}={given}")
    assert value(config, key) == expected
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "resolved.yaml") == config


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("$MISSING/x", "found '$MISSING/x'; expected a path, but the environment variable MISSING is not set"),
        ("${MISSING}", "found '${MISSING}'; expected a path, but the environment variable MISSING is not set"),
        ("$EMPTY/x", "found '$EMPTY/x'; expected a path, but the environment variable EMPTY is not set"),
        ("$BAD/x", r"found '$BAD/x'; expected a path, but it stands for 'a\nb/x'"),
        (
            "~nobody-here/x",
            "found '~nobody-here/x'; expected the name of a user after ~; write ./~nobody-here for a file of that name",
        ),
    ],
)
def test_an_unknown_variable_or_user_is_refused_in_every_key(tmp_path, key, given, expected):
    assert problem(tmp_path, f"{key}={given}") == f"command line: {key}: {expected}"


def test_the_config_file_itself_may_be_named_so(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", str(tmp_path))
    config = load(tmp_path)
    assert load_config("~/config.yaml") == load_config("$DATA/config.yaml") == config
    with pytest.raises(ConfigError, match=r"^--config: found '\$MISSING/x'; expected a path, but"):
        load_config("$MISSING/x")


@given(st.text(st.characters(exclude_characters="~$", exclude_categories=["C"]), min_size=1).filter(str.strip))
def test_text_without_tilde_and_dollar_stays_as_it_is(text):
    assert ModelConfig(pretrained=text).pretrained == text
