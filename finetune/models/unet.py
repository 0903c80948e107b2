"""What the UNets of all kinds have in common: their outline without weights, their parts and their sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D, ResnetBlockCondNorm2D

from finetune.core.errors import UserError, first_line
from finetune.core.shapes import Shape

_INNER = ResnetBlock2D, ResnetBlockCondNorm2D, BasicTransformerBlock


def outline(model_class: type[Any], config: dict[str, Any], where: str) -> Any:
    """A network of a config on the meta device: its shapes, without memory for weights.

    Args:
        model_class: of diffusers.
        where: the key or file that holds the config, for the error.

    Raises:
        UserError: if there is none of this config.
    """
    try:
        with torch.device("meta"):
            return model_class.from_config(config)
    except Exception as error:  # whatever a wrong value leads to
        raise UserError(f"{where}: {model_class.__name__} cannot be built from it: {first_line(error)}") from error


def without_weights(network: ModelMixin) -> Any:
    """A copy of a network on the meta device: its shapes, without memory for weights."""
    # diffusers lists settings that were left at their defaults, and ignores what was registered for them later.
    settings = {key: value for key, value in network.config.items() if key != "_use_default_values"}
    with torch.device("meta"):
        return type(network).from_config(settings)


def blocks(network: ModelMixin) -> list[torch.nn.Module]:
    """The parts of a UNet whose weights are needed at once, inner ones before those around them.

    Its residual and transformer blocks hold most of the weights; what else is in the blocks at one resolution is a part
    for each of these.
    """
    middle = [] if network.mid_block is None else [network.mid_block]
    inner = [module for module in network.modules() if isinstance(module, _INNER)]
    return [*inner, *network.down_blocks, *middle, *network.up_blocks]


def settings_of(component: Any) -> dict[str, Any]:
    """The config of a network or scheduler of diffusers, without what diffusers notes of its origin."""
    return {key: value for key, value in component.config.items() if not key.startswith("_")}


def narrowest(shapes: Sequence[Shape]) -> Shape:
    """The shape with the shortest side; of two, the smaller.

    A network that takes it takes all of them, if its divisor divides their sides: its layers treat height and width
    alike, and what they refuse is too small for them.
    """
    return min(shapes, key=sorted)


def fewest_pixels(shapes: Sequence[Shape], divisor: int) -> Shape:
    """As much of the narrowest as is enough to try a network: two pixels a side at its lowest level, or one if it has
    no more there."""
    return Shape(*(min(side, 2 * divisor) for side in narrowest(shapes)))


def own_resolution(sample_size: int | list[int] | tuple[int, int] | None) -> int | None:
    """A model's own resolution in pixels a side; None if it has none or its sides differ."""
    if isinstance(sample_size, list | tuple):
        return sample_size[0] if len(set(sample_size)) == 1 else None
    return sample_size
