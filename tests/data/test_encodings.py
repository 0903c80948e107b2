"""Encodings: made once, kept by what they were made from, shared, resumed, and drawn from as their keys say."""

import os
import time

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from finetune.core import randomness
from finetune.core.errors import UserError
from finetune.core.shapes import Shape
from finetune.data import encodings as encodings_module
from finetune.data import store
from finetune.data.captions import Captions
from finetune.data.encoded_batches import CroppedBatches, EncodedBatches, size_and_crop
from finetune.data.encodings import RequiredEncodings, image_key
from finetune.data.order import Slot
from finetune.data.pieces import Share, make_pieces
from finetune.data.pixels import FEATURES, SHAPED_FEATURES, Images, Original, pixel_row, shaped_row
from finetune.data.store import Store, key
from harness.batches import as_images
from harness.batches import batches as pixel_batches
from harness.compare import unequal
from harness.configs import of_kind, tiny_config, write_config, write_pictures
from harness.faults import failing_at, skip_the_export
from harness.processes import run_several, run_two

ARRAYS = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
TEXTS = [["a"], ["b", "c"], ["a"], ["d"], ["e"]]


class Halving:
    """Encoders that anyone can check: the mean is the left half of the pixels over 255, the deviation a tenth.

    `work` are the numbers of entries that each call encoded.
    """

    text_fields = {"text": (3, 2)}  # noqa: RUF012 - as the protocol has it
    text_chunk, sized, no_text = 4, False, ""

    def __init__(self, image_key="one", text_key="one", chunk=2):
        self.image_key, self.text_key, self.work, self.freed, self.chunk = image_key, text_key, [], 0, chunk

    def image_fields(self, shape):
        return dict.fromkeys(("mean", "std"), (1, shape.height, shape.width // 2))

    def image_chunk(self, shape):
        return max(self.chunk * 16 // shape.area, 1)  # two of 4 x 4

    def images(self, pixels, device):
        shape = Shape(*pixels.shape[2:])
        assert pixels.shape == (self.image_chunk(shape), 1, *shape)
        assert pixels.dtype == torch.uint8
        self.work.append(len(pixels))
        half = pixels[..., : shape.width // 2].float() / 255
        return {"mean": half, "std": torch.full_like(half, 0.1)}

    def texts(self, texts, device):
        assert len(texts) == self.text_chunk
        self.work.append(len(texts))
        return {"text": torch.stack([torch.full((3, 2), float(sum(map(ord, text)))) for text in texts])}

    def truncated(self, texts):
        return [text for text in texts if len(text) > 3]

    def free(self):
        self.freed += 1


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def images(arrays=ARRAYS, texts=TEXTS):
    return as_images(arrays, Captions.of(texts[: len(arrays)]))


def find(encoders=None, pictures=None, flips=False, prompts=()):
    return RequiredEncodings(encoders or Halving(), [(pictures or images(), (False, True)[: 1 + flips])], prompts)


def made(accelerator, **options):
    return find(**options).make(accelerator)


def batches(encodings, pictures=None, seed=7, **options):
    settings = {"random_flip": False, "condition_dropout": 0.0, **options}
    return EncodedBatches(pictures or images(), encodings, seed, 100, "stratified", **settings)


def test_a_latent_is_the_mean_and_a_keyed_draw_of_the_deviation(accelerator):
    """In batches of any size, the mean is the left half of the pixels, and the deviation a tenth."""
    encodings = made(accelerator)
    slots = [Slot(4, 2, 0, 1.0), Slot(1, 2, 1, 1.0), Slot(4, 3, 0, 0.0)]
    batch = batches(encodings).__getitems__(slots)
    for place, slot in enumerate(slots):
        draw = randomness.noise(7, slot.epoch, slot.position, (1, 4, 2), "posterior")
        half = torch.from_numpy(ARRAYS[slot.image, :, :2, 0])[None].float() / 255
        assert torch.equal(batch["latents"][place], half + torch.tensor(0.1) * draw)
        noise = randomness.noise(7, slot.epoch, slot.position, (1, 4, 2))
        assert torch.equal(batch["noise"][place], noise)
    alone = batches(encodings).__getitems__(slots[1:2])
    assert unequal(alone, {name: tensor[1:2] for name, tensor in batch.items()}) == []
    assert batch["weights"].tolist() == [1.0, 1.0, 0.0]


def test_a_flipped_image_is_an_entry_of_its_own(accelerator):
    encodings = made(accelerator, flips=True)
    assert len(encodings.posteriors[Shape(4, 4)].places) == 10
    slots = [Slot(0, 0, position, 1.0) for position in range(20)]
    flipping = batches(encodings, random_flip=True)
    batch = flipping.__getitems__(slots)
    flips = [flipping.flipped(slot) for slot in slots]
    assert {*flips} == {True, False}
    for place, slot in enumerate(slots):
        pixels = ARRAYS[0, :, ::-1, 0] if flips[place] else ARRAYS[0, :, :, 0]
        draw = 0.1 * randomness.noise(7, 0, slot.position, (1, 4, 2), "posterior")
        half = torch.from_numpy(pixels[:, :2].copy())[None].float() / 255
        assert torch.allclose(batch["latents"][place] - draw, half, atol=1e-6)


def test_an_image_is_shown_as_its_mean_with_its_first_caption(accelerator):
    shown = batches(made(accelerator), random_flip=False).shown([1, 3], dropped=False)
    assert torch.equal(shown["latents"], torch.from_numpy(ARRAYS[[1, 3], :, :2, 0])[:, None].float() / 255)
    assert shown["text"][:, 0, 0].tolist() == [ord("b"), ord("d")]


def test_a_batch_has_the_caption_of_its_position(accelerator):
    pictures, slots = images(), [Slot(1, 0, position, 1.0) for position in range(50)]
    batch = batches(made(accelerator)).__getitems__(slots)
    expected = [float(ord(pictures.captions.texts[pictures.captions.drawn(7, slot)])) for slot in slots]
    assert batch["text"][:, 2, 1].tolist() == expected
    assert {*expected} == {98.0, 99.0}


@pytest.mark.parametrize(("no_text", "absent"), [("", 7.0), (None, 0.0)])
def test_a_dropped_caption_is_the_empty_text_or_zeros(accelerator, no_text, absent):
    """The same for a batch, for what is shown and for a prompt; the empty text is embedded as sevens here."""
    encoders = Halving()
    embed = encoders.texts
    encoders.texts = lambda texts, device: {"text": embed(texts, device)["text"] + 7}
    encoders.no_text = no_text
    encodings, slots = made(accelerator, encoders=encoders), [Slot(0, 0, position, 1.0) for position in range(50)]
    told = batches(encodings, condition_dropout=0.25)
    dropped = randomness.conditions_dropped(7, 0, range(50), 0.25)
    expected = [absent if without else ord("a") + 7.0 for without in dropped]
    assert {*expected} == {absent, 104.0}
    assert told.__getitems__(slots)["text"][:, 2, 1].tolist() == expected
    assert told.shown([1, 3], dropped=True)["text"][:, 0, 0].tolist() == [absent, absent]
    assert encodings.texts.embed(["d", None])["text"][:, 0, 0].tolist() == [107.0, absent]


def test_what_is_there_is_not_made_again(accelerator):
    """Five images in chunks of two: three calls, the last one padded; five captions and the empty one: two calls."""
    first, second = Halving(), Halving()
    made(accelerator, encoders=first)
    assert first.work == [4, 4, 2, 2, 2]
    assert first.freed > 0
    made(accelerator, encoders=second, prompts=["a", "b"])
    assert second.work == []
    made(accelerator, encoders=second, prompts=["another prompt"])
    assert second.work == [4]


def test_entries_belong_to_what_they_were_made_from(accelerator):
    """A changed picture, another encoder, or other settings: made anew, the others kept."""
    made(accelerator)
    changed = ARRAYS.copy()
    changed[2, 0, 0, 0] ^= 1
    assert len(find(pictures=images(changed)).missing_images) == 1
    assert len(find(pictures=images(ARRAYS[::-1])).missing_images) == 0
    other = find(Halving(image_key="two"))
    assert (len(other.missing_images), len(other.missing_texts)) == (5, 0)
    other = find(Halving(text_key="two"))
    assert (len(other.missing_images), len(other.missing_texts)) == (0, 6)
    assert len(find(Halving(chunk=3)).missing_images) == 5


def test_equal_pictures_and_captions_are_encoded_once(accelerator):
    twice = images([*ARRAYS[:2], *ARRAYS[:2]], [["a"], ["b"], ["b"], ["a"]])
    required = find(pictures=twice)
    assert (required.needed, required.texts) == ({Shape(4, 4): 2}, ["", "a", "b"])
    shown = batches(required.make(accelerator), twice).shown([0, 2], dropped=False)
    assert torch.equal(shown["latents"][0], shown["latents"][1])


class Killed(BaseException):
    """Stands for the end of the process."""


def test_an_interrupted_run_continues_with_the_next_piece(accelerator, monkeypatch):
    """In pieces of two images: after the first one the process dies, and leaves three to be made."""
    monkeypatch.setattr(Store, "piece", property(lambda store: 2))
    with pytest.raises(Killed), failing_at(Store, "write", 5, Killed()):  # after three pieces of texts, one of images
        made(accelerator)
    rest = find()
    assert (len(rest.missing_images), len(rest.missing_texts)) == (3, 0)
    encodings = rest.make(accelerator)
    undisturbed = [batches(encodings).shown([index], dropped=False)["latents"] for index in range(5)]
    assert torch.equal(torch.cat(undisturbed), torch.from_numpy(ARRAYS[..., :2, 0])[:, None].float() / 255)


def test_processes_share_the_pieces(monkeypatch):
    """Pieces of 2, 2 and 1 images, in chunks of two: two pieces for the first process, one for the second."""
    monkeypatch.setattr(Store, "piece", property(lambda store: 2))
    encodings, shares = find(), []
    for process in (0, 1):
        chosen = []

        def encode(images, chosen=chosen):
            chosen.append([one.image for one in images])
            return {name: torch.zeros(2, 1, 4, 2) for name in ("mean", "std")}

        make_pieces(Share(process, 2), encodings.image_pieces(encodings.missing_images), encode, "Encoding images")
        shares.append(chosen)
    assert shares == [[[0, 1], [4, 4]], [[2, 3]]]  # the last chunk is filled up
    assert find().missing_images == {}


@pytest.fixture
def text_run(tmp_path):
    """The command of a text-to-image run of one update."""
    pictures = write_pictures(tmp_path / "pictures", 12, kind="text")
    options = of_kind("text", pictures) | {"data__random_flip": True, "training": {"max_train_steps": 1}}
    options["training"] |= {"micro_batch_size": 1, "gradient_accumulation_steps": 1}
    return "--config", write_config(tmp_path / "config.yaml", tiny_config(pictures, tmp_path / "run", **options))


def in_cache(folder):
    """The entries of all files in a cache: a tensor of each, by key."""
    entries = {}
    for file in (folder / "encodings").rglob("*.safetensors"):
        tensors = load_file(file)
        fields = sorted(tensors.keys() - {"keys"})
        for row, name in enumerate(tensors["keys"]):
            entries[file.parent.name, bytes(name)] = torch.cat([tensors[field][row].flatten() for field in fields])
    return entries


@pytest.mark.slow
def test_processes_encode_for_the_cache_that_they_see(text_run, tmp_path):
    """Two share one, as on one host, a third one has its own; the pieces are of two images, and their mirrored ones."""

    def before(process):
        skip_the_export()
        datasets.config.HF_DATASETS_CACHE = str(tmp_path / ["one", "two", "one"][process])
        Store.piece = property(lambda store: 2)
        write = Store.write

        def counting(store, keys, entries):
            with open(tmp_path / f"written-{process}", "a") as log:
                log.write(f"{len(keys)}\n")
            write(store, keys, entries)

        Store.write = counting

    for output_dir in ("run", "again"):
        started = run_several(3, *text_run, f"output_dir={tmp_path / output_dir}", folder=tmp_path, before=before)
        assert [outcome.returncode for outcome in started] == [0, 0, 0], started
    one, two = in_cache(tmp_path / "one"), in_cache(tmp_path / "two")
    assert unequal(one, two) == []
    written = [sum(map(int, (tmp_path / f"written-{process}").read_text().split())) for process in range(3)]
    assert written[0] + written[2] == written[1] == len(one) >= 24
    assert min(written) > 8
    assert [file.name for name in ("one", "two") for file in (tmp_path / name).rglob(".shared*")] == []


@pytest.mark.slow
def test_entries_that_are_gone_again_end_all_processes_with_one_line(text_run, tmp_path):
    """Of one process's own cache."""

    def before(process):
        datasets.config.HF_DATASETS_CACHE = str(tmp_path / str(process))
        if process == 1:
            Store.write = lambda store, keys, entries: None

    one, other = run_two(*text_run, folder=tmp_path, before=before)
    assert (one.returncode, other.returncode) == (1, 1)
    assert one.error == (
        f"encodings: {tmp_path}/1/encodings: found entries missing that were just made; expected a cache that nobody "
        "deletes from while it is used: run the same command again"
    )
    assert other.errors == []


def test_a_cache_that_one_process_cannot_write_is_named_before_anything_is_encoded(text_run, tmp_path):
    def before(process):
        datasets.config.HF_DATASETS_CACHE = str(tmp_path / str(process))
        if process == 1:
            (tmp_path / "1").mkdir()
            (tmp_path / "1/encodings").touch()
        encodings_module.make_pieces = None

    one, other = run_two(*text_run, folder=tmp_path, before=before)
    assert (one.returncode, other.returncode) == (1, 1)
    assert one.error.startswith(f"encodings: {tmp_path}/1/encodings: cannot be written (")
    assert other.errors == []


def test_a_damaged_piece_is_made_again(accelerator):
    encodings = made(accelerator)
    (file,) = encodings.posteriors[Shape(4, 4)].folder.glob("*.safetensors")
    content = file.read_bytes()
    for damaged in (content[:-1], b"", b"\x80\x04 pickle", content[:40]):
        file.write_bytes(damaged)
        assert len(find().missing_images) == 5
        assert len(made(accelerator).posteriors[Shape(4, 4)].places) == 5
        assert file.read_bytes() == content


def test_what_a_killed_process_left_is_deleted_after_a_day_and_what_another_one_writes_stays(accelerator):
    """Whether it is of this host or not, by safetensors or by us. Entries are not removed, however old."""
    folder, now = made(accelerator).texts.store.folder, time.time()
    (piece,) = folder.iterdir()
    names = [".tmpA3bX9z", f".{piece.name}.{os.getpid()}", f".{piece.name}.4194305", f".{piece.name}.{'ab' * 16}"]
    for name, age in [(name + more, age) for name in names for more, age in (("-new", 80_000), ("-old", 90_000))]:
        (folder / name).touch()
        os.utime(folder / name, (now - age, now - age))
    os.utime(piece, (0, 0))
    made(accelerator, prompts=["another"])
    left = {file.name for file in folder.iterdir()}
    assert {name for name in left if name.startswith(".")} == {f"{name}-new" for name in names}
    assert len(left) == len(names) + 2


def test_pieces_have_the_permissions_of_new_files(accelerator, tmp_path):
    """Users who share a cache read each other's."""
    (tmp_path / "new").touch()
    encodings = made(accelerator)
    files = [*encodings.texts.store.folder.glob("*"), *encodings.posteriors[Shape(4, 4)].folder.glob("*")]
    assert {file.stat().st_mode for file in files} == {(tmp_path / "new").stat().st_mode}


@pytest.mark.parametrize(
    ("error", "missing"), [(PermissionError(13, "Permission denied"), None), (FileNotFoundError(), 5)]
)
def test_a_piece_that_may_not_be_read_is_named_and_one_that_is_gone_is_missing(
    accelerator, monkeypatch, error, missing
):
    folder = made(accelerator).posteriors[Shape(4, 4)].folder

    def fail(file, framework):
        raise error

    monkeypatch.setattr(store, "safe_open", fail)
    if missing is not None:
        assert len(find().missing_images) == missing
    else:
        with pytest.raises(UserError, match=rf"^encodings: {folder}/\w+\.safetensors: cannot be read \(Permission de"):
            find()
    assert len([*folder.glob("*.safetensors")]) == 1  # nobody else's file is deleted


def test_the_plan_says_how_much_there_is_and_how_much_is_missing(accelerator):
    """Five images of 2 x 8 numbers and six texts of 6 numbers, four bytes each: 320 + 144 bytes."""
    pictures = images(texts=[["a"], ["b", "c"], ["a"], ["d"], ["a long caption"]])
    encodings = find(pictures=pictures)
    assert encodings.missing_bytes == 5 * 16 * 4 + 6 * 6 * 4
    line, cut_off = encodings.notes
    assert line == "encodings: 5 latents and 6 texts, 0.0 MB on disk; still to be made: 5 and 6, 0.0 MB"
    assert cut_off == "captions cut off after 3 tokens: 1 of 5, 'a long caption'"
    encodings.make(accelerator)
    assert find(pictures=pictures).notes[0] == "encodings: 5 latents and 6 texts, 0.0 MB on disk"


LONG = ["a long caption", "a prompt too long", "abc"]


def test_prompts_that_are_cut_off_are_named_beside_the_captions():
    """A prompt that is also a caption is named once."""
    encodings = find(pictures=images(texts=[["a"], ["b"], ["a"], ["d"], ["a long caption"]]), prompts=LONG)
    assert encodings.notes[1:] == [
        "captions cut off after 3 tokens: 1 of 4, 'a long caption'",
        "prompts cut off after 3 tokens: 1 of 2, 'a prompt too long'",
    ]


def test_the_first_images_are_encoded_alone_with_their_first_captions(accelerator):
    pictures = images(texts=[["a"], ["b", "c"], ["a"], ["d"], ["e"]])
    encoders = Halving()

    def required():
        return find(encoders, pictures, flips=True, prompts=["f"])

    required().make(accelerator, images=2)
    left = required()
    assert (len(left.missing_images), [*left.missing_texts.values()]) == (8, ["c", "d", "e", "f"])
    assert encoders.work == [4, 2]  # a chunk of texts: a, b and the empty one, and one of images
    left.make(accelerator, images=2)
    assert encoders.work == [4, 2]
    left.make(accelerator)
    assert required().missing_bytes == 0


def test_too_little_room_is_found_before_anything_is_encoded(accelerator, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 463})())
    encodings = find()
    with pytest.raises(UserError, match="found 463 bytes free, expected 464 for 5 latents and 6 texts"):
        encodings.make(accelerator)
    assert encodings.encoders.work == []


def test_an_encoder_that_overflows_is_one_line(accelerator):
    encoders = Halving()
    encoders.texts = lambda texts, device: {"text": torch.full((4, 3, 2), torch.inf)}
    with pytest.raises(UserError, match="found text that is not finite"):
        made(accelerator, encoders=encoders)
    assert len(find().missing_texts) == 6


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(max_size=4), min_size=1, max_size=12, unique=True), st.integers(1, 5))
def test_a_store_gives_back_what_was_written(tmp_path_factory, names, piece):
    described = str(tmp_path_factory.mktemp("store")), {"one": (2,), "other": (1, 3)}
    store = Store(*described)
    keys = [key(name) for name in names]
    values = {"one": torch.randn(len(keys), 2), "other": torch.randn(len(keys), 1, 3)}
    for start in range(0, len(keys), piece):
        part = slice(start, start + piece)
        store.write(keys[part], {name: tensor[part] for name, tensor in values.items()})
    store = Store(*described)
    assert store.places.keys() == {*keys}
    for row, name in enumerate(keys):
        entry = store.read(name)
        assert unequal(entry, {field: tensor[row] for field, tensor in values.items()}) == []


