"""Decoded images are read as they were written, by views that can be sent to other processes."""

import hashlib
import pickle

import datasets
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune.data.pixels import FEATURES, Images, pixel_row


def table(rows: list[dict]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows, features=FEATURES)


def images(*arrays: np.ndarray, **options) -> Images:
    rows = [pixel_row(array) for array in arrays]
    return Images(table(rows), np.arange(len(rows)), arrays[0].shape[2], min(arrays[0].shape[:2]), **options)


SHAPES = st.tuples(st.integers(1, 5), st.integers(1, 5))


@settings(max_examples=50, deadline=None)
@given(st.lists(SHAPES, min_size=1, max_size=6), st.sampled_from([1, 3, 4]), st.integers(1, 6), st.data())
def test_what_was_written_is_read_whatever_the_batches(shapes, channels, batch, data):
    random = np.random.default_rng(0)
    arrays = [random.integers(0, 256, (*shape, channels), dtype=np.uint8) for shape in shapes]
    whole = table([pixel_row(array) for array in arrays])
    parts = [whole.select(range(start, min(start + batch, len(whole)))) for start in range(0, len(whole), batch)]
    read = Images(datasets.concatenate_datasets(parts), np.arange(len(whole)), channels, 1)
    for index in data.draw(st.permutations(range(len(arrays)))):
        assert (read.pixels(index) == arrays[index]).all()
        assert read.pixels(index).shape == arrays[index].shape


def test_an_item_is_the_middle_square():
    wide = np.arange(2 * 6, dtype=np.uint8).reshape(2, 6, 1)
    (item,) = images(wide)
    assert (item == wide[:, 2:4]).all()
    (item,) = images(wide.reshape(6, 2, 1))
    assert (item == wide.reshape(6, 2, 1)[2:4]).all()


def test_a_selection_is_a_view_with_its_own_labels_and_order():
    arrays = [np.full((2, 2, 1), value, np.uint8) for value in (10, 20, 30)]
    whole = images(*arrays, labels=np.array([7, 8, 9]), label_names=None, notes=["x: y"])
    part = whole.select(np.array([2, 0]))
    assert [item[0, 0, 0] for item in part] == [30, 10]
    assert part.labels.tolist() == [9, 7]
    assert part.table is whole.table
    assert part.notes == ["x: y"]
    assert [item[0, 0, 0] for item in part.select(np.array([1]))] == [10]


def test_the_fingerprint_knows_pixels_shapes_order_and_labels_and_nothing_else():
    a, b = np.arange(12, dtype=np.uint8).reshape(2, 6, 1), np.ones((2, 2, 1), np.uint8)
    same = [images(a, b).fingerprint, images(b, a).select(np.array([1, 0])).fingerprint]
    same.append(images(a, b, notes=["c: bad"]).fingerprint)
    other = [images(b, a), images(a), images(a, b, b), images(a + 1, b), images(a.reshape(6, 2, 1), b)]
    other += [images(a, b, labels=np.array(labels)) for labels in ([0, 1], [1, 0])]
    other += [images(a, b, labels=np.array([0, 1]), label_names=["x", "y"])]
    prints = [entry.fingerprint for entry in other]
    assert len({*same}) == 1
    assert len({*same, *prints}) == 1 + len(prints)
    # Stored with each run: by this formula for good.
    rows = (repr(array.shape).encode() + array.transpose(2, 0, 1).tobytes() for array in (a, b))
    checksums = b"".join(hashlib.blake2b(row, digest_size=8).digest() for row in rows)
    assert same[0] == hashlib.blake2b(checksums, digest_size=16).hexdigest()


def on_disk(path, *arrays: np.ndarray) -> Images:
    with datasets.arrow_writer.ArrowWriter(path=str(path), features=FEATURES) as writer:
        for array in arrays:
            writer.write(pixel_row(array))
        writer.finalize()
    return Images(datasets.Dataset.from_file(str(path)), np.arange(len(arrays)), arrays[0].shape[2], arrays[0].shape[0])


def test_pixels_are_views_of_the_file_and_cannot_be_changed(tmp_path):
    array = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    view = on_disk(tmp_path / "x.arrow", array).pixels(0)
    assert (view == array).all()
    assert not view.flags.owndata
    assert not view.flags.writeable


def test_images_go_to_other_processes_as_paths(tmp_path):
    whole = on_disk(tmp_path / "x.arrow", *(np.full((300, 300, 1), value, np.uint8) for value in range(20)))
    sent = pickle.dumps(whole)
    assert len(sent) < 10_000  # of 1,800,000 pixels
    assert (pickle.loads(sent).pixels(3) == 3).all()
    assert pickle.loads(sent).fingerprint == whole.fingerprint
