import io
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from finetune import data, randomness
from finetune.config import DataConfig
from finetune.data import Batches, load_images, loader_problem, make_loader, split_images
from finetune.errors import UserError
from finetune.images import decode
from finetune.pixels import FEATURES, Images, pixel_row
from finetune.windows import Slot, Split, WindowSampler, epoch_order

RESOLUTION = 8


def png(value: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """A picture that differs from all of another value, and is brighter to the right."""
    pixels = np.indices(size[::-1])[1] * 5 + value
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).convert("RGB").save(file, "PNG")
    return file.getvalue()


def write_folder(root, pictures: list[bytes]) -> str:
    root.mkdir()
    for number, picture in enumerate(pictures):
        (root / f"{number:03}.png").write_bytes(picture)
    return str(root)


def write_table(root, pictures: list[bytes]) -> pa.Table:
    return pa.table({"image": [{"bytes": picture, "path": None} for picture in pictures]})


def write_parquet(root, pictures: list[bytes]) -> str:
    pq.write_table(write_table(root, pictures), f"{root}.parquet")
    return f"{root}.parquet"


def write_saved(root, pictures: list[bytes]) -> str:
    datasets.Dataset(write_table(root, pictures)).save_to_disk(str(root))
    return str(root)


def write_tar(root, pictures: list[bytes]) -> str:
    with tarfile.open(f"{root}.tar", "w") as archive:
        for number, picture in enumerate(pictures):
            info = tarfile.TarInfo(f"{number:03}.png")
            info.size = len(picture)
            archive.addfile(info, io.BytesIO(picture))
    return f"{root}.tar"


KINDS = {"folder": write_folder, "parquet": write_parquet, "saved": write_saved, "tar": write_tar}


def load(source: str, channels: int = 3, resolution: int = RESOLUTION, **config) -> Images:
    return load_images(DataConfig(source=source, **config), channels, resolution)


def problems(source: str, **config) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load(source, **config)
    assert caught.value.exit_code == 2
    assert not any("\n" in line for line in caught.value.problems)
    return caught.value.problems


@pytest.fixture
def decodes(monkeypatch) -> list:
    """Grows by one entry with every picture that this process decodes."""
    calls = []
    monkeypatch.setattr(data, "decode", lambda *args, **options: calls.append(args) or decode(*args, **options))
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_any_kind_is_decoded_once(kind, tmp_path, decodes):
    pictures = [png(value) for value in (0, 50, 100)]
    source = KINDS[kind](tmp_path / "x", pictures)
    first = load(source)
    assert len(decodes) == len(first) == 3
    for index, picture in enumerate(pictures):
        assert (first.pixels(index) == decode(picture, 3, RESOLUTION, "center", "white")).all()
    again = load(source, random_flip=True, num_workers=7, on_bad_image="skip", validation_fraction=0.5)
    assert len(decodes) == 3
    assert again.fingerprint == first.fingerprint
    for count, changed in enumerate(
        ({"resolution": 9}, {"channels": 1}, {"crop": "random"}, {"background": "red"}), start=2
    ):
        load(source, **changed)
        load(source, **changed)
        assert len(decodes) == 3 * count


def test_other_processes_and_later_runs_find_everything_in_the_cache(tmp_path, capfd):
    """As processes of one launch do after the main one, and each start of a run after the first."""
    sources = [write(tmp_path / f"x-{kind}", [png(value) for value in (1, 2)]) for kind, write in KINDS.items()]
    (tmp_path / "described").mkdir()
    for name in "abcd":  # several metadata files: their order hangs on the hash seed of the process
        write_folder(tmp_path / "described" / name, [png(ord(name))])
        (tmp_path / "described" / name / "metadata.csv").write_text("file_name,label\n000.png,x\n")
    sources += [str(tmp_path / "described"), "digits"]
    fingerprints = [load(source, resolution=11).fingerprint for source in sources]
    assert "Decoding images" in capfd.readouterr().err  # progress is shown where there is some
    script = (
        "import sys; from finetune import data; from finetune.config import DataConfig\n"
        "data.decode = None\n"
        "for source in sys.argv[1:]:\n"
        "    print(data.load_images(DataConfig(source=source), 3, 11).fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", script, *sources], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == fingerprints
    assert done.stderr == ""


