"""From any source to decoded images: decoded once, labelled, bad ones reported, some held out."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from finetune.config.inputs import DataConfig
from finetune.core import files
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data import loading
from finetune.data.decode import decode, decode_to_shape
from finetune.data.loading import load_data
from finetune.data.pixels import Images

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


def load_parts(source: str, seed: int = 0, channels: int = 3, resolution: int = RESOLUTION, **config):
    """The images to train on and those held out."""
    return load_data(DataConfig(source=source, **config), ImageFormat(channels, resolution), seed)


def load(source: str, **options) -> Images:
    """All images of a source."""
    return load_parts(source, **{"validation_fraction": 0.0, **options})[0]


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
    monkeypatch.setattr(
        loading, "decode_to_shape", lambda *args, **options: calls.append(args) or decode_to_shape(*args, **options)
    )
    return calls


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_of_any_kind_is_decoded_once(kind, tmp_path, decodes):
    pictures = [png(value) for value in (0, 50, 100)]
    source = KINDS[kind](tmp_path / "x", pictures)
    first = load(source)
    assert len(decodes) == len(first) == 3
    for index, picture in enumerate(pictures):
        assert (first.pixels(index) == decode(picture, 3, RESOLUTION, "center", "white")).all()
    again = load(source, random_flip=True, num_workers=7, on_bad_image="skip")
    assert len(decodes) == 3
    assert again.fingerprint == first.fingerprint
    for count, changed in enumerate(
        ({"resolution": 9}, {"channels": 1}, {"crop": "random"}, {"background": "red"}), start=2
    ):
        load(source, **changed)
        load(source, **changed)
        assert len(decodes) == 3 * count


@pytest.mark.slow
def test_other_processes_and_later_runs_find_everything_in_the_cache(tmp_path, capfd):
    """As processes of one launch do after the main one, and each start of a run after the first."""
    sources = [write(tmp_path / f"x-{kind}", [png(value) for value in (1, 2)]) for kind, write in KINDS.items()]
    (tmp_path / "described").mkdir()
    for name in "abcd":  # several metadata files: their order depends on the hash seed of the process
        write_folder(tmp_path / "described" / name, [png(ord(name))])
        (tmp_path / "described" / name / "metadata.csv").write_text("file_name,label\n000.png,x\n")
    sources += [str(tmp_path / "described"), "digits"]
    fingerprints = [load(source, resolution=11).fingerprint for source in sources]
    assert "Decoding images" in capfd.readouterr().err  # progress is shown where there is some
    script = (
        "import sys; from finetune.data import loading; from finetune.config.inputs import DataConfig\n"
        "from finetune.core.kind import ImageFormat\n"
        "loading.decode_to_shape = None\n"
        "for source in sys.argv[1:]:\n"
        "    config = DataConfig(source=source, validation_fraction=0.0)\n"
        "    print(loading.load_data(config, ImageFormat(3, 11), 0)[0].fingerprint)"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", script, *sources], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == fingerprints
    assert done.stderr == ""


def test_the_fingerprint_depends_on_the_content_and_not_on_where_it_is_stored(tmp_path):
    pictures = [png(value) for value in (0, 50)]
    loaded = [load(write(tmp_path / f"x-{kind}", pictures)) for kind, write in KINDS.items()]
    os.utime(tmp_path / "x-folder" / "000.png", (1, 1))
    shutil.copytree(tmp_path / "x-folder", tmp_path / "elsewhere")
    loaded += [load(str(tmp_path / "x-folder")), load(str(tmp_path / "elsewhere"))]
    assert len({images.fingerprint for images in loaded}) == 1
    others = [load(write_folder(tmp_path / "y", pictures[::-1])), load(write_folder(tmp_path / "z", pictures * 2))]
    assert len({images.fingerprint for images in [*others, loaded[0]]}) == 3


def test_a_changed_picture_changes_the_fingerprint(tmp_path):
    source = write_folder(tmp_path / "x", [png(0), png(50)])
    before = load(source).fingerprint
    (tmp_path / "x" / "001.png").write_bytes(png(51))
    os.utime(tmp_path / "x" / "001.png", (2e9, 2e9))
    assert load(source).fingerprint != before


def test_only_images_with_the_asked_labels_are_decoded_and_keep_their_labels(tmp_path, decodes):
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
    "text": (b"not a picture", "is not a picture in any known format, or damaged at its start"),
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
    advice = "found 4 of 6 images bad; fix or remove them, or set data.on_bad_image=skip"
    assert first == f"data.source: {source}: {advice}"
    assert sorted(rest) == sorted(f"{name}.png: {reason}" for name, (_, reason) in BAD.items())
    assert problems(source) == (first, *rest)  # the cache remembers


def test_bad_images_are_skipped_and_listed(tmp_path):
    images = load(with_bad_ones(tmp_path / "x"), on_bad_image="skip")
    listed = sorted(note.removeprefix("  ") for note in images.notes if note.startswith("  "))
    assert listed == sorted(f"{name}.png: {reason}" for name, (_, reason) in BAD.items())
    good = load(write_folder(tmp_path / "y", [png(0), png(50)]))
    assert len(images) == len(good) == 2
    assert images.fingerprint == good.fingerprint
    assert (images.pixels(1) == good.pixels(1)).all()


def test_an_error_names_twenty_of_many_bad_images(tmp_path):
    first, *rest, last = problems(write_folder(tmp_path / "x", [b""] * 23 + [png(0)]))
    assert "found 23 of 24 images bad" in first
    assert rest == [f"{number:03}.png: is empty (0 bytes)" for number in range(20)]
    assert last == "and 3 more"


def test_no_usable_image_is_an_error_even_with_on_bad_image_skip(tmp_path):
    lines = problems(write_folder(tmp_path / "x", [b"", b"x"]), on_bad_image="skip")
    assert lines[0].endswith("found 2 of 2 images bad; fix or remove them")
    nothing = f"data.split: found no images in 'train[:0]' of {tmp_path}/x; expected at least one"
    assert problems(str(tmp_path / "x"), split="train[:0]") == (nothing,)


def test_bad_rows_of_a_table_are_named_by_number_and_paths_in_rows_are_not_opened(tmp_path):
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
    assert (len(images), images.labels.tolist()) == (1, [0])
    heading = "left out 5 of 6 images of 'train', which are bad (on_bad_image: skip):"
    assert images.notes[:6] == [heading, *(f"  {line}" for line in expected)]
    assert problems(str(tmp_path / "x.parquet"), labels=[1], on_bad_image="skip")[1:] == tuple(expected)


def test_links_in_a_folder_are_followed_but_paths_that_lead_out_of_it_are_not(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "a").write_bytes(png(0))
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.png").symlink_to(tmp_path / "store" / "a")
    assert len(load(str(tmp_path / "links"))) == 1
    folders = (str(tmp_path / "links"),)
    for path in ("../store/a", "a.png/../../store/a", "../links-too/a.png"):
        row = loading._decode_row({"bytes": None, "path": os.path.join(*folders, path)}, folders, channels=3)
        assert row["error"] == "has no picture, only a path, which is not followed out of a dataset"


def test_wrong_options_are_refused_before_the_source_is_opened(tmp_path):
    assert problems(str(tmp_path / "nothing"), background="whit")[0].startswith("data.background: found 'whit'")
    assert problems(str(tmp_path / "nothing"), channels=2)[0].startswith("model: found a network of 2 input channels")


def test_large_pictures_print_no_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # the pictures here have 120
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        assert len(load(write_folder(tmp_path / "x", [png(0)]))) == 1
    assert shown == []


def test_pictures_that_the_disk_has_no_room_for_are_not_decoded(tmp_path, monkeypatch):
    """Three of 9 x 9 pixels in three colours, a byte each; those in the cache need none."""
    source = write_folder(tmp_path / "x", [png(value) for value in (0, 50, 100)])
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 9 * 9 * 3 - 1))
    (problem,) = problems(source, resolution=9)
    assert re.fullmatch(
        r"data\.resolution: \S+: found 728 bytes free, expected 729 for decoded pictures; free some, or set "
        "HF_DATASETS_CACHE to a larger disk",
        problem,
    )
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * 9 * 9 * 3))
    assert len(load(source, resolution=9)) == 3
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert len(load(source, resolution=9)) == 3


def test_a_full_disk_is_a_one_line_error(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.Dataset, "map", fail)
    source = write_folder(tmp_path / "x", [png(0)])
    (line,) = problems(source)
    assert line.startswith(f"data.source: {source}: no room in the datasets cache")


def test_the_held_out_fraction_depends_on_the_seed():
    images = load("digits", channels=1)
    parts = [load_parts("digits", seed, channels=1) for seed in (0, 0, 1)]
    assert [len(part) for part in parts[0]] == [1707, 90]  # 5 % of 1797 is 89.85
    prints = [(train.fingerprint, held_out.fingerprint) for train, held_out in parts]
    assert prints[0] == prints[1] != prints[2]
    train, held_out = parts[0]
    assert sorted([*train.rows, *held_out.rows]) == list(range(1797))
    assert (train.labels == images.labels[train.rows]).all()
    everything, nothing = load_parts("digits", channels=1, validation_fraction=0)
    assert (everything.fingerprint, nothing) == (images.fingerprint, None)


def test_a_validation_split_is_held_out(tmp_path, decodes):
    for split, value, count in (("train", 0, 3), ("val", 50, 2)):
        (tmp_path / split).mkdir()
        for number in range(count):
            (tmp_path / split / f"{number}.png").write_bytes(png(value + number))
    train, held_out = load_parts(str(tmp_path), validation_split="validation")
    assert len(decodes) == 5
    assert (len(train), len(held_out)) == (3, 2)
    assert train.fingerprint == load(str(tmp_path)).fingerprint
    (line,) = problems(str(tmp_path), validation_split="train[:2]")
    assert line.startswith("data.validation_split: found 'train[:2]', which has 2 rows in common with data.split")
    line = problems(str(tmp_path), validation_split="dev")[0]
    assert line.startswith("data.validation_split: found 'dev'; expected a split of")
