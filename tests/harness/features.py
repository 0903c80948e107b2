"""A small image model of transformers in a folder, for distances between images."""

from pathlib import Path

import torch
from transformers import ResNetConfig, ResNetModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


def processor(channels: int) -> ViTImageProcessorPil:
    """Resizes to 16 x 16 pixels and maps 0..255 to -1..1."""
    half = [0.5] * channels
    size = {"height": 16, "width": 16}
    return ViTImageProcessorPil(size=size, image_mean=half, image_std=half, do_convert_rgb=channels == 3)


def save_resnet(folder: Path, channels: int = 1) -> str:
    """A ResNet with random weights and 16 features; returns the folder."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    ResNetModel(ResNetConfig(num_channels=channels, layer_type="basic", **sizes)).save_pretrained(folder)
    processor(channels).save_pretrained(folder)
    return str(folder)
