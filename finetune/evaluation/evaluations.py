"""What a run is evaluated by: samples, validation on held-out images, and the quality of samples."""

from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.core.distributed import on_main_process, together
from finetune.core.kind import Kind
from finetune.core.shapes import Shape
from finetune.data.encoded_batches import make_batches
from finetune.data.encodings import Encodings
from finetune.data.pixels import Images
from finetune.evaluation.quality import Quality
from finetune.evaluation.sampling import check_sampling, sampled_names, sampled_shapes
from finetune.evaluation.validation import Validation

SHOWN_CAPTIONS = 4  # of the images, drawn where the config names no prompts


@dataclass(frozen=True)
class Samples:
    """What the sample grids show.

    Attributes:
        names: the condition of each row; None is unconditional.
        shapes: there is a grid of each.
        negative_prompt: of guidance; None: no condition.
    """

    names: list[str | None]
    shapes: list[Shape]
    negative_prompt: str | None

    @property
    def texts(self) -> list[str]:
        """What a model of captions has to have encoded to draw them."""
        return [text for text in (*self.names, self.negative_prompt) if text]


@dataclass(frozen=True)
class Evaluations:
    """What a run is evaluated by; without held-out images by its samples alone."""

    samples: Samples
    validation: Validation | None = None
    quality: Quality | None = None


def choose_samples(config: Config, kind: Kind, images: Images) -> Samples:
    """What will be sampled, of a model that is trained on these images. Called by all processes.

    Raises:
        UserError: on all processes, if the model or its noise scheduler cannot draw what `samples` asks for.
    """

    def choose() -> Samples:
        options, captions = config.samples, images.captions.examples(SHOWN_CAPTIONS) if images.captions else []
        names = sampled_names(options, kind, captions, images.class_names)
        shapes = sampled_shapes(options, images.shapes)
        check_sampling(kind.noise_scheduler, options.inference_steps)
        return Samples(names, shapes, options.negative_prompt)

    return on_main_process(choose)


def make_evaluations(
    config: Config, kind: Kind, samples: Samples, held_out: Images | None, encodings: Encodings | None
) -> Evaluations:
    """Validation and quality, where there are held-out images. Called by all processes.

    Raises:
        UserError: on all processes, if the image model that quality is measured by cannot be loaded.
    """
    if held_out is None:
        return Evaluations(samples)
    options, examples = config.validation, make_batches(config, kind, held_out, encodings)
    validation = Validation(examples, options.images, config.seed, kind, config.training.snr_gamma)
    measured = options.quality
    if measured is None:
        return Evaluations(samples, validation)
    told = held_out.names() if kind.conditional else [None]
    return Evaluations(samples, validation, together(lambda: Quality(measured, held_out, told)))
