"""Entries that a store lacks, made in pieces: a piece is a file, and the work of one process."""

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from finetune.core.distributed import together
from finetune.core.errors import UserError
from finetune.core.groups import from_main_process, gathered, processes
from finetune.data.store import Store, writing

T = TypeVar("T")


class Piece(NamedTuple, Generic[T]):
    """Entries that become a file of their store: what each is made from, by key; `chunk` are encoded at once."""

    store: Store
    chunk: int
    entries: dict[bytes, T]


def pieces_of(store: Store, chunk: int, missing: Mapping[bytes, T]) -> Iterator[Piece[T]]:
    """What a store lacks, cut into pieces."""
    names = list(missing)
    for start in range(0, len(names), store.piece):
        yield Piece(store, chunk, {name: missing[name] for name in names[start : start + store.piece]})


class Share(NamedTuple):
    """Of what a cache lacks: this is process `number` of so many that see the same cache."""

    number: int
    processes: int


def find_share(cache: Path) -> Share:
    """Which processes see the same cache as this one: all of them, or those of its host. Called by all processes.

    The first that makes a file in a cache speaks for those that find it made. A file of this moment: a folder that was
    copied from another host looks the same in all else.

    Raises:
        UserError: on all processes, if the cache cannot be written.
    """
    own, count = processes().process_index, processes().num_processes
    if count == 1:
        return Share(0, 1)
    token = cache / f".shared-{from_main_process(uuid.uuid4().hex)}"
    together(lambda: _make_token(token, own))
    try:
        caches = gathered(together(lambda: _read_token(token)))
    finally:
        token.unlink(missing_ok=True)
    sharing = [process for process, seen in enumerate(caches) if seen == caches[own]]
    return Share(sharing.index(own), len(sharing))


def _make_token(token: Path, process: int) -> None:
    with writing(token.parent):
        token.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError), open(token, "x") as file:
            file.write(str(process))


def _read_token(token: Path) -> str:
    with writing(token.parent):
        return token.read_text()


def make_pieces(
    share: Share, pieces: Sequence[Piece[T]], encode: Callable[[Sequence[T]], dict[str, torch.Tensor]], title: str
) -> None:
    """Encode this process's share of the pieces, and write each when it is complete.

    Args:
        pieces: the same on all processes that see the same cache.
        encode: maps `chunk` entries to tensors with a row for each; the last, shorter chunk is padded.
        title: of the progress bar.

    Raises:
        UserError: if what is encoded is not finite, or cannot be written.
    """
    mine = pieces[share.number :: share.processes]
    shown = processes().is_main_process and bool(mine)
    total = sum(len(piece.entries) for piece in mine)
    with tqdm(total=total, desc=title, unit="", disable=not shown, dynamic_ncols=True) as bar:
        for store, chunk, entries in mine:
            made: list[dict[str, torch.Tensor]] = []
            sources = list(entries.values())
            for start in range(0, len(sources), chunk):
                given = sources[start : start + chunk]
                padded = given + given[:1] * (chunk - len(given))
                encoded = {name: tensor[: len(given)] for name, tensor in encode(padded).items()}
                _check_finite(encoded, title)
                made.append(encoded)
                bar.update(len(given))
            store.write(list(entries), {name: torch.cat([one[name] for one in made]) for name in store.fields})


def _check_finite(encoded: dict[str, torch.Tensor], title: str) -> None:
    for name, tensor in encoded.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"model.pretrained: found {name} that is not finite ({title.lower()}); expected encoders whose weights "
                "are finite"
            )
