"""The checkpoints in a run's output folder: which one to resume from, which ones to keep, and their size on disk.

A folder holds one line of checkpoints, each trained on from the one before it. A run that would start a second line in
it, from an older checkpoint or from another run's, is refused and can branch off into another folder.
"""

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from finetune.core.errors import UserError
from finetune.run import checkpoint

_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class Checkpoints:
    """The checkpoints of an output folder, as the main process sees them.

    Attributes:
        named: the checkpoint that `checkpoint.resume` names; it is never pruned, since the same command names it again.
        damaged: those that `find` skipped. They do not count as kept, and are deleted once the run has passed them.
    """

    output_dir: Path
    resume: str  # auto, never, or a checkpoint's folder
    keep: int
    damaged: set[Path] = field(default_factory=set)

    @property
    def named(self) -> Path | None:
        return None if self.resume in ("auto", "never") else Path(self.resume)

    def names_own(self) -> bool:
        """Whether the named checkpoint lies in the output folder."""
        return self.named is not None and self.named.resolve().parent == self.output_dir.resolve()

    def by_step(self) -> dict[int, Path]:
        """The checkpoints' folders by their steps, newest first, valid or not."""
        folders = self.output_dir.glob("checkpoint-*")
        found = {int(match[1]): folder for folder in folders if (match := _NAME.fullmatch(folder.name))}
        return dict(sorted(found.items(), reverse=True))

    def find(self, warn: Callable[[str], None]) -> Path | None:
        """The checkpoint to resume from, or None to start from scratch. Writes nothing.

        Raises:
            UserError: if the named one is not valid or training on from it would start a second line of checkpoints,
                if none of those that exist is valid or the newest has another step's name, or if `never` meets
                checkpoints.
        """
        existing = list(self.by_step().values())
        if self.resume == "never":
            if existing:
                raise UserError(
                    f"checkpoint.resume: never, but {self.output_dir} holds {existing[0].name}: starting again would "
                    f"mix two runs; set another output_dir, or delete {self.output_dir}"
                )
            return None
        if self.named is not None:
            return self._find_from(self.named, warn)
        found = self._newest_valid(existing, warn)
        if existing and found is None:
            raise UserError(
                f"checkpoint.resume: auto, but none of the {len(existing)} checkpoints in {self.output_dir} is valid "
                "(see above); restore one, or delete them to start again"
            )
        return found

    def _newest_valid(self, folders: Iterable[Path], warn: Callable[[str], None]) -> Path | None:
        for folder in folders:
            reason = checkpoint.flaw(folder)
            if reason is None:
                _check_name(folder)
                return folder
            warn(f"{folder} is skipped: {reason}")
            self.damaged.add(folder)
        return None

    def _find_from(self, named: Path, warn: Callable[[str], None]) -> Path:
        """The named checkpoint, or the newest one that an earlier start of the same command trained on from it."""
        if not named.is_dir():
            raise UserError(
                f"checkpoint.resume: found {named}, which is no folder; expected auto, never or a checkpoint"
            )
        if reason := checkpoint.flaw(named):
            raise UserError(f"checkpoint.resume: {named} is not a valid checkpoint: {reason}")
        own, step = self.names_own(), checkpoint.step_of(named)
        newer = [folder for other, folder in self.by_step().items() if other > step or not own]
        newest = self._newest_valid(newer, warn)
        if newest is None:
            return named
        with checkpoint.untrusted(newest) as files:
            branches = checkpoint.read_run_state(files)["state"].get("branches", [])
        if checkpoint.digest(named) in branches:
            return newest
        if own:
            raise UserError(
                f"checkpoint.resume: {named} is older than {newest.name} in the same output_dir, and training on from "
                "it would mix two runs there; set another output_dir to branch off from it, or move the newer "
                "checkpoints away to continue here"
            )
        raise UserError(
            f"checkpoint.resume: {self.output_dir} holds {newest.name}, which was not trained on from {named}; set "
            f"another output_dir to branch off, or checkpoint.resume=auto to resume from {newest.name}"
        )

    def prune(self, saved_step: int, best_step: int = -1) -> None:
        """Delete what need not be kept, once the checkpoint of a step is complete.

        At most `keep` valid ones stay, plus the one of `best_step` (-1: none).
        """
        self.damaged.discard(self.output_dir / f"checkpoint-{saved_step}")
        kept = 0
        for step, folder in self.by_step().items():
            if folder in self.damaged:
                if step < saved_step:
                    _delete(folder)
            elif kept < self.keep:
                kept += 1
            elif step != best_step and not (self.names_own() and folder.samefile(self.resume)):
                _delete(folder)

    def remove_leftovers(self) -> None:
        """Delete what a killed process left half-written or half-deleted."""
        for leftover in self._leftovers():
            _remove(leftover)

    def _leftovers(self) -> list[Path]:
        return [*self.output_dir.glob(checkpoint.PARTIAL), *self.output_dir.glob(".checkpoint-*.pruned")]

    def room_needed(self, size: int, saves: int) -> int:
        """Bytes that `saves` more checkpoints of a size take at most; an old one is deleted after the new one."""
        most = self.keep + 1 + self.names_own()
        valid = [folder for folder in self.by_step().values() if folder not in self.damaged]
        free_soon = sum(file.stat().st_size for leftover in self._leftovers() for file in leftover.glob("*"))
        return size * min(saves, max(most - len(valid), 1)) - free_soon


def _delete(folder: Path) -> None:
    """Rename first so that a half-deleted checkpoint is never seen, then delete in a thread beside training."""
    with contextlib.suppress(OSError, RuntimeError):  # what cannot be deleted now is deleted at the next start
        pruned = folder.rename(folder.with_name(f".{folder.name}.pruned"))
        threading.Thread(target=_remove, args=(pruned,)).start()


def _remove(folder: Path) -> None:
    """Delete a folder; of a symlink only the link, since what it leads to lies where the user put it."""
    with contextlib.suppress(OSError):
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)


def _check_name(folder: Path) -> None:
    """Raises UserError unless a valid checkpoint is named after its step, by which the newest is told."""
    name = f"checkpoint-{checkpoint.step_of(folder)}"
    if folder.name != name:
        raise UserError(
            f"output_dir: found the checkpoint {folder}, which is that of step {checkpoint.step_of(folder)}; rename it "
            f"{name}, or move it elsewhere"
        )
