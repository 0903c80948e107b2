"""LoRA: small adapters beside the frozen layers of a text-to-image model (Hu et al. 2021, section 4.1), by peft.

A layer's output W x becomes W x + alpha / rank B A x. A is drawn from the seed and its own name, B is zero, so that an
untrained adapter changes nothing.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils.operations import recursively_apply
from diffusers import UNet2DConditionModel
from peft import LoraConfig as PeftConfig

from finetune.config.inputs import LoRAConfig
from finetune.core.errors import UserError, first_line
from finetune.core.kind import Arguments
from finetune.core.randomness import key
from finetune.models import lora_files
from finetune.models.hub import DESCRIPTIONS, file_bytes
from finetune.models.stable_diffusion import StableDiffusion, quoted
from finetune.models.unet import fewest_pixels

GROUPS = {  # endings of modules' names, by what a config may call them
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "feed_forward": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "convolutions": ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
}
ADAPTED = (torch.nn.Linear, torch.nn.Conv2d)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
USAGE = """\
```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{base}")
pipeline.load_lora_weights("PATH_OR_REPOSITORY")
images = pipeline("{prompt}", num_inference_steps={steps}, guidance_scale=5.0).images
```

Rank {rank}, alpha {alpha:g}. `{kohya}` holds the same adapter for ComfyUI and the programs of kohya, with its alpha."""


class LoRA(StableDiffusion):
    """The kind of text-to-image model whose adapters are trained and whose own weights are frozen."""

    export_name = "lora"

    def __init__(self, options: LoRAConfig, seed: int, *parts: Any):
        """
        Args:
            parts: as StableDiffusion takes them; the network gets its adapters here.
        """
        super().__init__(*parts)
        self.options = options
        add_adapters(self.network, options)
        if unread := lora_files.unread(self.folder, self.network):
            raise UserError(
                f"model.lora.target_modules: found {', '.join(unread)}, which cannot be told apart in an adapter's "
                "file of kohya's format; expected other layers"
            )
        draw_adapters(self.network, seed)
        if self.network.conv_in.weight.dtype != torch.get_default_dtype():
            compute_in_own_dtype(self.network)

    def without_memory(self) -> UNet2DConditionModel:
        """A copy of the network on the meta device, adapters included: its shapes, without weights."""
        shapes = super().without_memory()
        with torch.device("meta"):
            add_adapters(shapes, self.options)
        return shapes

    def save(self, folder: Path) -> None:
        """Write the adapter in both formats, and load it afresh to see that it does what the trained network does.

        Raises:
            UserError: if its outputs differ, in any bit, from those of the trained network.
        """
        lora_files.write(folder, self.folder, self.network, alpha_of(self.options))
        lora_files.verify(folder, self.folder, self.network, *self._probe())

    def export_bytes(self) -> int:
        """Bytes that `save` writes, at most: the adapters twice, and in kohya's file an alpha for each two weights."""
        adapters = [*self.trainable().values()]
        alphas = [torch.empty(())] * (len(adapters) // 2)
        return file_bytes([*adapters, *adapters, *alphas]) + DESCRIPTIONS

    def _probe(self) -> tuple[torch.Tensor, Arguments]:
        """Inputs on which two networks are compared, of the fewest latents that the UNet can halve."""
        example = self.encoded_example(1, fewest_pixels(self.shapes, self.divisor))
        generator = torch.Generator().manual_seed(0)
        for name in ("latents", *self._encoders.text_fields):
            example[name] = torch.randn(example[name].shape, generator=generator)
        return self.inputs(example)

    def usage(self, inference_steps: int, prompt: str) -> str:
        """How the exported adapter is used, in Markdown."""
        return USAGE.format(
            pipeline=self.folder.pipeline_class.__name__,
            base=self.folder.published_name,
            prompt=quoted(prompt),
            steps=inference_steps,
            rank=self.options.rank,
            alpha=alpha_of(self.options),
            kohya=lora_files.KOHYA,
        )

    def identity(self) -> dict[str, Any]:
        """The base model's identity, the adapters' shape, and a hash of the frozen weights."""
        options = self.options.model_dump(mode="json") | {"alpha": alpha_of(self.options)}
        return super().identity() | {"lora": options, "base": self.folder.digest(["unet"])}


def peft_config(network: UNet2DConditionModel, options: LoRAConfig) -> PeftConfig:
    """What peft is told; `target_modules` are groups or endings of modules' names.

    Raises:
        UserError: if a target matches no module.
    """
    endings = [ending for target in options.target_modules for ending in GROUPS.get(target, (target,))]
    layers = dict(network.named_modules())
    for target in options.target_modules:
        named = [name for name in layers if _ends_with(name, GROUPS.get(target, (target,)))]
        others = [name for name in named if not isinstance(layers[name], ADAPTED)]
        if not named or others:
            raise UserError(_refusal(target, others, layers))
    sizes: dict[str, Any] = {
        "r": options.rank,
        "lora_alpha": alpha_of(options),
    }  # peft's annotation of alpha is a whole number
    return PeftConfig(**sizes, target_modules=endings, init_lora_weights=False)


def _refusal(target: str, others: Sequence[str], layers: Mapping[str, torch.nn.Module]) -> str:
    """Why a target will not do: it names nothing, or these layers, which cannot have adapters."""
    found, example = "which no layer of the UNet is called", "to_q"
    if others:
        found = f"which is a {type(layers[others[0]]).__name__} in {others[0]}"
        within = [name for name in layers if name.startswith(f"{others[0]}.") and isinstance(layers[name], ADAPTED)]
        example = within[0].removeprefix(others[0].removesuffix(target)) if within else example
    return (
        f"model.lora.target_modules: found {target!r}, {found}; expected {', '.join(GROUPS)} or endings of the names "
        f"of linear layers and convolutions, such as {example}"
    )


def alpha_of(options: LoRAConfig) -> float:
    """Alpha as the files hold it, in float32: with more digits they would not be exact."""
    return float(np.float32(options.rank if options.alpha is None else options.alpha))


def _ends_with(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def add_adapters(network: UNet2DConditionModel, options: LoRAConfig) -> None:
    """Freeze a network and add adapters in torch's default dtype, whatever the network's own; not drawn yet.

    Raises:
        UserError: if a target matches no module, or one that cannot have an adapter.
    """
    network.requires_grad_(False)
    config = peft_config(network, options)
    with torch.random.fork_rng(devices=[]):  # peft draws weights that are overwritten
        try:
            network.add_adapter(config)
        except ValueError as error:  # a module of another class than linear or convolution
            raise UserError(f"model.lora.target_modules: {first_line(error)}") from error
    for name, weight in network.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(torch.get_default_dtype())
            weight.requires_grad_(True)


def draw_adapters(network: UNet2DConditionModel, seed: int) -> None:
    """Give each adapter the initial weights that the seed and its name decide."""
    for name, weight in network.named_parameters():
        if "lora_" in name:
            weight.data = initial_weight(seed, name, weight.shape)


def initial_weight(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """A is uniform within 1 / sqrt(inputs), as a linear layer's weight in torch; B is zero."""
    if "lora_B" in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(key(seed, f"lora {name}", 0, 0))
    return (2 * torch.rand(shape, generator=generator) - 1) / shape[1:].numel() ** 0.5


def compute_in_own_dtype(network: UNet2DConditionModel) -> None:
    """Have a network in half precision take and give tensors of torch's default dtype, as training has them."""
    dtype = network.conv_in.weight.dtype

    def halve(module: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        return recursively_apply(cast, given), recursively_apply(cast, named)

    def widen(module: torch.nn.Module, given: tuple[Any, ...], output: Any) -> Any:
        output.sample = output.sample.to(torch.get_default_dtype())
        return output

    network.register_forward_pre_hook(halve, with_kwargs=True)
    network.register_forward_hook(widen)