def test_the_fingerprint_is_of_the_content_wherever_it_lies(tmp_path):
    pictures = [png(value) for value in (0, 50)]
    loaded = [load(write(tmp_path / f"x-{kind}", pictures)) for kind, write in KINDS.items()]
    os.utime(tmp_path / "x-folder" / "000.png", (1, 1))
    shutil.copytree(tmp_path / "x-folder", tmp_path / "elsewhere")
    loaded += [load(str(tmp_path / "x-folder")), load(str(tmp_path / "elsewhere"))]
    assert len({images.fingerprint for images in loaded}) == 1
    others = [load(write_folder(tmp_path / "y", pictures[::-1])), load(write_folder(tmp_path / "z", pictures * 2))]
    assert len({images.fingerprint for images in [*others, loaded[0]]}) == 3


def test_a_changed_picture_is_noticed(tmp_path, decodes):
    source = write_folder(tmp_path / "x", [png(0), png(50)])
    before = load(source).fingerprint
    (tmp_path / "x" / "001.png").write_bytes(png(51))
    os.utime(tmp_path / "x" / "001.png", (2e9, 2e9))
    assert load(source).fingerprint != before


def test_labels_choose_the_images_and_go_with_them(tmp_path, decodes):
    for label, value in (("cat", 0), ("dog", 50), ("owl", 100)):
        (tmp_path / label).mkdir()
        for number in range(2):
            (tmp_path / label / f"{number}.png").write_bytes(png(value + number))
    images = load(str(tmp_path), labels=["owl", "cat"])
    assert len(decodes) == 4
    assert images.labels.tolist() == [0, 0, 2, 2]
    assert images.label_names == ["cat", "dog", "owl"]
    assert images.pixels(2)[0, 0, 0] < images.pixels(3)[0, 0, 0]
    assert images.fingerprint != images.select(np.array([1, 0, 2, 3])).fingerprint
    assert problems(str(tmp_path), labels=["cow"])[0].startswith("data.labels: found ['cow']; expected labels of")


BAD = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"I am no picture", "is not a picture in any known format, or damaged at its start"),
    "truncated": (png(3, (90, 90))[:-60], "is damaged or cut off: image file is truncated"),
    "point": (png(0, (1, 1)), "is 1 x 1 pixels, expected at least 2 a side"),
}


def with_bad_ones(root) -> str:
    source = write_folder(root, [png(0), png(50)])
    for name, (content, _) in BAD.items():
        (root / f"{name}.png").write_bytes(content)
    return source


def test_bad_images_are_all_named_in_one_error(tmp_path):
    source = with_bad_ones(tmp_path / "x")
    first, *rest = problems(source)
    advice = "found 4 of 6 images bad; mend or remove them, or set data.on_bad_image=skip"
    assert first == f"data.source: {source}: {advice}"
    assert sorted(rest) == sorted(f"{name}.png: {reason}" for name, (_, reason) in BAD.items())
    assert problems(source) == (first, *rest)  # the cache remembers


def test_bad_images_are_skipped_and_listed(tmp_path):
    images = load(with_bad_ones(tmp_path / "x"), on_bad_image="skip")
    assert sorted(images.skipped) == sorted(f"{name}.png: {reason}" for name, (_, reason) in BAD.items())
    good = load(write_folder(tmp_path / "y", [png(0), png(50)]))
    assert len(images) == len(good) == 2
    assert images.fingerprint == good.fingerprint
    assert (images.pixels(1) == good.pixels(1)).all()


def test_of_very_many_bad_images_twenty_are_named(tmp_path):
    first, *rest, last = problems(write_folder(tmp_path / "x", [b""] * 23 + [png(0)]))
    assert "found 23 of 24 images bad" in first
    assert rest == [f"{number:03}.png: is empty (0 bytes)" for number in range(20)]
    assert last == "and 3 more"


def test_nothing_left_is_an_error_even_where_bad_images_are_skipped(tmp_path):
    lines = problems(write_folder(tmp_path / "x", [b"", b"x"]), on_bad_image="skip")
    assert lines[0].endswith("found 2 of 2 images bad; mend or remove them")
    nothing = f"data.split: found no images in 'train[:0]' of {tmp_path}/x; expected at least one"
    assert problems(str(tmp_path / "x"), split="train[:0]") == (nothing,)


