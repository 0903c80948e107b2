"""The exported pipeline of a class-conditional model: drawn from by name, with guidance, with diffusers alone."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from finetune.models.classes import with_classes
from finetune.models.hub import save_export
from finetune.models.unconditional import Unconditional
from harness.configs import UNET

NAMES = ["cat", "dog", "emu"]


@pytest.fixture(scope="module")
def kind():
    torch.manual_seed(0)
    kind = with_classes(Unconditional(UNet2DModel(**UNET), DDPMScheduler(clip_sample=True)), NAMES, seed=0)
    with torch.no_grad():  # a class matters as much as in a trained network
        kind.network.class_embedding.weight[:3] *= 10
    return kind


def draw(pipeline, labels, **options):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    return pipeline(labels, generator=generator, num_inference_steps=4, output_type="pt", **options).images


def test_classes_are_asked_for_by_name_or_row(kind):
    pipeline = kind.pipeline()
    assert pipeline.labels == {"cat": 0, "dog": 1, "emu": 2}
    assert pipeline.get_label_ids(["emu", 0]) == [2, 0]
    assert pipeline.get_label_ids("dog") == [1]
    for unknown in ("fox", 3, -1, 1.5, True, "1", ["cat"]):
        with pytest.raises(ValueError, match=r"class_labels: found \[.*\]; expected names or rows of \{'cat': 0"):
            pipeline.get_label_ids([unknown])
    assert torch.equal(draw(pipeline, ["cat", "emu"]), draw(pipeline, [0, 2]))


@pytest.mark.parametrize(
    ("asked", "rows"),
    [
        (None, [3]),  # the last row is that of "no class"
        (["cat", None, 2], [0, 3, 2]),
        (("cat", "dog"), [0, 1]),
        (range(2), None),
        (torch.tensor([2, 0]), [2, 0]),
        (torch.tensor(1), [1]),
        (np.array([1, 1]), [1, 1]),
        ([np.int64(2), torch.tensor(0)], [2, 0]),
        ([], None),
    ],
    ids=str,
)
def test_several_ways_to_ask_for_classes(kind, asked, rows):
    pipeline = kind.pipeline()
    if rows is not None:
        assert pipeline.get_label_ids(asked) == rows
    else:
        with pytest.raises(ValueError, match=r"class_labels: found .*; expected names or rows of \{'cat': 0"):
            pipeline.get_label_ids(asked)


def test_no_class_is_what_guidance_compares_with(kind):
    """At scale 0 nothing is left of the class: uncond + 0 (cond - uncond)."""
    pipeline = kind.pipeline()
    assert torch.equal(draw(pipeline, ["cat"], guidance_scale=0.0), draw(pipeline, [None], guidance_scale=0.0))
    expected = draw(pipeline, ["cat"], guidance_scale=0.0)
    torch.testing.assert_close(draw(pipeline, None, guidance_scale=1.0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_is_the_published_formula_and_the_noise_is_derived_from_the_clipped_image(kind, scale):
    scheduler = DDIMScheduler.from_config(kind.noise_scheduler.config)
    assert scheduler.config.clip_sample
    scheduler.set_timesteps(4)
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            told = kind.network(images, timestep, class_labels=torch.tensor([1, 2])).sample
            untold = kind.network(images, timestep, class_labels=torch.tensor([3, 3])).sample
            output = untold + scale * (told - untold)
            images = scheduler.step(output, timestep, images, use_clipped_model_output=True).prev_sample
    expected = (images / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(draw(kind.pipeline(), ["dog", "emu"], guidance_scale=scale), expected, rtol=0, atol=1e-5)


def test_another_scheduler_of_diffusers_draws_too(kind):
    pipeline = kind.pipeline()
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    assert torch.isfinite(draw(pipeline, ["cat"])).all()


def test_images_come_in_the_usual_formats(kind):
    pipeline = kind.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    assert pipeline(["cat"], **options).images[0].size == (8, 8)
    assert pipeline(["cat"], output_type="np", **options).images.shape == (1, 8, 8, 1)
    assert pipeline(["cat"], output_type="pt", return_dict=False, **options)[0].shape == (1, 1, 8, 8)


@pytest.mark.slow
def test_a_fresh_process_with_diffusers_alone_draws_the_same(kind, tmp_path):
    save_export(kind.save, tmp_path / "pipeline", "card", [])
    expected = draw(kind.pipeline(), ["dog"], guidance_scale=2.0)
    code = (
        "import torch\nfrom diffusers import DiffusionPipeline\n"
        "pipeline = DiffusionPipeline.from_pretrained('pipeline', trust_remote_code=True)\n"
        "generator = torch.Generator().manual_seed(3)\n"
        "options = dict(generator=generator, num_inference_steps=4, guidance_scale=2.0, output_type='pt')\n"
        "torch.save(pipeline(['dog'], **options).images, 'images.pt')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), expected)
