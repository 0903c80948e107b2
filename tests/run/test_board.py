"""What TensorBoard shows of a run: its runs, charts, settings and pictures, over several starts."""

import io
import re
import time
from functools import partial
from signal import SIGKILL, SIGTERM

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams import metadata

from finetune.run.board import CHARTS, DESCRIPTIONS, PLACES, Board, description, keep_order, place
from finetune.run.run import Run
from harness.compare import board, curves, history
from harness.configs import EVALUATED_STEPS, evaluated_config, write_config, write_pictures
from harness.faults import kill_at, signal_at
from harness.processes import finish, run

LENGTH = EVALUATED_STEPS + 3  # of the resumed run: one epoch more


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The folder of a run that was stopped in its second update, and resumed with other settings."""
    base = tmp_path_factory.mktemp("board")
    pictures = write_pictures(base / "pictures", 19)
    file = write_config(base / "run.yaml", evaluated_config(pictures, base / "run", validation={"images": 4}))
    stopped = run("--config", file, folder=base, before=lambda: signal_at(SIGTERM, Run, "finish_step", 2))
    assert stopped.returncode == 143, stopped.stderr
    assert settings(base / "run")["learning_rate"] == 1e-3  # an interrupted run has its row
    finish("--config", file, "optimizer.learning_rate=5e-4", "training.num_epochs=3", folder=base)
    return base / "run"


def settings(output_dir):
    """The row of a run in HPARAMS."""
    content = board(output_dir / "tensorboard").SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    row = metadata.parse_session_start_info_plugin_data(content)
    return {"name": row.group_name} | {
        key: getattr(value, value.WhichOneof("kind")) for key, value in row.hparams.items()
    }


def test_every_number_of_metrics_jsonl_is_in_a_chart(resumed):
    expected = {}
    for line in history(resumed):
        for name, value in line.items():
            if name != "step":
                expected.setdefault("/".join(place(name)), []).append((line["step"], float(np.float32(value))))
    shown = curves(resumed)
    assert shown.keys() == {name for name in expected if "/time/" not in name and "per_second" not in name}
    assert shown == {name: expected[name] for name in shown}


def test_every_scalar_of_a_run_has_a_description(resumed):
    names = {name for line in history(resumed) for name in line} - {"step"}
    assert len(names) > 15
    assert [name for name in names if not description(place(name)[1])] == []
    for name in ("train", "validation", "validation_ema"):
        found = board(resumed / "tensorboard" / name)
        for tag in found.PluginTagToContent("scalars"):
            assert found.SummaryMetadata(tag).summary_description == description(tag)


@pytest.mark.parametrize("text", DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_descriptions_name_a_unit(text):
    assert re.search(r"no unit|[Ss]econds|[Ii]mages|Updates|Passes|Learning rate|L2 norm", text)


def test_training_and_validation_of_a_quantity_are_one_chart(resumed):
    shown = curves(resumed)
    steps = {
        name.removesuffix("/loss"): [step for step, _ in points]
        for name, points in shown.items()
        if name.endswith("/loss")
    }
    # the baseline, then every update: a tenth of a short run is rounded up to one
    assert steps == {
        "train": list(range(1, LENGTH + 1)),
        "validation": list(range(LENGTH + 1)),
        "validation_ema": list(range(LENGTH + 1)),
    }
    ranges = {name.rpartition("/")[2] for name in shown if "loss_by_timestep" in name}
    assert ranges == {"00-24", "25-49", "50-74", "75-99"}
    assert all(f"{name}/loss_by_timestep/{part}" in shown for name in ("train", "validation") for part in ranges)


def test_loss_comes_first_and_time_last():
    groups = sorted(
        {place(name)[1].split("/")[0] for name in [*PLACES, "time/data", "validation/loss_by_timestep/00-24"]}
    )
    assert (groups[0], groups[-1]) == ("loss", "time")


def test_a_scalar_without_a_place_of_its_own_is_shown_under_other():
    assert place("validation/some_distance") == ("validation", "other/some_distance")
    assert place("train/something") == ("train", "other/something")
    assert place("time/data") == ("train", "time/data")


def test_epochs_are_counted_in_images(resumed):
    # 17 images in windows of 8, 8 and 1: the second update ends at 16 of 17
    epochs = dict(curves(resumed)["train/progress/epoch"])
    assert [epochs[step] for step in (1, 2, 3, 4)] == pytest.approx([8 / 17, 16 / 17, 1, 1 + 8 / 17])


def test_hparams_shows_the_settings_of_the_last_start(resumed):
    assert settings(resumed) == {
        "name": f"run in {resumed.parent}",
        "global_batch_size": 8,
        "learning_rate": 5e-4,
        "lr_scheduler": "constant",
        "seed": 3,
        "snr_gamma": "null",
        "timestep_sampling": "stratified",
        "updates": LENGTH,
    }


def test_hparams_reads_its_metrics_from_curves_that_exist(resumed):
    content = board(resumed / "tensorboard").SummaryMetadata(metadata.EXPERIMENT_TAG).plugin_data.content
    metrics = metadata.parse_experiment_plugin_data(content).metric_infos
    assert [metric.display_name for metric in metrics] == [
        *("train/epoch_loss", "train/loss_smoothed", "validation/loss", "validation/loss_ema")
    ]
    assert {f"{metric.name.group}/{metric.name.tag}" for metric in metrics} <= curves(resumed).keys()


def test_text_shows_the_config_of_each_start_from_its_first_step_on(resumed):
    texts = board(resumed / "tensorboard" / "train").Tensors("config/text_summary")
    assert [text.step for text in texts] == [0, 3]
    configs = [text.tensor_proto.string_val[0].decode() for text in texts]
    assert "learning_rate: 0.001" in configs[0]
    assert configs[1] == f"```yaml\n{(resumed / 'config.yaml').read_text()}```"
    assert "learning_rate: 0.0005" in configs[1]


def test_custom_scalars_have_one_tag_a_chart_since_tags_share_a_colour(resumed):
    found = board(resumed / "tensorboard").Tensors("custom_scalars__config__")
    layout = Layout.FromString(found[0].tensor_proto.string_val[0])
    patterns = [chart.multiline.tag[0] for category in layout.category for chart in category.chart]
    assert patterns == [chart[1][0] for category in CHARTS.values() for chart in category.values()]
    tags = {name.partition("/")[2] for name in curves(resumed)}
    assert [[tag for tag in tags if re.search(pattern, tag)] for pattern in patterns] == [
        ["loss"],
        ["loss/each_update"],
        [],  # the gradient noise scale, which a short run does not know yet
    ]


def test_pictures_are_those_of_the_evaluations(resumed):
    found = board(resumed / "tensorboard" / "validation")
    assert sorted(found.PluginTagToContent("images")) == ["pictures/denoising", "pictures/samples"]
    shown = found.Tensors("pictures/denoising")
    assert [image.step for image in shown] == [0, 3, 6, 9]
    with (
        Image.open(resumed / "samples" / "denoising-9.png") as drawn,
        Image.open(io.BytesIO(shown[-1].tensor_proto.string_val[2])) as image,
    ):
        assert np.array_equal(np.asarray(image.convert("L")), np.asarray(drawn))


def test_training_and_validation_get_the_first_two_colours(tmp_path):
    board = Board(tmp_path / "tensorboard", 0)
    board.start()
    board.settings("run", "seed: 0", {"seed": 0})
    board.log({"validation/loss_ema": 1.0}, 0)
    board.finish()
    first = {}
    for file in (tmp_path / "tensorboard").rglob("events*"):
        event = Event.FromString(next(iter(RawEventFileLoader(str(file)).Load())))
        first[file.parent.name] = event.wall_time
    # TensorBoard sorts runs by their first event
    assert sorted(first, key=first.get) == ["train", "validation", "tensorboard", "validation_ema"]


def test_steps_that_are_done_again_replace_those_of_the_first_time(tmp_path):
    board = Board(tmp_path / "tensorboard", 0)
    board.start()
    for step in range(6):
        board.log({"train/loss": step, "validation/loss": step, "validation/loss_ema": step}, step)
    board.finish()
    again = Board(tmp_path / "tensorboard", 3)
    again.start()
    for step in range(3, 5):
        again.log({"train/loss": 10 + step}, step)
    again.finish()
    assert curves(tmp_path) == {
        "train/loss/each_update": [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14)],
        "validation/loss": [(0, 0), (1, 1), (2, 2)],  # not validated again yet: what is not true any more is gone
        "validation_ema/loss": [(0, 0), (1, 1), (2, 2)],
    }


def test_a_branch_shows_the_curves_of_the_run_that_it_came_from_once(resumed, tmp_path):
    """Also where its first start was killed while it copied them."""
    command = ("--config", resumed.parent / "run.yaml", f"output_dir={tmp_path / 'branch'}", "training.num_epochs=3")
    command += (f"checkpoint.resume={resumed / 'checkpoint-8'}",)
    killed = run(*command, folder=tmp_path, before=lambda: kill_at(Board, "_write", 4))
    assert killed.returncode == -SIGKILL
    finish(*command, folder=tmp_path)
    shown = curves(tmp_path / "branch")
    for name in ("train/loss/each_update", "validation/loss", "train/progress/epoch"):
        assert [step for step, _ in shown[name]] == sorted({step for step, _ in shown[name]})
        assert [point for point in shown[name] if point[0] <= 8] == [p for p in curves(resumed)[name] if p[0] <= 8]
    assert [step for step, _ in shown["train/loss/each_update"]] == [*range(1, LENGTH + 1)]
    assert [text.step for text in board(tmp_path / "branch/tensorboard/train").Tensors("config/text_summary")] == [9]


def test_a_run_that_had_no_tensorboard_shows_its_first_steps_too(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 19)
    file = write_config(tmp_path / "run.yaml", evaluated_config(pictures, tmp_path / "run", logging__tracker=None))
    stop = partial(signal_at, SIGTERM, Run, "finish_step", 4)
    assert run("--config", file, folder=tmp_path, before=stop).returncode == 143
    assert not (tmp_path / "run/tensorboard").exists()
    finish("--config", file, "logging.tracker=tensorboard", folder=tmp_path)
    losses = {line["step"]: line["train/loss"] for line in history(tmp_path / "run") if "train/loss" in line}
    assert [*losses] == [*range(1, EVALUATED_STEPS + 1)]
    expected = [(step, float(np.float32(loss))) for step, loss in losses.items()]
    assert curves(tmp_path / "run")["train/loss/each_update"] == expected


def test_event_files_are_put_before_one_that_is_made_now(tmp_path):
    """Made in seconds 5, 8, 8 and 9, by clocks that were ahead: at 8 three of them become 5 to 7, the first 4."""
    for name in ("5.a.1.0", "8.a.2.0", "8.b.3.0", "9.a.4.0.x"):
        (tmp_path / f"events.out.tfevents.{int(name[0]):010d}{name[1:]}").write_text(name)
    keep_order(tmp_path, 8)
    files = sorted(tmp_path.iterdir())
    assert [file.read_text() for file in files] == ["5.a.1.0", "8.a.2.0", "8.b.3.0", "9.a.4.0.x"]
    assert [int(file.name.split(".")[3]) for file in files] == [4, 5, 6, 7]
    keep_order(tmp_path, 8)
    assert sorted(tmp_path.iterdir()) == files


def test_a_run_that_is_resumed_where_the_clock_is_behind_shows_all_its_points(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 19)
    file = write_config(tmp_path / "run.yaml", evaluated_config(pictures, tmp_path / "run"))
    stop = partial(signal_at, SIGTERM, Run, "finish_step", 4)
    assert run("--config", file, folder=tmp_path, before=stop).returncode == 143

    def before():
        ahead = time.time
        time.time = lambda: ahead() - 100_000

    finish("--config", file, folder=tmp_path, before=before)
    losses = curves(tmp_path / "run")["train/loss/each_update"]
    assert [step for step, _ in losses] == [*range(1, EVALUATED_STEPS + 1)]


def test_a_run_without_a_moving_average_has_no_empty_run_for_it(tmp_path):
    board = Board(tmp_path / "tensorboard", 0)
    board.start()
    board.settings("run", "seed: 0", {"seed": 0})
    board.log({"train/loss": 1.0, "validation/loss": 1.0}, 1)
    board.finish()
    found = sorted(path.name.split(".")[0] for path in (tmp_path / "tensorboard").iterdir())
    assert found == ["events", "train", "validation"]


def test_a_description_is_stored_once_and_not_with_every_point(tmp_path):
    board = Board(tmp_path / "tensorboard", 0)
    board.start()
    for step in range(50):
        board.log({"train/loss": 1.0}, step)
    board.finish()
    (file,) = (tmp_path / "tensorboard" / "train").iterdir()
    values = [value for raw in RawEventFileLoader(str(file)).Load() for value in Event.FromString(raw).summary.value]
    assert [value.HasField("metadata") for value in values] == [True] + 49 * [False]
