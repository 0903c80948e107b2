"""Every file of a folder is read, or the plan says that it was left out."""

import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data.listing import by_kind, list_folder
from finetune.data.loading import load_data
from finetune.data.sources import open_source
from harness.configs import png, tiny_config, write_config, write_pictures
from harness.folders import write_files
from harness.processes import finish, run


def problem(path, output_dir=None) -> str:
    with pytest.raises(UserError) as caught:
        open_source(str(path), output_dir and str(output_dir))
    (line,) = caught.value.problems
    assert "\n" not in line
    return line


CONVERT = "left out pictures in formats that cannot be read here, to be converted to PNG or JPEG"
RUN = "config.yaml", "metrics.jsonl", "loss_curve.png", "samples/step-1.png", "checkpoint-1/x.png", "pipeline/y.png"
TABLE = [
    # files, found, left out
    (["a.jpg", "b.JPG", "c/d.webp"], "found 3 pictures: 2 .jpg, 1 .webp", []),
    (
        [*(f"{n}.jpg" for n in range(3)), *(f"{n}.avif" for n in range(5)), "x.heic", "y.jxl"],
        "found 8 pictures: 5 .avif, 3 .jpg",
        [f"{CONVERT} (2): 1 .heic (x.heic), 1 .jxl (y.jxl)"],
    ),
    (
        ["a.png", "b.psd", "c.dng", "d.svg", "e.CR2"],
        "found 1 picture: 1 .png",
        [f"{CONVERT} (4): 1 .cr2 (e.CR2), 1 .dng (c.dng), 1 .psd (b.psd), 1 .svg (d.svg)"],
    ),
    (
        ["a.png", "a.txt", "b.txt", "c.txt", "d.txt", "LICENSE", "clip.mp4"],
        "found 1 picture: 1 .png",
        [
            "left out other files (6): 4 .txt (a.txt, b.txt, c.txt, ...), 1 .mp4 (clip.mp4), "
            "1 without extension (LICENSE)"
        ],
    ),
    (
        ["a.png", "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", ".thumbnails/a.png", "__MACOSX/._a.png", "#recycle/b.png"],
        "found 1 picture: 1 .png",
        [
            "left out files in hidden and system folders (4): 3 .png (#recycle/b.png, .thumbnails/a.png, "
            "__MACOSX/._a.png), 1 .jpg (@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg)"
        ],
    ),
    (
        ["cat/a.png", "cat/._a.png", "cat/Thumbs.db", ".DS_Store", "desktop.ini"],
        "found 1 picture: 1 .png",
        [
            "left out hidden and system files (4): 1 .db (cat/Thumbs.db), 1 .ini (desktop.ini), 1 .png (cat/._a.png), "
            "1 without extension (.DS_Store)"
        ],
    ),
    (
        ["a.png", *(f"runs/one/{name}" for name in RUN)],
        "found 1 picture: 1 .png",
        [
            "left out files of a run's output (6): 4 .png (runs/one/checkpoint-1/x.png, runs/one/loss_curve.png, "
            "runs/one/pipeline/y.png, ...), 1 .jsonl (runs/one/metrics.jsonl), 1 .yaml (runs/one/config.yaml)"
        ],
    ),
    (
        ["samples/a.png", "pipeline/b.png", "config.yaml"],
        "found 2 pictures: 2 .png",
        ["left out other files (1): 1 .yaml (config.yaml)"],
    ),
    (["train/a.png", "train/b.png", "test/c.png"], "found 3 pictures: 3 .png; 1 in test, 2 in train", []),
    (["a\x1b.txt", "b.png"], "found 1 picture: 1 .png", [r"left out other files (1): 1 .txt ('a\x1b.txt')"]),
]


@pytest.mark.parametrize(("files", "found", "left_out"), TABLE)
def test_the_notes_list_what_was_found_and_left_out(tmp_path, files, found, left_out):
    assert open_source(str(write_files(tmp_path, *files))).notes == [found, *left_out]


@given(
    st.lists(
        st.sampled_from(["a.png", "b.JPG", "c.avif", "d.heic", "e.txt", ".f.png", "g", "h.psd", "Thumbs.db", "i.mp4"]),
        unique=True,
    ),
    st.lists(st.sampled_from(["", "x/", "@eaDir/", ".hidden/", "x/y/", "__MACOSX/", "lost+found/"]), unique=True),
)
def test_every_file_is_found_or_counted_as_left_out(tmp_path_factory, names, folders):
    root = write_files(tmp_path_factory.mktemp("x"), *(folder + name for folder in folders for name in names))
    listing = list_folder(str(root))
    left_out = sum(int(re.search(r"\((\d+)\): ", note)[1]) for note in listing.notes)
    assert len(listing.everything) + left_out == len(names) * len(folders)


def test_kinds_are_counted_and_named():
    assert by_kind(["b.png", "a.PNG", "x", "c.jpg"]) == "2 .png, 1 .jpg, 1 without extension"
    assert by_kind(["b.png", "a.PNG", "d.png", "c.png"], named=True) == "4 .png (a.PNG, b.png, c.png, ...)"


def test_avif_pictures_are_decoded(tmp_path):
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "a.avif", quality=100)
    images, _ = load_data(DataConfig(source=str(tmp_path), validation_fraction=0.0), ImageFormat(3, 8), 0)
    assert abs(images[0].astype(int) - (200, 100, 50)).max() <= 2  # what AVIF loses at its best quality


