"""A diffusers pipeline that draws images of a class, with guidance.

An exported folder holds a copy of this file as pipeline.py, so it needs nothing but diffusers and torch.
"""

import inspect
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin, UNet2DModel
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalPipeline(DiffusionPipeline):  # type: ignore[misc] # diffusers has no types
    """Draws with a UNet2DModel whose class embedding has a last row that means "no class".

    Args:
        unet: the network; `num_class_embeds` of its config is the number of classes plus one.
        scheduler: any that samples from a DDPM; a DDPMScheduler becomes a DDIMScheduler.
        id2label: the name of each class.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin, id2label: dict[Any, str] | None = None):
        super().__init__()
        if type(scheduler).__name__ == "DDPMScheduler":
            scheduler = DDIMScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(id2label={str(row): name for row, name in (id2label or {}).items()})

    @property
    def labels(self) -> dict[str, int]:
        """The row of each class in the embedding, by name."""
        return {name: int(row) for row, name in self.config.id2label.items()}

    def get_label_ids(self, class_labels: Any) -> list[int]:
        """Rows of classes, given by name or by row; None is the row of "no class".

        Args:
            class_labels: a name, a row or None, or several: in a list or a tuple, or rows in a tensor or an array.

        Raises:
            ValueError: for a name or a row that the model does not have.
        """
        asked = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        asked = list(asked) if isinstance(asked, list | tuple) else [asked]
        rows = [self._row(label) for label in asked]
        unknown = [label for label, row in zip(asked, rows, strict=True) if row is None]
        if unknown or not rows:
            raise ValueError(f"class_labels: found {unknown}; expected names or rows of {self.labels}")
        return [row for row in rows if row is not None]

    def _row(self, label: Any) -> int | None:
        """The row of one class; None for what is neither the name nor the row of one."""
        labels = self.labels
        if label is None:
            return int(self.unet.config.num_class_embeds) - 1
        if isinstance(label, str):
            return labels.get(label)
        return int(label) if type(label) is not bool and label in labels.values() else None

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 40,
        output_type: str = "pil",
        return_dict: bool = True,
        latents: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw one image for each of `class_labels`.

        Args:
            class_labels: names or rows of classes, None for no class; see `get_label_ids`.
            guidance_scale: w of classifier-free guidance, uncond + w (cond - uncond) (Ho & Salimans 2022, in the form
                that diffusers uses); 1 turns it off.
            output_type: pil, np (float 0..1, (n, H, W, C)) or pt (float 0..1, (n, C, H, W)).
            latents: starting noise (n, C, H, W), instead of a draw from `generator`.
        """
        device, size = self._execution_device, self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        rows = torch.tensor(self.get_label_ids(class_labels), device=device)
        if latents is None:
            shape = (len(rows), self.unet.config.in_channels, height, width)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype)
        guided = guidance_scale != 1
        no_class = torch.full_like(rows, self.unet.config.num_class_embeds - 1)
        conditions = torch.cat([rows, no_class]) if guided else rows
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # DDIM that clips the image has to derive the noise from the clipped image, or guidance ruins the samples.
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"use_clipped_model_output": True} if "use_clipped_model_output" in accepted else {}
        images = latents.to(device, self.unet.dtype) * self.scheduler.init_noise_sigma
        for timestep in self.progress_bar(self.scheduler.timesteps):
            inputs = self.scheduler.scale_model_input(torch.cat([images, images]) if guided else images, timestep)
            output = self.unet(inputs, timestep, class_labels=conditions).sample
            if guided:
                with_class, without = output.chunk(2)
                output = without + guidance_scale * (with_class - without)
            images = self.scheduler.step(output, timestep, images, **options).prev_sample
        images = (images / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).float().numpy()
            if output_type == "pil":
                images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
