"""Configs: what a good one becomes, what is said about a bad one, and the arithmetic of the batch."""

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.config import (
    Config,
    ConfigError,
    LRSchedulerConfig,
    TrainingConfig,
    UserError,
    load_config,
    micro_batch_candidates,
    plan_batch,
    to_yaml,
)

ROOT = Path(__file__).parent.parent

GOOD = """\
output_dir: runs/test
model: {pretrained: user/base}
data:
  source: digits
training:
  micro_batch_size: 16
  gradient_accumulation_steps: 4
  num_epochs: 2
"""

RESOLVED = """\
output_dir: runs/test
seed: 0
model:
  pretrained: user/base
  unet: null
  noise_scheduler: {}
  gradient_checkpointing: false
data:
  source: digits
  split: train
  image_column: image
  label_column: null
  labels: null
  resolution: null
  crop: center
  random_flip: false
  background: white
  on_bad_image: error
  num_workers: 2
  validation_fraction: 0.05
  validation_split: null
training:
  global_batch_size: null
  micro_batch_size: 16
  gradient_accumulation_steps: 4
  num_epochs: 2
  max_train_steps: null
  max_grad_norm: 1.0
  timestep_sampling: stratified
  snr_gamma: null
  nonfinite_loss: stop
optimizer:
  name: adamw
  learning_rate: 1.0e-05
  betas:
  - 0.9
  - 0.999
  weight_decay: 0.01
  eps: 1.0e-08
lr_scheduler:
  name: constant
  warmup_steps: 0
  num_cycles: 1
  power: 1.0
  step_rules: null
ema:
  enabled: true
  decay: 0.9999
  power: 0.75
checkpoint:
  every_steps: 500
  keep: 3
  resume: auto
validation:
  every_steps: 100
  images: 64
samples:
  every_steps: 500
  count: 16
  inference_steps: 40
logging:
  every_steps: 1
  tracker: tensorboard
export:
  push_to_hub: null
"""


def write(folder, content):
    file = folder / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def good(folder, *overrides):
    return load_config(write(folder, GOOD), overrides)


# Good configs


def test_what_a_config_leaves_out_is_as_designed(tmp_path):
    config = good(tmp_path)
    assert to_yaml(config) == RESOLVED
    assert load_config(write(tmp_path, RESOLVED)) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_config(file, tmp_path):
    config = load_config(file)
    assert load_config(write(tmp_path, to_yaml(config))) == config
    assert config.output_dir == f"runs/{file.stem}"


def test_every_recipe_is_shipped():
    names = {file.name for file in (ROOT / "configs").glob("*.yaml")}
    assert names >= {"digits.yaml", "digits-base.yaml", "butterflies.yaml", "wikiart.yaml"}


# (override, section, key, what the value becomes)
OVERRIDES = [
    ("optimizer.learning_rate=1e-4", "optimizer", "learning_rate", 1e-4),
    ("optimizer.learning_rate=3E-4", "optimizer", "learning_rate", 3e-4),
    ("optimizer.learning_rate=1", "optimizer", "learning_rate", 1.0),
    ("optimizer.betas=[0, 0.5]", "optimizer", "betas", (0.0, 0.5)),
    ("training.max_grad_norm=null", "training", "max_grad_norm", None),
    ("training.max_grad_norm=", "training", "max_grad_norm", None),
    ("training.num_epochs=1_000", "training", "num_epochs", 1000),
    ("data.labels=[5, cat]", "data", "labels", (5, "cat")),
    ("data.labels=[no, 2020-01-01]", "data", "labels", ("no", "2020-01-01")),
    ("data.source=C:/pictures=2", "data", "source", "C:/pictures=2"),
    ("data.source='# 1: a'", "data", "source", "# 1: a"),
    ("data.validation_split=test[:10%]", "data", "validation_split", "test[:10%]"),
    ("model.noise_scheduler.prediction_type=sample", "model", "noise_scheduler", {"prediction_type": "sample"}),
    ("model.noise_scheduler.a.b=[.5]", "model", "noise_scheduler", {"a": {"b": [0.5]}}),
    ("checkpoint.resume=runs/test/checkpoint-7", "checkpoint", "resume", "runs/test/checkpoint-7"),
    ("samples.count=0", "samples", "count", 0),
    ("ema={enabled: false}", "ema", "enabled", False),
    ("ema.decay=1", "ema", "decay", 1.0),
    ("data.validation_fraction=0", "data", "validation_fraction", 0.0),
    ("lr_scheduler={name: constant_with_warmup, warmup_steps: 9}", "lr_scheduler", "warmup_steps", 9),
    ("lr_scheduler={name: cosine_with_restarts, num_cycles: 2}", "lr_scheduler", "num_cycles", 2),
    ("lr_scheduler={name: polynomial, power: 2}", "lr_scheduler", "power", 2.0),
    ("lr_scheduler={name: piecewise_constant, step_rules: '1:9,2e-1'}", "lr_scheduler", "step_rules", "1:9,2e-1"),
    ("training={micro_batch_size: auto, global_batch_size: 8, num_epochs: 1}", "training", "micro_batch_size", "auto"),
    ("export.push_to_hub=some.one/my_model-2", "export", "push_to_hub", "some.one/my_model-2"),
    ("logging.tracker=null", "logging", "tracker", None),
]


