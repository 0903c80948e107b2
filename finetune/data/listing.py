"""The files of a folder: those that a run reads, and notes on all that it leaves out."""

import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from finetune.core.errors import UserError, first_few, printable
from finetune.data.formats import PICTURES
from finetune.data.thumbnails import SERVER, thumbnails

READERS = dict.fromkeys(PICTURES, "imagefolder")
READERS |= {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
OTHER_PICTURES = set(ImageFolder.EXTENSIONS) - {".mpg", ".mpeg"}
OTHER_PICTURES |= {".avif", ".heics", ".heifs", ".heic", ".heif", ".hif", ".jxl", ".jxr", ".svg", ".xcf"}
OTHER_PICTURES |= {".exr", ".hdr", ".raw", ".dng"}
OTHER_PICTURES |= {".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw"}  # of cameras
OTHER_PICTURES -= PICTURES
# Made by servers, file managers and systems: thumbnails, waste baskets, snapshots. All in lower case.
SYSTEM_FOLDERS = {"@eadir", "@recycle", "@recently-snapshot", "@tmp", "@__thumb", "#recycle", "#snapshot"}
SYSTEM_FOLDERS |= {"$recycle.bin", "system volume information", "lost+found"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini"}
RUN_FILES = {"config.yaml", "metrics.jsonl"}  # a folder with both is a run's output_dir
RUN_OUTPUT = re.compile(r"samples|pipeline|lora|tensorboard|checkpoint-.*|loss_curve\.png|" + "|".join(RUN_FILES))
OTHER = "other files"  # the reason to leave out what nothing here reads
CAPTIONS = ".txt", ".TXT"  # extensions of texts beside pictures


@dataclass
class Listing:
    """Files in and below a folder, as paths relative to it."""

    files: dict[str, list[str]] = field(default_factory=dict)  # by reader, sorted
    metadata: list[str] = field(default_factory=list)  # metadata.csv and its like, sorted
    notes: list[str] = field(default_factory=list)  # what was left out, a line for each reason

    @property
    def everything(self) -> set[str]:
        """All readable files."""
        return {file for files in [*self.files.values(), self.metadata] for file in files}

    def restricted_to(self, splits: dict[str, list[str]], reason: str) -> "Listing":
        """Only the files of some splits, with a note on the others: files {reason}."""
        chosen = {file for files in splits.values() for file in files}
        by_reader = {reader: [file for file in files if file in chosen] for reader, files in self.files.items()}
        metadata = [file for file in self.metadata if file in chosen]
        others = self.everything - chosen
        notes = [_note(f"files {reason}", others)] if others else []
        return Listing({reader: files for reader, files in by_reader.items() if files}, metadata, notes + self.notes)


def list_folder(path: str, output_dir: str | None = None, captioned: bool = False) -> Listing:
    """The files in and below a folder, with links followed.

    Args:
        captioned: text files beside pictures of the same name are not left out, since their captions will be read.

    Raises:
        UserError: a folder cannot be read, a name is not UTF-8, or the run's own output would be among the files.
    """
    found: dict[str, list[str]] = {}
    left_out: dict[str, list[str]] = {}
    seen: set[str] = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=_unreadable):
        folders.sort()  # else the order, and of two links to one folder the one that is read, would be the disk's
        real, here = os.path.realpath(folder), os.path.relpath(folder, path)
        if real in seen:
            left_out.setdefault("links to folders that are read already", []).append(here)
            folders.clear()
            continue
        seen.add(real)
        if output_dir is not None:
            _refuse_output_inside(real, path, output_dir)
        is_run = set(names) >= RUN_FILES
        for name in [name for name in folders if _is_system(name) or (is_run and RUN_OUTPUT.fullmatch(name))]:
            folders.remove(name)
            reason = "files in hidden and system folders" if _is_system(name) else "files of a run's output"
            left_out.setdefault(reason, []).extend(_inside(path, os.path.join(folder, name)))
        for name in names:
            file = os.path.normpath(os.path.join(here, name))
            reader = "metadata" if _is_metadata(name) else READERS.get(_extension(name), "")
            if (why := _reason_to_leave_out(name, is_run)) is not None:
                left_out.setdefault(why, []).append(file)
            else:
                if reader == "metadata" and not os.path.isfile(os.path.join(folder, name)):
                    raise UserError(  # reading a pipe would wait for ever
                        f"data.source: {path}: found {printable(file)}, which is a metadata file by its name and no "
                        "regular file (a broken link, a named pipe or a socket); replace or remove it"
                    )
                found.setdefault(reader, []).append(_in_utf8(file, path))
    metadata = sorted(found.pop("metadata", []))
    # Metadata files say themselves which pictures are used.
    if small := set() if metadata else thumbnails(path, found.get("imagefolder", ())):
        left_out["thumbnails of pictures beside them"] = sorted(small)
        found["imagefolder"] = [file for file in found["imagefolder"] if file not in small]
    if captioned:
        stems = {os.path.splitext(file)[0] for file in found.get("imagefolder", ())}
        left_out[OTHER] = [file for file in left_out.get(OTHER, ()) if not _is_text_beside(file, stems)]
    notes = [_note(reason, files) for reason, files in left_out.items() if files]
    return Listing({reader: sorted(files) for reader, files in found.items()}, metadata, notes)


def by_kind(files: Iterable[str], named: bool = False) -> str:
    """Files counted by extension, the most frequent first: `5 .avif, 3 .jpg`, with some names of each if asked for."""
    kinds: dict[str, list[str]] = {}
    for file in files:
        kinds.setdefault(_extension(file) or "without extension", []).append(file)
    parts = []
    for kind, names in sorted(kinds.items(), key=lambda item: (-len(item[1]), item[0])):
        parts.append(f"{len(names)} {kind}" + (f" ({first_few(map(printable, sorted(names)))})" if named else ""))
    return ", ".join(parts)


def _note(reason: str, files: Collection[str]) -> str:
    return f"left out {reason} ({len(files)}): {by_kind(files, named=True)}"


def check_output(source: str, output_dir: str) -> None:
    """Raises UserError if the pictures are part of what the run itself writes."""
    inside = _parts_below(os.path.realpath(output_dir), os.path.realpath(source))
    if inside and RUN_OUTPUT.fullmatch(inside[0]):
        raise UserError(f"output_dir: found {output_dir}, where {source} is part of the output; set another output_dir")


def _refuse_output_inside(folder: str, path: str, output_dir: str) -> None:
    inside = _parts_below(folder, os.path.realpath(output_dir))
    if inside is not None and not any(map(_is_system, inside)):
        raise UserError(
            f"output_dir: found {output_dir}, which is inside data.source {path}: the run's samples and plots would "
            "become training images; set an output_dir outside it"
        )


def _parts_below(folder: str, path: str) -> list[str] | None:
    """The names that lead from a folder to a path, or None if it is not inside. Both are real paths."""
    if path == folder:
        return []
    prefix = folder.rstrip(os.sep) + os.sep
    return path.removeprefix(prefix).split(os.sep) if path.startswith(prefix) else None


def _unreadable(error: OSError) -> None:
    raise UserError(
        f"data.source: the folder {printable(str(error.filename))} cannot be read ({error.strerror}); expected one "
        "that can: change its permissions, or move it elsewhere"
    )


def _is_system(folder: str) -> bool:
    return folder.startswith((".", "__")) or folder.lower() in SYSTEM_FOLDERS


def _reason_to_leave_out(name: str, is_run: bool) -> str | None:
    if name.startswith(".") or name.lower() in SYSTEM_FILES or SERVER.fullmatch(name):
        return "hidden and system files"
    if is_run and RUN_OUTPUT.fullmatch(name):
        return "files of a run's output"
    if _is_metadata(name) or _extension(name) in READERS:
        return None
    if _extension(name) in OTHER_PICTURES:
        return "pictures in formats that cannot be read here, to be converted to PNG or JPEG"
    return OTHER


def _is_metadata(name: str) -> bool:
    return name.lower() in ImageFolder.METADATA_FILENAMES


def _is_text_beside(file: str, stems: set[str]) -> bool:
    stem, extension = os.path.splitext(file)
    return extension in CAPTIONS and stem in stems


def _inside(path: str, folder: str) -> list[str]:
    """All files below a folder that is left out, readable or not."""
    return [os.path.relpath(os.path.join(below, name), path) for below, _, names in os.walk(folder) for name in names]


def _extension(file: str) -> str:
    return os.path.splitext(file)[1].lower()


def _in_utf8(file: str, path: str) -> str:
    try:
        file.encode()
    except UnicodeEncodeError:
        name = os.fsencode(file)
        raise UserError(f"data.source: {path}: found the name {name!r}, expected one in UTF-8; rename it") from None
    return file
