"""From any data source to decoded images: those to train on and those held out."""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from finetune.config.inputs import DataConfig
from finetune.config.schema import Config
from finetune.core.distributed import made_once, on_main_process, together
from finetune.core.errors import UserError, first_few
from finetune.core.hosts import require_same
from finetune.core.kind import ImageFormat, Kind
from finetune.core.shapes import Shape, run_shapes
from finetune.data.cache import decoded
from finetune.data.caption_sources import read_captions
from finetune.data.changes import changes_to_shapes, changes_to_squares, first_frames
from finetune.data.damage import is_pointer
from finetune.data.decode import check_format, decode_to_shape
from finetune.data.fetching import fetch_together
from finetune.data.order import held_out
from finetune.data.pixels import (
    FEATURES,
    FORMAT,
    SHAPED_FEATURES,
    BadImageError,
    Images,
    error_row,
    pixel_row,
    shaped_row,
)
from finetune.data.selection import Selection, check_held_out, select
from finetune.data.sources import Source, explained, open_source, quiet

LISTED = 20  # bad images that an error or the plan names


def load_images(config: Config, kind: Kind) -> tuple[Images, Images | None]:
    """The images of a run in the shapes that it trains, which the kind is told: to train on, and held out.

    Called by all processes; the main one decodes, the others read its cache.

    Raises:
        UserError: on all processes, as `load_data` does, or for shapes that the network cannot take.
    """
    data, square = config.data, kind.image_format.resolution
    shapes = on_main_process(lambda: run_shapes(data.buckets, square, kind.divisor))
    together(lambda: kind.train_shapes(shapes))
    fetch_together(data.source)
    needed = config.model.class_conditional, config.output_dir, kind.captioned
    several = None if data.buckets is None else shapes
    loaded = made_once(lambda: load_data(data, kind.image_format, config.seed, *needed, several))
    _check_same_on_all_hosts(data.source, *loaded)
    return loaded


def _check_same_on_all_hosts(source: str, images: Images, held_out: Images | None) -> None:
    """Raises UserError, on all processes, if one of them has other images: a host's folder may be its own copy."""

    def problem(expected: tuple[list[str], int], found: tuple[list[str], int], there: str, here: str) -> str | None:
        if found == expected:
            return None
        return (
            f"data.source: {source}: found other images on {there}, {found[1]} of them, than on {here}, {expected[1]}; "
            "expected the same files under the same names on every host"
        )

    parts = [part for part in (images, held_out) if part is not None]
    require_same(([part.fingerprint for part in parts], sum(map(len, parts))), problem)


def load_data(
    config: DataConfig,
    image_format: ImageFormat,
    seed: int,
    labelled: bool = False,
    output_dir: str | None = None,
    captioned: bool = False,
    shapes: Sequence[Shape] | None = None,
) -> tuple[Images, Images | None]:
    """Images to train on and images held out: `validation_split`, or a fraction chosen by the seed alone.

    Decoded unless the cache has them.

    Args:
        labelled: every image has to have a label, and a held-out one the label of some image to train on.
        output_dir: where the run will write, which may not be among the images.
        captioned: every image has to have a caption.
        shapes: that pictures are given, each the nearest; None: all become squares.

    Raises:
        UserError: no such source, split, column or label; no room; bad images, all in one error, unless
            `on_bad_image: skip` leaves them out; nothing left.
    """
    check_format(image_format.channels, config.background)
    if not captioned and (config.caption or config.caption_column):
        key = "caption" if config.caption else "caption_column"
        raise UserError(f"data.{key}: found {getattr(config, key)!r}; only valid for a text-to-image model")
    source = open_source(config.source, output_dir, captioned)
    check_held_out(source.splits, config)
    needed = image_format, labelled, captioned, shapes
    images = _load(source, config, config.split, "data.split", *needed)
    if config.validation_split is not None:
        key = "data.validation_split"
        held = _load(source, config, config.validation_split, key, *needed)
    else:
        chosen = held_out(seed, len(images), config.validation_fraction)
        if not len(chosen):
            return images, None
        images, held = images.select(np.delete(np.arange(len(images)), chosen)), images.select(chosen)
        key = "data.validation_fraction"
    if labelled and (unknown := [name for name in held.class_names if name not in images.class_names]):
        raise UserError(
            f"{key}: found the classes {first_few(unknown, 10)} among the images held out and not among those to "
            "train on; add images of them, leave them out with data.labels, or hold out others"
        )
    return images, held


