"""Entries that a store lacks, made in pieces: a piece is a file, and the work of one process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from tqdm import tqdm

from finetune.core.errors import UserError
from finetune.data.store import Store

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


def make_pieces(
    accelerator: Accelerator,
    pieces: Sequence[Piece[T]],
    encode: Callable[[Sequence[T]], dict[str, torch.Tensor]],
    title: str,
) -> None:
    """Encode this process's share of the pieces, and write each when it is complete.

    Args:
        encode: maps `chunk` entries to tensors with a row for each; the last, shorter chunk is padded.
        title: of the progress bar.

    Raises:
        UserError: if what is encoded is not finite, or cannot be written.
    """
    mine = pieces[accelerator.process_index :: accelerator.num_processes]
    shown = accelerator.is_main_process and bool(mine)
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
