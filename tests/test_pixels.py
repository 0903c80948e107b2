import hashlib
import os
import pickle
from functools import partial

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune import pixels
from finetune.pixels import FEATURES, Images, decoded, error_row, pixel_row


def table(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


def images(*arrays: np.ndarray, **options) -> Images:
    rows = [pixel_row(array) for array in arrays]
    return Images(table(rows), np.arange(len(rows)), arrays[0].shape[2], min(arrays[0].shape[:2]), **options)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=50, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=6), st.sampled_from([1, 3, 4]), st.integers(1, 6), st.data())
def test_what_was_written_is_read_whatever_the_batches(shapes, channels, batch, data):
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (*shape, channels), dtype=np.uint8) for shape in shapes]
    whole = table([pixel_row(array) for array in arrays])
    parts = [whole.select(range(start, min(start + batch, len(whole)))) for start in range(0, len(whole), batch)]
    read = Images(datasets.concatenate_datasets(parts), np.arange(len(whole)), channels, 1)
    for index in data.draw(st.permutations(range(len(arrays)))):
        assert (read.pixels(index) == arrays[index]).all()
        assert read.pixels(index).shape == arrays[index].shape


def test_pixels_are_views_of_the_file_and_cannot_be_changed(tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    with datasets.arrow_writer.ArrowWriter(path=str(tmp_path / "x.arrow"), features=FEATURES) as writer:
        writer.write(pixel_row(array))
        writer.finalize()
    view = Images(datasets.Dataset.from_file(str(tmp_path / "x.arrow")), np.arange(1), 3, 2).pixels(0)
    assert (view == array).all()
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_an_item_is_the_middle_square():
    wide = np.arange(2 * 6, dtype=np.uint8).reshape(2, 6, 1)
    (item,) = images(wide)
    assert (item == wide[:, 2:4]).all()


def test_a_selection_is_a_view_with_its_own_labels_and_order():
    arrays = [np.full((2, 2, 1), value, np.uint8) for value in (10, 20, 30)]
    whole = images(*arrays, labels=np.array([7, 8, 9]), label_names=None, skipped=["x: y"])
    part = whole.select(np.array([2, 0]))
    assert [item[0, 0, 0] for item in part] == [30, 10]
    assert part.labels.tolist() == [9, 7]
    assert part.table is whole.table
    assert part.skipped == ["x: y"]
    assert [item[0, 0, 0] for item in part.select(np.array([1]))] == [10]


def test_the_fingerprint_knows_pixels_shapes_order_and_labels_and_nothing_else():
    a, b = np.arange(12, dtype=np.uint8).reshape(2, 6, 1), np.ones((2, 2, 1), np.uint8)
    same = [images(a, b).fingerprint, images(b, a).select(np.array([1, 0])).fingerprint]
    same.append(images(a, b, skipped=["c: bad"]).fingerprint)
    other = [images(b, a), images(a), images(a, b, b), images(a + 1, b), images(a.reshape(6, 2, 1), b)]
    other += [images(a, b, labels=np.array(labels)) for labels in ([0, 1], [1, 0])]
    other += [images(a, b, labels=np.array([0, 1]), label_names=["x", "y"])]
    prints = [entry.fingerprint for entry in other]
    assert len({*same}) == 1
    assert len({*same, *prints}) == 1 + len(prints)
    # Stored with each run: by this formula for good.
    rows = (repr(array.shape).encode() + array.transpose(2, 0, 1).tobytes() for array in (a, b))
    checksums = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    assert same[0] == hashlib.blake2b(checksums, digest_size=16).hexdigest()


def test_images_go_to_other_processes_as_paths(tmp_path):
    path = str(tmp_path / "x.arrow")
    source = datasets.Dataset.from_dict({"image": [{"bytes": b"\0" * 90_000, "path": None}] * 20})
    source.map(echo, input_columns=["image"], remove_columns=["image"], features=FEATURES, cache_file_name=path)
    whole = Images(datasets.Dataset.from_file(path), np.arange(20), 1, 300)
    sent = pickle.dumps(whole)
    assert len(sent) < 10_000
    assert (pickle.loads(sent).pixels(3) == whole.pixels(3)).all()
    assert pickle.loads(sent).fingerprint == whole.fingerprint


def echo(image: dict | None, log: str = os.devnull, mended: str = "") -> dict:
    """A row whose pixels are the bytes themselves; `bad` is an error until the file `mended` exists."""
    with open(log, "a") as file:
        file.write(f"{os.getpid()} {image}\n")
    if image["bytes"] == b"bad" and not os.path.exists(mended):
        return error_row("is bad")
    return pixel_row(np.frombuffer(image["bytes"], np.uint8).reshape(1, -1, 1))


class Decoding:
    """A dataset of a few rows, each with its number as its only pixel, and a count of what is decoded."""

    def __init__(self, root, rows: list[bytes]):
        self.log, self.mended = str(root / "log"), str(root / "mended")
        self.source = datasets.Dataset.from_dict({"image": [{"bytes": row, "path": None} for row in rows]})

    def __call__(self, rows=None, identity: str = "", size: int = 1) -> list:
        """(pixel or error of each row, how many were decoded)"""
        open(self.log, "w").close()
        rows = np.arange(len(self.source)) if rows is None else np.array(rows)
        decode = partial(echo, log=self.log, mended=self.mended)
        table = decoded(self.source, "image", rows, decode, identity, size)
        return [row["error"] or row["pixels"] for row in table], len(self.lines())

    def lines(self) -> list[str]:
        return open(self.log).read().splitlines()


def test_rows_are_decoded_once(tmp_path):
    decoding = Decoding(tmp_path, [b"a", b"b", b"c"])
    assert decoding() == ([b"a", b"b", b"c"], 3)
    assert decoding() == ([b"a", b"b", b"c"], 0)
    assert decoding([2, 0]) == ([b"c", b"a"], 2)
    assert decoding([2, 0]) == ([b"c", b"a"], 0)
    assert decoding(identity="other") == ([b"a", b"b", b"c"], 3)
    assert decoding(size=10**9) == ([b"a", b"b", b"c"], 0)


def test_the_cache_lies_with_the_datasets_and_has_no_rubbish(tmp_path):
    Decoding(tmp_path, [b"lies"])()
    files = os.listdir(os.path.join(datasets.config.HF_DATASETS_CACHE, "pixels"))
    assert files
    assert all(name.endswith(".arrow") for name in files)


def test_an_interrupted_run_goes_on_with_the_next_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "PIECE", 2)
    decoding = Decoding(tmp_path, [bytes([value]) for value in range(6)])

    def stop(image: dict) -> dict:
        if image["bytes"] == b"\3":
            raise KeyboardInterrupt
        return echo(image)

    with pytest.raises(KeyboardInterrupt):
        decoded(decoding.source, "image", np.arange(6), stop, "", 1)
    assert decoding() == ([bytes([value]) for value in range(6)], 4)  # 0 and 1 were saved


