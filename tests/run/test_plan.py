"""The plan: what is printed before anything is trained."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DModel

from finetune.config.schema import Config
from finetune.core.batch import BatchLayout
from finetune.core.errors import UserError
from finetune.models.load import load_kind
from finetune.run.plan import plan as printed
from finetune.run.plan import unused_negative
from harness.configs import SMALL, tiny_config


def config_of(**changes) -> Config:
    return Config.model_validate(tiny_config(Path("pictures"), Path("run"), **changes))


def plan(
    config: Config, num_held_out: int = 0, notes: tuple[str, ...] = (), mixed_precision: str = "no", processes: int = 1
) -> list[str]:
    """The lines of the plan for 20 images in windows of 8, on one process of a CPU, or in larger ones on several."""
    accelerator = SimpleNamespace(device=torch.device("cpu"), mixed_precision=mixed_precision)
    kind = load_kind(config.model, config.data.resolution, config.seed)
    text = printed(config, accelerator, BatchLayout(4, 2, processes), kind, 20, num_held_out, notes, 2_500_000_000)
    return [" ".join(line.split()) for line in text.splitlines()]


def test_the_plan_says_what_is_trained_and_how():
    threads = torch.get_num_threads()
    parameters = sum(weight.numel() for weight in UNet2DModel(**SMALL).parameters()) / 1e6
    # 20 images in windows of 8: three updates an epoch, the last of 4 images, twice
    assert plan(config_of()) == [
        "Plan",
        f"device cpu, 1 process(es) with {threads} thread(s) each, float32",
        f"model from scratch: {parameters:.2f} M parameters, epsilon prediction",
        "images 20 to train on, 0 held out; 8 x 8, 1 channel(s)",
        "batch 8 = 4 per micro-batch x 2 accumulation steps x 1 process(es)",
        "length 6 updates, 3 an epoch (2 epochs; an epoch's last update has 4 of 8 images)",
        "evaluation none",
        "compute 2.5 GFLOP an image, forward and backward",
        "learning rate 0.001, constant, 0 updates of warm-up",
        "output run",
    ]


def test_the_plan_says_what_a_process_of_a_sharded_run_holds_a_share_of():
    parts = {
        True: "weights, gradients, optimizer state and EMA weights",
        False: "weights, gradients and optimizer state",
    }
    for averaged, held in parts.items():
        config = config_of(training__shard=True, ema__enabled=averaged)
        assert plan(config, processes=2)[1].endswith(f", float32; each process holds 1/2 of {held}")
        assert plan(config)[1].endswith("; training.shard has no effect with one process")


def test_the_plan_says_what_is_done_to_the_pictures():
    notes = ("3 of 20 in colour are made grey", "2 are enlarged")
    lines = plan(config_of(), notes=notes)
    assert lines[4:6] == ["pictures 3 of 20 in colour are made grey", "2 are enlarged"]


def test_the_plan_says_where_the_resolution_differs_from_the_models():
    lines = plan(config_of(data__resolution=16))
    assert lines[3] == "images 20 to train on, 0 held out; 16 x 16 (the model was made for 8 x 8), 1 channel(s)"


def test_the_plan_says_when_the_run_is_evaluated():
    config = config_of(training__max_train_steps=55, validation={"images": 4}, samples={"count": 2, "every_steps": 9})
    samples = "2 samples every 9 update(s)"
    # a tenth of 55 updates
    assert f"evaluation validation every 5 update(s), 4 draws of the held-out images; {samples}" in plan(config, 2)
    assert f"evaluation {samples}" in plan(config)
    judged = config_of(validation={"quality": {"features": "x"}}, data__validation_fraction=0.5, samples={"count": 0})
    assert any(line.endswith("; quality of 1000 samples every 1000 update(s)") for line in plan(judged, 2))


def test_the_plan_says_if_the_learning_rate_never_reaches_its_peak():
    # six updates, 0 to 5
    long = config_of(lr_scheduler={"name": "cosine", "warmup_steps": 50})
    assert "learning rate 0.001, cosine, 50 updates of warm-up, never above 0.0001 in this run" in plan(long)
    assert "learning rate 0.001, cosine, 5 updates of warm-up" in plan(
        config_of(lr_scheduler={"name": "cosine", "warmup_steps": 5})
    )


def test_a_schedule_that_the_run_could_not_follow_is_found_by_the_plan():
    with pytest.raises(UserError, match=r"lr_scheduler.warmup_steps: found 6; expected fewer than this run's 6"):
        plan(config_of(lr_scheduler={"name": "polynomial", "warmup_steps": 6}))


def test_a_dropout_of_conditions_that_there_are_none_of_is_noted():
    note = "Note: training.condition_dropout has no effect: the model is unconditional"
    assert note in plan(config_of(training__condition_dropout=0.3))
    for harmless in (config_of(), config_of(training__condition_dropout=0.0)):
        assert note not in plan(harmless)


def test_a_negative_prompt_without_guidance_is_noted():
    def note(**samples):
        return unused_negative(config_of(samples=samples))

    assert note(negative_prompt="blurred") == (
        "Note: samples.negative_prompt has no effect: samples.guidance_scale is 1, which is no guidance"
    )
    assert note(negative_prompt="blurred", guidance_scale=[1.0, 1.0]) is not None
    for used in ({"guidance_scale": 3.0}, {"guidance_scale": [1.0, 3.0]}, {"guidance_scale": 0.0}):
        assert note(negative_prompt="blurred", **used) is None
    assert note() is None
