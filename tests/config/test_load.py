"""What a valid config becomes: defaults, overrides, aliases, shipped files."""

import subprocess
import sys
from typing import get_args

import pytest

from finetune.config.load import load_config, to_yaml
from finetune.config.updates import LRSchedulerConfig
from harness.config_files import VALID, load_valid, write
from harness.configs import ROOT

RESOLVED = """\
output_dir: runs/test
seed: 0
model:
  pretrained: user/base
  unet: null
  class_conditional: false
  lora: null
  noise_scheduler: {}
  gradient_checkpointing: false
data:
  source: digits
  split: train
  image_column: image
  label_column: null
  labels: null
  caption_column: null
  caption: null
  resolution: null
  buckets: null
  order: full
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
  noise_offset: 0.0
  condition_dropout: 0.1
  nonfinite_loss: stop
  shard: false
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
  keep_best: false
  resume: auto
validation:
  every_steps: null
  images: 64
  quality: null
samples:
  every_steps: 500
  count: 16
  inference_steps: 40
  labels: null
  prompts: null
  negative_prompt: null
  shapes: null
  guidance_scale: 1.0
logging:
  every_steps: 1
  tracker: tensorboard
export:
  push_to_hub: null
"""


def test_defaults_of_every_key(tmp_path):
    config = load_valid(tmp_path)
    assert to_yaml(config) == RESOLVED
    assert load_config(write(tmp_path, RESOLVED)) == config


SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
assert {"digits", "digits-base", "butterflies", "wikiart", "sd15", "sd15-lora", "sdxl-lora"} <= {
    file.stem for file in SHIPPED
}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_config_loads_and_names_its_own_output_folder(file, tmp_path):
    config = load_config(file)
    assert load_config(write(tmp_path, to_yaml(config))) == config
    assert config.output_dir == f"runs/{file.stem}"


# (override, section, key, resulting value)
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
def test_an_override_sets_the_value(override, section, key, value, tmp_path):
    found = getattr(getattr(load_valid(tmp_path, override), section), key)
    assert found == value
    assert type(found) is type(value)


def test_the_last_of_several_overrides_counts(tmp_path):
    assert load_valid(tmp_path, "seed=1", "seed=2").seed == 2


def test_overrides_fill_in_a_section_that_the_file_lacks(tmp_path):
    file = write(tmp_path, VALID.replace("model: {pretrained: user/base}\n", ""))
    assert load_config(file, ["model.unet.layers_per_block=2"]).model.unet == {"layers_per_block": 2}


def test_an_override_of_one_use_of_an_alias_leaves_the_others(tmp_path):
    text = VALID + "validation: &often\n  every_steps: 7\nsamples: *often\n"
    config = load_config(write(tmp_path, text), ["samples.every_steps=9"])
    assert (config.validation.every_steps, config.samples.every_steps) == (7, 9)


@pytest.mark.parametrize("text", ["\ufeff" + VALID, VALID.replace("\n", "\r\n"), "%YAML 1.2\n---\n" + VALID + "...\n"])
def test_a_byte_order_mark_line_ends_and_directives_do_not_matter(text, tmp_path):
    assert load_config(write(tmp_path, text)) == load_valid(tmp_path)


def test_loading_a_config_imports_neither_torch_nor_numpy():
    code = "import sys, finetune.config.load; print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "[]\n"


def test_learning_rate_schedules_are_those_of_diffusers():
    from diffusers.optimization import SchedulerType

    names = [name for part in get_args(LRSchedulerConfig.model_fields["name"].annotation) for name in get_args(part)]
    assert sorted(names) == sorted(kind.value for kind in SchedulerType)


def test_a_config_cannot_be_changed(tmp_path):
    with pytest.raises(ValueError, match="frozen"):
        load_valid(tmp_path).training.num_epochs = 3
