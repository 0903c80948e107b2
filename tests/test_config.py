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


PIECEWISE = "lr_scheduler={name: piecewise_constant, step_rules: '%s'}"
RULES = "expected factor:until_step,...,factor like 1:100,0.1:200,0.01 or null"
ABOVE_0 = "expected a whole number above 0"
KEYS = "output_dir, seed, model, data, training, optimizer, lr_scheduler, ema, checkpoint, validation, samples, logging, export"
SIZES = "global_batch_size, micro_batch_size, gradient_accumulation_steps"

# (what is wrong, the file, overrides, each line that is expected). FILE stands for the file's name, CLI for the command
# line, and a line that ends in ... is only the beginning of one.
BAD = [
    # keys
    ("unknown section", GOOD + "foo: 1", [], [f"FILE: foo: unknown key; expected one of {KEYS}"]),
    ("misspelt section", GOOD + "optimiser: {}", [], ["FILE: optimiser: unknown key; did you mean optimizer?"]),
    (
        "misspelt key",
        swap("micro_batch_size", "micro_batchsize"),
        [],
        ["FILE: training.micro_batchsize: unknown key; did you mean training.micro_batch_size?"],
    ),
    (
        "key in capitals",
        swap("source", "SOURCE"),
        [],
        ["FILE: data.source: missing; expected a line of text", "FILE: data.SOURCE: unknown key; did you mean data.source?"],
    ),
    (
        "key of another section",
        GOOD + "learning_rate: 1e-5",
        [],
        ["FILE: learning_rate: unknown key; did you mean optimizer.learning_rate?"],
    ),
    (
        "key of several sections",
        GOOD + "images: 3\nevery_steps: 3",
        [],
        [
            "FILE: images: unknown key; did you mean validation.images?",
            "FILE: every_steps: unknown key; did you mean checkpoint.every_steps or validation.every_steps or ...",
        ],
    ),
    ("key like no other", GOOD + "ema: {zzz: 1}", [], ["FILE: ema.zzz: unknown key; expected one of enabled, decay, power"]),
    ("key with a line break", GOOD + '"a\\nb": 1', [], [r"FILE: 'a\nb': unknown key; expected one of ..."]),
    ("key that is a number", GOOD + "5: 1", [], ["FILE: line 9, column 1: found a key that is no name; expected names"]),
    ("key that is a list", GOOD + "? [a]\n: 1", [], ["FILE: line 9, column 3: found a key that is no name; expected names"]),
    ("key that is true", GOOD + "ema: {true: 1}", [], ["FILE: line 9, column 7: found a key that is no name; expected names"]),
    ("duplicate section", GOOD + "data: {}", [], ["FILE: line 9, column 1: found the key 'data' again; expected it once"]),
    (
        "duplicate key",
        GOOD + "  num_epochs: 3",
        [],
        ["FILE: line 9, column 3: found the key 'num_epochs' again; expected it once"],
    ),
    ("missing section", swap("model: {pretrained: user/base}\n", ""), [], ["FILE: model: missing; expected a mapping with ..."]),
    ("missing key", swap("output_dir: runs/test\n", ""), [], ["FILE: output_dir: missing; expected a line of text"]),
    # types
    ("section that is a number", GOOD + "ema: 3", [], ["FILE: ema: found 3; expected a mapping with enabled, decay, power"]),
    ("section that is empty", GOOD + "ema:", [], ["FILE: ema: found null; expected a mapping with enabled, decay, power"]),
    ("section that is a list", GOOD + "export: [1]", [], ["FILE: export: found [1]; expected a mapping with push_to_hub"]),
    ("text for a number", swap("epochs: 2", "epochs: two"), [], [f"FILE: training.num_epochs: found 'two'; {ABOVE_0} or null"]),
    ("quoted number", swap("epochs: 2", "epochs: '2'"), [], [f"FILE: training.num_epochs: found '2'; {ABOVE_0} or null"]),
    ("octal number", swap("epochs: 2", "epochs: 02"), [], [f"FILE: training.num_epochs: found '02'; {ABOVE_0} or null"]),
    ("broken number", swap("epochs: 2", "epochs: 2.5"), [], [f"FILE: training.num_epochs: found 2.5; {ABOVE_0} or null"]),
    ("number like 2.0", swap("epochs: 2", "epochs: 2.0"), [], [f"FILE: training.num_epochs: found 2.0; {ABOVE_0} or null"]),
    ("true for a number", GOOD + "seed: true", [], ["FILE: seed: found true; expected a whole number from 0 to 2^63 - 1"]),
    ("true for a fraction", "ema: {decay: true}\n" + GOOD, [], ["FILE: ema.decay: found true; expected a number from 0 to 1"]),
    ("number for true", "ema: {enabled: 1}\n" + GOOD, [], ["FILE: ema.enabled: found 1; expected true or false"]),
    ("yes for true", "ema: {enabled: yes}\n" + GOOD, [], ["FILE: ema.enabled: found 'yes'; expected true or false"]),
    ("number for text", swap("runs/test", "3"), [], ["FILE: output_dir: found 3; expected a line of text"]),
    ("list for text", swap("digits", "[a, b]"), [], ["FILE: data.source: found ['a', 'b']; expected a line of text"]),
    ("null for a number", GOOD + "checkpoint: {keep: null}", [], [f"FILE: checkpoint.keep: found null; {ABOVE_0}"]),
    (
        "quoted 1e-5",
        GOOD + "optimizer: {learning_rate: '1e-5'}",
        [],
        ["FILE: optimizer.learning_rate: found '1e-5'; expected a number above 0"],
    ),
    (
        "number with a comma",
        GOOD,
        ["optimizer.learning_rate=0,1"],
        ["CLI: optimizer.learning_rate: found '0,1'; expected a number above 0"],
    ),
    (
        "one beta",
        GOOD + "optimizer: {betas: [0.9]}",
        [],
        ["FILE: optimizer.betas: found [0.9]; expected a list of two numbers from 0 to below 1"],
    ),
    (
        "betas that are no numbers",
        GOOD + "optimizer: {betas: [a, 1.5]}",
        [],
        ["FILE: optimizer.betas: found ['a', 1.5]; expected a list of two numbers from 0 to below 1"],
    ),
    ("labels in one text", GOOD, ["data.labels=5"], ["CLI: data.labels: found 5; expected a list of numbers or texts or null"]),
    ("no labels", GOOD, ["data.labels=[]"], ["CLI: data.labels: found []; expected a list of numbers or texts or null"]),
    ("half a label", GOOD, ["data.labels=[1.5]"], ["CLI: data.labels: found [1.5]; expected a list of numbers or texts or null"]),
    ("list for a free mapping", GOOD, ["model.noise_scheduler=[1]"], ["CLI: model.noise_scheduler: found [1]; expected a mapping"]),
    (
        "long value",
        GOOD + f"seed: {'x' * 500}",
        [],
        [f"FILE: seed: found '{'x' * 56}...; expected a whole number from 0 to 2^63 - 1"],
    ),
    (
        "value of several lines",
        GOOD + 'seed: "a\\nb\\u2028c"',
        [],
        [r"FILE: seed: found 'a\nb\u2028c'; expected a whole number from 0 to 2^63 - 1"],
    ),
    # values
    ("zero size", GOOD, ["training.micro_batch_size=0"], [f"CLI: training.micro_batch_size: found 0; {ABOVE_0} or auto or null"]),
    (
        "negative size",
        swap("steps: 4", "steps: -4"),
        [],
        [f"FILE: training.gradient_accumulation_steps: found -4; {ABOVE_0} or null"],
    ),
    ("automatic", GOOD, ["training.micro_batch_size=AUTO"], ["CLI: training.micro_batch_size: found 'AUTO'; ..."]),
    ("negative seed", GOOD, ["seed=-1"], ["CLI: seed: found -1; expected a whole number from 0 to 2^63 - 1"]),
    ("seed of 64 bits", GOOD, [f"seed={2**63}"], [f"CLI: seed: found {2**63}; expected a whole number from 0 to 2^63 - 1"]),
    ("seed of 5000 digits", GOOD, [f"seed={'9' * 5000}"], [f"CLI: seed: found '{'9' * 56}...; expected a whole number ..."]),
    ("zero resolution", GOOD, ["data.resolution=0"], [f"CLI: data.resolution: found 0; {ABOVE_0} or null"]),
    ("negative workers", GOOD, ["data.num_workers=-1"], ["CLI: data.num_workers: found -1; expected a whole number, 0 or more"]),
    ("all held out", GOOD, ["data.validation_fraction=1"], ["CLI: data.validation_fraction: found 1; expected a number from 0 to below 1"]),
    ("negative samples", GOOD, ["samples.count=-1"], ["CLI: samples.count: found -1; expected a whole number, 0 or more"]),
    ("no interval", GOOD, ["samples.every_steps=0"], [f"CLI: samples.every_steps: found 0; {ABOVE_0}"]),
    ("keep none", GOOD, ["checkpoint.keep=0"], [f"CLI: checkpoint.keep: found 0; {ABOVE_0}"]),
    ("no learning rate", GOOD, ["optimizer.learning_rate=0"], ["CLI: optimizer.learning_rate: found 0; expected a number above 0"]),
    ("not a number", GOOD, ["optimizer.learning_rate=.nan"], ["CLI: optimizer.learning_rate: found nan; expected a number above 0"]),
    ("infinite", GOOD, ["optimizer.weight_decay=.inf"], ["CLI: optimizer.weight_decay: found inf; expected a number, 0 or more"]),
    ("too large", GOOD, ["optimizer.eps=1e999"], ["CLI: optimizer.eps: found inf; expected a number, 0 or more"]),
    ("beta of one", GOOD, ["optimizer.betas=[0.9, 1]"], ["CLI: optimizer.betas: found [0.9, 1]; expected a list of two numbers ..."]),
    ("decay above one", GOOD, ["ema.decay=1.1"], ["CLI: ema.decay: found 1.1; expected a number from 0 to 1"]),
    ("negative clipping", GOOD, ["training.max_grad_norm=-1"], ["CLI: training.max_grad_norm: found -1; expected a number above 0 or null"]),
    ("zero gamma", GOOD, ["training.snr_gamma=0"], ["CLI: training.snr_gamma: found 0; expected a number above 0 or null"]),
    ("unknown crop", GOOD, ["data.crop=left"], ["CLI: data.crop: found 'left'; expected center or random"]),
    ("unknown optimizer", GOOD, ["optimizer.name=sgd"], ["CLI: optimizer.name: found 'sgd'; expected adamw"]),
    ("empty folder name", GOOD, ["output_dir=''"], ["CLI: output_dir: found ''; expected a line of text"]),
    ("blank folder name", GOOD, ["output_dir=' '"], ["CLI: output_dir: found ' '; expected a line of text"]),
    ("zero byte in a name", GOOD, ['output_dir="a\\0"'], [r"CLI: output_dir: found 'a\x00'; expected a line of text"]),
    ("repository of no one", GOOD, ["export.push_to_hub=model"], ["CLI: export.push_to_hub: found 'model'; expected a repository like user/name or null"]),
    ("repository elsewhere", GOOD, ["export.push_to_hub=../x"], ["CLI: export.push_to_hub: found '../x'; expected a repository ..."]),
    ("resume nothing", GOOD, ["checkpoint.resume=null"], ["CLI: checkpoint.resume: found null; expected auto, never or the folder of a checkpoint"]),
    # schedules
    (
        "unknown schedule",
        GOOD + "lr_scheduler: {name: cosin}",
        [],
        [
            "FILE: lr_scheduler.name: found 'cosin'; expected constant or constant_with_warmup or piecewise_constant "
            "or linear or cosine or cosine_with_restarts or polynomial"
        ],
    ),
    (
        "warm-up that would be ignored",
        GOOD + "lr_scheduler: {warmup_steps: 10}",
        [],
        ["FILE: lr_scheduler.warmup_steps: found 10; expected 0 with constant, which has no warm-up (constant_with_warmup has one)"],
    ),
    ("cycles of none", GOOD, ["lr_scheduler.num_cycles=2"], ["CLI: lr_scheduler.num_cycles: found 2; expected 1 with constant, as only cosine_with_restarts uses it"]),
    (
        "options of other schedules",
        GOOD,
        ["lr_scheduler={name: cosine, power: 2, num_cycles: 3}"],
        [
            "CLI: lr_scheduler.num_cycles: found 3; expected 1 with cosine, as only cosine_with_restarts uses it",
            "CLI: lr_scheduler.power: found 2.0; expected 1 with cosine, as only polynomial uses it",
        ],
    ),
    ("piecewise without rules", GOOD, ["lr_scheduler.name=piecewise_constant"], ["FILE and CLI: ..."]),
    ("rules without piecewise", GOOD, ["lr_scheduler.step_rules='1:2,3'"], ["CLI: lr_scheduler.step_rules: found '1:2,3' with constant; expected rules with piecewise_constant and null with any other name"]),
    ("rules with an open end", GOOD, [PIECEWISE % "1:10"], [f"CLI: lr_scheduler.step_rules: found '1:10'; {RULES}"]),
    ("rules that fall", GOOD, [PIECEWISE % "1:20,0.1:10,0.01"], [f"CLI: lr_scheduler.step_rules: found '1:20,0.1:10,0.01'; {RULES}"]),
    ("rules of words", GOOD, [PIECEWISE % "a:b,c"], [f"CLI: lr_scheduler.step_rules: found 'a:b,c'; {RULES}"]),
    ("rules without a number", GOOD, [PIECEWISE % "nan:10,1"], [f"CLI: lr_scheduler.step_rules: found 'nan:10,1'; {RULES}"]),
    (
        "polynomial below its end",
        GOOD,
        ["lr_scheduler.name=polynomial", "optimizer.learning_rate=1e-8"],
        ["CLI: optimizer.learning_rate: found 1e-08; expected above 1e-07, at which polynomial ends"],
    ),
    # values that do not go together
    ("no model", swap("{pretrained: user/base}", "{}"), [], ["FILE: model: found neither of the two; expected exactly one of pretrained, unet"]),
    ("two models", swap("user/base", "user/base, unet: {}"), [], ["FILE: model: found pretrained and unet; expected exactly one of pretrained, unet"]),
    ("no length", swap("  num_epochs: 2\n", ""), [], ["FILE: training: found neither of the two; expected exactly one of num_epochs, max_train_steps"]),
    ("two lengths", GOOD, ["training.max_train_steps=9"], ["FILE and CLI: training: found num_epochs and max_train_steps; expected exactly one of num_epochs, max_train_steps"]),
    ("validating what is trained on", GOOD, ["data.validation_split=train"], ["CLI: data.validation_split: found 'train'; expected another split than the one to train on"]),
    ("no batch", swap("  micro_batch_size: 16\n  gradient_accumulation_steps: 4\n", ""), [], [f"FILE: training: found none of {SIZES}; expected at least two"]),
    ("half a batch", swap("  micro_batch_size: 16\n", ""), [], [f"FILE: training: found gradient_accumulation_steps of {SIZES}; expected at least two"]),
    ("auto without a batch", swap("size: 16\n  gradient_accumulation_steps: 4", "size: auto"), [], ["FILE: training.micro_batch_size: found auto with micro_batch_size; expected with auto just global_batch_size"]),
    ("auto with steps", swap("size: 16", "size: auto\n  global_batch_size: 64"), [], [f"FILE: training.micro_batch_size: found auto with {SIZES}; expected with auto just global_batch_size"]),
    ("micro-batch that does not divide", swap("gradient_accumulation_steps: 4", "global_batch_size: 60"), [], ["FILE: training: found global_batch_size 60; expected a multiple of micro_batch_size 16"]),
    ("steps that do not divide", swap("micro_batch_size: 16", "global_batch_size: 62"), [], ["FILE: training: found global_batch_size 62; expected a multiple of gradient_accumulation_steps 4"]),
    ("three that disagree", GOOD, ["training.global_batch_size=96"], ["FILE and CLI: training: found global_batch_size 96; expected a multiple of micro_batch_size 16 x gradient_accumulation_steps 4 = 64"]),
    (
        "many at once",
        "seed: -1\nsede: 1\nmodel: {}\ndata: 5\ntraining: {num_epochs: 0, epochs: 1}",
        ["nonsense", "ema.decay=2"],
        [
            "CLI: found 'nonsense'; expected key.path=value",
            "FILE: output_dir: missing; expected a line of text",
            "FILE: seed: found -1; expected a whole number from 0 to 2^63 - 1",
            "FILE: model: found neither of the two; expected exactly one of pretrained, unet",
            "FILE: data: found 5; expected a mapping with source, ...",
            f"FILE: training.num_epochs: found 0; {ABOVE_0} or null",
            "FILE: training.epochs: unknown key; did you mean training.num_epochs?",
            "CLI: ema.decay: found 2; expected a number from 0 to 1",
            "FILE: sede: unknown key; did you mean seed?",
        ],
    ),
    # what is no YAML, or no mapping
    ("empty file", "", [], [f"FILE: found nothing; expected a mapping with {KEYS}"]),
    ("only a comment", "# nothing yet\n", [], [f"FILE: found nothing; expected a mapping with {KEYS}"]),
    ("list at the top", "- output_dir: a\n", [], [f"FILE: found [{{'output_dir': 'a'}}]; expected a mapping with {KEYS}"]),
    ("text at the top", "digits", [], [f"FILE: found 'digits'; expected a mapping with {KEYS}"]),
    ("two documents", GOOD + "---\n" + GOOD, [], ["FILE: line 9, column 1: expected a single document in the stream, but found another document"]),
    ("tab", swap("  source", "\tsource"), [], [r"FILE: line 4, column 1: while scanning for the next token, found character '\t' that cannot start any token"]),
    ("open bracket", GOOD + "ema: {enabled: true", [], ["FILE: line 9, column 20: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"]),
    ("wrong indent", GOOD + " ema: {}", [], ["FILE: line 9, column 2: while parsing a block mapping, ..."]),
    ("two colons", GOOD + "seed: a: b", [], ["FILE: line 9, column 8: mapping values are not allowed here"]),
    ("open quote", GOOD + "seed: 'a", [], ["FILE: line 9, column 9: while scanning a quoted scalar, found unexpected end of stream"]),
    ("Python object", GOOD + "seed: !!python/object/apply:os.system [ls]", [], ["FILE: line 9, column 7: found a tag; expected a plain value"]),
    ("tagged number", GOOD + "seed: !!int x", [], ["FILE: line 9, column 7: found a tag; expected a plain value"]),
    ("alias of nothing", GOOD + "seed: *x", [], ["FILE: line 9, column 7: found undefined alias 'x'"]),
    ("value inside itself", GOOD + "ema: &a {decay: *a}", [], ["FILE: line 9, column 17: found an alias in what is aliased itself; expected the value"]),
    ("a billion laughs", "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", [], ["FILE: line 2, column 8: found an alias in what is aliased itself; expected the value"]),
    ("merge key", GOOD + "ema: {<<: {decay: 0.5}}", [], ["FILE: ema.<<: unknown key; expected one of enabled, decay, power"]),
    ("nested too deeply", "[" * 5000, [], ["FILE: found values nested too deeply; expected sections and their values"]),
    ("control character", GOOD + "seed: \x07", [], [r"FILE: line 9: found '\x07'; expected printable text"]),
    ("half a surrogate pair", GOOD + 'seed: "\\ud800"', [], [r"FILE: found an escape like \ud800 that is no character; expected the character"]),
    ("no code point", GOOD + 'seed: "\\UFFFFFFFF"', [], [r"FILE: found an escape like \ud800 that is no character; expected the character"]),
    ("Latin-1", b"output_dir: caf\xe9", [], ["FILE: found no UTF-8 at byte 15; expected text in UTF-8"]),
    ("UTF-16", GOOD.encode("utf-16"), [], ["FILE: found no UTF-8 at byte 0; expected text in UTF-8"]),
    ("a picture", b"\x89PNG\r\n\x1a\n\x00\x00", [], ["FILE: found no UTF-8 at byte 0; expected text in UTF-8"]),
    # overrides
    ("no equals sign", GOOD, ["training.num_epochs"], ["CLI: found 'training.num_epochs'; expected key.path=value"]),
    ("no key", GOOD, ["=3"], ["CLI: found '=3'; expected key.path=value"]),
    ("hole in the path", GOOD, ["training..num_epochs=3"], ["CLI: found 'training..num_epochs=3'; expected key.path=value"]),
    ("override of no section", GOOD, ["foo.bar=1"], ["FILE and CLI: foo: unknown key; expected one of ..."]),
    ("override of a misspelt section", GOOD, ["trainig.num_epochs=1"], ["FILE and CLI: trainig: unknown key; did you mean training?"]),
    ("override of no key", GOOD, ["training.foo=1"], ["CLI: training.foo: unknown key; expected one of global_batch_size, ..."]),
    ("override of a misspelt key", GOOD, ["training.epochs=1"], ["CLI: training.epochs: unknown key; did you mean training.num_epochs?"]),
    ("path through a number", GOOD, ["training.num_epochs.x=1"], ["CLI: training.num_epochs.x: found training.num_epochs to be 2; expected a mapping there"]),
    ("path through a default", GOOD, ["seed.x=1"], ["FILE and CLI: seed: found {'x': 1}; expected a whole number from 0 to 2^63 - 1"]),
    ("path through a list", GOOD + "optimizer: {betas: [0.9, 0.99]}", ["optimizer.betas.0=1"], ["CLI: optimizer.betas.0: found optimizer.betas to be [0.9, 0.99]; expected a mapping there"]),
    ("broken YAML in an override", GOOD, ["data.labels=[1, 2"], ["CLI: data.labels: line 1, column 6: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"]),
    ("bytes in an override", GOOD, ["output_dir=\udcff"], [r"CLI: output_dir: line 1: found '\udcff'; expected printable text"]),
    ("section in an override", GOOD, ["ema={decya: 0.5, power: 0}"], ["CLI: ema.power: found 0; expected a number above 0", "CLI: ema.decya: unknown key; did you mean ema.decay?"]),
]  # fmt: skip


