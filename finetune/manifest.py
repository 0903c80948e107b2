"""A manifest beside a folder's files: their sizes and checksums, by which the folder is whole or does not count."""

import json
import os
from pathlib import Path

import xxhash

MANIFEST = "manifest.json"


def seal(folder: Path, step: int) -> None:
    """Sync a folder's files to disk, and then the manifest that lists them."""
    files = {}
    for file in sorted(folder.iterdir()):
        files[file.name] = {"bytes": file.stat().st_size, "xxh3_128": _checksum(file)}
        sync(file)
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=2), encoding="utf-8")
    sync(manifest)
    sync(folder)


def flaw(folder: Path) -> str | None:
    """Why a folder cannot be trusted, in a few words; None where each file is as its manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, expected in files.items():
            file = folder / Path(name).name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, {expected['bytes']} were written"
            if _checksum(file) != expected["xxh3_128"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    unlisted = {file.name for file in folder.iterdir()} - {*files, MANIFEST}
    return f"{min(unlisted)} is not in its {MANIFEST}" if unlisted else None


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(file, "rb") as content:
        while chunk := content.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
