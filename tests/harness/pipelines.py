"""Stable Diffusion pipelines of some ten thousand weights, saved by diffusers, with encoders that tell texts apart."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

# By how much of its largest value a posterior of the VAE below may be off where other numbers of images are encoded at
# once: a convolution of it adds at most 9 x 8 products, in an order of the kernel's choice, and there are fewer than 32
# layers one after another.
VAE_ROUNDING = 32 * 72 * 2**-24
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
LENGTH = 12  # tokens that are read: "a cat" has 6, a letter each and the two ends
NOISE_SCHEDULER = {"num_train_timesteps": 100, "clip_sample": False, "steps_offset": 1}
UNET = {
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 8,
    "attention_head_dim": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
# Texts are attended to in the middle alone: for runs about all but the network.
SMALL = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 0}
SDXL = {
    "cross_attention_dim": 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 6,
}


def vae(seed: int = 0) -> AutoencoderKL:
    """Of grey pictures: 8 x 8 pixels become 4 channels of 4 x 4."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        scaling_factor=0.5,
    )


def tokenizer() -> CLIPTokenizer:
    vocabulary = {token: row for row, token in enumerate(TOKENS)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH)


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(TOKENS),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=6,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def pipeline(xl: bool = False, seed: int = 0, scheduler=None, unet=None) -> StableDiffusionPipeline:
    """A pipeline with weights drawn from the seed.

    Args:
        unet: further settings of its UNet.
    """
    encoder = vae(seed)
    settings = UNET | (SDXL if xl else {}) | (unet or {})
    parts = {
        "vae": encoder,
        "unet": UNet2DConditionModel(**settings),
        "text_encoder": CLIPTextModel(_text_config()),
        "tokenizer": tokenizer(),
        "scheduler": scheduler or DDPMScheduler(**NOISE_SCHEDULER),
    }
    if xl:
        parts |= {"text_encoder_2": CLIPTextModelWithProjection(_text_config()), "tokenizer_2": tokenizer()}
        return StableDiffusionXLPipeline(**parts, add_watermarker=False)
    nothing = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, **nothing)


def save_pipeline(folder: Path, **options) -> str:
    """A pipeline in a folder, unless it is there; returns the folder."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            pipeline(**options).save_pretrained(folder)
    return str(folder)


def add_checker(folder: Path) -> Path:
    """Give a pipeline the two components that look for unsafe pictures, of few weights; returns the folder."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    config = CLIPConfig(vision_config=vision, text_config={**sizes, "vocab_size": 9}, projection_dim=8)
    with torch.random.fork_rng(devices=[]):
        StableDiffusionSafetyChecker(config).save_pretrained(folder / "safety_checker")
    CLIPImageProcessor(size={"shortest_edge": 8}).save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
