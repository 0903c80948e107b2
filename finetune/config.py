"""A run's config: its schema, how it is read and overridden, and the arithmetic of the batch.

The keys are the public interface. What is wrong with a config is one line a problem: where, what was found, what was
expected. The words for what is expected stand beside the constraint that they describe.
"""

import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from finetune import plain_yaml
from finetune.errors import UserError

COMMAND_LINE = "command line"


class ConfigError(UserError):
    """The config as it stands describes no run."""


def _step_rules(text: str) -> str:
    """diffusers' own notation. It sorts the rules by update, so that any other order would not mean what it says."""
    *rules, last = text.split(",")
    factors, steps = zip(*(rule.split(":") for rule in rules), strict=True) if rules else ((), ())
    factors, steps = [float(factor) for factor in (*factors, last)], [int(step) for step in steps]
    if steps != sorted({step for step in steps if step > 0}) or not all(0 <= f < math.inf for f in factors):
        raise ValueError
    return text


Flag = Annotated[bool, Field(description="true or false")]
Count = Annotated[int, Field(gt=0, description="a whole number above 0")]
Natural = Annotated[int, Field(ge=0, description="a whole number, 0 or more")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="a whole number from 0 to 2^63 - 1")]
Positive = Annotated[float, Field(gt=0, description="a number above 0")]
NonNegative = Annotated[float, Field(ge=0, description="a number, 0 or more")]
Decay = Annotated[float, Field(ge=0, le=1, description="a number from 0 to 1")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="a number from 0 to below 1")]
Betas = Annotated[
    tuple[Fraction, Fraction], Strict(False), Field(description="a list of two numbers from 0 to below 1")
]
Labels = Annotated[tuple[int | str, ...], Strict(False), Field(min_length=1, description="a list of numbers or texts")]
Text = Annotated[str, Field(pattern=r"^\P{Cc}*[^\s\p{Cc}]\P{Cc}*$", description="a line of text")]
Resume = Annotated[Text, Field(description="auto, never or the folder of a checkpoint")]
RepoId = Annotated[str, Field(pattern=r"^\w[\w.-]*/\w[\w.-]*$", description="a repository like user/name")]
StepRules = Annotated[
    str, AfterValidator(_step_rules), Field(description="factor:until_step,...,factor like 1:100,0.1:200,0.01")
]
Mapping = Annotated[dict[str, Any], Field(description="a mapping")]


class Section(BaseModel):
    """A mapping with known keys and strict types, except that a whole number may stand for a fraction."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """Values that are right alone and wrong together: (the key, or "" for the whole section; the problem)."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(self.disagreements()):
            raise ValueError(*found)
        return self


class ModelConfig(Section):
    pretrained: Text | None = None  # hub id or folder of a DDPM pipeline
    unet: Mapping | None = None  # config of a UNet2DModel to train from scratch
    noise_scheduler: Mapping = {}  # overrides of the DDPMScheduler's config
    gradient_checkpointing: Flag = False

    def disagreements(self) -> Iterator[tuple[str, str]]:
        given = [key for key in ("pretrained", "unet") if getattr(self, key) is not None]
        if len(given) != 1:
            yield "", f"found {' and '.join(given) or 'neither of the two'}; expected exactly one of pretrained, unet"


class DataConfig(Section):
    source: Text  # digits, a hub id, a folder of images, or parquet, arrow or tar files
    split: Text = "train"
    image_column: Text = "image"
    label_column: Text | None = None
    labels: Labels | None = None  # keep only images with one of these
    resolution: Count | None = None  # pixels a side; null: the model's sample_size
    crop: Literal["center", "random"] = "center"
    random_flip: Flag = False
    background: Text = "white"  # a colour by name or #rrggbb, on which transparent pixels are laid
    on_bad_image: Literal["error", "skip"] = "error"
    num_workers: Natural = 2
    validation_fraction: Fraction = 0.05  # of the images, held out
    validation_split: Text | None = None  # held out instead of a fraction

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.validation_split == self.split:
            yield "validation_split", f"found {_short(self.split)}; expected another split than the one to train on"


class TrainingConfig(Section):
    global_batch_size: Count | None = None  # images in an update, over all processes
    micro_batch_size: Count | Literal["auto"] | None = None  # images in a forward pass, on one process
    gradient_accumulation_steps: Count | None = None  # forward passes in an update, on one process
    num_epochs: Count | None = None
    max_train_steps: Count | None = None  # updates; where both are given, this is the length
    max_grad_norm: Positive | None = 1.0  # null: no clipping
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    snr_gamma: Positive | None = None  # null: every timestep weighs the same
    nonfinite_loss: Literal["stop", "skip"] = "stop"

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.num_epochs is None and self.max_train_steps is None:
            yield "", "found neither of the two; expected num_epochs or max_train_steps"
        keys = "global_batch_size", "micro_batch_size", "gradient_accumulation_steps"
        total, micro, steps = sizes = [getattr(self, key) for key in keys]
        given = ", ".join(key for key, size in zip(keys, sizes, strict=True) if size is not None)
        if micro == "auto":
            if total is None or steps is not None:
                yield "micro_batch_size", f"found auto with {given}; expected with auto just {keys[0]}"
        elif sizes.count(None) > 1:
            yield "", f"found {given or 'none'} of {', '.join(keys)}; expected at least two"
        elif total is not None and (problem := _uneven(total, micro, steps)):
            yield "", problem


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    learning_rate: Positive = 1e-5
    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegative = 0.01
    eps: NonNegative = 1e-8


