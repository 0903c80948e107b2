"""The cache of decoded pictures: each decoded once, whatever interrupts, damages or repeats a run."""

import glob
import multiprocessing
import os
import shutil
import threading
import time
from functools import partial

import datasets
import numpy as np
import pytest

from finetune.data.cache import decoded
from finetune.data.pixels import FEATURES, error_row, pixel_row


def echo(image: dict | None, log: str = os.devnull, repaired: str = "") -> dict:
    """A row whose pixels are the bytes themselves; `bad` is an error until the file `repaired` exists."""
    with open(log, "a") as file:
        file.write(f"{image}\n")
    if image["bytes"] == b"bad" and not os.path.exists(repaired):
        return error_row("is bad")
    return pixel_row(np.frombuffer(image["bytes"], np.uint8).reshape(1, -1, 1))


class Decoding:
    """A dataset of a few rows, each with its number as its only pixel, and a count of what is decoded."""

    def __init__(self, root, rows: list[bytes]):
        self.root, self.log, self.repaired = str(root), str(root / "log"), str(root / "repaired")
        self.source = datasets.Dataset.from_dict({"image": [{"bytes": row, "path": None} for row in rows]})

    def __call__(self, rows=None, identity: str = "", size: int = 1) -> list:
        """(pixel or error of each row, how many were decoded)"""
        open(self.log, "w").close()
        rows = np.arange(len(self.source)) if rows is None else np.array(rows)
        decode = partial(echo, log=self.log, repaired=self.repaired)
        table = decoded(self.source, "image", rows, decode, FEATURES, self.root + identity, size)
        return [row["error"] or row["pixels"] for row in table], len(self.lines())

    def slowly(self) -> None:
        def decode(image: dict) -> dict:
            time.sleep(0.2)
            return echo(image, self.log)

        decoded(self.source, "image", np.arange(len(self.source)), decode, FEATURES, self.root, 1)

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


def rubbish() -> list[str]:
    """What lies in the cache beside whole files."""
    found = glob.glob(os.path.join(datasets.config.HF_DATASETS_CACHE, "pixels", "**"), recursive=True)
    return [file for file in found if os.path.isfile(file) and not file.endswith((".arrow", "/lock"))]


def cached(decoding: Decoding) -> str:
    """The only file that decoding everything adds to the cache."""
    pattern = os.path.join(datasets.config.HF_DATASETS_CACHE, "pixels", "*", "*.arrow")
    before = set(glob.glob(pattern))
    decoding()
    (added,) = set(glob.glob(pattern)) - before
    return added


def test_a_full_disk_leaves_no_unfinished_file(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    decoding = Decoding(tmp_path, [b"full"])
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", fail)
    with pytest.raises(OSError, match="No space left"):
        decoding()
    monkeypatch.undo()
    assert rubbish() == []
    assert decoding() == ([b"full"], 1)


def test_what_a_killed_process_left_makes_room_first(tmp_path):
    decoding = Decoding(tmp_path, [b"kept", b"swept"])
    left = os.path.join(os.path.dirname(cached(decoding)), "tmpabcdef")
    open(left, "w").close()
    assert rubbish() == [left]
    seen = []

    def decode(image: dict) -> dict:
        seen.append(os.path.exists(left))
        return echo(image)

    decoded(decoding.source, "image", np.array([1]), decode, FEATURES, decoding.root, 1)
    assert seen == [False]
    assert rubbish() == []


@pytest.mark.parametrize("length", [0, 100, 500, -300, -8])
def test_a_damaged_file_is_made_again(tmp_path, length):
    """Cut anywhere; without its last 8 bytes, the mark of its end, arrow reads it as if it were whole."""
    rows = [bytes([65 + value]) * 100 for value in range(9)]
    decoding = Decoding(tmp_path, rows)
    path = cached(decoding)
    os.truncate(path, length % os.path.getsize(path))
    assert decoding() == (rows, 0 if length == -8 else 9)
    assert decoding() == (rows, 0)


def test_a_file_with_too_few_rows_is_made_again(tmp_path):
    rows = [bytes([75 + value]) for value in range(4)]
    decoding = Decoding(tmp_path, rows)
    path = cached(decoding)
    shutil.copy(cached(Decoding(tmp_path, rows[:3])), path)
    assert decoding() == (rows, 4)


def test_two_runs_at_once_decode_once(tmp_path):
    decoding = Decoding(tmp_path, [bytes([85 + value]) for value in range(3)])
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=decoding.slowly) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(decoding.lines()) == 3


def test_an_interrupted_run_continues_with_the_next_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("finetune.data.cache.PIECE", 2)
    decoding = Decoding(tmp_path, [bytes([value]) for value in range(6)])

    def stop(image: dict) -> dict:
        if image["bytes"] == b"\3":
            raise KeyboardInterrupt
        return echo(image)

    with pytest.raises(KeyboardInterrupt):
        decoded(decoding.source, "image", np.arange(6), stop, FEATURES, decoding.root, 1)
    assert decoding() == ([bytes([value]) for value in range(6)], 4)  # 0 and 1 were saved


def test_every_core_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    together = threading.Barrier(3, timeout=10)  # opens when three pictures are being decoded at once

    def wait(image: dict) -> dict:
        together.wait()
        return echo(image)

    source = Decoding(tmp_path, [bytes([65 + value]) for value in range(6)]).source
    table = decoded(source, "image", np.arange(6), wait, FEATURES, str(tmp_path), 1)
    assert table["pixels"][:] == [b"A", b"B", b"C", b"D", b"E", b"F"]


def test_a_picture_that_was_repaired_without_a_new_time_or_size_is_decoded_again(tmp_path):
    """As by `chmod`, or a network disk that came back: neither name nor time of the file tells."""
    decoding = Decoding(tmp_path, [b"a", b"bad", b"c"])
    assert decoding() == ([b"a", "is bad", b"c"], 3 + 1)
    assert decoding() == ([b"a", "is bad", b"c"], 1)
    open(decoding.repaired, "w").close()
    assert decoding() == ([b"a", b"bad", b"c"], 1 + 3)
    assert decoding() == ([b"a", b"bad", b"c"], 0)
