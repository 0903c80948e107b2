"""Properties of any config: read or explained, and a written config is read as the same one."""

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config.load import ConfigError, load_config, to_yaml
from finetune.config.schema import Config
from harness.config_files import VALID, write

KEY_PATHS = [
    f"{name}.{key}"
    for name, field in Config.model_fields.items()
    for key in getattr(field.annotation, "model_fields", ())
]
KEY_NAMES = sorted({part for path in [*KEY_PATHS, *Config.model_fields] for part in path.split(".")})
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["auto", "1e-5", "constant"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(KEY_NAMES) | st.text(), inner),
    max_leaves=20,
)
PIECES = st.sampled_from(
    [*"\n\t:-?&*!|>'\"%@`#,[]{} ", "\n  ", ": ", "- ", "<<", "!!", "\\u", "1e", "&a", "*a", *KEY_NAMES]
)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("configs")


def load_or_explain(file, overrides=()):
    """It loads as a config that can be written and read again, or fails with one-line problems."""
    config, problems = None, ()
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        problems = error.problems
    assert config or problems
    assert all(problem.splitlines() == [problem] for problem in problems)
    assert "pydantic" not in "".join(problems)
    if config:
        assert load_config(write(file.parent, to_yaml(config))) == config


@settings(max_examples=100, deadline=None)
@given(content=st.binary() | st.text() | st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_any_file_is_read_or_explained(scratch, content):
    load_or_explain(write(scratch, content))
    load_or_explain(write(scratch, VALID.encode() + (content if isinstance(content, bytes) else content.encode())))


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(values=st.dictionaries(st.sampled_from(list(Config.model_fields)) | st.text(), VALUES))
def test_any_values_are_loaded_or_explained(scratch, values):
    load_or_explain(write(scratch, yaml.safe_dump(values, allow_unicode=True)))
    load_or_explain(write(scratch, yaml.safe_dump({**yaml.safe_load(VALID), **values})))


@settings(max_examples=100, deadline=None)
@given(
    overrides=st.lists(
        st.text()
        | st.builds(
            "{}={}".format,
            st.sampled_from(KEY_PATHS) | st.lists(st.sampled_from(KEY_NAMES) | st.text()).map(".".join),
            VALUES | st.lists(PIECES).map("".join),
        )
    )
)
def test_any_override_is_applied_or_explained(scratch, overrides):
    load_or_explain(write(scratch, VALID), overrides)


LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)
PATHS = LINES.filter(lambda path: not path.startswith("~") and "$" not in path)  # those are expanded: see test_paths
COUNTS = st.integers(1, 10**18)
RATES = st.floats(0, exclude_min=True, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)
FREE = st.dictionaries(st.text(), JSON)
CONFIGS = st.fixed_dictionaries(
    {
        "output_dir": PATHS,
        "model": st.fixed_dictionaries({"unet": FREE}, optional={"noise_scheduler": FREE}),
        "data": st.fixed_dictionaries(
            {"source": PATHS},
            optional={
                "labels": st.none() | st.lists(st.integers(-(10**18), 10**18) | st.text(), min_size=1),
                "label_column": st.none() | LINES,
                "random_flip": st.booleans(),
                "validation_fraction": st.floats(0, 1, exclude_max=True),
            },
        ),
        "training": st.fixed_dictionaries(
            {"micro_batch_size": COUNTS, "gradient_accumulation_steps": COUNTS, "max_train_steps": COUNTS},
            optional={"snr_gamma": st.none() | RATES},
        ),
    },
    optional={
        "seed": st.integers(0, 2**63 - 1),
        "optimizer": st.fixed_dictionaries({"learning_rate": RATES, "betas": st.just([0, 0.5])}),
        "checkpoint": st.fixed_dictionaries({"resume": PATHS}),
        "logging": st.fixed_dictionaries({"tracker": st.none() | LINES}),
    },
)


@settings(max_examples=100, deadline=None)
@given(values=CONFIGS)
def test_a_written_config_loads_as_an_equal_config(scratch, values):
    config = Config.model_validate(values)
    assert load_config(write(scratch, to_yaml(config))) == config


ODD_TEXTS = [
    "",
    " a",
    "a: b",
    "#",
    "~",
    "true",
    "no",
    "5",
    "1e5",
    "0E0",
    ".5",
    "0x10",
    "12:30",
    "2020-01-01",
    "<<",
    "=",
]
ODD_TEXTS += [
    "café",
    "\n",
    "a\n b ",
    "\x85",
    "\u2028",
    "\0",
    "!!int",
    "&a",
    "*a",
    "'",
    '"',
    "\ufeff",
    "x" * 200 + " " + "y" * 200,
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_an_unusual_text_is_quoted_so_that_it_stays_text(text, tmp_path):
    values = {**yaml.safe_load(VALID), "model": {"unet": {text: text, "list": [text]}}}
    written = to_yaml(Config.model_validate(values))
    assert load_config(write(tmp_path, written)).model.unet == values["model"]["unet"]
    assert yaml.safe_load(written)["model"]["unet"] == values["model"]["unet"]  # PyYAML's own reader agrees


def test_aliases_are_read_but_not_written(tmp_path):
    shared = [1, [2, 3]]
    text = yaml.safe_dump({**yaml.safe_load(VALID), "model": {"unet": {"a": shared, "b": shared}}})
    assert "*id" in text
    config = load_config(write(tmp_path, text))
    assert config.model.unet == {"a": shared, "b": shared}
    assert "*id" not in to_yaml(config)