def problems_of(file, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(file, overrides)
    assert caught.value.exit_code == 2
    assert all(problem.splitlines() == [problem] for problem in caught.value.problems)
    return list(caught.value.problems)


def matches(line, expected, file):
    expected = expected.replace("FILE", str(file), 1).replace("CLI", "command line", 1)
    return line.startswith(expected[:-3]) if expected.endswith("...") else line == expected


@pytest.mark.parametrize(("content", "overrides", "expected"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_config(content, overrides, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path, content)
    problems = problems_of(file, overrides)
    assert len(problems) == len(expected), problems
    for problem, line in zip(problems, expected, strict=True):
        assert matches(problem, line, file), f"{problem!r}\nis not\n{line!r}"
    assert list(tmp_path.iterdir()) == [file]


def test_the_table_is_as_long_as_promised():
    assert len({row[0] for row in BAD}) == len(BAD) >= 60


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


# through the script, one row of each kind: the content, the file's syntax, the command line
@pytest.mark.parametrize("name", ["many at once", "tab", "broken YAML in an override"])
def test_the_script_says_so_and_writes_nothing(name, tmp_path):
    content, overrides, expected = next(row[1:] for row in BAD if row[0] == name)
    file = write(tmp_path, content)
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(file), *overrides]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    lines = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == len(expected)
    assert all(matches(line, pattern, file) for line, pattern in zip(lines, expected, strict=True))
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
    try:
        config = load_config(file, overrides)
    except ConfigError as error:
        assert error.problems
        assert all(problem.splitlines() == [problem] for problem in error.problems)
        assert "pydantic" not in str(error)
    else:
        assert load_config(write(file.parent, to_yaml(config))) == config


@settings(max_examples=300, deadline=None)
@given(content=st.binary() | st.text() | st.lists(PIECES | st.text(max_size=3)).map("".join))
def test_any_file_is_read_or_explained(scratch, content):
    survives(write(scratch, content))
    survives(write(scratch, GOOD.encode() + (content if isinstance(content, bytes) else content.encode())))


@settings(max_examples=300, deadline=None)
@given(values=st.dictionaries(st.sampled_from(list(Config.model_fields)) | st.text(), VALUES))
def test_any_values_are_taken_or_explained(scratch, values):
    survives(write(scratch, yaml.safe_dump(values, allow_unicode=True)))
    survives(write(scratch, yaml.safe_dump({**yaml.safe_load(GOOD), **values})))


@settings(max_examples=300, deadline=None)
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


@settings(max_examples=300, deadline=None)
@given(values=CONFIGS)
def test_a_written_config_is_the_same_config(scratch, values):
    config = Config.model_validate(values)
    assert load_config(write(scratch, to_yaml(config))) == config
    assert load_config(write(scratch, yaml.safe_dump(values))) == config  # as any other tool would write it


def test_what_is_there_twice_is_written_twice(tmp_path):
    shared = [1, [2, 3]]
    config = good(tmp_path).model_copy(update={"model": {"unet": {"a": shared, "b": shared}}})
    assert "&" not in to_yaml(config)


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
    try:
        plan = plan_batch(config, processes)
    except ConfigError as error:
        assert not possible
        numbers = [size for size in (total, micro, steps, processes) if size is not None]
        assert all(f" {number}" in str(error) for number in numbers)
        assert len(error.problems) == 1
    else:
        assert [plan[1:]] == possible
        assert plan[0] == total


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
