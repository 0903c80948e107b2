"""configs/digits-text-base: what is in the folder, that it loads as any pipeline does, and what it draws."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from finetune.data.decode import decode
from finetune.data.sources import NUMBERS, open_source
from harness.configs import ROOT
from harness.digits import read, run_job

FOLDER = ROOT / "configs/digits-text-base"


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def digits():
    """Every fourth digit as the trainer decodes it, (450, 3, 32, 32) in -1 .. 1, and which they are."""
    rows = open_source("digits").splits["train"].select(range(0, 1797, 4))
    decoded = np.stack([decode(row["image"]["bytes"], 3, 32, "center", "white") for row in rows])
    return torch.from_numpy(decoded).permute(0, 3, 1, 2) / 127.5 - 1, rows["label"]


def grey(pictures):
    """Pictures (n, 3, 32, 32) in -1 .. 1 as they are read."""
    return (pictures.mean(1).numpy() + 1) / 2


def share(pipeline, caption, digits, each):
    """The share of samples in which the digit is read that the caption names."""
    asked = np.repeat(digits, each)
    captions = [caption.format(NUMBERS[digit]) for digit in asked]
    options = {"num_inference_steps": 10, "guidance_scale": 3.0, "output_type": "pt"}
    images = pipeline(captions, generator=torch.Generator().manual_seed(1), **options).images
    return (read(images.mean(1).numpy()) == asked).mean()


def test_the_folder_is_small_and_holds_no_code():
    files = [file for file in FOLDER.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".json", ".safetensors"}
    assert sum(file.stat().st_size for file in files) <= 3_000_000


def test_its_parts_have_one_dtype_without_being_asked(pipeline):
    """Saved in float16, the text encoder would be loaded in it, and the UNet, loaded in float32, could not use it."""
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    halves = StableDiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.float16)
    assert {halves.unet.dtype, halves.vae.dtype, halves.text_encoder.dtype} == {torch.float16}


def test_each_number_is_a_token_of_its_own(pipeline):
    """Without its vocabulary a tokenizer would load all the same, with 2 tokens."""
    tokenizer = pipeline.tokenizer
    assert len(tokenizer) == pipeline.text_encoder.config.vocab_size == 712
    assert tokenizer.model_max_length == pipeline.text_encoder.config.max_position_embeddings == 32
    for number in NUMBERS:
        assert tokenizer.tokenize(f"A handwritten {number.upper()}") == ["a</w>", "handwritten</w>", f"{number}</w>"]
    assert tokenizer.tokenize("brush zq") == ["brush</w>", "z", "q</w>"]  # letters, where a word is not known
    empty = tokenizer("", padding="max_length").input_ids
    assert empty == [tokenizer.bos_token_id] + 31 * [tokenizer.eos_token_id]


def test_its_latents_have_a_deviation_of_1_and_are_decoded_to_the_digits(pipeline, digits):
    pictures, labels = digits
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(0))
        decoded = pipeline.vae.decode(latents).sample.clamp(-1, 1)
    assert latents.shape == (450, 4, 8, 8)
    assert latents.std().item() * pipeline.vae.config.scaling_factor == pytest.approx(1, abs=0.02)
    assert (decoded - pictures).square().mean() < 0.003
    assert (read(grey(decoded)) == np.array(labels)).mean() > 0.99


def test_its_network_predicts_what_its_scheduler_says(pipeline, digits):
    """Sampled as if it predicted epsilon, it draws blurred digits that the judge still reads: only the loss tells.

    At t = 900 the image is 1 % of the variance, so v is nearly the negative image, which is independent of the noise:
    read as epsilon it errs by more than the noise's own variance of 1.
    """
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    assert noise_scheduler.config.prediction_type == "v_prediction"
    generator = torch.Generator().manual_seed(0)
    pictures, labels = digits
    chosen = [index for index, label in enumerate(labels) if label < 5]
    with torch.no_grad():
        latents = pipeline.vae.encode(pictures[chosen]).latent_dist.mean * pipeline.vae.config.scaling_factor
        texts = pipeline.encode_prompt([f"a handwritten {NUMBERS[labels[i]]}" for i in chosen], "cpu", 1, False)[0]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(chosen),), 900)
        output = pipeline.unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, texts).sample
    assert (output - noise_scheduler.get_velocity(latents, noise, timesteps)).square().mean() < 0.5
    assert (output - noise).square().mean() > 1


@pytest.mark.slow
@pytest.mark.parametrize("caption", ["a handwritten {}", "please write the number {} on paper"])
def test_it_draws_0_to_4_by_caption_and_not_5_to_9(pipeline, caption):
    assert share(pipeline, caption, range(5), 10) >= 0.95
    assert share(pipeline, caption, range(5, 10), 10) <= 0.15


@pytest.mark.slow
def test_the_job_teaches_it_5_to_9_by_an_adapter(tmp_path):
    """The base draws 0 to 4 instead."""
    run = tmp_path / "run"
    run_job("digits-text.yaml", run, "samples.count=0", "validation.every_steps=75")
    taught = StableDiffusionPipeline.from_pretrained(FOLDER)
    taught.set_progress_bar_config(disable=True)
    assert share(taught, "a handwritten {}", range(5, 10), 20) <= 0.15
    taught.load_lora_weights(run / "lora", weight_name="pytorch_lora_weights.safetensors")
    assert share(taught, "a handwritten {}", range(5, 10), 20) >= 0.9
    # The adapters' 0.18 M weights, their average and two moments, 4 bytes each, are 2.9 MB; the base would add 4.2 MB.
    assert sum(file.stat().st_size for file in (run / "checkpoint-150").iterdir()) < 4e6