@pytest.mark.parametrize(
    ("width", "height", "flipped", "expected"),
    [
        (8, 8, False, [8, 8, 0, 0, 4, 4]),
        # 12 x 8 becomes 6 x 4: one column is cut off on either side
        (12, 8, False, [8, 12, 0, 1, 4, 4]),
        (12, 8, True, [8, 12, 0, 1, 4, 4]),
        # 14 x 8 becomes 7 x 4: one column on the left, two on the right, which are on the left of a mirrored picture
        (14, 8, False, [8, 14, 0, 1, 4, 4]),
        (14, 8, True, [8, 14, 0, 2, 4, 4]),
        # 8 x 20 becomes 4 x 10
        (8, 20, True, [20, 8, 3, 0, 4, 4]),
    ],
)
def test_sdxl_is_told_original_size_crop_and_target(width, height, flipped, expected):
    row = pixel_row(ARRAYS[0], Original(width, height, False))
    table = datasets.Dataset.from_list([row], features=FEATURES)
    assert size_and_crop(Images(table, np.arange(1), 1, 4), 0, flipped) == expected


SIDES = [(4, 4), (2, 8), (4, 4), (8, 2), (2, 8), (2, 8)]  # height, width


def shaped_images():
    """Six pictures of three shapes; the four last have the same bytes."""
    flat = np.random.default_rng(0).integers(0, 256, (6, 16), dtype=np.uint8)
    flat[3:] = flat[2]
    rows = [
        shaped_row(one.reshape(*sides, 1), Original(40, 40, colour=False), Shape(*sides))
        for one, sides in zip(flat, SIDES, strict=True)
    ]
    table = datasets.Dataset.from_list(rows, features=SHAPED_FEATURES)
    return Images(table, np.arange(6), 1, 4, captions=Captions.of([["a"]] * 6))


