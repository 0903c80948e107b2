"""Pictures of many shapes in one window: one run in every batch layout, resumed to the bit, and squares as before."""

import signal

import pytest

from harness.compare import differences, differing, history, relative_difference, slots, weights
from harness.configs import PIPELINES, crop_of, evaluated_config, of_kind, tiny_config, write_config, write_pictures
from harness.faults import kill_at, signal_at
from harness.processes import finish, run, run_two
from harness.shapes import LAYOUTS, SHAPES, TAILS, Case, run_shaped, shaped_config, write_shapes

# In float64 every layout with a tail of its own and the last with every tail, in float32 every layout once, and some of
# the other kinds.
EXACT = [*map(Case, LAYOUTS[1:], TAILS), *(Case(LAYOUTS[-1], images) for images in [*TAILS][:-1])]
ROUNDED = [Case(layout, 37, "float32") for layout in LAYOUTS[1:]]
CLASSES = [Case((2, 4, 2), 31, kind="classes"), Case((2, 1, 8), 33, kind="classes")]
LATENTS = [Case(layout, images, kind="text") for layout, images in zip(LAYOUTS[1:], TAILS, strict=True)]
LATENTS += [Case(layout, 37, kind=kind) for layout, kind in zip(LAYOUTS[2:], ("sdxl", "lora"), strict=True)]
LATENTS += [Case((2, 4, 2), 37, "float32", "text")]
LATENTS += [Case((2, 4, 2), 37, "float32", kind, "random") for kind in ("text", "sdxl")]

# Adam moves them by full steps of the rounding errors of a gradient that is 0 in exact arithmetic (see `compare`).
KEY_BIAS = "to_k.bias"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return run_shaped(tmp_path_factory.mktemp("shapes"), EXACT + ROUNDED + CLASSES + LATENTS)


def without_key_biases(tensors, kind):
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(KEY_BIAS)}
    assert (len(kept) < len(tensors)) == (kind not in PIPELINES)  # whose attention has no biases
    return kept


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT + ROUNDED + CLASSES + LATENTS, ids=str)
def test_every_layout_is_the_same_run(runs, case):
    reference, other, step = runs[case.reference], runs[case], case.updates
    assert len(slots(reference)) == case.epochs * case.images
    assert slots(other) == slots(reference)  # images, pixels, noise, timesteps
    assert [line["step"] for line in history(other)] == list(range(1, step + 1))
    found = differences(reference, other, step)
    bound = 1e-12 if case.precision == "float64" else 1e-5
    logged = ("train/loss", "train/epoch_loss", "train/learning_rate", "train/grad_norm", "step")
    assert {name: found[name] for name in logged if found[name] > bound} == {}
    for part in ("model", "ema"):
        one, two = weights(reference, step, part), weights(other, step, part)
        apart = relative_difference(*(without_key_biases(each, case.kind) for each in (one, two)))
        print(f"{case} {part}: {found[part]:.1e} of all weights, {apart:.1e} without the key biases")
        assert apart < bound
        for name in one:  # a bias of a key is at most a full step away for each update, both ways
            if name.endswith(KEY_BIAS):
                assert (one[name] - two[name]).abs().max() <= 2 * 1e-3 * step


def evaluated(pictures, output_dir, kind="unconditional", **changes):
    """A run on five shapes with everything that happens between updates."""
    options = of_kind(kind, pictures) | {"data__buckets": SHAPES, "data__crop": crop_of(kind)}
    if kind in PIPELINES:
        samples = {"every_steps": 3, "count": 2, "inference_steps": 2, "prompts": ["a cat", "a dog"]}
        options |= {"samples": samples | {"shapes": [[12, 8], [4, 16]], "guidance_scale": [1.0, 3.0]}}
        options |= {"data__random_flip": True}
    return evaluated_config(pictures, output_dir, **options | changes)


def told_to_stop_in_the_second_update():
    from finetune.run.run import Run

    signal_at(signal.SIGTERM, Run, "finish_step", 1, after=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "crop"), [*((kind, crop_of(kind)) for kind in ("unconditional", *PIPELINES)), ("sdxl", "random")]
)
def test_a_run_that_is_resumed_ends_bit_for_bit_as_an_undisturbed_one(tmp_path, kind, crop):
    pictures, log = write_shapes(tmp_path / "pictures", 27, kind), tmp_path / "log"
    # 24 to train on, in windows of 8: 3 an epoch, 6 in all; stopped in the middle of the first epoch
    for name in ("undisturbed", "stopped"):
        write_config(tmp_path / f"{name}.yaml", evaluated(pictures, tmp_path / name, kind, data__crop=crop))
    finish("--config", tmp_path / "undisturbed.yaml", folder=log)
    stopped = run("--config", tmp_path / "stopped.yaml", folder=log, before=told_to_stop_in_the_second_update)
    assert stopped.returncode == 143
    done = finish("--config", tmp_path / "stopped.yaml", folder=log)
    assert "step 2 of 6" in done.stdout
    assert differing(tmp_path / "undisturbed", tmp_path / "stopped", 6) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text", "lora"])
