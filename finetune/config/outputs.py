"""Keys of the config: what a run saves, measures, shows and gives away."""

from collections.abc import Iterator

from finetune.config.fields import Count, Flag, Labels, Natural, Path, Prompts, RepoId, Resume, Scales, Shapes, Text
from finetune.config.section import Section


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

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.images < 2:
            yield "images", f"found {self.images}; expected at least 2, to estimate a covariance"


class ValidationConfig(Section):
    every_steps: Count | None = None
    """Updates between two validations; null: a tenth of the run."""
    images: Count = 64
    """Losses in one validation, each of a held-out image, a timestep and noise: always the same; images may repeat."""
    quality: QualityConfig | None = None
    """Fréchet and kernel distance between samples and held-out images; null: not measured."""


class SamplesConfig(Section):
    every_steps: Count = 500
    """Updates between two sample grids."""
    count: Natural = 16
    """Images in a grid, for each guidance scale, rounded up to full rows; 0: no grids."""
    inference_steps: Count = 40
    """DDIM steps per image."""
    labels: Labels | None = None
    """Classes to draw, a row of the grid each; null: the first ten classes of the training images."""
    prompts: Prompts | None = None
    """Prompts to draw, a row of the grid each; null: the captions of the first images."""
    negative_prompt: Text | None = None
    """Negative prompt for guidance; null: no prompt."""
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
    """Hub repository that the export, a pipeline or an adapter, is uploaded to at the end; null: none."""