class LRSchedulerConfig(Section):
    name: (
        Literal["constant", "constant_with_warmup", "piecewise_constant"]
        | Literal["linear", "cosine", "cosine_with_restarts", "polynomial"]
    ) = "constant"
    warmup_steps: Natural = 0  # updates
    num_cycles: Count = 1  # of cosine_with_restarts
    power: Positive = 1.0  # of polynomial
    step_rules: StepRules | None = None  # of piecewise_constant: the learning rate's factor up to each update

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps and self.name in ("constant", "piecewise_constant"):
            expected = f"expected 0 with {self.name}, which has no warm-up (constant_with_warmup has one)"
            yield "warmup_steps", f"found {self.warmup_steps}; {expected}"
        for key, name in {"num_cycles": "cosine_with_restarts", "power": "polynomial"}.items():
            if getattr(self, key) != 1 and self.name != name:
                yield key, f"found {getattr(self, key)}; expected 1 with {self.name}, as only {name} uses it"
        if (self.step_rules is not None) != (self.name == "piecewise_constant"):
            expected = "expected rules with piecewise_constant and null with any other name"
            yield "step_rules", f"found {_short(self.step_rules)} with {self.name}; {expected}"


class EMAConfig(Section):
    enabled: Flag = True
    decay: Decay = 0.9999
    power: Positive = 0.75  # of the warm-up 1 - (1 + step) ** -power


class CheckpointConfig(Section):
    every_steps: Count = 500
    keep: Count = 3
    resume: Resume = "auto"


class ValidationConfig(Section):
    every_steps: Count = 100
    images: Count = 64


class SamplesConfig(Section):
    every_steps: Count = 500
    count: Natural = 16
    inference_steps: Count = 40


class LoggingConfig(Section):
    every_steps: Count = 1
    tracker: Text | None = "tensorboard"


class ExportConfig(Section):
    push_to_hub: RepoId | None = None


class Config(Section):
    """All that describes a run, and nothing of the hardware. Every interval counts updates."""

    output_dir: Text
    seed: Seed = 0
    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    validation: ValidationConfig = ValidationConfig()
    samples: SamplesConfig = SamplesConfig()
    logging: LoggingConfig = LoggingConfig()
    export: ExportConfig = ExportConfig()

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.lr_scheduler.name == "polynomial" and self.optimizer.learning_rate <= 1e-7:
            found = self.optimizer.learning_rate
            yield "optimizer.learning_rate", f"found {found}; expected above 1e-07, at which polynomial ends"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file and lay `key.path=value` overrides over it, each value being YAML too.

    Raises:
        ConfigError: with everything that is wrong, one line a problem.
    """
    values, problems, overridden = _read(path), [], []
    for override in overrides:
        try:
            overridden.append(_override(values, override))
        except ConfigError as error:
            problems += error.problems
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        for keys, problem in dict.fromkeys(line for detail in error.errors() for line in _explain(detail, values)):
            problems.append(f"{_source(keys, path, overridden)}: {_name(*keys)}: {problem}")
    if problems:
        raise ConfigError(*problems)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config, in the schema's order; loading it gives an equal one."""
    return plain_yaml.write(config.model_dump())


def plan_batch(
    training: TrainingConfig, num_processes: int, micro_batch_size: int | None = None
) -> tuple[int, int, int]:
    """(global_batch_size, micro_batch_size, gradient_accumulation_steps), whichever of them the config leaves open.

    Args:
        micro_batch_size: what `micro_batch_size: auto` turned out to be.

    Raises:
        ConfigError: they do not work out on so many processes.
    """
    total, micro, steps = training.global_batch_size, training.micro_batch_size, training.gradient_accumulation_steps
    if micro == "auto":
        if micro_batch_size is None:
            raise ValueError("micro_batch_size is auto: find it first")
        micro = micro_batch_size
    if total is None:
        total = micro * steps * num_processes
    if problem := _uneven(total, micro, steps, num_processes):
        raise ConfigError(f"training: {problem}")
    micro = micro or total // (steps * num_processes)
    return total, micro, steps or total // (micro * num_processes)


