"""A manifest of a folder's files, with sizes and checksums, used to verify the folder."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import xxhash

MANIFEST = "manifest.json"


def describe(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Sync these files of a folder to disk, and return what the manifest says of them."""
    files = {}
    for name in sorted(names):
        file = folder / name
        files[name] = {"bytes": file.stat().st_size, "xxh3_128": checksum(file)}
        sync(file)
    return files


def seal(folder: Path, step: int, names: Iterable[str], described: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Sync these files of a folder to disk, then write and sync the manifest that lists them.

    Args:
        described: entries that other processes made for their own files.
    """
    files = {**describe(folder, names), **described}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
    sync(manifest)
    sync(folder)


def read(folder: Path) -> dict[str, Any]:
    """The manifest: `step`, and `files` with size and checksum by name."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def flaw(folder: Path, is_loaded: Callable[[str], Any], lacks: Callable[[Iterable[str]], Iterable[str]]) -> str | None:
    """Why a folder is not valid, in a few words; None if every file that is loaded matches the manifest.

    Args:
        is_loaded: whether a file of this name is ever loaded; other files are ignored, listed or not.
        lacks: the names that a manifest should list and does not, by those that it lists.
    """
    try:
        manifest = read(folder)
        files, _ = manifest["files"], int(manifest["step"])
        for name in lacks(files):
            return f"{name} is not in its {MANIFEST}"
        for name, expected in files.items():
            if not is_loaded(name):
                continue
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            try:
                found = checksum(file)
            except OSError as error:
                return f"{name} cannot be read ({error.strerror})"
            if found != expected["xxh3_128"]:
                return f"{name} has another checksum than when it was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    return None


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
