"""Samples from starting noise that stays the same for the whole run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler

from finetune.config.outputs import SamplesConfig
from finetune.core.errors import UserError, first_few, first_line, short
from finetune.core.groups import summed
from finetune.core.kind import Arguments, Embed, Kind, predict
from finetune.core.randomness import noise
from finetune.core.shapes import Shape
from finetune.data.pixels import Pixels
from finetune.evaluation.passes import as_pixels, evaluating
from finetune.evaluation.rounds import rounds
from finetune.training.trial_pass import pass_idly

DEFAULT_ROWS = 10  # classes that are sampled where the config names none


def sampled_names(
    options: SamplesConfig, kind: Kind, captions: Sequence[str] = (), class_names: Sequence[str] = ()
) -> list[str | None]:
    """The conditions that the sample grid has a row for; one row without a condition for an unconditional model.

    Args:
        captions: prompts for a model conditioned on captions, where the config names none.
        class_names: of the images: a pretrained model may know others, which are not trained.

    Raises:
        UserError: if `samples.labels` names a class that the model does not have, or if the model is not
            conditioned on what `samples` asks for.
    """
    _check_asked(options, kind)
    if not kind.conditional:
        return [None]
    if kind.captioned:
        return [*(options.prompts or captions)]
    names = [str(label) for label in options.labels or (class_names or kind.class_names)[:DEFAULT_ROWS]]
    if unknown := [name for name in names if name not in kind.class_names]:
        raise UserError(
            f"samples.labels: found {', '.join(map(short, unknown))}; expected classes of the model, which has "
            f"{first_few(kind.class_names, 20)}"
        )
    return [*names]


def _check_asked(options: SamplesConfig, kind: Kind) -> None:
    told = "captions" if kind.captioned else "classes" if kind.conditional else "nothing"
    asked: tuple[tuple[str, str | None, Any], ...] = (
        ("labels", "classes", options.labels),
        ("prompts", "captions", options.prompts),
        ("negative_prompt", "captions", options.negative_prompt),
        ("guidance_scale", None, options.guidance_scale if options.guidance_scales != (1.0,) else None),
    )
    for key, needed, given in asked:
        if given is not None and (told == "nothing" or needed not in (None, told)):
            expected = {
                "classes": "classes (model.class_conditional=true)",
                "captions": "captions (text-to-image)",
                None: "classes (model.class_conditional=true) or captions (text-to-image)",
            }[needed]
            given = list(given) if isinstance(given, tuple) else given
            raise UserError(f"samples.{key}: found {short(given)}; only a model conditioned on {expected} takes it")


def sampled_shapes(options: SamplesConfig, images: Mapping[Shape, int]) -> list[Shape]:
    """The shapes that there is a sample grid of.

    Args:
        images: how many there are of each shape, the most frequent one first.

    Raises:
        UserError: if `samples.shapes` names one that no image has.
    """
    if options.shapes is None:
        return [next(iter(images))]
    shapes = [Shape(height, width) for width, height in options.shapes]
    if unknown := [str(shape) for shape in shapes if shape not in images]:
        raise UserError(
            f"samples.shapes: found {', '.join(unknown)}; expected shapes of the images, which have "
            f"{', '.join(map(str, images))}"
        )
    return shapes


@dataclass(frozen=True)
class ImageSampler:
    """Draws images by DDIM, from starting noise that the seed alone decides.

    Attributes:
        check: called between two steps; raises Interrupted to end there.
        negative_prompt: of guidance; None: no condition.
        embed: what a model of captions needs, to make embeddings of prompts.
    """

    kind: Kind
    accelerator: Accelerator
    check: Callable[[], None]
    seed: int
    inference_steps: int
    negative_prompt: str | None = None
    embed: Embed | None = None

    @torch.no_grad()
    def sample(
        self,
        names: Sequence[str | None],
        shapes: Sequence[Shape],
        guidance_scale: float = 1.0,
        purpose: str = "samples",
    ) -> list[Pixels]:
        """An image for each of `names`, uint8 (H, W, C).

        Called by all processes, each of which draws its share; all get the result.

        Args:
            names: the condition of each image; None is unconditional.
            shapes: of each image; those of one shape go through the network together.
            guidance_scale: of classifier-free guidance; 1 turns it off.
            purpose: names the stream of the starting noise.
        """
        kind, device = self.kind, self.accelerator.device
        images = [torch.zeros(*shape, kind.image_format.channels, dtype=torch.uint8) for shape in shapes]
        drawn: dict[Shape, list[tuple[Sequence[int], torch.Tensor]]] = {}
        with evaluating(kind.network):
            for chunk in rounds(len(names), self.accelerator, shapes):
                if chunk is None:
                    self._pass_idly()
                    continue
                shape = shapes[chunk[0]]
                told = [names[index] for index in chunk]
                without = [] if guidance_scale == 1 else [self.negative_prompt] * len(chunk)
                conditions = kind.conditions([*told, *without], device, shape, self.embed)
                noised = tuple(kind.example(1, shape)["noise"].shape[1:])
                start = torch.stack([noise(self.seed, 0, index, noised, purpose) for index in chunk]).to(device)
                drawn.setdefault(shape, []).append((chunk, self._denoised(start, conditions, guidance_scale)))
        for parts in drawn.values():  # all of a shape at once, since a model of latents loads what makes images of them
            made = as_pixels(kind.images(torch.cat([clean for _, clean in parts])))
            for index, image in zip((index for chunk, _ in parts for index in chunk), made, strict=True):
                images[index] = torch.from_numpy(image)
        everything = summed(torch.cat([image.flatten() for image in images]))  # each is 0 on all processes but one
        each = everything.split([image.numel() for image in images])
        return [pixels.view(image.shape).numpy() for pixels, image in zip(each, images, strict=True)]

    @cached_property
    def _ddim(self) -> DDIMScheduler:
        ddim = DDIMScheduler.from_config(self.kind.noise_scheduler.config)
        ddim.set_timesteps(self.inference_steps)
        return ddim

    def _denoised(self, x: torch.Tensor, conditions: Arguments, guidance_scale: float) -> torch.Tensor:
        """What DDIM makes of starting noise, (b, C, H, W)."""
        for timestep in self._ddim.timesteps:
            self.check()
            output = self._predict(x, timestep, conditions, guidance_scale)
            # DDIM that clips the image has to derive the noise from the clipped image, or guidance ruins it.
            x = self._ddim.step(output, timestep, x, use_clipped_model_output=self.kind.conditional).prev_sample
        return x

    def _pass_idly(self) -> None:
        """As many steps, while other processes draw the last chunks."""
        for _ in self._ddim.timesteps:
            self.check()
            pass_idly(self.kind)

    def _predict(
        self, x: torch.Tensor, timestep: torch.Tensor, conditions: Arguments, guidance_scale: float
    ) -> torch.Tensor:
        """The network's output under classifier-free guidance, uncond + w (cond - uncond), of the shape of `x`.

        Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", in the form that diffusers uses. Both halves go
        through the network as one batch.

        Args:
            conditions: of each image and, under guidance, then of each without its condition.
        """
        if guidance_scale == 1:
            return predict(self.kind.network, x, timestep, conditions)
        with_condition, without = predict(self.kind.network, torch.cat([x, x]), timestep, conditions).chunk(2)
        return without + guidance_scale * (with_condition - without)


def check_sampling(noise_scheduler: DDPMScheduler, inference_steps: int) -> None:
    """Sample one pixel as the run will and as its exported pipeline does, so that neither fails after the training.

    Raises:
        UserError: if a step fails or its result is not finite.
    """
    config = noise_scheduler.config
    if inference_steps > config.num_train_timesteps:
        raise UserError(
            f"samples.inference_steps: found {inference_steps}; expected at most {config.num_train_timesteps}, the "
            "num_train_timesteps of model.noise_scheduler"
        )
    keys = ("beta_schedule", "timestep_spacing", "steps_offset", "variance_type")
    settings = ", ".join(f"{key} {config[key]}" for key in keys)
    for scheduler_class, options in ((DDIMScheduler, {}), (DDPMScheduler, {"generator": torch.Generator()})):
        problem = f"model.noise_scheduler: {scheduler_class.__name__} cannot sample in {inference_steps} steps"
        pixel = torch.zeros(1, 1, 1, 1)
        try:
            scheduler = scheduler_class.from_config(config)
            scheduler.set_timesteps(inference_steps)
            for timestep in scheduler.timesteps:
                pixel = scheduler.step(torch.zeros_like(pixel), timestep, pixel, **options).prev_sample
        except Exception as error:  # whatever a wrong setting leads to
            raise UserError(f"{problem} with {settings}: {first_line(error)}") from error
        if scheduler.timesteps.min() < 0:  # would count from the end
            raise UserError(
                f"{problem} with {settings}: found a timestep {scheduler.timesteps.min()}, expected 0 or more"
            )
        if not pixel.isfinite().all():
            raise UserError(f"{problem} with {settings}: found a pixel {pixel.item()}, expected finite ones")
