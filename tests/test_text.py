"""Text-to-image runs through the script: encoded once, resumed to the bit, sampled and exported as diffusers would."""

import gc
import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import CLIPTextModel

from finetune.core.randomness import noise
from finetune.data.store import Store
from finetune.evaluation.sampling import ImageSampler
from finetune.evaluation.validation import Validation
from finetune.run.evaluator import Evaluator
from finetune.training.window import Window
from harness.compare import differing, history, unequal, weights
from harness.configs import EVALUATED_STEPS, ROOT, evaluated_config, of_kind, picture, write_config, write_pictures
from harness.faults import kill_at
from harness.processes import finish, run, run_two

KINDS = ["text", "sdxl", "lora"]
PROMPTS = ["a cat", "a dog"]


def text_config(kind, pictures, output_dir, **changes):
    samples = {"every_steps": 3, "count": 4, "inference_steps": 2, "guidance_scale": [1.0, 3.0], "prompts": PROMPTS}
    options = of_kind(kind, pictures) | {"samples": samples, "data__random_flip": True}
    return evaluated_config(pictures, output_dir, **options | changes)


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    """A run of each kind, and the kind."""
    base = tmp_path_factory.mktemp(request.param)
    config = text_config(request.param, write_pictures(base / "pictures", 19, (10, 8), request.param), base / "run")
    finish("--config", write_config(base / "config.yaml", config), folder=base)
    return base, request.param


@pytest.fixture
def exported(finished):
    """A run whose export is a pipeline."""
    if finished[1] == "lora":
        pytest.skip("exports an adapter")
    return finished


@pytest.mark.slow
def test_validation_is_measured_with_and_without_the_caption(finished):
    lines = [line for line in history(finished[0] / "run") if "validation/loss" in line]
    assert [line["step"] for line in lines] == [0, 3, 6]
    for line in lines:
        gain = line["validation/loss_unconditional"] - line["validation/loss"]
        assert line["validation/condition_gain"] == pytest.approx(gain, abs=1e-12)
        assert gain != 0


def test_the_export_is_the_pipeline_that_it_came_from_with_averaged_weights(exported):
    base, kind = exported
    pipeline = DiffusionPipeline.from_pretrained(base / "run/pipeline")
    assert type(pipeline) is {"text": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}[kind]
    origin = DiffusionPipeline.from_pretrained(base / f"pictures-{kind}")
    averaged = weights(base / "run", EVALUATED_STEPS, "ema")
    assert unequal(dict(pipeline.unet.named_parameters()), averaged) == []
    assert not torch.equal(pipeline.unet.conv_in.weight, origin.unet.conv_in.weight)
    for part in ("vae", "text_encoder"):
        assert unequal(*(getattr(loaded, part).state_dict() for loaded in (pipeline, origin))) == []
    assert pipeline.tokenizer("a cat").input_ids == origin.tokenizer("a cat").input_ids
    assert type(pipeline.scheduler) is type(origin.scheduler)


def test_samples_in_training_are_those_of_the_export(exported):
    """The grid's blocks of columns at scales 1 and 3: the same starting noise through the exported pipeline."""
    base, _ = exported
    pipeline = DiffusionPipeline.from_pretrained(base / "run/pipeline")
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    grid = np.asarray(Image.open(base / "run/samples/step-6.png").convert("L")).astype(int)
    names = [name for name in PROMPTS for _ in range(2)]
    latents = torch.stack([noise(3, 0, index, (4, 4, 4), "samples") for index in range(4)])
    for scale in (1.0, 3.0):
        options = {"guidance_scale": scale, "num_inference_steps": 2, "output_type": "np"}
        images = pipeline(names, latents=latents, **options).images
        drawn = (images[..., 0] * 255).round().astype(int).repeat(8, axis=1).repeat(8, axis=2)
        for tile in drawn:  # somewhere in the grid, wherever its labels are
            windows = np.lib.stride_tricks.sliding_window_view(grid, tile.shape)
            assert (abs(windows[:, :, ::8, ::8] - tile[::8, ::8]).max((2, 3)) <= 1).any()


def test_the_snippet_of_the_model_card_draws(exported):
    card = (exported[0] / "run/pipeline/README.md").read_text()
    assert "pipeline_tag: text-to-image" in card
    snippet = card.split("```python\n")[1].split("```")[0]
    scope = {}
    exec(snippet.replace("PATH_OR_REPOSITORY", str(exported[0] / "run/pipeline")), scope)
    assert scope["images"][0].size == (8, 8)