def test_two_processes_encode_draw_and_measure_the_same(tmp_path, kind):
    """At step 0, before rounding sets runs apart: validation with and without the caption, and the sample grid."""
    pictures, log = write_shapes(tmp_path / "pictures", 27, kind), tmp_path / "log"
    config = evaluated(pictures, tmp_path / "one", kind, training__max_train_steps=1)
    finish("--config", write_config(tmp_path / "run.yaml", config), folder=log)

    def fresh_cache(process):
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")

    layout = ("training.micro_batch_size=2", f"output_dir={tmp_path / 'two'}")
    outcomes = run_two("--config", tmp_path / "run.yaml", *layout, folder=log, before=fresh_cache)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert history(tmp_path / "one")[0] == history(tmp_path / "two")[0]
    grids = [(tmp_path / name / "samples/step-0.png").read_bytes() for name in ("one", "two")]
    assert grids[0] == grids[1]


@pytest.mark.slow
def test_a_run_killed_while_it_encodes_resumes_to_the_bit(tmp_path):
    """Captions are the first file, then a file for each shape: killed before the fourth."""
    kind, log = "lora", tmp_path / "log"
    pictures = write_shapes(tmp_path / "pictures", 27, kind)
    for name in ("undisturbed", "killed"):
        config = evaluated(pictures, tmp_path / name, kind, training__max_train_steps=2)
        write_config(tmp_path / f"{name}.yaml", config)
    finish("--config", tmp_path / "undisturbed.yaml", folder=log)

    def fresh_cache():
        import datasets

        datasets.config.HF_DATASETS_CACHE = str(tmp_path / "cache")

    def killed():
        from finetune.data.store import Store

        fresh_cache()
        kill_at(Store, "write", 4)

    arguments = ("--config", tmp_path / "killed.yaml")
    assert run(*arguments, folder=log, before=killed).returncode == -signal.SIGKILL
    finish(*arguments, folder=log, before=fresh_cache)
    assert differing(tmp_path / "undisturbed", tmp_path / "killed", 2) == []
    files = [file for file in (tmp_path / "cache/encodings").rglob("*") if file.is_file()]
    assert sorted({file.suffix for file in files}) == [".safetensors"]
    assert len({file.parent for file in files}) == 1 + len(SHAPES)  # captions, and a folder for each shape


@pytest.mark.slow
def test_a_run_is_resumed_with_another_micro_batch(tmp_path):
    pictures, log = write_shapes(tmp_path / "pictures", 27), tmp_path / "log"
    other = ["training.micro_batch_size=2", "training.gradient_accumulation_steps=4"]
    for name in ("undisturbed", "moved"):
        write_config(tmp_path / f"{name}.yaml", evaluated(pictures, tmp_path / name))
    finish("--config", tmp_path / "undisturbed.yaml", folder=log)
    finish("--config", tmp_path / "moved.yaml", "training.max_train_steps=2", folder=log)
    finish("--config", tmp_path / "moved.yaml", *other, folder=log)
    parts = (weights(tmp_path / name, 6) for name in ("undisturbed", "moved"))
    assert 0 < relative_difference(*parts) < 1e-5


@pytest.mark.slow
def test_other_shapes_are_another_run(tmp_path):
    pictures, log = write_shapes(tmp_path / "pictures", 27), tmp_path / "log"
    write_config(tmp_path / "run.yaml", evaluated(pictures, tmp_path / "run", training__max_train_steps=2))
    finish("--config", tmp_path / "run.yaml", folder=log)
    outcome = run("--config", tmp_path / "run.yaml", "data.buckets=[[8,8],[12,8]]", folder=log)
    assert outcome.returncode == 2
    assert "data.shapes: ['8 x 8', '12 x 8', '8 x 12', '16 x 4', '4 x 16'] in the checkpoint" in outcome.stderr