def test_broken_rows_of_a_table_are_named_by_number_and_paths_in_them_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(0))
    rows = [
        {"bytes": png(0), "path": "fine.png"},
        {"bytes": b"garbage", "path": "../../x.png"},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": str(tmp_path / "secret.png")},
        {"bytes": None, "path": "https://example.com/x.png"},
    ]
    pq.write_table(pa.table({"image": rows, "label": [0, 1, 1, 1, 1, 1]}), tmp_path / "x.parquet")
    expected = [
        "row 1 (../../x.png): is not a picture in any known format, or damaged at its start",
        "row 2: has no picture",
        "row 3: has no picture",
        f"row 4 ({tmp_path}/secret.png): has no picture, only a path, which is not followed out of a dataset",
        "row 5 (https://example.com/x.png): has no picture, only a path, which is not followed out of a dataset",
    ]
    assert problems(str(tmp_path / "x.parquet"))[1:] == tuple(expected)
    images = load(str(tmp_path / "x.parquet"), on_bad_image="skip")
    assert (len(images), images.skipped, images.labels.tolist()) == (1, expected, [0])
    assert problems(str(tmp_path / "x.parquet"), labels=[1], on_bad_image="skip")[1:] == tuple(expected)


def test_a_folder_of_links_is_followed_but_dots_are_not(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(png(0))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "store" / "a")
    assert len(load(str(tmp_path / "links"))) == 1
    folders = (str(tmp_path / "links"),)
    for path in ("../store/a", "a.png/../../store/a", "../links-too/a.png"):
        row = data._decode_row({"bytes": None, "path": os.path.join(*folders, path)}, folders, channels=3)
        assert row["error"] == "has no picture, only a path, which is not followed out of a dataset"


def test_wrong_options_are_refused_before_anything_is_opened(tmp_path):
    assert problems(str(tmp_path / "nothing"), background="whit")[0].startswith("data.background: found 'whit'")
    assert problems(str(tmp_path / "nothing"), channels=2)[0].startswith("model: found a network of 2 input channels")


def test_large_pictures_give_no_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the pictures here have 120
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert len(load(write_folder(tmp_path / "x", [png(0)]))) == 1
    assert shown == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "map", fail)
    source = write_folder(tmp_path / "x", [png(0)])
    (line,) = problems(source)
    assert line.startswith(f"data.source: {source}: no room in the datasets cache")


def test_a_fraction_is_held_out_by_the_seed():
    images = load("digits", channels=1)
    parts = [split_images(images, DataConfig(source="digits"), seed) for seed in (0, 0, 1)]
    assert [len(part) for part in parts[0]] == [1707, 90]  # 5 % of 1797 is 89.85
    prints = [(train.fingerprint, held_out.fingerprint) for train, held_out in parts]
    assert prints[0] == prints[1] != prints[2]
    train, held_out = parts[0]
    assert sorted([*train.rows, *held_out.rows]) == list(range(1797))
    assert (train.labels == images.labels[train.rows]).all()
    whole, nothing = split_images(images, DataConfig(source="digits", validation_fraction=0), 0)
    assert (whole, nothing) == (images, None)