@pytest.mark.slow
def test_a_run_from_the_export_starts_where_that_one_ended(exported, tmp_path):
    base, kind = exported
    config = text_config(kind, base / "pictures", tmp_path / "run", model={"pretrained": str(base / "run/pipeline")})
    config["training"]["num_epochs"] = 1
    finish("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    last = [line["validation/loss_ema"] for line in history(base / "run") if "validation/loss_ema" in line][-1]
    assert history(tmp_path / "run")[0]["validation/loss"] == last


KILLS = {
    "encoding": (Store, "write", 1),
    "encoded captions": (Store, "write", 1, True),
    "inside a window": (Window, "add", 8),
    "in a validation": (Validation, "losses", 5, True),
    "between two guidance scales": (ImageSampler, "sample", 3),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("finished", "moment"),
    [
        ("text", "encoding"),
        ("text", "in a validation"),
        ("sdxl", "encoded captions"),
        ("sdxl", "between two guidance scales"),
        ("lora", "encoding"),
        ("lora", "inside a window"),
    ],
    indirect=["finished"],
)
def test_a_killed_run_resumes_to_the_bit(finished, tmp_path, moment):
    base, kind = finished
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}

    def fresh_cache():
        import datasets

        datasets.config.HF_DATASETS_CACHE = cache["HF_DATASETS_CACHE"]

    def killed():
        fresh_cache()
        kill_at(*KILLS[moment])

    file = write_config(tmp_path / "config.yaml", text_config(kind, base / "pictures", tmp_path / "run"))
    assert run("--config", file, folder=tmp_path, before=killed).returncode == -9
    finish("--config", file, folder=tmp_path, before=fresh_cache)
    assert differing(base / "run", tmp_path / "run", EVALUATED_STEPS) == []
    encodings = tmp_path / "cache/encodings"
    assert [file.name for file in encodings.rglob("*") if file.is_file() and file.suffix != ".safetensors"] == []


@pytest.mark.slow
def test_two_processes_encode_draw_and_measure_the_same(finished, tmp_path):
    """At step 0, before rounding sets runs apart: validation with and without the caption, and the sample grid."""
    base, kind = finished
    layout = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "num_epochs": 2, "condition_dropout": 0.3}
    config = text_config(kind, base / "pictures", tmp_path / "run", training=layout)
    file = write_config(tmp_path / "config.yaml", config)

    def fresh_cache(process):
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")

    outcomes = run_two("--config", file, folder=tmp_path, before=fresh_cache)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    first, second = (history(folder / "run")[0] for folder in (base, tmp_path))
    assert first == second
    grid = "run/samples/step-0.png"
    assert (base / grid).read_bytes() == (tmp_path / grid).read_bytes()


@pytest.mark.slow
def test_the_encoders_are_out_of_memory_while_updates_run(finished, tmp_path):
    base, kind = finished

    def watch():
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")
        add, seen = Window.add, []

        def watched(window, *arguments):
            if not seen:
                gc.collect()
                seen.extend(one for one in gc.get_objects() if isinstance(one, AutoencoderKL | CLIPTextModel))
                (tmp_path / "alive").write_text(str(len(seen)))
                seen.append(None)
            return add(window, *arguments)

        Window.add = watched

    file = write_config(tmp_path / "config.yaml", text_config(kind, base / "pictures", tmp_path / "run"))
    finish("--config", file, folder=tmp_path, before=watch)
    assert (tmp_path / "alive").read_text() == "0"


