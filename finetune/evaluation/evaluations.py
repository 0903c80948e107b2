"""What a run is evaluated by: samples, validation on held-out images, and the quality of samples."""

from dataclasses import dataclass

from finetune.config.schema import Config
from finetune.core.distributed import on_main_process, together
from finetune.core.kind import Embed, Kind
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
    def example(self) -> str:
        """A prompt to show how the model is used, if it is one of captions."""
        return next((name for name in self.names if name), "a caption")

    @property
    def texts(self) -> list[str]:
        """What a model of captions has to have encoded to draw them."""
        return [text for text in (*self.names, self.negative_prompt) if text]


@dataclass(frozen=True)
class Evaluations:
    """What a run is evaluated by; without held-out images by its samples alone.

    Attributes:
        embed: what makes embeddings of prompts, for a model of captions.
    """

    samples: Samples
    embed: Embed | None = None
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


def make_quality(config: Config, kind: Kind, held_out: Images | None) -> Quality | None:
    """What measures samples against the held-out images, where the config asks for it. Called by all processes.

    Raises:
        UserError: on all processes, if the image model that it is measured by cannot be loaded.
    """
    measured = config.validation.quality
    if measured is None or held_out is None:
        return None
    names = held_out.names() if kind.conditional else [None]
    return together(lambda: Quality(measured, held_out, names))


def make_evaluations(
    config: Config,
    kind: Kind,
    samples: Samples,
    quality: Quality | None,
    held_out: Images | None,
    encodings: Encodings | None,
) -> Evaluations:
    """Samples, their quality, and validation on held-out images, where there are any.

    Args:
        encodings: of the held-out images, captions and prompts; None for a model of pixels.
    """
    validation = None
    if held_out is not None:
        examples = make_batches(config, kind, held_out, encodings)
        count, snr_gamma = config.validation.images, config.training.snr_gamma
        validation = Validation(examples, count, config.seed, kind, snr_gamma)
    return Evaluations(samples, encodings.texts.embed if encodings else None, validation, quality)
