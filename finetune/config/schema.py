"""The schema of a run's config. Its keys are the public interface.

The string below a key says what it means and in which unit; docs/make_config.py makes docs/config.md of them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator

from finetune.config.fields import (
    Betas,
    Buckets,
    Count,
    Decay,
    Flag,
    Fraction,
    Labels,
    Mapping,
    Names,
    Natural,
    NonNegative,
    Path,
    Positive,
    Prompts,
    RepoId,
    Resume,
    Scales,
    Seed,
    Shapes,
    StepRules,
    Text,
    short,
)
from finetune.core.batch import uneven


class Section(BaseModel):
    """A mapping with known keys and strict types, except that a whole number may stand for a float."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def disagreements(self) -> Iterator[tuple[str, str]]:
        """Cross-field checks: yields (the key, or "" for the whole section; the problem)."""
        yield from ()

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if found := list(self.disagreements()):
            raise ValueError(*found)
        return self


class LoRAConfig(Section):
    rank: Count = 16
    """Rank of the adapters: the width of what they pass on."""
    alpha: Positive | None = None
    """The adapters' output is scaled by alpha / rank; null: alpha is the rank."""
    target_modules: Names = ("attention",)
    """Layers with an adapter: `attention`, `feed_forward`, `convolutions`, or endings of their names like `to_q`."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights; the adapters are float32 whatever it is."""
    dropout: NonNegative = 0.0
    """Only 0: dropout draws from a global generator, so that a run would depend on its batch layout."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.dropout:
            yield "dropout", f"found {self.dropout}; expected 0: it draws from a global generator, by the batch layout"


class ModelConfig(Section):
    pretrained: Path | None = None
    """Hub id or folder of a DDPMPipeline, DDIMPipeline, StableDiffusionPipeline or StableDiffusionXLPipeline."""
    unet: Mapping | None = None
    """Settings of a diffusers UNet2DModel to train from scratch, instead of `pretrained`."""
    class_conditional: Flag = False
    """Tell the model the class of an image (`data.label_column`), so that it can draw a class that is asked for."""
    lora: LoRAConfig | None = None
    """Train adapters of a text-to-image model, its own weights frozen; null: train all weights of the UNet."""
    noise_scheduler: Mapping = {}
    """Settings of diffusers' DDPMScheduler that replace those of the pretrained pipeline."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass: less memory, for the time of one more forward pass."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        given = [key for key in ("pretrained", "unet") if getattr(self, key) is not None]
        if len(given) != 1:
            yield "", f"found {' and '.join(given) or 'neither'}; expected exactly one of pretrained, unet"
        if self.lora is not None and self.unet is not None:
            yield "lora", "found it with model.unet; expected it with a pretrained text-to-image model"