def test_a_split_is_held_out_and_decoded_with_the_other(tmp_path, decodes):
    for split, value, count in (("train", 0, 3), ("val", 50, 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            (tmp_path / split / f"{number}.png").write_bytes(png(value + number))
    config = DataConfig(source=str(tmp_path), validation_split="validation")
    images = load_images(config, 3, RESOLUTION)
    assert len(decodes) == 5  # so that the main process has done all of it before the others come
    train, held_out = split_images(images, config, 0)
    assert len(decodes) == 5
    assert (len(train), len(held_out)) == (3, 2)
    assert train.fingerprint == images.fingerprint
    line = problems(str(tmp_path), validation_split="dev")[0]
    assert line.startswith("data.validation_split: found 'dev'; expected a split of")


def wide_images(count: int = 6, height: int = 8, width: int = 14, channels: int = 3) -> Images:
    """Every pixel of image i is (row, column, i): what a crop shows says where it was cut."""
    rows, columns = np.indices((height, width))
    arrays = [np.stack([rows, columns, np.full_like(rows, i)], axis=2)[..., :channels] for i in range(count)]
    table = datasets.Dataset.from_list([pixel_row(a.astype(np.uint8)) for a in arrays], features=FEATURES)
    return Images(table, np.arange(count), channels, min(height, width))


def batches(images: Images, seed: int = 0, crop: str = "center", flip: bool = False, sampling="stratified") -> Batches:
    return Batches(images, seed, 1000, sampling, images.resolution, crop, flip)


SLOTS = [Slot(5, 3, 0, 1.5), Slot(2, 3, 1, 1.5), Slot(5, 3, 0, 0.0)]


def test_a_batch_holds_what_its_slots_say():
    batch = batches(wide_images(), seed=7).__getitems__(SLOTS)
    assert batch.keys() == {"images", "noise", "timesteps", "weights", "image_ids", "positions"}
    assert batch["images"].shape == batch["noise"].shape == (3, 3, 8, 8)
    assert batch["images"].dtype == torch.uint8
    assert all(tensor.is_contiguous() for tensor in batch.values())
    assert batch["images"][:, 2, 0, 0].tolist() == batch["image_ids"].tolist() == [5, 2, 5]
    assert batch["images"][0, 0, :, 0].tolist() == list(range(8))
    assert batch["images"][0, 1, 0].tolist() == list(range(3, 11))  # the middle 8 of 14 columns
    assert batch["positions"].tolist() == [0, 1, 0]
    assert batch["weights"].tolist() == [1.5, 1.5, 0.0]
    for place, slot in enumerate(SLOTS):
        assert (batch["noise"][place] == randomness.noise(7, 3, slot.position, (3, 8, 8))).all()
        expected = randomness.timestep(7, 3, slot.position, 1000, "stratified")
        assert batch["timesteps"][place] == expected
    dtypes = {name: batch[name].dtype for name in ("timesteps", "image_ids", "positions")}
    assert set(dtypes.values()) == {torch.int64}


def test_timesteps_are_sampled_as_the_config_says():
    drawn = [batches(wide_images(), sampling=s).__getitems__(SLOTS)["timesteps"] for s in ("stratified", "uniform")]
    assert drawn[0].tolist() != drawn[1].tolist()


def test_noise_and_weights_have_the_default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        batch = batches(wide_images()).__getitems__(SLOTS)
    finally:
        torch.set_default_dtype(torch.float32)
    assert batch["noise"].dtype == batch["weights"].dtype == torch.float64


@pytest.mark.parametrize("channels", [1, 3])
def test_crops_and_flips_hang_on_epoch_and_position(channels):
    images = wide_images(channels=channels, height=8, width=11)
    read = batches(images, crop="random", flip=True)
    seen = {}
    for epoch in range(2):
        for position in range(200):
            slot = Slot(0, epoch, position, 1.0)
            (u_top, u_left), (u_flip,) = (
                randomness.uniform(0, purpose, epoch, position, count) for purpose, count in (("crop", 2), ("flip", 1))
            )
            top, left = int(u_top * 1), int(u_left * 4)  # 8 - 8 + 1 places one way, 11 - 8 + 1 the other
            expected = images.pixels(0)[top : top + 8, left : left + 8]
            expected = expected[:, ::-1] if u_flip < 0.5 else expected
            (got,) = read.__getitems__([slot])["images"].numpy()
            assert (got == expected.transpose(2, 0, 1)).all()
            seen.setdefault((left, u_flip < 0.5), []).append((epoch, position))
    assert len(seen) == 8
    # 400 draws over 8 equal cells: 50 each, standard deviation 6.6.
    assert all(25 < len(places) < 75 for places in seen.values())
    assert {epoch for epoch, _ in seen[0, True]} == {0, 1}


def test_tall_images_are_cropped_too():
    read = batches(wide_images(height=20, width=8), crop="random")
    tops = {int(read.__getitems__([Slot(0, 0, p, 1.0)])["images"][0, 0, 0, 0]) for p in range(200)}
    assert tops == set(range(13))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=12), st.integers(1, 12), st.booleans())
def test_a_sample_is_the_same_in_every_batch(positions, size, flip):
    order = epoch_order(0, 0, 12)
    slots = [Slot(int(order[position]), 0, position, 1.0) for position in positions]
    read = batches(wide_images(12), crop="random", flip=flip)
    whole = read.__getitems__(slots)
    parts = [read.__getitems__(slots[start : start + size]) for start in range(0, len(slots), size)]
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_a_seek_reads_no_image_that_was_done(monkeypatch):
    read, pixels = [], Images.pixels
    monkeypatch.setattr(Images, "pixels", lambda self, index: read.append(index) or pixels(self, index))
    sampler = WindowSampler(12, 0, Split(2, 2, 1))
    sampler.seek(epoch=3, window=2)
    loader = make_loader(batches(wide_images(12)), sampler, num_workers=0, pin_memory=False)
    ids = torch.cat([batch["image_ids"] for batch in loader]).tolist()
    assert read == ids == epoch_order(0, 3, 12)[8:].tolist()