def test_pictures_of_many_shapes_are_encoded_each_in_its_own(accelerator):
    """All three of 16 pixels, in chunks of two; the two last pictures are one entry."""
    encoders, pictures = Halving(), shaped_images()
    encodings = made(accelerator, encoders=encoders, pictures=pictures)
    assert {shape: len(store.places) for shape, store in encodings.posteriors.items()} == {
        Shape(4, 4): 2,
        Shape(2, 8): 2,
        Shape(8, 2): 1,
    }
    assert encoders.work == [4, 2, 2, 2]  # captions, then a chunk of each shape
    assert encodings.posteriors[Shape(2, 8)].entry_bytes == 2 * 4 * 2 * 4
    made_of = batches(encodings, pictures)
    for index, (height, width) in enumerate(SIDES):
        assert made_of.shape(index) == (1, height, width // 2)
        batch = made_of.__getitems__([Slot(index, 1, index, 1.0)])
        draw = randomness.noise(7, 1, index, (1, height, width // 2), "posterior")
        mean = torch.from_numpy(pictures[index][:, : width // 2, 0].copy())[None].float() / 255
        assert torch.equal(batch["latents"][0], mean + torch.tensor(0.1) * draw)
        assert torch.equal(batch["noise"][0], randomness.noise(7, 1, index, (1, height, width // 2)))
        assert torch.equal(made_of.shown([index], dropped=False)["latents"][0], mean)
    again = Halving()
    made(accelerator, encoders=again, pictures=shaped_images())
    assert again.work == []


def test_equal_bytes_in_another_shape_are_another_entry():
    pictures = shaped_images()
    keys = [image_key(pictures, index, False) for index in range(6)]
    assert len({*keys}) == 5
    assert keys[4] == keys[5]
    assert keys[0] == key(f"{pictures.checksum(0)}/4/0")  # a square's, whatever the other shapes
    # where crops are random the same stored pixels may be trained in two shapes
    other = shaped_images()
    other._shapes = other._shapes[:, ::-1]
    assert image_key(other, 1, False) != keys[1]


def test_processes_share_the_pieces_of_all_shapes():
    """Three pieces, one a shape: two for the first process and one for the second."""
    encodings, shares = find(pictures=shaped_images()), []
    for process in (0, 1):
        chosen = []

        def encode(images, chosen=chosen):
            chosen.append({image.shape for image in images})
            fields = encodings.encoders.image_fields(images[0].shape)
            return {name: torch.zeros(len(images), *field) for name, field in fields.items()}

        make_pieces(Share(process, 2), encodings.image_pieces(encodings.missing_images), encode, "Encoding images")
        shares.append(chosen)
    assert shares == [[{Shape(2, 8)}, {Shape(8, 2)}], [{Shape(4, 4)}]]
    assert find(pictures=shaped_images()).missing_images == {}


@pytest.mark.parametrize(
    ("width", "height", "flipped", "expected"),
    [
        # 2:1 where the shape, 2 high and 8 wide, is 4:1: scaled to 8 x 4, of which a row goes above and below
        (16, 8, False, [8, 16, 1, 0, 2, 8]),
        # 5:1 is scaled to 10 x 2, of which a column goes on either side
        (50, 10, True, [10, 50, 0, 1, 2, 8]),
        # 11:2 is scaled to 11 x 2: one column on the left, two on the right, which are on the left of a mirrored one
        (22, 4, False, [4, 22, 0, 1, 2, 8]),
        (22, 4, True, [4, 22, 0, 2, 2, 8]),
    ],
)
def test_sdxl_is_told_the_target_of_each_picture(width, height, flipped, expected):
    row = shaped_row(np.zeros((2, 8, 1), np.uint8), Original(width, height, colour=False), Shape(2, 8))
    table = datasets.Dataset.from_list([row], features=SHAPED_FEATURES)
    assert size_and_crop(Images(table, np.arange(1), 1, 4), 0, flipped) == expected


COLUMNS = np.broadcast_to(np.arange(7, dtype=np.uint8)[:, None], (4, 7, 1))  # a pixel's value is its column
SLOTS = [Slot(1, epoch, position, 1.0) for epoch in range(3) for position in range(40)]


def cropped(accelerator, encoders, arrays, original, **options):
    """Batches of random crops of 4 x 4 pixels, of five pictures that were of another size before."""
    rows = [pixel_row(array, Original(*original, colour=False)) for array in arrays]
    table = datasets.Dataset.from_list(rows, features=FEATURES)
    pictures = Images(table, np.arange(len(arrays)), 1, 4, captions=Captions.of(TEXTS[: len(arrays)]))
    encodings = RequiredEncodings(encoders, [(pictures, ())], []).make(accelerator)
    settings = {"random_flip": True, "condition_dropout": 0.25, **options}
    return CroppedBatches(pictures, encodings, 7, 100, "stratified", **settings)


def test_random_crops_are_left_to_the_model_with_the_draws_that_latents_would_have(accelerator):
    """Pixels as a model of pixels gets them; all else as with encodings; of images nothing is encoded."""
    encoders = Halving()
    made_of = cropped(accelerator, encoders, [COLUMNS] * 5, (14, 8))
    assert encoders.work == [4, 4]  # six texts
    batch = made_of.__getitems__(SLOTS[:40])
    pixels = pixel_batches(made_of.images, 7, "random", flip=True)
    assert torch.equal(batch["images"], pixels.read_images(SLOTS[:40]))
    draws = [randomness.noise(7, 0, position, (1, 4, 2), "posterior") for position in range(40)]
    assert torch.equal(batch["posterior"], torch.stack(draws))
    encoded = batches(made(accelerator), random_flip=True, condition_dropout=0.25)
    encoded.flipped = lambda slot: False  # of which there are no entries
    expected = encoded.__getitems__(SLOTS[:40])
    assert unequal(batch, expected) == ["images", "latents", "posterior"]


def test_another_position_or_epoch_is_another_crop(accelerator):
    """A crop of 4 columns of 7 starts in one of 4; each slot's is drawn, the same whoever asks."""
    made_of = cropped(accelerator, Halving(), [COLUMNS] * 5, (14, 8), random_flip=False)
    corners = [int(made_of.__getitems__([slot])["images"][0, 0, 0, 0]) for slot in SLOTS]
    expected = [int(4 * randomness.uniform(7, "crop", slot.epoch, slot.position, 2)[1]) for slot in SLOTS]
    assert corners == expected
    assert {*corners} == {0, 1, 2, 3}
    assert corners[:40] != corners[40:80]


def test_sdxl_is_told_the_corner_of_each_random_crop(accelerator):
    """14 x 8 becomes 7 x 4. What the pixels show: a mirrored picture has column 6 - c where the other one has c."""
    encoders = Halving()
    encoders.sized = True
    made_of = cropped(accelerator, encoders, [COLUMNS] * 5, (14, 8))
    batch = made_of.__getitems__(SLOTS[:40])
    flips = [made_of.flipped(slot) for slot in SLOTS[:40]]
    first = batch["images"][:, 0, 0, 0].tolist()
    lefts = [6 - column if flipped else column for column, flipped in zip(first, flips, strict=True)]
    assert batch["time_ids"].tolist() == [[8, 14, 0, left, 4, 4] for left in lefts]
    assert {*zip(lefts, flips, strict=True)} == {(left, flip) for left in range(4) for flip in (False, True)}
    # 8 x 14 becomes 4 x 7: the crop starts in one of four rows
    made_of = cropped(accelerator, encoders, [COLUMNS.transpose(1, 0, 2)] * 5, (8, 14))
    batch = made_of.__getitems__(SLOTS[:40])
    assert batch["time_ids"].tolist() == [[14, 8, top, 0, 4, 4] for top in batch["images"][:, 0, 0, 0].tolist()]
    assert len(batch["time_ids"].unique(dim=0)) == 4


def test_images_that_are_cropped_at_random_are_shown_by_their_centres(accelerator):
    """Columns 1 to 4 of 7, drawn from their posteriors without deviation, and told as a crop at the centre."""
    encoders = Halving()
    encoders.sized = True
    shown = cropped(accelerator, encoders, [COLUMNS] * 5, (14, 8)).shown([1, 3], dropped=False)
    assert shown["images"].tolist() == [[[[1, 2, 3, 4]] * 4]] * 2
    assert torch.equal(shown["posterior"], torch.zeros(2, 1, 4, 2))
    assert shown["time_ids"].tolist() == [[8, 14, 0, 1, 4, 4]] * 2
    assert shown["text"][:, 0, 0].tolist() == [ord("b"), ord("d")]


def test_held_out_images_of_a_run_with_random_crops_are_encoded(accelerator):
    """From their centres, each once and not mirrored, with the captions of all."""
    trained, held = images(ARRAYS[:3]), images(np.stack([COLUMNS, COLUMNS + 1]))
    encodings = RequiredEncodings(Halving(), [(trained, ()), (held, (False,))], []).make(accelerator)
    assert len(encodings.posteriors[Shape(4, 4)].places) == 2
    assert (encodings.have(trained), encodings.have(held)) == (False, True)
    shown = batches(encodings, held).shown([0, 1], dropped=False)
    assert torch.equal(shown["latents"][:, 0, 0], torch.tensor([[1.0, 2.0], [2.0, 3.0]]) / 255)
