"""`training.micro_batch_size: auto` finds what fits, on all processes, under a real limit, and changes nothing."""

import ctypes
import gc
import re
import resource
import socket
import threading
from contextlib import suppress

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DModel

from finetune.config.inputs import ModelConfig
from finetune.core.batch import BatchLayout
from finetune.core.errors import UserError
from finetune.core.shapes import Shape
from finetune.models import ema
from finetune.models.load import load_kind, outline_kind
from finetune.models.unconditional import Unconditional
from finetune.training import memory
from finetune.training.memory import (
    Trials,
    largest_layout,
    memory_plan,
    state_bytes,
    state_plan,
    weight_bytes,
)
from finetune.training.trial_pass import activation_bytes
from harness import faults
from harness.compare import differences, unequal
from harness.configs import UNET, tiny_config, write_config, write_pictures
from harness.faults import at_call, limit_images, limit_pixels, skip_the_export
from harness.pipelines import save_pipeline, vae
from harness.processes import finish, forget_processes, in_new_process, run, run_two

LARGER = {**UNET, "sample_size": 32, "block_out_channels": [16, 16]}  # activations: 2.6 MB an image, weights: 0.3 MB
FLOAT32 = 1e-5


def unconditional(config):
    return Unconditional(UNet2DModel(**config).train(), DDPMScheduler())


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    gc.freeze()  # each try ends in a full collection, which takes long with a test suite's imports
    yield
    gc.unfreeze()