@pytest.mark.parametrize(("override", "section", "key", "value"), OVERRIDES, ids=[row[0] for row in OVERRIDES])
def test_override(override, section, key, value, tmp_path):
    found = getattr(getattr(good(tmp_path, override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_several_overrides_counts(tmp_path):
    assert good(tmp_path, "seed=1", "seed=2").seed == 2


def test_overrides_fill_in_a_section_that_the_file_lacks(tmp_path):
    file = write(tmp_path, GOOD.replace("model: {pretrained: user/base}\n", ""))
    assert load_config(file, ["model.unet.layers_per_block=2"]).model.unet == {"layers_per_block": 2}


def test_an_override_of_one_use_of_an_alias_leaves_the_others(tmp_path):
    text = GOOD + "validation: &often\n  every_steps: 7\nsamples: *often\n"
    config = load_config(write(tmp_path, text), ["samples.every_steps=9"])
    assert (config.validation.every_steps, config.samples.every_steps) == (7, 9)


@pytest.mark.parametrize("text", ["\ufeff" + GOOD, GOOD.replace("\n", "\r\n"), "%YAML 1.2\n---\n" + GOOD + "...\n"])
def test_how_a_file_is_written_does_not_matter(text, tmp_path):
    assert load_config(write(tmp_path, text)) == good(tmp_path)


def test_config_knows_nothing_of_torch():
    code = "import sys, finetune.config; print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_schedules_are_those_of_diffusers():
    from diffusers.optimization import SchedulerType

    names = [name for part in get_args(LRSchedulerConfig.model_fields["name"].annotation) for name in get_args(part)]
    assert sorted(names) == sorted(kind.value for kind in SchedulerType)


def test_a_config_cannot_be_changed(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        good(tmp_path).training.num_epochs = 3


def test_user_error():
    error = ConfigError("one", "two", exit_code=3)
    assert isinstance(error, UserError)
    assert (error.problems, error.exit_code, str(error)) == (("one", "two"), 3, "one\ntwo")
    assert UserError("one").exit_code == 2
    copied = pickle.loads(pickle.dumps(error))  # as it comes out of a data worker
    assert (copied.problems, copied.exit_code) == (error.problems, error.exit_code)


# Bad configs


def swap(old, new):
    assert old in GOOD
    return GOOD.replace(old, new)


COUNT = "expected a whole number above 0"
KEYS = ", ".join(Config.model_fields)
SIZES = "global_batch_size, micro_batch_size, gradient_accumulation_steps"
LABELS = "expected a list of numbers or texts or null"
SEED = "expected a whole number from 0 to 2^63 - 1"
RULES = "expected factor:until_step,...,factor like 1:100,0.1:200,0.01 or null"
PIECEWISE = "lr_scheduler={{name: piecewise_constant, step_rules: '{}'}}".format
NO_CODE = r"FILE: found an escape like \ud800 that is no character; expected the character"

# (what is wrong, the file, each line that is expected). FILE stands for the file's name; a line that ends in ... may go
# on.
BAD_FILES = [
    # keys
    ("unknown section", GOOD + "foo: 1", f"FILE: foo: unknown key; expected one of {KEYS}"),
    ("misspelt section", GOOD + "optimiser: {}", "FILE: optimiser: unknown key; did you mean optimizer?"),
    (
        "misspelt key",
        swap("micro_batch_size", "micro_batchsize"),
        "FILE: training.micro_batchsize: unknown key; did you mean training.micro_batch_size?",
    ),
    (
        "key in capitals",
        swap("source", "SOURCE"),
        "FILE: data.source: missing; expected a line of text",
        "FILE: data.SOURCE: unknown key; did you mean data.source?",
    ),
    ("key elsewhere", GOOD + "betas: 1", "FILE: betas: unknown key; did you mean optimizer.betas?"),
    (
        "key in several places",
        GOOD + "every_steps: 3",
        "FILE: every_steps: unknown key; did you mean checkpoint.every_steps or validation.every_steps or ...",
    ),
    ("key like none", GOOD + "ema: {zzz: 1}", "FILE: ema.zzz: unknown key; expected one of enabled, decay, power"),
    ("key of two lines", GOOD + '"a\\nb": 1', r"FILE: 'a\nb': unknown key; expected one of ..."),
    ("merge key", GOOD + "ema: {<<: {decay: 0.5}}", "FILE: ema.<<: unknown key; expected one of enabled, decay, power"),
    ("number as key", GOOD + "5: 1", "FILE: line 9, column 1: found a key that is no name; expected names"),
    ("list as key", GOOD + "? [a]\n: 1", "FILE: line 9, column 3: found a key that is no name; expected names"),
    ("true as key", GOOD + "ema: {true: 1}", "FILE: line 9, column 7: found a key that is no name; expected names"),
    ("section twice", GOOD + "data: {}", "FILE: line 9, column 1: found the key 'data' again; expected it once"),
    (
        "key twice",
        swap("  num_epochs", "  num_epochs: 3\n  num_epochs"),
        "FILE: line 9, column 3: found the key 'num_epochs' again; expected it once",
    ),
    ("no section", swap("model: {pretrained: user/base}\n", ""), "FILE: model: missing; expected a mapping with ..."),
    ("no output", swap("output_dir: runs/test\n", ""), "FILE: output_dir: missing; expected a line of text"),
    # types
    ("number as section", GOOD + "ema: 3", "FILE: ema: found 3; expected a mapping with enabled, decay, power"),
    ("nothing as section", GOOD + "ema:", "FILE: ema: found null; expected a mapping with enabled, decay, power"),
    ("list as section", GOOD + "export: [1]", "FILE: export: found [1]; expected a mapping with push_to_hub"),
    ("list as text", swap("digits", "[a, b]"), "FILE: data.source: found ['a', 'b']; expected a line of text"),
    ("word as number", swap(": 2", ": two"), f"FILE: training.num_epochs: found 'two'; {COUNT} or null"),
    ("quoted number", swap(": 2", ": '2'"), f"FILE: training.num_epochs: found '2'; {COUNT} or null"),
    ("octal number", swap(": 2", ": 02"), f"FILE: training.num_epochs: found '02'; {COUNT} or null"),
    ("part of a whole", swap(": 2", ": 2.5"), f"FILE: training.num_epochs: found 2.5; {COUNT} or null"),
    ("whole with a point", swap(": 2", ": 2.0"), f"FILE: training.num_epochs: found 2.0; {COUNT} or null"),
    ("true as number", GOOD + "seed: true", f"FILE: seed: found true; {SEED}"),
    ("value of two lines", GOOD + 'seed: "a\\nb\\u2028c"', rf"FILE: seed: found 'a\nb\u2028c'; {SEED}"),
    ("value of 500 letters", GOOD + f"seed: {'x' * 500}", f"FILE: seed: found '{'x' * 56}...; {SEED}"),
    # values that do not go together
    (
        "no model",
        swap("{pretrained: user/base}", "{}"),
        "FILE: model: found neither of the two; expected exactly one of pretrained, unet",
    ),
    (
        "two models",
        swap("user/base", "user/base, unet: {}"),
        "FILE: model: found pretrained and unet; expected exactly one of pretrained, unet",
    ),
    (
        "no length",
        swap("  num_epochs: 2\n", ""),
        "FILE: training: found neither of the two; expected num_epochs or max_train_steps",
    ),
    (
        "no batch",
        swap("  micro_batch_size: 16\n  gradient_accumulation_steps: 4\n", ""),
        f"FILE: training: found none of {SIZES}; expected at least two",
    ),
    (
        "half a batch",
        swap("  micro_batch_size: 16\n", ""),
        f"FILE: training: found gradient_accumulation_steps of {SIZES}; expected at least two",
    ),
    (
        "auto alone",
        swap("16\n  gradient_accumulation_steps: 4", "auto"),
        "FILE: training.micro_batch_size: found auto with micro_batch_size; expected with auto just global_batch_size",
    ),
    (
        "auto with steps",
        swap("16", "auto\n  global_batch_size: 64"),
        f"FILE: training.micro_batch_size: found auto with {SIZES}; expected with auto just global_batch_size",
    ),
    (
        "indivisible by micro-batches",
        swap("gradient_accumulation_steps: 4", "global_batch_size: 60"),
        "FILE: training: found global_batch_size 60; expected a multiple of micro_batch_size 16",
    ),
    (
        "indivisible by steps",
        swap("micro_batch_size: 16", "global_batch_size: 62"),
        "FILE: training: found global_batch_size 62; expected a multiple of gradient_accumulation_steps 4",
    ),
    (
        "three sizes that disagree",
        swap("size: 16", "size: 16\n  global_batch_size: 96"),
        "FILE: training: found global_batch_size 96; "
        "expected a multiple of micro_batch_size 16 x gradient_accumulation_steps 4 = 64",
    ),
    (
        "nine things at once",
        "seed: -1\nsede: 1\nmodel: {}\ndata: 5\ntraining: {num_epochs: 0, epochs: 1}\nema: {decay: 2, enabled: 1}",
        "FILE: output_dir: missing; expected a line of text",
        f"FILE: seed: found -1; {SEED}",
        "FILE: model: found neither of the two; expected exactly one of pretrained, unet",
        "FILE: data: found 5; expected a mapping with source, ...",
        f"FILE: training.num_epochs: found 0; {COUNT} or null",
        "FILE: training.epochs: unknown key; did you mean training.num_epochs?",
        "FILE: ema.enabled: found 1; expected true or false",
        "FILE: ema.decay: found 2; expected a number from 0 to 1",
        "FILE: sede: unknown key; did you mean seed?",
    ),
    # no mapping, or no YAML
    ("empty", "", f"FILE: found nothing; expected a mapping with {KEYS}"),
    ("only a comment", "# nothing yet\n", f"FILE: found nothing; expected a mapping with {KEYS}"),
    ("list at the top", "- output_dir: a\n", f"FILE: found [{{'output_dir': 'a'}}]; expected a mapping with {KEYS}"),
    ("word at the top", "digits", f"FILE: found 'digits'; expected a mapping with {KEYS}"),
    (
        "two documents",
        GOOD + "---\n" + GOOD,
        "FILE: line 9, column 1: expected a single document in the stream, but found another document",
    ),
    (
        "tab",
        swap("  source", "\tsource"),
        r"FILE: line 4, column 1: while scanning for the next token, found character '\t' that cannot start any token",
    ),
    (
        "open bracket",
        GOOD + "ema: {decay: 1",
        "FILE: line 9, column 15: while parsing a flow mapping, expected ',' ...",
    ),
    (
        "odd indent",
        GOOD + " ema: {}",
        "FILE: line 9, column 2: while parsing a block mapping, expected <block end>, ...",
    ),
    ("two colons", GOOD + "seed: a: b", "FILE: line 9, column 8: mapping values are not allowed here"),
    (
        "open quote",
        GOOD + "seed: 'a",
        "FILE: line 9, column 9: while scanning a quoted scalar, found unexpected end ...",
    ),
    (
        "Python object",
        GOOD + "seed: !!python/object/apply:os.system [ls]",
        "FILE: line 9, column 7: found a tag; expected a plain value",
    ),
    ("tag", GOOD + "seed: !!int x", "FILE: line 9, column 7: found a tag; expected a plain value"),
    ("alias of nothing", GOOD + "seed: *x", "FILE: line 9, column 7: found undefined alias 'x'"),
    (
        "value inside itself",
        GOOD + "ema: &a {decay: *a}",
        "FILE: line 9, column 17: found an alias in what is aliased itself; expected the value",
    ),
    (
        "a billion laughs",
        "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
        "FILE: line 2, column 8: found an alias in what is aliased itself; expected the value",
    ),
    ("nesting", "[" * 5000, "FILE: found values nested too deeply; expected sections and their values"),
    ("control character", GOOD + "seed: \x07", r"FILE: line 9: found '\x07'; expected printable text"),
    ("half a surrogate pair", GOOD + 'seed: "\\ud800"', NO_CODE),
    ("no code point", GOOD + 'seed: "\\UFFFFFFFF"', NO_CODE),
    ("Latin-1", b"output_dir: caf\xe9", "FILE: found no UTF-8 at byte 15; expected text in UTF-8"),
    ("UTF-16", GOOD.encode("utf-16"), "FILE: found no UTF-8 at byte 0; expected text in UTF-8"),
    ("picture", b"\x89PNG\r\n\x1a\n\x00\x00", "FILE: found no UTF-8 at byte 0; expected text in UTF-8"),
]

# (override, what is said about the value of the key that it names)
BAD_VALUES = [
    ("output_dir=''", "found ''; expected a line of text"),
    ("output_dir=' '", "found ' '; expected a line of text"),
    ("output_dir=3", "found 3; expected a line of text"),
    ('output_dir="a\\0"', r"found 'a\x00'; expected a line of text"),
    ("output_dir=\udcff", r"line 1: found '\udcff'; expected printable text"),
    ("seed=-1", f"found -1; {SEED}"),
    (f"seed={2**63}", f"found {2**63}; {SEED}"),
    (f"seed={'9' * 5000}", f"found '{'9' * 56}...; {SEED}"),
    ("model.unet=big", "found 'big'; expected a mapping or null"),
    ("model.noise_scheduler=[1]", "found [1]; expected a mapping"),
    ("data.labels=5", f"found 5; {LABELS}"),
    ("data.labels=[]", f"found []; {LABELS}"),
    ("data.labels=[1, 1.5, true]", f"found [1, 1.5, True]; {LABELS}"),
    ("data.labels=[1", "line 1, column 3: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
    ("data.resolution=0", f"found 0; {COUNT} or null"),
    ("data.crop=left", "found 'left'; expected center or random"),
    ("data.random_flip=yes", "found 'yes'; expected true or false"),
    ("data.num_workers=-1", "found -1; expected a whole number, 0 or more"),
    ("data.validation_fraction=1", "found 1; expected a number from 0 to below 1"),
    ("data.validation_split=train", "found 'train'; expected another split than the one to train on"),
    ("data.foo=1", "unknown key; expected one of source, split, ..."),
    ("training.epochs=1", "unknown key; did you mean training.num_epochs?"),
    ("training.num_epochs.x=1", "found training.num_epochs to be 2; expected a mapping there"),
    ("training.micro_batch_size=0", f"found 0; {COUNT} or auto or null"),
    ("training.micro_batch_size=AUTO", f"found 'AUTO'; {COUNT} or auto or null"),
    ("training.gradient_accumulation_steps=-4", f"found -4; {COUNT} or null"),
    ("training.max_grad_norm=0", "found 0; expected a number above 0 or null"),
    ("training.snr_gamma=-5", "found -5; expected a number above 0 or null"),
    ("training.timestep_sampling=none", "found 'none'; expected stratified or uniform"),
    ("optimizer.name=sgd", "found 'sgd'; expected adamw"),
    ("optimizer.learning_rate=0", "found 0; expected a number above 0"),
    ("optimizer.learning_rate=.nan", "found nan; expected a number above 0"),
    ("optimizer.learning_rate='1e-5'", "found '1e-5'; expected a number above 0"),
    ("optimizer.learning_rate=0,1", "found '0,1'; expected a number above 0"),
    ("optimizer.betas=[0.9]", "found [0.9]; expected a list of two numbers from 0 to below 1"),
    ("optimizer.betas=[0.9, 1]", "found [0.9, 1]; expected a list of two numbers from 0 to below 1"),
    ("optimizer.betas=[a, b]", "found ['a', 'b']; expected a list of two numbers from 0 to below 1"),
    ("optimizer.weight_decay=.inf", "found inf; expected a number, 0 or more"),
    ("optimizer.eps=1e999", "found inf; expected a number, 0 or more"),
    (
        "lr_scheduler.name=cosin",
        "found 'cosin'; expected constant or constant_with_warmup or piecewise_constant or ...",
    ),
    ("lr_scheduler.num_cycles=2", "found 2; expected 1 with constant, as only cosine_with_restarts uses it"),
    ("lr_scheduler.power=2", "found 2.0; expected 1 with constant, as only polynomial uses it"),
    (
        "lr_scheduler.warmup_steps=9",
        "found 9; expected 0 with constant, which has no warm-up (constant_with_warmup has one)",
    ),
    (
        "lr_scheduler.step_rules='1:2,3'",
        "found '1:2,3' with constant; expected rules with piecewise_constant and null with any other name",
    ),
    ("ema.decay=1.1", "found 1.1; expected a number from 0 to 1"),
    ("ema.decay=true", "found true; expected a number from 0 to 1"),
    ("checkpoint.keep=null", f"found null; {COUNT}"),
    ("checkpoint.resume=null", "found null; expected auto, never or the folder of a checkpoint"),
    ("samples.every_steps=0", f"found 0; {COUNT}"),
    ("samples.count=-1", "found -1; expected a whole number, 0 or more"),
    ("export.push_to_hub=model", "found 'model'; expected a repository like user/name or null"),
    ("export.push_to_hub=../x", "found '../x'; expected a repository like user/name or null"),
]

# (overrides, each line that is expected)
BAD_OVERRIDES = [
    (["training.num_epochs"], "command line: found 'training.num_epochs'; expected key.path=value"),
    (["=3"], "command line: found '=3'; expected key.path=value"),
    (["training..seed=3"], "command line: found 'training..seed=3'; expected key.path=value"),
    (["foo.bar=1"], f"FILE and command line: foo: unknown key; expected one of {KEYS}"),
    (["trainig.num_epochs=1"], "FILE and command line: trainig: unknown key; did you mean training?"),
    (["seed.x=1"], f"FILE and command line: seed: found {{'x': 1}}; {SEED}"),
    (
        ["optimizer={betas: [0, 0]}", "optimizer.betas.0=1"],
        "command line: optimizer.betas.0: found optimizer.betas to be [0, 0]; expected a mapping there",
    ),
    (
        ["ema={decya: 0.5, power: 0}"],
        "command line: ema.power: found 0; expected a number above 0",
        "command line: ema.decya: unknown key; did you mean ema.decay?",
    ),
    (
        ["lr_scheduler={name: piecewise_constant, warmup_steps: 1, step_rules: '1:2,1'}"],
        "command line: lr_scheduler.warmup_steps: found 1; expected 0 with piecewise_constant, which has ...",
    ),
    (
        ["lr_scheduler={name: piecewise_constant}"],
        "command line: lr_scheduler.step_rules: found null with piecewise_constant; expected rules with ...",
    ),
    ([PIECEWISE("1:10")], f"command line: lr_scheduler.step_rules: found '1:10'; {RULES}"),
    ([PIECEWISE("1:9,1:9,1")], f"command line: lr_scheduler.step_rules: found '1:9,1:9,1'; {RULES}"),
    ([PIECEWISE("1:9,1:8,1")], f"command line: lr_scheduler.step_rules: found '1:9,1:8,1'; {RULES}"),
    ([PIECEWISE("1:0,1")], f"command line: lr_scheduler.step_rules: found '1:0,1'; {RULES}"),
    ([PIECEWISE("a:b,c")], f"command line: lr_scheduler.step_rules: found 'a:b,c'; {RULES}"),
    ([PIECEWISE("nan:9,1")], f"command line: lr_scheduler.step_rules: found 'nan:9,1'; {RULES}"),
    (
        ["lr_scheduler.name=polynomial", "optimizer.learning_rate=1e-7"],
        "command line: optimizer.learning_rate: found 1e-07; expected above 1e-07, at which polynomial ends",
    ),
    (
        ["nonsense", "seed=-1"],
        "command line: found 'nonsense'; expected key.path=value",
        f"command line: seed: found -1; {SEED}",
    ),
]

BAD = {name: (content, [], lines) for name, content, *lines in BAD_FILES}
BAD |= {given[:60]: (GOOD, [given], [f"command line: {given.split('=')[0]}: {line}"]) for given, line in BAD_VALUES}
BAD |= {" ".join(given): (GOOD, given, lines) for given, *lines in BAD_OVERRIDES}


def problems_of(file, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert caught.value.exit_code == 2
    assert all(problem.splitlines() == [problem] for problem in caught.value.problems)
    return list(caught.value.problems)


def assert_lines(lines, expected, file):
    assert len(lines) == len(expected), lines
    for line, wanted in zip(lines, expected, strict=True):
        wanted = wanted.replace("FILE", str(file), 1)
        assert line == wanted or (wanted.endswith("...") and line.startswith(wanted[:-3])), f"expected: {wanted}"


@pytest.mark.parametrize("name", BAD)
def test_bad_config(name, tmp_path, monkeypatch):
    content, overrides, expected = BAD[name]
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, content)
    assert_lines(problems_of(file, overrides), expected, file)
    assert list(tmp_path.iterdir()) == [file]


def test_no_row_of_the_tables_is_lost():
    assert len(BAD) == len(BAD_FILES) + len(BAD_VALUES) + len(BAD_OVERRIDES) >= 60


def test_file_that_cannot_be_read(tmp_path, monkeypatch):
    expected = "expected a YAML file"
    missing, folder = tmp_path / "missing.yaml", tmp_path
    assert problems_of(missing) == [f"{missing}: cannot be read (No such file or directory); {expected}"]
    assert problems_of(folder) == [f"{folder}: cannot be read (Is a directory); {expected}"]
    assert problems_of("a\0b") == [rf"'a\x00b': cannot be read (embedded null byte); {expected}"]
    file = write(tmp_path, GOOD)
    assert problems_of(file / "x") == [f"{file / 'x'}: cannot be read (Not a directory); {expected}"]

    def forbidden(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # the tests may run as root, who may read anything
    assert problems_of(file) == [f"{file}: cannot be read (Permission denied); {expected}"]


# Through the script: many problems, broken YAML, the command line.
@pytest.mark.parametrize("name", ["nine things at once", "tab", "nonsense seed=-1"])
def test_the_script_says_so_and_writes_nothing(name, tmp_path):
    content, overrides, expected = BAD[name]
    file = write(tmp_path, content)
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(file), *overrides]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    errors = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert_lines(errors, expected, file)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == [file]


# Whatever a file or an override holds

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


def survives(file, overrides=()):
    """It becomes a config that can be written and read again, or an error of clear lines."""
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
    survives(write(scratch, content))
    survives(write(scratch, GOOD.encode() + (content if isinstance(content, bytes) else content.encode())))


@settings(max_examples=100, deadline=None)
@given(values=st.dictionaries(st.sampled_from(list(Config.model_fields)) | st.text(), VALUES))
def test_any_values_are_taken_or_explained(scratch, values):
    survives(write(scratch, yaml.safe_dump(values, allow_unicode=True)))
    survives(write(scratch, yaml.safe_dump({**yaml.safe_load(GOOD), **values})))


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
def test_any_override_is_taken_or_explained(scratch, overrides):
    survives(write(scratch, GOOD), overrides)


# What is written is read again

LINES = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)
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
        "output_dir": LINES,
        "model": st.fixed_dictionaries({"unet": FREE}, optional={"noise_scheduler": FREE}),
        "data": st.fixed_dictionaries(
            {"source": LINES},
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
        "checkpoint": st.fixed_dictionaries({"resume": LINES}),
        "logging": st.fixed_dictionaries({"tracker": st.none() | LINES}),
    },
)


@settings(max_examples=100, deadline=None)
@given(values=CONFIGS)
def test_a_written_config_is_the_same_config(scratch, values):
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
def test_a_text_stays_that_text(text, tmp_path):
    values = {**yaml.safe_load(GOOD), "model": {"unet": {text: text, "list": [text]}}}
    written = to_yaml(Config.model_validate(values))
    assert load_config(write(tmp_path, written)).model.unet == values["model"]["unet"]
    assert yaml.safe_load(written)["model"]["unet"] == values["model"]["unet"]  # any other reader agrees


def test_aliases_are_read_but_not_written(tmp_path):
    shared = [1, [2, 3]]
    text = yaml.safe_dump({**yaml.safe_load(GOOD), "model": {"unet": {"a": shared, "b": shared}}})
    assert "*id" in text
    config = load_config(write(tmp_path, text))
    assert config.model.unet == {"a": shared, "b": shared}
    assert "*id" not in to_yaml(config)


# The arithmetic of the batch

SIZE = st.integers(1, 48)
SIZE_KEYS = ["global_batch_size", "micro_batch_size", "gradient_accumulation_steps"]


def training(**sizes):
    return TrainingConfig(num_epochs=1, **sizes)


@given(micro=SIZE, steps=SIZE, processes=SIZE, left_out=st.none() | st.sampled_from(SIZE_KEYS))
def test_two_sizes_give_the_third_and_three_agree(micro, steps, processes, left_out):
    plan = (micro * steps * processes, micro, steps)
    sizes = {key: size for key, size in zip(SIZE_KEYS, plan, strict=True) if key != left_out}
    assert plan_batch(training(**sizes), processes) == plan


@settings(max_examples=300)
@given(
    total=st.integers(1, 200),
    micro=st.none() | st.integers(1, 16),
    steps=st.none() | st.integers(1, 16),
    processes=st.integers(1, 8),
)
def test_a_plan_works_out_or_the_error_shows_why(total, micro, steps, processes):
    if micro is None and steps is None:
        micro = 1
    possible = [
        (m, n)
        for m in ([micro] if micro else range(1, total + 1))
        for n in ([steps] if steps else range(1, total + 1))
        if m * n * processes == total
    ]
    sizes = {"global_batch_size": total, "micro_batch_size": micro, "gradient_accumulation_steps": steps}
    try:
        config = training(**sizes)
    except ValueError:  # wrong on any number of processes
        assert total % math.prod(size for size in (micro, steps) if size)
        return
    if possible:
        assert [plan_batch(config, processes)] == [(total, *pair) for pair in possible]
        return
    with pytest.raises(ConfigError) as caught:
        plan_batch(config, processes)
    for key, number in {**sizes, "num_processes": processes}.items():
        assert number is None or f"{key} {number}" in str(caught.value)


def test_the_error_shows_the_arithmetic():
    with pytest.raises(ConfigError) as caught:
        plan_batch(training(global_batch_size=64, micro_batch_size=16, gradient_accumulation_steps=4), 2)
    assert str(caught.value) == (
        "training: found global_batch_size 64; expected "
        "micro_batch_size 16 x gradient_accumulation_steps 4 x num_processes 2 = 128"
    )
    with pytest.raises(ConfigError) as caught:
        plan_batch(training(global_batch_size=64, micro_batch_size=16), 3)
    assert str(caught.value) == (
        "training: found global_batch_size 64; expected a multiple of micro_batch_size 16 x num_processes 3 = 48"
    )
    with pytest.raises(ConfigError) as caught:
        micro_batch_candidates(10, 4)
    assert str(caught.value) == "training: found global_batch_size 10; expected a multiple of num_processes 4"


@given(share=st.integers(1, 5000), processes=SIZE)
def test_candidates_are_the_divisors_of_a_share(share, processes):
    candidates = micro_batch_candidates(share * processes, processes)
    assert candidates == [size for size in range(share, 0, -1) if share % size == 0]
    config = training(global_batch_size=share * processes, micro_batch_size="auto")
    for size in candidates:
        assert plan_batch(config, processes, size) == (share * processes, size, share // size)


@given(total=SIZE, processes=SIZE)
def test_a_batch_that_processes_cannot_share_has_no_candidates(total, processes):
    if total % processes:
        with pytest.raises(ConfigError, match=rf"global_batch_size {total}; .*num_processes {processes}$"):
            micro_batch_candidates(total, processes)


def test_auto_is_to_be_found_first():
    config = training(global_batch_size=64, micro_batch_size="auto")
    with pytest.raises(ValueError, match="find it first"):
        plan_batch(config, 1)
    assert plan_batch(config, 2, 8) == (64, 8, 4)


def test_what_was_found_replaces_nothing_that_is_given():
    assert plan_batch(training(global_batch_size=64, micro_batch_size=16), 1, 8) == (64, 16, 4)