def test_numbers_do_not_travel_through_shared_memory():
    """A block of it for each tensor would cost the main process more than reading the images itself."""
    batch = batches(wide_images()).__getitems__(SLOTS)
    unpack, (shared, numbers) = data._Parcel(batch).__reduce__()
    assert batch.keys() - numbers.keys() == {"images", "noise"}
    arrived = unpack(shared, numbers)
    assert arrived.keys() == batch.keys()
    assert all(torch.equal(arrived[name], batch[name]) for name in batch)


@pytest.mark.parametrize(("context", "num_workers"), [("fork", 2), ("spawn", 1)])
def test_workers_change_nothing(context, num_workers, tmp_path):
    images = load(write_folder(tmp_path / "x", [png(5 * value) for value in range(12)]), crop="random")
    sampler, read = WindowSampler(len(images), 0, Split(2, 2, 1)), batches(images, crop="random", flip=True)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        alone = list(make_loader(read, sampler, num_workers=0, pin_memory=False))
        loader = make_loader(read, sampler, num_workers, pin_memory=False)
        loader.multiprocessing_context = context
        for epoch in (0, 1, 0):  # the same workers, told by slots alone which epoch it is
            sampler.seek(epoch, 0)
            shared = list(loader)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(shared) == len(alone) == 6
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype for name in one)
    assert torch.equal(torch.get_rng_state(), before)


class Confession(Batches):
    """Tells about the worker that reads."""

    def __getitems__(self, slots):
        ignored = [signal.getsignal(number) is signal.SIG_IGN for number in (signal.SIGINT, signal.SIGUSR1)]
        told = {"threads": torch.get_num_threads(), "ignored": all(ignored), "pid": os.getpid()}
        return {name: torch.tensor([value]) for name, value in told.items()}


def test_workers_leave_signals_and_cores_to_the_main_process():
    dataset = Confession(wide_images(), 0, 1000, "uniform", 8, "center", False)
    loader = make_loader(dataset, WindowSampler(6, 0, Split(2, 1, 1)), num_workers=2, pin_memory=False)
    told = list(loader)
    workers = {int(worker["pid"]) for worker in told}
    assert len(workers - {os.getpid()}) == 2
    assert all(worker["threads"] == 1 and worker["ignored"] for worker in told)
    for name in ("TERM", "INT", "USR1"):  # as a scheduler sends them, to every process
        subprocess.run(["kill", f"-{name}", *map(str, workers)], check=True)
    time.sleep(0.2)
    assert {int(worker["pid"]) for worker in loader} == workers
    for worker in loader._iterator._workers:  # as this process does when it exits
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 0
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        list(loader)


class Suicide(Batches):
    def __getitems__(self, slots):
        if os.environ["FINETUNE_TEST_END"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(3)


@pytest.mark.parametrize("end", ["kill", "exit"])
def test_a_worker_that_dies_is_one_line(end, monkeypatch):
    monkeypatch.setenv("FINETUNE_TEST_END", end)
    dataset = Suicide(wide_images(), 0, 1000, "uniform", 8, "center", False)
    loader = make_loader(dataset, WindowSampler(6, 0, Split(2, 1, 1)), num_workers=1, pin_memory=False)
    started = time.monotonic()
    with pytest.raises(RuntimeError) as caught:
        next(iter(loader))
    assert time.monotonic() - started < 30
    problem = loader_problem(caught.value)
    assert problem.exit_code == 1
    (line,) = problem.problems
    assert line == (
        "data.num_workers: a data worker was killed, most likely for want of memory; "
        "set data.num_workers=0 or free some, and run the same command again"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are "
            "out of shared memory. Please try to raise your shared memory limit.",
            "/dev/shm",
        ),
        ("Caught RuntimeError in DataLoader worker process 0.\nRuntimeError: unable to write to file </torch_1_2_3>: "
         "No space left on device (28)", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "killed"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
        ("CUDA out of memory", None),
    ],
)  # fmt: skip
def test_only_the_loaders_own_errors_are_recognised(text, words):
    problem = loader_problem(RuntimeError(text))
    assert problem is None if words is None else words in str(problem)