def test_what_decodes_latents_is_loaded_once_for_a_grid_of_two_guidance_scales(finished, tmp_path):
    base, kind = finished
    if kind != "text":
        pytest.skip("decoding is the same for every kind")

    def count():
        from finetune.models.components import Folder

        load, draw, loaded = Folder.load, Evaluator._draw, []

        def counted(folder, part, *arguments):
            loaded.append(part)
            return load(folder, part, *arguments)

        def drawn(run, step):
            loaded.clear()
            draw(run, step)
            with (tmp_path / "loaded").open("a") as file:
                file.write(f"{step}: {loaded}\n")

        Folder.load, Evaluator._draw = counted, drawn

    config = text_config(kind, base / "pictures", tmp_path / "run", training__max_train_steps=3)
    finish("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path, before=count)
    assert (tmp_path / "loaded").read_text() == "0: ['vae']\n3: ['vae']\n"


@pytest.mark.slow
def test_a_check_tells_the_size_of_the_encodings_and_makes_those_that_the_network_is_judged_by(finished, tmp_path):
    """17 images to train on, each also flipped, 2 held out; 4 captions, both prompts among them, and the empty one.

    It is judged by 16 images with their first captions, which are three, and by the empty one.
    """
    base, kind = finished

    def fresh_cache():
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")

    file = write_config(tmp_path / "config.yaml", text_config(kind, base / "pictures", tmp_path / "run"))
    for missing in ("36 and 5, 0.0 MB", "20 and 1, 0.0 MB", "20 and 1, 0.0 MB"):
        checked = finish("--config", file, "--check", folder=tmp_path, before=fresh_cache)
        assert f"encodings: 36 latents and 5 texts, 0.0 MB on disk; still to be made: {missing}\n" in checked.stdout
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_changed_picture_of_the_same_name_is_encoded_anew(finished, tmp_path):
    base, kind = finished
    pictures = shutil.copytree(base / "pictures", tmp_path / "pictures")
    file = write_config(
        tmp_path / "config.yaml",
        text_config(kind, pictures, tmp_path / "run"),
    )
    assert "36 latents and 5 texts, 0.0 MB on disk\n" in finish("--config", file, "--check", folder=tmp_path).stdout
    shutil.copy(pictures / "0005.png", pictures / "0004.png")
    found = finish("--config", file, "--check", folder=tmp_path).stdout
    assert "34 latents" in found  # the two are one entry now, as it is and mirrored
    picture((10, 8), 1000 + KINDS.index(kind)).save(pictures / "0004.png")  # which no other kind has encoded
    found = finish("--config", file, "--check", folder=tmp_path).stdout
    assert "36 latents and 5 texts, 0.0 MB on disk; still to be made: 2 and 0, 0.0 MB\n" in found


@pytest.mark.slow
def test_a_pipeline_that_is_marked_wrong_is_refused_with_the_line_to_set(finished, tmp_path):
    """The UNet is made one of velocity that knows no more than the latents' mean, which is scaled to be large."""
    from safetensors.torch import load_file, save_file

    base, kind = finished
    pictures = write_pictures(tmp_path / "pictures", 4, kind=kind)
    for file in pictures.glob("*.png"):
        Image.new("L", (8, 8), 40).save(file)
    folder = shutil.copytree(base / f"pictures-{kind}", tmp_path / f"pictures-{kind}")
    latent = DiffusionPipeline.from_pretrained(folder).vae.encode(torch.full((1, 1, 8, 8), 40 / 127.5 - 1))
    mean = latent.latent_dist.mean.mean((0, 2, 3)).detach()
    vae = json.loads((folder / "vae/config.json").read_text())
    vae["scaling_factor"] = float(2 / mean.square().mean().sqrt())
    (folder / "vae/config.json").write_text(json.dumps(vae))
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.weight"].zero_()
    weights["conv_out.bias"].copy_(-vae["scaling_factor"] * mean)
    save_file(weights, file, {"format": "pt"})
    config = write_config(tmp_path / "config.yaml", text_config(kind, pictures, tmp_path / "run"))
    for flags in (["--check"], []):
        outcome = run("--config", config, *flags, folder=tmp_path)
        assert outcome.returncode == 2
        assert outcome.error.startswith(
            "model.noise_scheduler.prediction_type: found epsilon, but the network predicts v_prediction: "
        )
        assert not (tmp_path / "run").exists()
    key, value = outcome.error.rpartition("; set ")[2].split("=")
    finish("--config", config, f"{key}={value}", folder=tmp_path)


@pytest.mark.slow
def test_the_loss_of_the_base_is_a_level_line(finished, tmp_path):
    """Also in a run that was stopped before its end."""
    base, kind = finished
    lines = [line for line in history(base / "run") if "validation/loss" in line]
    assert {line["validation/loss_base"] for line in lines} == {lines[0]["validation/loss"]}
    file = write_config(tmp_path / "config.yaml", text_config(kind, base / "pictures", tmp_path / "run"))
    finish("--config", file, "training.num_epochs=1", folder=tmp_path)
    finish("--config", file, folder=tmp_path)
    assert [line.get("validation/loss_base") for line in history(tmp_path / "run")][-1] == lines[0]["validation/loss"]


@pytest.mark.slow
def test_a_negative_prompt_leads_guided_samples_elsewhere(finished, tmp_path):
    """The first block of columns is not guided, and stays as it was; the second one changes."""
    base, kind = finished
    samples = {"every_steps": 3, "count": 4, "inference_steps": 2, "guidance_scale": [1.0, 3.0], "prompts": PROMPTS}
    config = text_config(kind, base / "pictures", tmp_path / "run", samples=samples | {"negative_prompt": "an emu"})
    config["training"] = config["training"] | {"max_train_steps": 1}
    finish("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    with_it, without = (
        np.asarray(Image.open(folder / "run/samples/step-0.png").convert("L")).astype(int)
        for folder in (tmp_path, base)
    )
    changed = np.flatnonzero((with_it != without).any(0))
    assert len(changed)
    assert changed.min() > with_it.shape[1] / 2  # in the right half, where scale 3 is


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "pipeline"), [("sd15-lora", "text"), ("sdxl-lora", "lora"), ("sd15", "text")])
def test_a_recipe_trains_a_small_pipeline(tmp_path, recipe, pipeline):
    """Everything as shipped but for the pipeline, the pictures, the length, and half precision, slow on a CPU."""
    pictures = write_pictures(tmp_path / "pictures", 20, (10, 8), "text")
    if recipe == "sd15":  # a column named text, as the dataset of the recipes has it; else .txt files
        texts = {file.name: file.with_suffix(".txt").read_text() for file in pictures.glob("*.png")}
        rows = [json.dumps({"file_name": name, "text": text}) for name, text in texts.items()]
        (pictures / "metadata.jsonl").write_text("\n".join(rows))
    folder = of_kind(pipeline, pictures)["model"]["pretrained"]
    config = yaml.safe_load((ROOT / f"configs/{recipe}.yaml").read_text())
    changes = {
        "model.pretrained": folder,
        "data.source": pictures,
        "output_dir": tmp_path / "run",
        "data.num_workers": 0,
        "samples.inference_steps": 2,
        "training.max_train_steps": 2,
        "lr_scheduler.warmup_steps": 1,
        "logging.tracker": "null",
    }
    if "lora" in recipe:
        changes["model.lora.base_dtype"] = "float32"
    overrides = [f"{key}={value}" for key, value in changes.items()]
    finish("--config", write_config(tmp_path / "config.yaml", config), *overrides, folder=tmp_path)
    assert [line["step"] for line in history(tmp_path / "run") if "train/loss" in line] == [1, 2]
    assert (tmp_path / "run" / ("lora" if "lora" in recipe else "pipeline") / "README.md").exists()
    assert (tmp_path / "run/samples/step-2.png").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__crop": "random"}, "data.crop: 'center' in the checkpoint, 'random' now"),
        (
            {"samples": {"labels": ["cat"]}},
            "samples.labels: found ['cat']; only a model conditioned on classes",
        ),
        ({"data__caption_column": "words"}, "data.caption_column: found 'words'; expected a column of texts"),
        ({"training__condition_dropout": 0.1}, "training.condition_dropout: 0.3 in the checkpoint, 0.1 now"),
        ({"training__noise_offset": 0.1}, "training.noise_offset: 0.0 in the checkpoint, 0.1 now"),
        ({"data__caption": "a cat"}, "data.fingerprint: "),
    ],
)
def test_a_mistake_is_one_line(finished, tmp_path, changes, line):
    base, kind = finished
    config = text_config(kind, base / "pictures", base / "run", **changes)
    outcome = run("--config", write_config(tmp_path / "config.yaml", config), folder=tmp_path)
    assert outcome.returncode == 2
    assert line in outcome.errors[0]
    assert "Traceback" not in outcome.stderr


def test_noise_offset_is_keyed_and_the_same_in_all_pixels_of_a_channel():
    from harness.batches import batches, wide_images

    slots_of = partial(batches, wide_images())
    from finetune.data.order import Slot

    slots = [Slot(0, 1, position, 1.0) for position in range(200)]
    plain, offset = slots_of(), slots_of()
    offset.noise_offset = 0.5
    difference = offset.__getitems__(slots)["noise"] - plain.__getitems__(slots)["noise"]
    assert torch.allclose(difference, difference[:, :, :1, :1].expand_as(difference), atol=1e-6)
    expected = torch.stack([0.5 * noise(0, 1, slot.position, (3, 1, 1), "noise offset") for slot in slots])
    assert torch.allclose(difference[:, :, :1, :1], expected, atol=1e-6)
    assert abs(float(expected.std()) - 0.5) < 0.1  # 600 draws: standard deviation 0.014