@pytest.mark.slow
def test_one_shape_is_the_run_of_squares_to_the_bit(tmp_path):
    """Pictures that are cropped and flipped at random, a tail of 3, classes: with one bucket and without."""
    pictures, log = write_pictures(tmp_path / "pictures", 19, (10, 8), "classes"), tmp_path / "log"
    options = {"data__crop": "random", "data__random_flip": True, "model__class_conditional": True}
    options |= {"logging__tracker": "tensorboard"}
    for name, buckets in (("squares", None), ("one", [[8, 8]]), ("counted", 1)):
        config = tiny_config(pictures, tmp_path / name, data__buckets=buckets, **options)
        finish("--config", write_config(tmp_path / f"{name}.yaml", config), folder=log)
    assert differing(tmp_path / "squares", tmp_path / "one", 6) == []
    assert differing(tmp_path / "squares", tmp_path / "counted", 6) == []


@pytest.mark.slow
def test_all_pictures_in_one_of_many_shapes(tmp_path):
    """All 12 x 8, where four other shapes are open to them: the dealing is that of one shape."""
    pictures, log = write_pictures(tmp_path / "pictures", 19, (12, 8)), tmp_path / "log"
    for name, buckets in (("many", [[8, 8], [12, 8], [8, 12]]), ("one", [[12, 8]])):
        config = tiny_config(pictures, tmp_path / name, data__buckets=buckets, logging__tracker="tensorboard")
        finish("--config", write_config(tmp_path / f"{name}.yaml", config), folder=log)
    assert differing(tmp_path / "many", tmp_path / "one", 6) == []


def test_one_picture_in_each_shape(tmp_path):
    pictures = write_shapes(tmp_path / "pictures", 5)
    config = shaped_config(pictures, tmp_path / "run")
    done = finish("--config", write_config(tmp_path / "run.yaml", config), folder=tmp_path / "log")
    # one window of 5 images, each a micro-batch of its own
    assert "1 of 16 x 4, 1 of 8 x 8, 1 of 4 x 16, 1 of 12 x 8, 1 of 8 x 12" in " ".join(done.stdout.split())
    assert "5.00 micro-steps per update on average, 2.00 if all had one shape" in done.stdout
    assert [line["step"] for line in history(tmp_path / "run")] == [1, 2]


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("data.buckets=[[8,8],[9,8]]", "found 9 x 8; expected sides of multiples of 2, since the network halves them"),
        ("data.buckets=[[8,8],[12,8],[8,8]]", "data.buckets: found [8, 8] 2 times; expected it once"),
        ("data.buckets=[]", "data.buckets: found []; expected a number of shapes or a list of [width, height] or null"),
        ("data.buckets=[[8]]", "data.buckets: found [[8]]; expected a number of shapes or a list of [width, height]"),
        ("data.buckets=0", "data.buckets: found 0; expected a number of shapes or a list of [width, height] or null"),
        ("data.buckets=99", "data.buckets: found 99; expected at most"),
        ("samples.shapes=[[4,4]]", "samples.shapes: found 4 x 4; expected shapes of the images, which have"),
    ],
)
def test_shapes_that_will_not_do_are_one_line(tmp_path, override, problem):
    pictures = write_shapes(tmp_path / "pictures", 6)
    file = write_config(tmp_path / "run.yaml", shaped_config(pictures, tmp_path / "run"))
    outcome = run("--config", file, override, folder=tmp_path / "log")
    assert outcome.returncode == 2
    assert problem in outcome.stderr
    assert outcome.stderr.count("error:") == 1
    assert not (tmp_path / "run").exists()


def test_shapes_to_sample_need_buckets(tmp_path):
    config = tiny_config(write_pictures(tmp_path / "pictures", 2), tmp_path / "run", samples__shapes=[[8, 8]])
    outcome = run("--config", write_config(tmp_path / "run.yaml", config), folder=tmp_path / "log")
    assert "samples.shapes: found [[8, 8]]; only valid with data.buckets" in outcome.stderr


def test_pictures_that_are_cropped_by_more_than_half_are_counted_and_named(tmp_path):
    pictures = write_shapes(tmp_path / "pictures", 6)
    picture_of = write_pictures(pictures, 1, (160, 8))  # 20:1; 16 x 4 is 4:1 and keeps a fifth: replaces 0000.png
    config = shaped_config(picture_of, tmp_path / "run")
    done = finish("--config", write_config(tmp_path / "run.yaml", config), "--check", folder=tmp_path / "log")
    assert "cropped by more than half: 1 of 6: 0000.png (160 x 8)" in done.stdout
    assert "80.0% at most" in done.stdout
