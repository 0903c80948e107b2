"""Keys of the config: what is trained, and on what.

The string below a key says what it means and in which unit; docs/make_config.py makes docs/config.md of them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

from finetune.config.fields import (
    Buckets,
    Count,
    Flag,
    Fraction,
    Labels,
    Mapping,
    Names,
    Natural,
    NonNegative,
    Path,
    Positive,
    Text,
)
from finetune.config.section import Section
from finetune.core.errors import short


def duplicates(key: str, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """A problem for each shape that a list has more than once."""
    for shape in dict.fromkeys(shapes):
        if shapes.count(shape) > 1:
            yield key, f"found {short(list(shape))} {shapes.count(shape)} times; expected it once"


class LoRAConfig(Section):
    rank: Count = 16
    """Rank of the LoRA matrices."""
    alpha: Positive | None = None
    """The adapters' output is scaled by alpha / rank; null: alpha is the rank."""
    target_modules: Names = ("attention",)
    """Layers with an adapter: `attention`, `feed_forward`, `convolutions`, or endings of their names like `to_q`."""
    base_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Precision of the frozen weights; the adapters are float32 whatever it is."""
    dropout: NonNegative = 0.0
    """Only 0: dropout draws from a global generator, so that a run would depend on its batch layout."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        if self.alpha is not None and not 1e-37 <= self.alpha <= 1e38:  # would be 0 or infinite in the files
            yield "alpha", f"found {self.alpha}; expected a number that float32 can hold, from 1e-37 to 1e38"
        if self.dropout:
            yield "dropout", f"found {self.dropout}; expected 0: it draws from a global generator, by the batch layout"


class ModelConfig(Section):
    pretrained: Path | None = None
    """Hub id or folder of a DDPMPipeline, DDIMPipeline, StableDiffusionPipeline or StableDiffusionXLPipeline."""
    unet: Mapping | None = None
    """Settings of a diffusers UNet2DModel to train from scratch, instead of `pretrained`."""
    class_conditional: Flag = False
    """Condition the model on the class of an image (`data.label_column`), so that it can draw a class on request."""
    lora: LoRAConfig | None = None
    """Train adapters of a text-to-image model, its own weights frozen; null: train all weights of the UNet."""
    noise_scheduler: Mapping = {}  # noqa: RUF012 - pydantic copies it
    """Settings of diffusers' DDPMScheduler that replace those of the pretrained pipeline."""
    gradient_checkpointing: Flag = False
    """Recompute activations in the backward pass: less memory, for the time of one more forward pass."""

    def disagreements(self) -> Iterator[tuple[str, str]]:
        given = [key for key in ("pretrained", "unet") if getattr(self, key) is not None]
        if len(given) != 1:
            yield "", f"found {' and '.join(given) or 'neither'}; expected exactly one of pretrained, unet"
        if self.lora is not None and self.unet is not None:
            yield "lora", "found with model.unet; only valid with a pretrained text-to-image model"


class DataConfig(Section):
    source: Path
    """`digits`, a folder of pictures, parquet, arrow or WebDataset tar files or a URL to them (`s3://`, `hf://`
    or whatever fsspec opens), or a dataset's hub id."""
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
    """Aspect-ratio buckets; each picture gets the nearest. A number n: the first n of diffusers' buckets, of about
    resolution x resolution pixels; or a list of [width, height]; null: squares."""
    order: Literal["full", "blocks"] = "full"
    """How an epoch's images are shuffled: `full`: all with each other; `blocks`: 65,536 at a time, from all over the
    source in short pieces, for more images than fit in memory."""
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
            yield from duplicates("buckets", self.buckets)