def test_every_core_decodes_what_is_worth_it_and_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    rows = [bytes([65 + value]) for value in range(7)]
    decoding = Decoding(tmp_path, rows)
    assert decoding() == (rows, 7)
    assert len({line.split()[0] for line in decoding.lines()}) == 2  # processes
    monkeypatch.undo()
    assert decoding() == (rows, 0)  # what two processes saved, one finds


@pytest.mark.parametrize(
    ("each", "count", "cores", "expected"),
    [
        # (2^20 + 2^15) bytes are 33 / 4096 of the 2^27 that are worth it: 124.1 such pictures.
        (2**20, 125, 8, 8),
        (2**20, 124, 8, None),
        (2**15, 2049, 8, 8),
        (200, 1797, 8, None),
        (2**26, 2, 8, 2),
        (2**28, 1, 1, None),
    ],
)
def test_processes_are_started_for_many_bytes(each, count, cores, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    monkeypatch.setattr(pixels, "_bytes", lambda *_: each)
    piece = datasets.Dataset.from_dict({"image": [{"bytes": b"", "path": None}] * count})
    assert pixels._processes(piece, "image") == expected


def test_encoded_bytes_are_counted_in_memory_and_on_disk(tmp_path):
    (tmp_path / "x").write_bytes(b"123")
    assert pixels._bytes(b"12", None) == 2
    assert pixels._bytes(None, str(tmp_path / "x")) == 3
    assert pixels._bytes(None, str(tmp_path / "y")) == pixels._bytes(None, None) == 0


def test_a_picture_that_was_mended_without_a_trace_is_decoded_again(tmp_path):
    """As by `chmod`, or a network disk that came back: neither name nor time of the file tells."""
    decoding = Decoding(tmp_path, [b"a", b"bad", b"c"])
    assert decoding() == ([b"a", "is bad", b"c"], 3 + 1)
    assert decoding() == ([b"a", "is bad", b"c"], 1)
    open(decoding.mended, "w").close()
    assert decoding() == ([b"a", b"bad", b"c"], 1 + 3)
    assert decoding() == ([b"a", b"bad", b"c"], 0)