def _doubles(key: str, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """A problem for each shape that a list has more than once."""
    for shape in dict.fromkeys(shapes):
        if shapes.count(shape) > 1:
            yield key, f"found {short(list(shape))} {shapes.count(shape)} times; expected it once"


class DataConfig(Section):
    source: Path
    """`digits`, a folder of pictures, parquet, arrow or WebDataset tar files, or a dataset's hub id."""
    split: Text = "train"
    """Split to train on, or part of one in the notation of `datasets`: `train[:1000]`."""
    image_column: Text = "image"
    """Column of the pictures; `image` also finds the only column of pictures, whatever its name."""
    label_column: Text | None = None
    """Column of the labels; null: `label`, where there is one."""
    labels: Labels | None = None
    """Train only on images with one of these labels, given by name or number; null: on all."""
    caption_column: Text | None = None
    """Column of captions or of lists of them; null: `caption` or `text`, or `.txt` files beside the pictures."""
    caption: Text | None = None
    """One caption for all pictures, instead of captions of their own."""
    resolution: Count | None = None
    """Pixels a side; null: the model's `sample_size`."""
    buckets: Buckets | None = None
    """Shapes that pictures are given, each the nearest to its own: so many of diffusers' ladder of aspect ratios, whose
    areas are about resolution x resolution, or a list of [width, height]; null: all become squares."""
    crop: Literal["center", "random"] = "center"
    """How pictures are cut to their shape: the middle, or another random part in each epoch."""
    random_flip: Flag = False
    """Mirror each image with probability 1/2, drawn anew in each epoch."""
    background: Text = "white"
    """Colour under transparent pixels, by name or as #rrggbb."""
    on_bad_image: Literal["error", "skip"] = "error"
    """`error`: end with a list of the pictures that cannot be used; `skip`: train without them."""
    num_workers: Natural = 2
    """Processes that prepare batches, for each training process; 0: the training process itself."""
    validation_fraction: Fraction = 0.05
    """Share of the images that is held out for validation, from 0 to below 1."""
    validation_split: Text | None = None
    """Split to validate on, instead of a fraction of the images."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.validation_split == self.split:
            yield "validation_split", f"found {short(self.split)}; expected a split other than data.split"
        if self.caption is not None and self.caption_column is not None:
            yield "caption", f"found {short(self.caption)} and a caption_column; expected one of them"
        if isinstance(self.buckets, tuple):
            yield from _doubles("buckets", self.buckets)


class TrainingConfig(Section):
    global_batch_size: Count | None = None
    """Images in one update, over all processes and accumulation steps."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Images in one forward and backward pass of one process; `auto`: the largest that fits in memory."""
    gradient_accumulation_steps: Count | None = None
    """Forward and backward passes of one process in one update."""
    num_epochs: Count | None = None
    """Length in passes over the training images."""
    max_train_steps: Count | None = None
    """Length in updates; overrides `num_epochs` if both are given."""
    max_grad_norm: Positive | None = 1.0
    """Norm that the gradient of an update is clipped to; null: no clipping."""
    timestep_sampling: Literal["stratified", "uniform"] = "stratified"
    """`stratified`: timesteps that cover their range evenly in each batch; `uniform`: independent draws."""
    snr_gamma: Positive | None = None
    """Gamma of min-SNR loss weighting (Hang et al. 2023), usually 5; null: every timestep weighs the same."""
    noise_offset: NonNegative = 0.0
    """Strength of noise that a channel has in all its pixels, in standard deviations, usually 0 to 0.1."""
    condition_dropout: Fraction = 0.1
    """Share of the images trained without their class or caption, from 0 to below 1, which guidance compares with."""
    nonfinite_loss: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is not finite, stop the run or skip the update."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.num_epochs is None and self.max_train_steps is None:
            yield "", "found neither; expected num_epochs or max_train_steps"
        keys = "global_batch_size", "micro_batch_size", "gradient_accumulation_steps"
        total, micro, steps = sizes = [getattr(self, key) for key in keys]
        given = ", ".join(key for key, size in zip(keys, sizes, strict=True) if size is not None)
        if micro == "auto":
            if total is None or steps is not None:
                problem = f"found {given}; auto needs global_batch_size and no gradient_accumulation_steps"
                yield "micro_batch_size", problem
        elif sizes.count(None) > 1:
            yield "", f"found {given or 'none'} of {', '.join(keys)}; expected at least two"
        elif total is not None and (mismatch := uneven(total, micro, steps)):
            yield "", mismatch


class OptimizerConfig(Section):
    name: Literal["adamw"] = "adamw"
    """The optimizer."""
    learning_rate: Positive = 1e-5
    """Peak learning rate, per update."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment, per update."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay: each update shrinks the weights by learning_rate x weight_decay."""
    eps: NonNegative = 1e-8
    """AdamW's term in the denominator, for numerical stability."""


class LRSchedulerConfig(Section):
    name: (
        Literal["constant", "constant_with_warmup", "piecewise_constant"]
        | Literal["linear", "cosine", "cosine_with_restarts", "polynomial"]
    ) = "constant"
    """Shape of the learning rate over the run, as in diffusers."""
    warmup_steps: Natural = 0
    """Updates over which the learning rate rises from 0."""
    num_cycles: Count = 1
    """Restarts of `cosine_with_restarts`, over the run."""
    power: Positive = 1.0
    """Exponent of `polynomial`."""
    step_rules: StepRules | None = None
    """Of `piecewise_constant`: factors of the learning rate, each with the update that ends it."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.warmup_steps and self.name in ("constant", "piecewise_constant"):
            expected = f"expected 0 with {self.name}, which has no warm-up (constant_with_warmup has one)"
            yield "warmup_steps", f"found {self.warmup_steps}; {expected}"
        for key, name in {"num_cycles": "cosine_with_restarts", "power": "polynomial"}.items():
            if getattr(self, key) != 1 and self.name != name:
                yield key, f"found {getattr(self, key)}; expected 1 with {self.name}, because only {name} uses it"
        if (self.step_rules is not None) != (self.name == "piecewise_constant"):
            expected = "expected rules for piecewise_constant and null for any other schedule"
            yield "step_rules", f"found {short(self.step_rules)} with {self.name}; {expected}"


class EMAConfig(Section):
    enabled: Flag = True
    """Keep a moving average of the weights; validation, samples and export use it."""
    decay: Decay = 0.9999
    """Largest decay of the average, per update."""
    power: Positive = 0.75
    """Exponent of the decay's warm-up, 1 - (1 + updates)^-power."""


class CheckpointConfig(Section):
    every_steps: Count = 500
    """Updates between two checkpoints."""
    keep: Count = 3
    """Checkpoints that stay on disk, the newest ones."""
    keep_best: Flag = False
    """Also keep the checkpoint with the lowest kernel distance (`validation.quality`)."""
    resume: Resume = "auto"
    """`auto`: from the newest valid checkpoint; `never`; or the folder of a checkpoint."""


class QualityConfig(Section):
    features: Path
    """Image model of transformers whose features are compared: a folder or a hub id like `facebook/dinov2-small`."""
    images: Count = 1000
    """Samples to draw, and held-out images to compare them with."""
    every_steps: Count = 1000
    """Updates between two measurements."""


class ValidationConfig(Section):
    every_steps: Count | None = None
    """Updates between two validations; null: a tenth of the run."""
    images: Count = 64
    """Draws of a held-out image, a timestep and noise in one validation; the same in each."""
    quality: QualityConfig | None = None
    """Fréchet and kernel distance between samples and held-out images; null: not measured."""


class SamplesConfig(Section):
    every_steps: Count = 500
    """Updates between two sample grids."""
    count: Natural = 16
    """Images in a grid, for each guidance scale; 0: no grids."""
    inference_steps: Count = 40
    """DDIM steps per image."""
    labels: Labels | None = None
    """Classes to draw, a row of the grid each; null: the first ten."""
    prompts: Prompts | None = None
    """Prompts to draw, a row of the grid each; null: the captions of the first images."""
    negative_prompt: Text | None = None
    """Prompt that guidance leads away from; null: no prompt."""
    shapes: Shapes | None = None
    """Shapes to draw, a grid each, of those of `data.buckets`; null: the most frequent one."""
    guidance_scale: Scales = 1.0
    """Scale of classifier-free guidance, 1 for none; a list: a block of columns each."""

    @property
    def guidance_scales(self) -> tuple[float, ...]:
        """The guidance scales as a list, whether one or several are given."""
        return self.guidance_scale if isinstance(self.guidance_scale, tuple) else (self.guidance_scale,)


class LoggingConfig(Section):
    every_steps: Count = 1
    """Updates between two logged lines."""
    tracker: Text | None = "tensorboard"
    """A tracker of Accelerate that is installed; null: `metrics.jsonl` alone."""


class ExportConfig(Section):
    push_to_hub: RepoId | None = None
    """Hub repository that the pipeline is uploaded to at the end; null: none."""


class Config(Section):
    """Everything that describes a run, and nothing about the hardware. Every interval counts updates."""

    output_dir: Path
    """Folder of the run; a run that exists there is resumed."""
    seed: Seed = 0
    """Seeds all randomness of the run."""
    model: ModelConfig
    """What is trained."""
    data: DataConfig
    """What it is trained on."""
    training: TrainingConfig
    """Batch size, length and objective."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How an update is made."""
    lr_scheduler: LRSchedulerConfig = LRSchedulerConfig()
    """How the learning rate changes over the run."""
    ema: EMAConfig = EMAConfig()
    """The moving average of the weights."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is saved to resume from."""
    validation: ValidationConfig = ValidationConfig()
    """Loss on held-out images."""
    samples: SamplesConfig = SamplesConfig()
    """Grids of generated images, always from the same noise."""
    logging: LoggingConfig = LoggingConfig()
    """How the curves are written."""
    export: ExportConfig = ExportConfig()
    """What happens to the finished pipeline."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.checkpoint.keep_best and self.validation.quality is None:
            yield "checkpoint.keep_best", "found true; expected it with validation.quality, which says what is best"
        if self.validation.quality and not (self.data.validation_fraction or self.data.validation_split):
            yield "validation.quality", "found no held-out images; expected data.validation_fraction above 0 or a split"
        if self.samples.shapes is not None:
            yield from _doubles("samples.shapes", self.samples.shapes)
            if self.data.buckets is None:
                given = short([list(shape) for shape in self.samples.shapes])
                yield "samples.shapes", f"found {given}; expected it with data.buckets only"
        if self.validation.quality and self.data.buckets is not None:
            yield (
                "validation.quality",
                "found it with data.buckets; expected null, as it compares pictures of one shape",
            )
        if self.lr_scheduler.name == "polynomial" and self.optimizer.learning_rate <= 1e-7:
            found = self.optimizer.learning_rate
            yield (
                "optimizer.learning_rate",
                f"found {found}; expected above 1e-07, the polynomial schedule's final value",
            )