def test_a_folder_with_nothing_readable_says_what_is_in_it(tmp_path):
    line = problem(write_files(tmp_path, "a.heic", "b.heic"))
    assert "found nothing to read in the folder" in line
    assert f"{CONVERT} (2): 2 .heic (a.heic, b.heic)" in line


def test_a_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_files(tmp_path, "a.png", "locked/b.png", "lost+found/c.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) in ("locked", "lost+found"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert problem(tmp_path) == (
        f"data.source: the folder {tmp_path}/locked cannot be read (Permission denied); expected one that can: "
        "change its permissions, or move it elsewhere"
    )
    os.rename(tmp_path / "locked", tmp_path / "open")
    assert open_source(str(tmp_path)).notes == ["found 2 pictures: 2 .png"]  # lost+found belongs to the file system


def test_pictures_that_no_metadata_names_are_noted(tmp_path):
    write_files(tmp_path, *(f"{n}.png" for n in range(10)))
    (tmp_path / "metadata.csv").write_text("file_name,label\n" + "".join(f"{n}.png,x\n" for n in range(4)))
    source = open_source(str(tmp_path))
    assert len(source.splits["train"]) == 4
    assert source.notes == [
        "found 10 pictures: 10 .png",
        "left out 6 of 10 pictures, which no metadata file names: 6 .png (4.png, 5.png, 6.png, ...)",
    ]
    (tmp_path / "metadata.csv").write_text("photo_file_name\n" + "".join(f"./{n}.png\n" for n in range(10)))
    assert open_source(str(tmp_path)).notes == ["found 10 pictures: 10 .png"]


def test_metadata_of_one_folder_does_not_name_the_pictures_of_another(tmp_path):
    write_files(tmp_path, "a/1.png", "b/1.png")
    (tmp_path / "a/metadata.jsonl").write_text('{"file_name": "1.png"}\n')
    assert open_source(str(tmp_path)).notes[1:] == [
        "left out 1 of 2 pictures, which no metadata file names: 1 .png (b/1.png)"
    ]


def test_one_folder_reached_twice_is_read_once(tmp_path):
    write_files(tmp_path, "cat/1.png")
    (tmp_path / "best").symlink_to(tmp_path / "cat")
    listing = list_folder(str(tmp_path))
    assert listing.files == {"imagefolder": ["best/1.png"]}  # the first by name, whatever the disk's order
    assert listing.notes == ["left out links to folders that are read already (1): 1 without extension (cat)"]


@pytest.mark.parametrize(
    ("source", "output_dir", "refused"),
    [
        ("proj", "proj/runs/one", True),
        ("proj", "proj", True),
        ("proj/photos", "proj/photos/new", True),
        ("proj/link", "proj/photos/new", True),  # link -> photos
        ("linked", "proj/photos/new", True),  # linked/photos -> proj/photos
        ("proj/photos", "proj/link", True),
        ("proj/runs/one/samples", "proj/runs/one", True),
        ("proj/photos", "proj/runs/one", False),
        ("proj/photos", "proj/photos2", False),
        ("proj/photos", "proj", False),
        ("proj", "proj/.runs/one", False),  # hidden folders are not read
        ("proj/photos/*.parquet", "proj/photos/run", False),
    ],
)
def test_output_among_the_pictures_is_refused(tmp_path, source, output_dir, refused):
    write_files(tmp_path, "proj/photos/a.png", "proj/runs/one/samples/1.png", "linked/b.png")
    (tmp_path / "proj/link").symlink_to("photos")
    (tmp_path / "linked/photos").symlink_to(tmp_path / "proj/photos")
    if source.endswith(".parquet"):
        pq.write_table(pa.table({"image": [png()]}), tmp_path / "proj/photos/x.parquet")
    if refused:
        assert problem(tmp_path / source, tmp_path / output_dir).startswith(
            f"output_dir: found {tmp_path}/{output_dir}"
        )
    else:
        open_source(str(tmp_path / source), str(tmp_path / output_dir))


def test_output_among_the_pictures_is_refused_before_anything_is_written(tmp_path):
    pictures = write_pictures(tmp_path / "proj", 4)
    config = write_config(tmp_path / "config.yaml", tiny_config(pictures, pictures / "runs/one"))
    outcome = run("--config", config, folder=tmp_path / "out")
    assert (outcome.returncode, len(outcome.errors)) == (2, 1)
    assert outcome.error.startswith(f"output_dir: found {pictures}/runs/one, which is inside data.source {pictures}")
    assert sorted(os.listdir(pictures)) == ["0000.png", "0001.png", "0002.png", "0003.png"]


def test_the_plan_prints_what_was_left_out(tmp_path):
    pictures = write_pictures(tmp_path / "pictures", 24)
    write_files(pictures, "x.heic")
    for number in range(22):
        (pictures / f"bad{number:02}.png").write_bytes(b"")
    options = {"data__on_bad_image": "skip", "data__validation_fraction": 0.1}
    config = write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run", **options))
    printed = finish("--config", config, "--check", folder=tmp_path / "out").stdout.splitlines()
    printed = [line.removeprefix("  pictures").strip() for line in printed]
    start = printed.index("found 46 pictures: 46 .png")
    assert printed[start + 1 : start + 4] == [
        f"{CONVERT} (1): 1 .heic (x.heic)",
        "left out 22 of 46 images of 'train', which are bad (on_bad_image: skip):",
        "bad00.png: is empty (0 bytes)",
    ]
    assert printed[start + 22 : start + 24] == ["bad19.png: is empty (0 bytes)", "and 2 more"]
    assert printed.count("found 46 pictures: 46 .png") == 1
