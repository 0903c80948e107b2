"""A file system of another machine, as the tests have it: a folder behind the URL `far://`, read block by block."""

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from harness.configs import png


class Far(LocalFileSystem):
    """Local files, fetched as from another machine, with a log of (process, file) for each that is asked for."""

    protocol = "far"
    blocksize = 100  # bytes, so that a fetch has many blocks
    log = os.devnull

    def get_file(self, rpath, lpath, callback, **options):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {os.path.basename(rpath)}\n")
        AbstractFileSystem.get_file(self, rpath, lpath, callback=callback, **options)


def register(log: Path | None = None) -> None:
    """Have fsspec know `far://`."""
    fsspec.register_implementation("far", Far, clobber=True)
    Far.log = str(log or os.devnull)
    Far.clear_instance_cache()


def fetches(log: Path) -> list[str]:
    """The files that were asked for, sorted."""
    return sorted(line.split()[1] for line in log.read_text().splitlines()) if log.exists() else []


def write_shards(folder: Path, count: int, rows: int = 4) -> Path:
    """Parquet files of different pictures, named 0.parquet and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(count):
        write_shard(folder / f"{shard}.parquet", range(shard * rows, (shard + 1) * rows))
    return folder


def write_shard(file: Path, seeds) -> None:
    features = {"image": [{"bytes": png(seed=seed), "path": None} for seed in seeds]}
    pq.write_table(pa.table(features), file)
