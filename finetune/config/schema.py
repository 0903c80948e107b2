"""The schema of a run's config. Its keys are the public interface.

The sections are defined in inputs.py, updates.py and outputs.py. The string below a key says what it means and
in which unit; docs/make_config.py makes docs/config.md of them.
"""

from collections.abc import Iterator

from finetune.config.fields import Path, Seed
from finetune.config.inputs import DataConfig, ModelConfig, duplicates
from finetune.config.outputs import CheckpointConfig, ExportConfig, LoggingConfig, SamplesConfig, ValidationConfig
from finetune.config.section import Section
from finetune.config.updates import EMAConfig, LRSchedulerConfig, OptimizerConfig, TrainingConfig
from finetune.core.errors import short


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
            yield "checkpoint.keep_best", "found true; needs validation.quality, which defines the best checkpoint"
        if self.validation.quality and not (self.data.validation_fraction or self.data.validation_split):
            yield "validation.quality", "found no held-out images; expected data.validation_fraction above 0 or a split"
        if self.training.shard and self.model.lora is not None:
            problem = "found true with model.lora, whose adapters take little memory; expected false"
            yield "training.shard", f"{problem} (model.lora.base_dtype halves what the frozen weights take)"
        if self.samples.shapes is not None:
            yield from duplicates("samples.shapes", self.samples.shapes)
            if self.data.buckets is None:
                given = short([list(shape) for shape in self.samples.shapes])
                yield "samples.shapes", f"found {given}; only valid with data.buckets"
        if self.lr_scheduler.name == "polynomial" and self.optimizer.learning_rate <= 1e-7:
            found = self.optimizer.learning_rate
            yield (
                "optimizer.learning_rate",
                f"found {found}; expected above 1e-07, the polynomial schedule's final value",
            )
