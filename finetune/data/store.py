"""Entries made once and kept on disk: tensors by key, in files that are complete or not there.

A key is a hash of everything that an entry was made from. Folder: HF_DATASETS_CACHE/encodings/<what made them>/, with
pieces `<hash of their keys>.safetensors`. Nobody ever changes a piece, so any number of processes and runs can write.
"""

import hashlib
import os
import uuid
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from finetune.core import files
from finetune.core.errors import UserError
from finetune.core.files import LARGER_CACHE, permit
from finetune.core.kind import Fields

FORMAT = 1  # bump it when what is stored changes
PIECE_BYTES = 2**26
_OPEN = 64  # files that are mapped at a time, each with a descriptor
_ABANDONED = 24 * 3600.0  # seconds after which nobody still writes a piece, which is one write of 64 MB


def key(text: str) -> bytes:
    """16 bytes that stand for a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def writing(folder: Path) -> AbstractContextManager[None]:
    """Turn a failure to write a folder of the cache into one line that names it; raises UserError."""
    advice = f"free some space, {LARGER_CACHE}, and run the same command again: what is encoded stays"
    return files.writing(folder, "encodings: ", advice)


class Store:
    """Entries of one kind; each has the same tensors in float32.

    Can be forked and pickled (to spawned workers): paths are sent, not tensors.

    Attributes:
        places: the piece and the row of each entry that was there when the store was opened, by key.
    """

    def __init__(self, identity: object, fields: Fields):
        """Find out what is there.

        Args:
            identity: of what makes the entries; another one is another folder.
            fields: the tensors of an entry, with their shapes.

        Raises:
            UserError: if a piece may not be read, as in the cache of another user.
        """
        self.fields = fields
        named = hashlib.blake2b(repr((FORMAT, identity, sorted(fields.items()))).encode(), digest_size=8).hexdigest()
        self.folder = Path(datasets.config.HF_DATASETS_CACHE, "encodings", named)
        self.places = self._scan()
        self._opened: OrderedDict[str, Any] = OrderedDict()

    @property
    def entry_bytes(self) -> int:
        return sum(4 * int(np.prod(shape)) for shape in self.fields.values())

    @property
    def piece(self) -> int:
        """Entries in a file; at most this many are made again after an interruption."""
        return max(min(PIECE_BYTES // self.entry_bytes, 4096), 1)

    def _scan(self) -> dict[bytes, tuple[str, int]]:
        """Where each entry is. A damaged piece is deleted, and its entries are made again."""
        places: dict[bytes, tuple[str, int]] = {}
        for file in sorted(self.folder.glob("*.safetensors")):
            try:
                with safe_open(file, "np") as opened:
                    keys = opened.get_tensor("keys")
                    shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in self.fields}
                if shapes != {name: (len(keys), *shape) for name, shape in self.fields.items()}:
                    raise ValueError
            except (SafetensorError, ValueError, KeyError):
                file.unlink(missing_ok=True)
                continue
            except FileNotFoundError:  # another run found it damaged
                continue
            except OSError as error:
                raise UserError(
                    f"encodings: {file}: cannot be read ({error.strerror or error}); let it be read, or set "
                    "HF_DATASETS_CACHE to a folder of your own"
                ) from error
            for row, name in enumerate(keys):
                places[name.tobytes()] = file.name, row
        return places

    def write(self, keys: Sequence[bytes], entries: Mapping[str, torch.Tensor]) -> None:
        """Add a piece, atomically.

        Raises:
            UserError: if it cannot be written.
        """
        file = self.folder / f"{hashlib.blake2b(b''.join(keys), digest_size=8).hexdigest()}.safetensors"
        partial = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
        table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), -1)
        with writing(self.folder):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial.touch()
                self._remove_leftovers(partial.stat().st_mtime)
                tensors = {name: entries[name].contiguous() for name in self.fields}
                save_file({"keys": torch.from_numpy(table.copy()), **tensors}, partial)
                permit([partial])
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)

    def _remove_leftovers(self, now: float) -> None:
        """Delete what killed processes left half-written, safetensors' own temporary files among it.

        By age: whether a process lives cannot be seen from another host or container that shares the cache.

        Args:
            now: by the clock of the disk, which may be that of another machine.
        """
        for leftover in self.folder.glob(".*"):
            with suppress(OSError):  # finished or deleted meanwhile, or another user's
                if now - leftover.stat().st_mtime > _ABANDONED:
                    leftover.unlink()

    def read(self, name: bytes) -> dict[str, torch.Tensor]:
        """The tensors of an entry, copied from mapped files."""
        piece, row = self.places[name]
        if piece not in self._opened:
            if len(self._opened) >= _OPEN:
                self._opened.popitem(last=False)
            self._opened[piece] = safe_open(self.folder / piece, "pt")
        self._opened.move_to_end(piece)
        opened = self._opened[piece]
        return {field: opened.get_slice(field)[row] for field in self.fields}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_opened": OrderedDict()}
