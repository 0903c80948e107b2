"""Folders and archives as users have them."""

import io
import tarfile
from pathlib import Path

from finetune.data.listing import READERS
from harness.configs import png

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 132735\n"


def write_files(root: Path, *files: str) -> Path:
    """Empty files, but pictures where the name is a picture's."""
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png() if path.suffix.lower() in READERS else b"")
    return root


def tar(path: Path, files: dict[str, bytes]) -> str:
    """A tar archive of files; returns its path."""
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)