def _load(
    source: Source,
    config: DataConfig,
    split: str,
    key: str,
    image_format: ImageFormat,
    labelled: bool,
    captioned: bool,
    shapes: Sequence[Shape] | None,
) -> Images:
    chosen = select(source.splits, config, split, key)
    if not len(chosen.rows):
        raise UserError(f"{key}: found no images in {split!r} of {config.source}; expected at least one")
    if labelled:
        _check_labels(source, config, chosen)
    channels, resolution = image_format
    size = {"resolution": resolution} if shapes is None else {"shapes": [tuple(shape) for shape in shapes]}
    options: dict[str, Any] = {"channels": channels, **size, "crop": config.crop, "background": config.background}
    features = FEATURES if shapes is None else SHAPED_FEATURES
    with explained(config.source), quiet():
        decode_row = partial(_decode_row, folders=source.folders, **options)
        identity, about = repr((FORMAT, list(features), options)), resolution**2 * channels
        table = decoded(chosen.dataset, chosen.image_column, chosen.rows, decode_row, features, identity, about)
    errors = table.data.column("error")
    bad = np.flatnonzero(errors.is_valid().to_numpy())

    def name(index: int) -> str:
        row = int(chosen.rows[index])
        return source.describe(row, chosen.dataset[row][chosen.image_column])

    problems = [f"{name(index)}: {errors[index].as_py()}" for index in bad.tolist()]
    if problems and (config.on_bad_image == "error" or len(problems) == len(table)):
        advice = "fix or remove them" + (", or set data.on_bad_image=skip" if config.on_bad_image == "error" else "")
        found = f"found {len(problems)} of {len(table)} images bad"
        raise UserError(f"data.source: {config.source}: {found}; {advice}", *_listed(problems))
    good = np.delete(np.arange(len(table)), bad)
    labels = None if chosen.labels is None else chosen.labels[good]
    notes = list(source.notes)
    captions = None
    if captioned:
        captions, note = read_captions(source, config, chosen, chosen.rows[good])
        notes.append(note)
    if problems:
        notes.append(
            f"left out {len(problems)} of {len(table)} images of {split!r}, which are bad (on_bad_image: skip):"
        )
        notes += [f"  {line}" for line in _listed(problems)]
    notes += first_frames(table, good, name)
    if shapes is None:
        notes += changes_to_squares(table, good, image_format)
    else:
        notes += changes_to_shapes(table, good, image_format, name)
    return Images(table, good, channels, resolution, labels, chosen.label_names, notes, captions)


def _listed(problems: list[str]) -> list[str]:
    more = len(problems) - LISTED
    return problems[:LISTED] + ([f"and {more} more"] if more > 0 else [])


def _check_labels(source: Source, config: DataConfig, chosen: Selection) -> None:
    """Raises UserError if there are no labels, or naming the images that have none."""
    column = config.label_column or "label"
    kind = chosen.dataset.features.get(column)
    if chosen.labels is None and kind is not None:
        raise UserError(
            f"data.label_column: found {column!r} of {config.source}, which holds {kind}; expected class labels, "
            "integers or texts"
        )
    if chosen.labels is None:
        raise UserError(
            f"data.label_column: found no column {column!r} of labels in {config.source}; model.class_conditional=true "
            "needs one: class labels, integers or texts, or a folder for each of at least two classes"
        )
    missing = chosen.rows[chosen.labels < 0][:LISTED].tolist()
    if missing:
        names = [source.describe(row, chosen.dataset[row][chosen.image_column]) for row in missing]
        count = int((chosen.labels < 0).sum())
        raise UserError(
            f"data.label_column: found no label in {column!r} for {count} of {len(chosen.rows)} images; expected one "
            "for each: label or remove them",
            *names,
        )


def _decode_row(image: dict[str, Any] | None, folders: tuple[str, ...], **options: Any) -> dict[str, Any]:
    """A row of the cache from what a dataset holds for a picture. A path must lie in one of the folders."""
    try:
        encoded = _encoded(image or {}, folders)
    except BadImageError as error:
        return error_row(str(error))
    try:
        if "shapes" in options:
            shapes = [Shape(*sides) for sides in options.pop("shapes")]
            made = decode_to_shape(encoded, shapes=shapes, **options)
            return shaped_row(made.pixels, made.original, made.shape)
        side = options.pop("resolution")
        made = decode_to_shape(encoded, shapes=[Shape(side, side)], **options)
        return pixel_row(made.pixels, made.original)
    except BadImageError as error:
        if is_pointer(encoded):
            return error_row("is a git-lfs pointer instead of the picture: run `git lfs pull` in its repository")
        return error_row(str(error))


def _encoded(image: dict[str, Any], folders: tuple[str, ...]) -> bytes | str:
    data: bytes | None = image.get("bytes")
    path: str | None = image.get("path")
    if data is not None:
        return data
    if not path:
        raise BadImageError("has no picture")
    if not any(os.path.abspath(path).startswith(folder + os.sep) for folder in folders):
        raise BadImageError("has no picture, only a path, which is not followed out of a dataset")
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImageError("is not a regular file")  # reading a named pipe would wait for ever
    return os.path.abspath(path)