def micro_batch_candidates(global_batch_size: int, num_processes: int) -> list[int]:
    """What `micro_batch_size: auto` may be: the divisors of one process's share of an update, largest first."""
    if problem := _uneven(global_batch_size, None, None, num_processes):
        raise ConfigError(f"training: {problem}")
    share = global_batch_size // num_processes
    small = [divisor for divisor in range(1, math.isqrt(share) + 1) if share % divisor == 0]
    return sorted({*small, *(share // divisor for divisor in small)}, reverse=True)


def _uneven(total: int, micro: int | None, steps: int | None, processes: int | None = None) -> str | None:
    """What is wrong with sharing a batch out so, if anything; None stands for what is free to follow from the rest."""
    sizes = {"micro_batch_size": micro, "gradient_accumulation_steps": steps, "num_processes": processes}
    given = {name: size for name, size in sizes.items() if size is not None}
    product, free = math.prod(given.values()), len(given) < len(sizes)
    if total == product or (free and total % product == 0):
        return None
    factors = " x ".join(f"{name} {size}" for name, size in given.items())
    equals = f" = {product}" if len(given) > 1 else ""
    return f"found global_batch_size {total}; expected {'a multiple of ' if free else ''}{factors}{equals}"


def _read(path: str | Path) -> dict[str, Any]:
    try:
        values = _parse(Path(path).read_bytes().decode(), _name(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{_name(path)}: found no UTF-8 at byte {error.start}; expected text in UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{_name(path)}: cannot be read ({reason}); expected a YAML file") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else _short(values)
        raise ConfigError(f"{_name(path)}: found {found}; expected a mapping with {', '.join(Config.model_fields)}")
    return values


def _override(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Set what `key.path=value` says, with the mappings on its way, and return the path."""
    key, equals, text = override.partition("=")
    *above, last = keys = tuple(key.split("."))
    if not equals or not all(keys):
        raise ConfigError(f"{COMMAND_LINE}: found {_short(override)}; expected key.path=value")
    value = _parse(text, f"{COMMAND_LINE}: {_name(*keys)}")
    for depth, name in enumerate(above, start=1):
        inner = {} if values.get(name) is None else values[name]
        if not isinstance(inner, dict):
            found = f"{_name(*keys[:depth])} to be {_short(inner)}"
            raise ConfigError(f"{COMMAND_LINE}: {_name(*keys)}: found {found}; expected a mapping there")
        values[name] = dict(inner)  # a copy, as an alias may put the same one elsewhere too
        values = values[name]
    values[last] = value
    return keys


def _source(keys: tuple[str, ...], path: str | Path, overridden: list[tuple[str, ...]]) -> str:
    """Where the value at a key path comes from: the command line as a whole, or in some of its parts, or the file."""
    if any(keys[: len(given)] == given for given in overridden):
        return COMMAND_LINE
    in_part = any(given[: len(keys)] == keys for given in overridden)
    return f"{_name(path)} and {COMMAND_LINE}" if in_part else _name(path)


def _parse(text: str, source: str) -> Any:
    try:
        return plain_yaml.read(text)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _explain(error: Any, values: Any) -> list[tuple[tuple[str, ...], str]]:
    """(key path, problem) for what pydantic found, at the key that the schema declares, however far below it was."""
    keys, section, field = (), Config, None
    for name in error["loc"]:
        if section is None:
            break
        keys = (*keys, name)
        if (field := section.model_fields.get(name)) is None:
            return [(keys, f"unknown key; {_nearest(keys, section)}")]
        if name not in values:
            return [(keys, f"missing; expected {_expected(field)}")]
        values, section = values[name], field.annotation if isinstance(field.annotation, type(Section)) else None
    if section and error["type"] == "value_error":
        return [((*keys, *key.split(".")) if key else keys, problem) for key, problem in error["ctx"]["error"].args]
    return [(keys, f"found {_short(values)}; expected {_expected(field)}")]


def _expected(field: FieldInfo) -> str:
    def alternatives(annotation: Any) -> Iterator[str]:
        if annotation is type(None):
            yield "null"
        elif isinstance(annotation, type(Section)):
            yield f"a mapping with {', '.join(annotation.model_fields)}"
        elif get_origin(annotation) is Annotated:
            yield annotation.__metadata__[-1].description
        else:  # a union or a literal
            for part in get_args(annotation):
                yield from [part] if isinstance(part, str) else alternatives(part)

    return field.description or " or ".join(alternatives(field.annotation))


def _nearest(keys: tuple[str, ...], section: type[Section]) -> str:
    *above, key = keys
    if near := difflib.get_close_matches(key.lower(), section.model_fields, n=1):
        return f"did you mean {_name(*above, *near)}?"
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    elsewhere = [f"{name}.{key}" for name, other in sections.items() if key in getattr(other, "model_fields", ())]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"expected one of {', '.join(section.model_fields)}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _name(*parts: str | Path) -> str:
    """Key path or file, on one line whatever is in it."""
    return ".".join(part if part and part.isprintable() else repr(part) for part in map(str, parts))
