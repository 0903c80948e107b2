"""Shards behind a URL: read as local ones are, fetched once, and each failure one line."""

import errno
import os
import shutil
from functools import partial
from pathlib import Path

import datasets
import fsspec
import pytest

from finetune.config.inputs import DataConfig
from finetune.core.errors import UserError
from finetune.core.kind import ImageFormat
from finetune.data import fetching, remote
from finetune.data.loading import load_data
from harness.configs import png, tiny_config, write_config
from harness.faults import kill_at, skip_the_export
from harness.folders import tar
from harness.processes import finish, run, run_two
from harness.remote import Far, fetches, register, write_shard, write_shards


@pytest.fixture(autouse=True)
def far(tmp_path, monkeypatch):
    """`far://` is known and logged, and the cache is empty."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    register(tmp_path / "log")
    yield tmp_path / "log"
    register()


def load(source, **options):
    return load_data(DataConfig(source=str(source), validation_fraction=0, **options), ImageFormat(1, 8), 0)[0]


def failure(source, **options):
    with pytest.raises(UserError) as raised:
        load(source, **options)
    (problem,) = raised.value.problems
    return problem


@pytest.mark.parametrize("ending", ["", "/", "/*.parquet"])
def test_a_folder_or_a_pattern_of_shards_is_read_as_the_same_files_here(tmp_path, ending):
    shards = write_shards(tmp_path / "shards", 3)
    images = load(f"far://{shards}{ending}")
    assert len(images) == 12
    assert images.fingerprint == load(shards).fingerprint
    assert "found 3 .parquet: 3 in train" in images.notes


def test_a_single_shard_and_tar_files(tmp_path):
    shards = write_shards(tmp_path / "shards", 2)
    assert load(f"far://{shards}/1.parquet").fingerprint == load(shards / "1.parquet").fingerprint
    archive = tar(tmp_path / "a.tar", {f"{number}.png": png(seed=number) for number in range(3)})
    assert load(f"far://{archive}").fingerprint == load(archive).fingerprint


def test_memory_is_a_file_system_too(tmp_path):
    shards = write_shards(tmp_path / "shards", 2)
    fsspec.filesystem("memory").put(str(shards), "/bucket", recursive=True)
    assert load("memory://bucket").fingerprint == load(shards).fingerprint


def test_splits_are_read_from_names_and_other_files_are_noted(tmp_path):
    for name, seeds in (("train-0.parquet", range(3)), ("train-1.parquet", range(3, 6)), ("test-0.parquet", [9, 8])):
        (tmp_path / "shards").mkdir(exist_ok=True)
        write_shard(tmp_path / "shards" / name, seeds)
    (tmp_path / "shards/README.md").write_text("words")
    images = load(f"far://{tmp_path}/shards")
    assert len(images) == 6
    assert len(load(f"far://{tmp_path}/shards", split="test")) == 2
    assert any("left out 1 other file" in note and ".md" in note for note in images.notes)


def test_shards_are_fetched_once_and_again_when_they_change(tmp_path, far):
    shards = write_shards(tmp_path / "shards", 3)
    before = load(f"far://{shards}")
    assert fetches(far) == ["0.parquet", "1.parquet", "2.parquet"]
    load(f"far://{shards}")
    assert len(fetches(far)) == 3
    write_shard(shards / "1.parquet", range(50, 54))
    after = load(f"far://{shards}")
    assert fetches(far) == ["0.parquet", "1.parquet", "1.parquet", "2.parquet"]
    assert after.fingerprint == load(shards).fingerprint != before.fingerprint


def test_a_damaged_copy_is_fetched_again(tmp_path, far):
    shards = write_shards(tmp_path / "shards", 2)
    url = f"far://{shards}"
    found, _ = remote.list_shards(url)
    fetching.fetch(url, found)
    os.truncate(found[1].path, 5)
    assert load(url).fingerprint == load(shards).fingerprint
    assert fetches(far) == ["0.parquet", "1.parquet", "1.parquet"]


# --- a run


def config(tmp_path, shards):
    made = tiny_config(shards, tmp_path / "run", data__source=f"far://{shards}", training__max_train_steps=1)
    return write_config(tmp_path / "config.yaml", made)


def own_cache(tmp_path, *_):
    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    register(tmp_path / "log")
    skip_the_export()


@pytest.mark.parametrize(("owner", "name", "call"), [
    (fetching._Progress, "relative_update", 2),  # half of the first shard
    (fetching._Progress, "relative_update", 40),
    (os, "replace", 1),
    (os, "replace", 3),
])  # fmt: skip
def test_a_killed_run_fetches_only_what_is_not_complete(tmp_path, far, monkeypatch, owner, name, call):
    shards = write_shards(tmp_path / "shards", 4)

    def before():
        own_cache(tmp_path)
        fetching.STREAMS = 1
        kill_at(owner, name, call)

    arguments = ("--config", config(tmp_path, shards))
    assert run(*arguments, folder=tmp_path, before=before).returncode == -9
    complete = {path.name for path in (tmp_path / "cache/shards").glob("*/*.parquet")}
    assert len(complete) < 4
    far.unlink()
    finish(*arguments, folder=tmp_path, before=partial(own_cache, tmp_path))
    assert fetches(far) == sorted({"0.parquet", "1.parquet", "2.parquet", "3.parquet"} - complete)
    for path in (tmp_path / "cache/shards").glob("*/*.parquet"):
        assert path.read_bytes() == (shards / path.name).read_bytes()
    assert not list((tmp_path / "cache/shards").glob("*/tmp*"))


@pytest.mark.slow
def test_processes_share_the_fetching(tmp_path, far):
    shards = write_shards(tmp_path / "shards", 6)
    outcomes = run_two("--config", config(tmp_path, shards), folder=tmp_path, before=partial(own_cache, tmp_path))
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes
    assert fetches(far) == [f"{number}.parquet" for number in range(6)]
    by_process = [line.split()[0] for line in far.read_text().splitlines()]
    assert sorted(map(by_process.count, {*by_process})) == [3, 3]
    assert "Fetching 3 shards" in outcomes[0].stderr


# --- failures


def test_a_missing_back_end_is_named():
    fsspec.register_implementation(
        "nowhere", "package_that_is_not.X", errtxt="Install nowherefs to access", clobber=True
    )
    found = failure("nowhere://bucket/x.parquet")
    assert found.startswith("data.source: nowhere://bucket/x.parquet: ")
    assert "Install nowherefs" in found
    assert "pip install" in found


def test_a_protocol_that_does_not_exist():
    assert "expected one that fsspec knows" in failure("nosuch://bucket/x.parquet")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("memory://none/x.parquet", "{}: found nothing there, or it cannot be reached ("),
        ("far:///none/x.parquet", "{}: found nothing there, or it cannot be reached ("),
        ("far:///none", "found nothing at {}; expected .arrow, .parquet, .tar files"),
    ],
)
def test_a_shard_that_is_not_there(url, problem):
    assert failure(url).startswith(f"data.source: {problem.format(url)}")


def test_a_folder_without_shards(tmp_path):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/a.png").write_bytes(png())
    found = failure(f"far://{tmp_path}/shards")
    assert "found 1 .png" in found
    assert "expected .arrow, .parquet, .tar files" in found


def test_shards_of_two_kinds(tmp_path):
    shards = write_shards(tmp_path / "shards", 1)
    tar(shards / "a.tar", {"a.png": png()})
    assert "expected files of one kind" in failure(f"far://{shards}")


class CredentialsError(Exception):
    pass


@pytest.mark.parametrize(("error", "expected"), [
    (PermissionError("Forbidden"), "no access"),
    (OSError(errno.ENOSPC, "No space left on device"), "set HF_DATASETS_CACHE"),
    (CredentialsError("Unable to locate"), "AWS_ACCESS_KEY_ID"),
    (ConnectionError("refused"), "check the address and the network"),
    (TimeoutError(), "check the address and the network"),
    (FileNotFoundError("gone"), "found nothing there"),
])  # fmt: skip
@pytest.mark.parametrize("where", ["info", "get_file"])
def test_what_a_back_end_raises_is_one_line(tmp_path, monkeypatch, error, expected, where):
    shards = write_shards(tmp_path / "shards", 1)

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Far, where, fail)
    assert expected in failure(f"far://{shards}/0.parquet")
    assert not list((tmp_path / "cache/shards").glob("*/*.parquet"))


def test_a_shard_that_is_cut_off(tmp_path, monkeypatch):
    shards = write_shards(tmp_path / "shards", 2)

    def cut(self, address, half, callback):
        shutil.copyfile(address, half)
        os.truncate(half, 10)

    monkeypatch.setattr(Far, "get_file", cut)
    assert "was cut off: found 10 bytes, expected" in failure(f"far://{shards}")
    assert not list((tmp_path / "cache/shards").glob("*/*.parquet"))


def test_a_shard_that_changes_while_it_is_read(tmp_path, monkeypatch):
    shards, get = write_shards(tmp_path / "shards", 1), Far.get_file

    def change(self, address, half, callback):
        get(self, address, half, callback)
        os.utime(address, (1, 1))

    monkeypatch.setattr(Far, "get_file", change)
    assert "changed while it was read" in failure(f"far://{shards}")
    assert not list((tmp_path / "cache/shards").glob("*/*.parquet"))


def test_no_room_is_found_before_anything_is_fetched(tmp_path, far, monkeypatch):
    shards = write_shards(tmp_path / "shards", 2)
    needed = sum(path.stat().st_size for path in shards.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, needed - 1))
    assert f"found {needed - 1:,} bytes free" in failure(f"far://{shards}")
    assert fetches(far) == []


def test_secrets_in_a_url_are_not_printed():
    fsspec.register_implementation(
        "nowhere", "package_that_is_not.X", errtxt="Install nowherefs to access", clobber=True
    )
    for url in ("nowhere://user:secret@host/x.parquet", "nowhere://host/x.parquet?signature=secret"):
        assert "secret" not in failure(url)


# --- over HTTP


def test_shards_are_read_over_http(tmp_path):
    pytest.importorskip("aiohttp")
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Handler(SimpleHTTPRequestHandler):
        asked: list = []  # noqa: RUF012

        def log_message(self, *_):
            self.asked.append(self.requestline)

    shards = write_shards(tmp_path / "shards", 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/shards"
    try:
        assert load(f"{url}/1.parquet?signature=x").fingerprint == load(shards / "1.parquet").fingerprint
        assert load(f"{url}/").fingerprint == load(f"{url}/*.parquet").fingerprint == load(shards).fingerprint
        assert "found nothing there" in failure(f"{url}/2.parquet")
    finally:
        server.shutdown()
        server.server_close()
    assert Path(load(shards / "0.parquet").table.cache_files[0]["filename"]).exists()
    assert "check the address and the network" in failure(f"{url}/0.parquet")