def say_out_of_memory(*_):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(UNet2DModel, "forward", UNet2DModel.forward)  # undoes limit_images afterwards
    # A real failure has glibc move this process to another arena, which grows by 128 MB at a time: later forks of it
    # would not run under a limit.
    monkeypatch.setattr(faults, "exhaust_memory", say_out_of_memory)
    forget_processes()
    yield Accelerator(cpu=True)
    forget_processes()


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("limit", "size"), [(99, 12), (12, 12), (11, 6), (5, 4), (2, 2), (1, 1)])
def test_auto_finds_the_largest_divisor_that_fits(one_process, limit, size, where):
    limit_images(lambda count: count > limit, where)
    found = largest_layout(one_process, unconditional(UNET), BatchLayout(12, 1, 1), averaged=True)
    assert found == BatchLayout(size, 12 // size, 1)


@pytest.mark.parametrize(
    "measure",
    [
        lambda accelerator, kind: largest_layout(accelerator, kind, BatchLayout(4, 1, 1), averaged=True),
        lambda accelerator, kind: memory_plan(accelerator, kind, BatchLayout(4, 1, 1), averaged=True),
        lambda accelerator, kind: activation_bytes(kind),
    ],
    ids=["largest_layout", "memory_plan", "activation_bytes"],
)
@pytest.mark.parametrize("limit", [99, 2], ids=["fits", "runs out"])
def test_measuring_changes_neither_weights_nor_buffers_gradients_or_generators(one_process, measure, limit):
    """On a network that draws (dropout) and counts (batch statistics), with gradients in the middle of a window."""
    kind = unconditional({**UNET, "dropout": 0.1})
    kind.network.conv_in = torch.nn.Sequential(kind.network.conv_in, torch.nn.BatchNorm2d(8))
    for weight in kind.network.parameters():
        weight.grad = torch.randn_like(weight)
    before = {name: tensor.clone() for name, tensor in kind.network.state_dict().items()}
    gradients = {name: weight.grad.clone() for name, weight in kind.network.named_parameters()}
    drawn = torch.get_rng_state()
    assert "conv_in.1.running_mean" in before
    limit_images(lambda count: count > limit, "backward")
    with suppress(UserError):  # the plan of a micro-batch that does not fit
        measure(one_process, kind)
    assert unequal(before, kind.network.state_dict()) == []
    assert unequal(gradients, {name: weight.grad for name, weight in kind.network.named_parameters()}) == []
    assert torch.equal(torch.get_rng_state(), drawn)


def test_auto_is_decided_by_the_largest_area(one_process):
    """Shapes of 64 and of 128 pixels, of which 400 fit: 3 of the larger, where 6 of the smaller would."""
    kind = unconditional(UNET)
    limit_pixels(400)
    squares = largest_layout(one_process, kind, BatchLayout(12, 1, 1), averaged=True)
    kind.train_shapes([Shape(8, 8), Shape(8, 16), Shape(16, 4)])
    shaped = largest_layout(one_process, kind, BatchLayout(12, 1, 1), averaged=True)
    assert (squares.micro_batch_size, shaped.micro_batch_size) == (6, 3)
    with pytest.raises(UserError, match="a trial update with 4 does not fit into the memory of cpu"):
        memory_plan(one_process, kind, BatchLayout(4, 3, 1), averaged=True)
    forward_of_one, shaped_one = activation_bytes(unconditional(UNET)), activation_bytes(kind)
    assert 1.8 < shaped_one / forward_of_one < 2  # twice the pixels; the timestep's embedding does not grow


def test_auto_on_a_cpu_tries_only_what_the_free_memory_holds(one_process, monkeypatch):
    """Linux overcommits memory and kills the process that uses it: trying is not enough.

    Gradients and moments are 3 x 10 bytes, an update takes 100 for the kernels and 50 an image, of which 30 are
    activations. After a trial of n images, m are expected to take 30 + m (100 + 50 n) / n.
    """
    tried, asked = [], []
    limit_images(lambda count: tried.append(count) or False)
    monkeypatch.setattr(memory, "weight_bytes", lambda kind: 10)
    monkeypatch.setattr(memory, "activation_bytes", lambda kind: asked.append(1) or 30)
    monkeypatch.setattr(memory, "resident_memory", lambda: 1000)
    monkeypatch.setattr(memory, "peak_memory", lambda: 1000 + 30 + 100 + 50 * max(tried))
    # expected of 2: 30 + 2 x 150 = 330; of 3: 330; of 4: 363.3; of 6: 480; of 12: 830, where 730 will be taken
    for free, size in ((0, 1), (329, 1), (330, 3), (364, 4), (479, 4), (480, 6), (829, 6), (830, 12)):
        tried.clear()
        asked.clear()
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        layout = largest_layout(one_process, unconditional(UNET), BatchLayout(12, 1, 1), averaged=False)
        assert (layout.micro_batch_size, max(tried)) == (size, size)
        assert len(asked) == 1


def test_an_error_that_is_not_out_of_memory_is_raised(one_process):
    kind = unconditional(UNET)
    kind.network.conv_in = torch.nn.Conv2d(3, 8, 3)
    with pytest.raises(RuntimeError, match="expected input"):
        largest_layout(one_process, kind, BatchLayout(12, 1, 1), averaged=True)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_single_images_that_do_not_fit_are_an_error(one_process, where):
    limit_images(lambda count: True, where)
    with pytest.raises(UserError, match="auto: not even single images fit into the memory of cpu; use a smaller data"):
        largest_layout(one_process, unconditional(UNET), BatchLayout(12, 1, 1), averaged=True)


def test_frozen_weights_are_held_once():
    """Weights of 4 bytes: frozen ones are held once, trained ones with gradient, two moments and perhaps an average."""
    kind = unconditional(UNET)
    frozen = 8 * 1 * 3 * 3 + 8  # conv_in's kernels and biases
    trained = sum(weight.numel() for weight in kind.network.parameters()) - frozen
    kind.network.conv_in.requires_grad_(False)
    kind.trainable = lambda: {name: p for name, p in kind.network.named_parameters() if p.requires_grad}
    assert weight_bytes(kind) == 4 * trained
    assert state_bytes(kind.network, averaged=True) == 4 * frozen + 5 * 4 * trained
    assert state_bytes(kind.network, averaged=False) == 4 * frozen + 4 * 4 * trained


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return ModelConfig(pretrained=save_pipeline(tmp_path_factory.mktemp("pipeline") / "sd"))


def test_what_encodes_random_crops_is_held_by_every_process(one_process, pipeline, monkeypatch):
    """Once and in float32, by one that holds a half of the rest too; where --check measures, it is there already."""
    outline, weights = outline_kind(pipeline, None, crops=True), sum(weight.numel() for weight in vae().parameters())
    state = state_bytes(outline.network, averaged=True)
    assert state_bytes(outline.network, True, outline.crop_encoder) == state + 4 * weights
    needed = 2 * (state // 2 + 4 * weights)
    shared = 2, True, True, outline.crop_encoder
    monkeypatch.setattr(memory, "processes_here", lambda: 2)
    monkeypatch.setattr(memory, "free_memory", lambda: needed)
    assert "optimizer state and EMA weights, and the encoder of random crops, will take" in state_plan(
        one_process, outline.network, *shared
    )
    monkeypatch.setattr(memory, "free_memory", lambda: needed - 2)
    with pytest.raises(UserError, match="and the encoder of random crops, take"):
        state_plan(one_process, outline.network, *shared)
    monkeypatch.undo()
    kind, resident = outline.load(0), []
    monkeypatch.setattr(memory, "resident_memory", lambda: resident.append(kind.encoders()._vae) or 0)
    Trials(one_process, kind, 1, averaged=True)
    assert resident != [None]


def test_auto_tries_the_encoding_of_random_crops(one_process, pipeline, monkeypatch):
    """The VAE takes 4 images and not 6, where the UNet would take all 12."""
    encode, tried = AutoencoderKL.encode, []

    def limited(encoder, pixels):
        tried.append(len(pixels))
        return say_out_of_memory() if len(pixels) > 4 else encode(encoder, pixels)

    monkeypatch.setattr(AutoencoderKL, "encode", limited)
    sizes = [
        largest_layout(one_process, load_kind(pipeline, None, 0, crops), BatchLayout(12, 1, 1), True).micro_batch_size
        for crops in (False, True)
    ]
    assert sizes == [12, 4]
    assert {*tried} == {1, 2, 3, 4, 6}
    with pytest.raises(UserError, match="a trial update with 6 does not fit into the memory of cpu"):
        memory_plan(one_process, load_kind(pipeline, None, 0, crops=True), BatchLayout(6, 2, 1), averaged=True)


@pytest.mark.slow
@pytest.mark.parametrize("why", ["runs out of memory", "has less free memory", "has less on a host of its own"])
def test_two_processes_take_what_the_smaller_one_can(tmp_path, why):
    """Windows of 8, 8, 8 and 3 images, against a run of one process in micro-batches of 4."""
    config = tiny_config(
        write_pictures(tmp_path / "pictures", 27),
        tmp_path / "one",
        training={"micro_batch_size": "auto", "global_batch_size": 8, "num_epochs": 1},
    )
    command = ("--config", write_config(tmp_path / "config.yaml", config))

    def before(process):
        skip_the_export()
        if process == 1 and why == "runs out of memory":
            limit_images(lambda count: count > 2)
        elif process == 1:  # of 4 bytes free, which the two processes share, it may take 2: one an image
            free = 2 if "host" in why else 4
            at_call(memory, "state_plan", 1, lambda: setattr(memory, "free_memory", lambda: free), after=True)
            memory.Trials.needed = lambda trials, size: size
        if "host" in why:
            socket.gethostname = lambda: f"host-{process}"

    finish(*command, "training.micro_batch_size=4", folder=tmp_path, before=skip_the_export)
    ended = run_two(*command, f"output_dir={tmp_path / 'two'}", folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in ended] == [0, 0], ended
    assert "8 = 2 per micro-batch x 2 accumulation steps x 2 process(es)" in ended[0].stdout
    assert max(differences(tmp_path / "one", tmp_path / "two", 4).values()) < FLOAT32


def address_space():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))


