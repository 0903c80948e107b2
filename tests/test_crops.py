"""Random crops of text-to-image models: encoded in the loop, by a VAE that stays loaded."""

import pytest
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from finetune.evaluation.sampling import ImageSampler
from finetune.models.components import Folder
from finetune.models.encoders import PipelineEncoders
from finetune.training.window import Window
from harness.compare import differences, differing, history
from harness.configs import EVALUATED_STEPS, evaluated_config, of_kind, write_config, write_pictures
from harness.faults import kill_at, skip_the_export
from harness.pipelines import VAE_ROUNDING
from harness.processes import finish, run, run_two

pytestmark = pytest.mark.slow

KINDS = "text", "sdxl", "lora"
TEXT_ENCODERS = CLIPTextModel, CLIPTextModelWithProjection

# Of two layouts, as of every kind in float32 (see test_invariance).
ROUNDING = 1e-5


def crops_config(kind, pictures, output_dir, **changes):
    """With sample grids between updates, at two guidance scales."""
    samples = {"every_steps": 2, "count": 2, "inference_steps": 2, "guidance_scale": [1.0, 3.0], "prompts": ["a cat"]}
    options = of_kind(kind, pictures) | {"samples": samples, "data__random_flip": True, "data__crop": "random"}
    return evaluated_config(pictures, output_dir, **options | changes)


@pytest.fixture(scope="module", params=KINDS)
def finished(request, tmp_path_factory):
    """A run of each kind on random crops of larger pictures, and the kind; with how often it loaded its VAE, and which
    encoders each micro-batch found in memory."""
    base = tmp_path_factory.mktemp(request.param)
    config = crops_config(request.param, write_pictures(base / "pictures", 19, (20, 14), request.param), base / "run")
    file = write_config(base / "config.yaml", config)
    finish("--config", file, folder=base, before=lambda: watch(base / "watched"))
    return base, request.param


def watch(file):
    import gc

    load, add, loaded = Folder.load, Window.add, []

    def counted(folder, part, *arguments):
        loaded.append(part)
        return load(folder, part, *arguments)

    def seen(window, *arguments):
        gc.collect()
        alive = [sum(isinstance(one, each) for one in gc.get_objects()) for each in (AutoencoderKL, TEXT_ENCODERS)]
        with file.open("a") as lines:
            print(loaded.count("vae"), *alive, file=lines)
        return add(window, *arguments)

    Folder.load, Window.add = counted, seen
    skip_the_export()


def test_sample_grids_between_updates_leave_the_vae_and_no_text_encoder(finished):
    """17 images in micro-batches of 4, two a window: 5 an epoch, the last window's one. Grids at steps 0, 2, 4 and 6.

    The VAE is loaded when the pipeline is checked, and once more to stay; there is also its outline without weights.
    """
    lines = (finished[0] / "watched").read_text().splitlines()
    assert len(lines) == 2 * 5
    assert {*lines} == {"2 2 0"}
    assert [line["step"] for line in history(finished[0] / "run") if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert all((finished[0] / f"run/samples/step-{step}.png").exists() for step in (0, 2, 4, 6))


def test_the_plan_says_what_is_encoded_when_and_what_it_costs(finished, tmp_path):
    """Of images only the two held out are encoded before; a check encodes neither, and still judges the network."""
    base, _ = finished

    def fresh_cache():
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")

    arguments = "--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", "--check"
    printed = finish(*arguments, folder=tmp_path, before=fresh_cache).stdout
    assert "encodings: 2 latents and 5 texts, 0.0 MB on disk; still to be made: 2 and 5, 0.0 MB" in printed
    assert "random crops are encoded in the loop: 0.323 MFLOP an image by 0.1 MB of weights that stay in" in printed
    assert "data.crop=center encodes images once, before training" in printed
    assert "EMA weights, and the encoder of random crops, will take" in printed

    def judging_nobody():
        fresh_cache()
        PipelineEncoders.encode = lambda *arguments: 1 / 0

    assert "ZeroDivisionError" in run(*arguments, folder=tmp_path, before=judging_nobody).stderr


KILLS = {
    "in the first update": (Window, "add", 1),
    "inside a window": (Window, "add", 7),
    "between two guidance scales": (ImageSampler, "sample", 3),
}


@pytest.mark.parametrize(("finished", "moment"), zip(KINDS, KILLS, strict=True), indirect=["finished"])
def test_a_killed_run_resumes_to_the_bit(finished, tmp_path, moment):
    def killed():
        skip_the_export()
        kill_at(*KILLS[moment])

    arguments = "--config", finished[0] / "config.yaml", f"output_dir={tmp_path / 'run'}"
    assert run(*arguments, folder=tmp_path, before=killed).returncode == -9
    finish(*arguments, folder=tmp_path, before=skip_the_export)
    assert differing(finished[0] / "run", tmp_path / "run", EVALUATED_STEPS) == []


def test_two_processes_draw_and_measure_the_same_and_train_alike(finished, tmp_path):
    """At step 0 to the bit, as nothing of it is of crops; after six updates up to rounding."""
    base, _ = finished
    arguments = "--config", base / "config.yaml", f"output_dir={tmp_path / 'run'}", "training.micro_batch_size=2"
    outcomes = run_two(*arguments, folder=tmp_path, before=lambda process: skip_the_export())
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert history(base / "run")[0] == history(tmp_path / "run")[0]
    grid = "run/samples/step-0.png"
    assert (base / grid).read_bytes() == (tmp_path / grid).read_bytes()
    found = differences(base / "run", tmp_path / "run", EVALUATED_STEPS)
    assert {name: apart for name, apart in found.items() if apart > ROUNDING} == {}


@pytest.mark.parametrize("kind", KINDS)
def test_crops_of_pictures_that_leave_no_choice_are_the_run_of_encoded_centres(tmp_path, kind):
    """8 x 8 pixels of 8 x 8, mirrored or not: the same latents but for the order of the VAE's sums.

    The cache's were encoded 4096 at a time, the last ones filled up; these as many as a micro-batch has.
    """
    pictures = write_pictures(tmp_path / "pictures", 19, (8, 8), kind)
    file = write_config(tmp_path / "config.yaml", crops_config(kind, pictures, tmp_path / "random"))
    for crop in ("random", "center"):
        arguments = f"data.crop={crop}", f"output_dir={tmp_path / crop}"
        finish("--config", file, *arguments, folder=tmp_path, before=skip_the_export)
    found = differences(tmp_path / "center", tmp_path / "random", EVALUATED_STEPS)
    assert {name: apart for name, apart in found.items() if apart > VAE_ROUNDING} == {}


def test_what_changes_the_memory_of_an_update_changes_nothing_else(finished, tmp_path):
    """A micro-batch that is found, gradient checkpointing, and data workers, which have no VAE."""
    batch = (
        "training.micro_batch_size=auto",
        "training.gradient_accumulation_steps=null",
        "training.global_batch_size=8",
    )
    changes = *batch, "training.global_batch_size=8", "model.gradient_checkpointing=true", "data.num_workers=2"
    arguments = "--config", finished[0] / "config.yaml", f"output_dir={tmp_path / 'run'}", *changes
    finish(*arguments, folder=tmp_path, before=skip_the_export)
    found = differences(finished[0] / "run", tmp_path / "run", EVALUATED_STEPS)
    assert {name: apart for name, apart in found.items() if apart > ROUNDING} == {}
