"""Class-conditional pixel models: a UNet2DModel that is conditioned on the class of the image that it denoises.

The class embedding has a row for each class and a last one for "no class", which diffusers' UNet2DModel lacks: images
whose label is dropped are trained with it, which guidance needs.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel

from finetune.core.errors import UserError, first_few
from finetune.core.kind import Arguments, Batch, Embed
from finetune.core.randomness import noise
from finetune.core.shapes import Shape
from finetune.models.class_pipeline import ClassConditionalPipeline
from finetune.models.unconditional import Unconditional

USAGE = """\
```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("PATH_OR_REPOSITORY", trust_remote_code=True)
images = pipeline([{shown}], guidance_scale=2.0, num_inference_steps={steps}).images
```

Classes, in the order of their rows: {names}. `trust_remote_code` loads the class in pipeline.py; without it:

```python
import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("PATH_OR_REPOSITORY", subfolder="unet")
scheduler = DDIMScheduler.from_pretrained("PATH_OR_REPOSITORY", subfolder="scheduler")
scheduler.set_timesteps({steps})
rows, guidance_scale, size = torch.tensor([{row}]), 2.0, unet.config.sample_size
no_class = torch.full_like(rows, unet.config.num_class_embeds - 1)
images = torch.randn(len(rows), unet.config.in_channels, size, size)  # from -1 to 1 in the end
for timestep in scheduler.timesteps:
    with torch.no_grad():
        output = unet(torch.cat([images, images]), timestep, class_labels=torch.cat([rows, no_class])).sample
    with_class, without = output.chunk(2)
    output = without + guidance_scale * (with_class - without)
    images = scheduler.step(output, timestep, images, use_clipped_model_output=True).prev_sample
```"""


class ClassConditional(Unconditional):
    """The kind of model that denoises pixels of a known class; see `core.kind.Kind`.

    Attributes:
        class_names: the name of each row of the class embedding but the last, which means "no class".
        shown: the class that the model card draws, one of those that are trained.
    """

    conditional = True

    def __init__(
        self,
        network: UNet2DModel,
        noise_scheduler: DDPMScheduler,
        made_for: int | None,
        class_names: Sequence[str],
        shapes: list[Shape] | None = None,
        variant: str | None = None,
        shown: str | None = None,
    ):
        super().__init__(network, noise_scheduler, made_for, variant=variant)
        self.shapes = shapes or self.shapes
        self.class_names = list(class_names)
        self.shown = self.class_names[0] if shown is None else shown

    def inputs(self, batch: Batch) -> tuple[torch.Tensor, Arguments]:
        """The images in [-1, 1], (b, C, H, W), and `class_labels`, (b,): the row of "no class" where it is dropped."""
        clean, _ = super().inputs(batch)
        no_class = len(self.class_names)
        return clean, {"class_labels": batch["labels"].masked_fill(batch["dropped"], no_class)}

    def conditions(
        self, names: Sequence[str | None], device: torch.device, shape: Shape | None = None, embed: Embed | None = None
    ) -> Arguments:
        """`class_labels` for classes by name; None is "no class"."""
        rows = {name: row for row, name in enumerate(self.class_names)} | {None: len(self.class_names)}
        return {"class_labels": torch.tensor([rows[name] for name in names], device=device)}

    def example(self, count: int, shape: Shape | None = None) -> dict[str, torch.Tensor]:
        """A batch of `count` blank images of the first class, on the CPU: of a shape, or of the largest area."""
        labels, dropped = torch.zeros(count, dtype=torch.long), torch.zeros(count, dtype=torch.bool)
        return super().example(count, shape) | {"labels": labels, "dropped": dropped}

    def pipeline(self) -> ClassConditionalPipeline:
        """A pipeline of the present weights that draws a class by name, with guidance."""
        return ClassConditionalPipeline(self.network, self.noise_scheduler, dict(enumerate(self.class_names)))

    def usage(self, inference_steps: int, prompt: str) -> str:
        """How the exported pipeline is called, in Markdown: with the class in pipeline.py, and without it."""
        row, names = self.class_names.index(self.shown), ", ".join(self.class_names)
        shown = json.dumps(self.shown, ensure_ascii=False)
        return USAGE.format(steps=inference_steps, shown=shown, row=row, names=names)

    def identity(self) -> dict[str, Any]:
        """The configs of the network and of the noise scheduler, and the classes."""
        return super().identity() | {"classes": self.class_names}


def with_classes(kind: Unconditional, class_names: Sequence[str], seed: int) -> ClassConditional:
    """The class-conditional model that a model and the classes of the data make, for pictures of the same shapes.

    - An unconditional network gets an embedding. Class rows are drawn from N(0, 1) by the seed: rows of zero learn far
      too slowly. The row of "no class" is zero, so that dropped labels start from the network's own output.
    - A network with a class embedding and stored names keeps its rows, and has to know all classes of the data. If all
      of its rows have names, it gets one for "no class", zero.
    - One without names gets a row for "no class", zero; its rows are the labels' own numbers.

    Raises:
        UserError: if the data has classes that a pretrained network does not know.
    """
    network = kind.network
    stored = kind.stored_class_names
    known = None if network.class_embedding is None else network.class_embedding.weight.detach()
    if known is not None:
        names = [str(row) for row in range(len(known))] if stored is None else stored
        if unknown := [name for name in class_names if name not in names]:
            raise UserError(_unknown(unknown, stored, len(known)))
        if len(names) < len(known):
            options = kind.made_for, names, kind.shapes, kind.variant, class_names[0]
            return ClassConditional(network, kind.noise_scheduler, *options)
        rows = known
    else:
        names, width = list(class_names), network.time_embedding.linear_2.out_features
        weight = network.time_embedding.linear_2.weight
        rows = torch.stack([noise(seed, 0, row, (width,), "class embedding") for row in range(len(names))])
        rows = rows.to(weight.device, weight.dtype)
    embedding = torch.nn.Embedding(len(names) + 1, rows.shape[1], device=rows.device, dtype=rows.dtype)
    with torch.no_grad():
        embedding.weight.copy_(torch.cat([rows, torch.zeros_like(rows[:1])]))
    network.class_embedding = embedding
    network.register_to_config(num_class_embeds=len(names) + 1)
    return ClassConditional(
        network, kind.noise_scheduler, kind.made_for, names, kind.shapes, kind.variant, class_names[0]
    )


def _unknown(unknown: Sequence[str], stored: Sequence[str] | None, rows: int) -> str:
    found = f"data.label_column: found the classes {first_few(unknown, 10)}"
    if stored is not None:
        return f"{found}, which the pretrained model does not have; expected some of {first_few(stored, 20)}"
    return (
        f"{found}; expected numbers from 0 to {rows - 1}, since the pretrained model has {rows} classes without names"
    )