def limit_address_space(images):
    """From where the network stands ready: what it takes for so many images and half as many again."""
    skip_the_export()
    room = int(1.5 * images * activation_bytes(unconditional(LARGER)))
    threading.stack_size(1 << 18)  # of 8 MB each otherwise, as many as happen to run at once

    def limit():
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: memory that is freed leaves the address space
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, resource.RLIM_INFINITY))

    at_call(ema, "make_ema", 1, limit, after=True)


def run_within_the_limit(folder):
    """A run of micro-batches of 64 and one of `auto`, beside one without a limit."""
    config = tiny_config(
        write_pictures(folder / "pictures", 64, (32, 32)),
        folder / "run",
        model={"unet": LARGER},
        training={"micro_batch_size": 64, "global_batch_size": 64, "num_epochs": 2},
    )
    command = ("--config", write_config(folder / "config.yaml", config))
    finish(*command, f"output_dir={folder / 'unlimited'}", folder=folder, before=skip_the_export)
    limited = {"folder": folder, "before": lambda: limit_address_space(32)}
    died = run(*command, f"output_dir={folder / 'died'}", **limited)
    return died, finish(*command, f"output_dir={folder / 'auto'}", "training.micro_batch_size=auto", **limited)


@pytest.mark.slow
def test_under_a_real_limit_auto_finishes_the_run_that_micro_batches_of_64_cannot(tmp_path):
    # Each thread that decodes would reserve 64 MB of addresses. glibc reads this once, when the first thread starts.
    died, done = in_new_process(run_within_the_limit, tmp_path, MALLOC_ARENA_MAX="1")
    assert died.returncode == 1
    assert died.error.startswith(
        "training.micro_batch_size: out of memory with 64 at step 1; set training.micro_batch_size=32 "
        "training.gradient_accumulation_steps=2, which keeps the global batch, "
    )

    # 1.5 x 32 images fit, and 64 do not; what the kernels need beside the activations may cost another halving.
    assert re.search(r"64 = (\d+) per micro-batch", done.stdout)[1] in ("32", "16")
    assert max(differences(tmp_path / "unlimited", tmp_path / "auto", 2).values()) < FLOAT32
