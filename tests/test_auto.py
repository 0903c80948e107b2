"""training.micro_batch_size: auto. What fits is found at the start, on all processes, and under a real limit."""

import ctypes
import gc
import re
import resource
from functools import partial
from types import SimpleNamespace

import psutil
import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from scarce import FLOAT32, above, command, is_said, make_base, same_run
from scripted import at_call, script, two

from finetune import model
from finetune.capacity import activation_bytes, first_split, free_memory, largest_split, smaller_splits, state_bytes
from finetune.config import TrainingConfig
from finetune.errors import UserError
from finetune.windows import Split
from splits import relative_difference
from tiny import UNET, forget_processes, tiny_config, weights, write_config, write_pictures

LARGER = {**UNET, "sample_size": 32, "block_out_channels": [16, 16]}  # activations: 2.6 MB an image, weights: 0.3 MB


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    gc.freeze()  # each try ends in a full collection, which takes long with a test suite's imports
    yield
    gc.unfreeze()


@pytest.fixture
def one_process(monkeypatch):
    monkeypatch.setattr(UNet2DModel, "forward", UNet2DModel.forward)  # put back afterwards
    forget_processes()
    yield Accelerator(cpu=True)
    forget_processes()


def test_first_split_is_the_whole_share_for_auto_and_the_given_one_else():
    auto = TrainingConfig(micro_batch_size="auto", global_batch_size=24, num_epochs=1)
    assert [first_split(auto, processes) for processes in (1, 2)] == [Split(24, 1, 1), Split(12, 1, 2)]
    given = TrainingConfig(micro_batch_size=3, global_batch_size=24, num_epochs=1)
    assert first_split(given, 2) == Split(3, 4, 2)


def test_smaller_splits_keep_the_window():
    assert smaller_splits(Split(4, 3, 2)) == [Split(4, 3, 2), Split(3, 4, 2), Split(2, 6, 2), Split(1, 12, 2)]
    assert smaller_splits(Split(1, 12, 2)) == [Split(1, 12, 2)]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize(("limit", "size"), [(99, 12), (12, 12), (11, 6), (5, 4), (2, 2), (1, 1)])
def test_the_largest_that_fits_and_the_network_as_it_was(one_process, limit, size, where):
    unet = UNet2DModel(**{**UNET, "dropout": 0.1})
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    drawn = torch.get_rng_state()
    above(limit, where)
    assert largest_split(one_process, unet, Split(12, 1, 1)) == Split(size, 12 // size, 1)
    assert all(torch.equal(before[name], weight) for name, weight in unet.state_dict().items())
    assert all(parameter.grad is None for parameter in unet.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_what_is_free_on_a_cpu_is_asked_before_it_is_tried(one_process, monkeypatch):
    """Linux promises memory that it has not, and kills whoever uses it."""
    unet = UNet2DModel(**UNET)
    image, state = 1000, 100
    monkeypatch.setattr("finetune.capacity.activation_bytes", lambda unet: image)
    monkeypatch.setattr("finetune.capacity.state_bytes", lambda unet, averaged: state)
    # 4 images need 4000 bytes of the 0.8 x 5000 that state leaves; 6 would need 6000
    for free, size in ((5100, 4), (5099, 3), (0, 1)):
        monkeypatch.setattr("finetune.capacity.free_memory", lambda free=free: free)
        assert largest_split(one_process, unet, Split(12, 1, 1)).micro_batch_size == size


def control_group(folder, version, limit, usage, inactive):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    statistic = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 1\n{statistic} {inactive}\n")


@pytest.mark.parametrize(
    ("version", "line", "tree", "none"),
    [(1, "4:cpuset,memory:{}\n2:cpu:/\n", "memory", 2**63 - 4096), (2, "0::{}\n", "", "max")],
)
@pytest.mark.parametrize("seen", ["as on the host", "as in a container"])
def test_a_control_groups_limit_is_what_is_free(tmp_path, monkeypatch, version, line, tree, none, seen):
    """Of 1000 bytes allowed 700 are taken, 200 of them for files that can be dropped: 500 are free."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert free_memory(tmp_path) == 10_000  # no Linux, no groups
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line.format("/job/step"))
    assert free_memory(tmp_path) == 10_000  # as in a container without the folder
    groups = tmp_path / "sys/fs/cgroup" / tree
    limited = groups / "job" if seen == "as on the host" else groups
    control_group(groups, version, none, 5000, 0)
    control_group(limited, version, 1000, 700, 200)
    if seen == "as on the host":
        control_group(limited / "step", version, none, 300, 0)
    assert free_memory(tmp_path) == 500
    control_group(limited, version, 1000, 1300, 200)
    assert free_memory(tmp_path) == 0
    control_group(limited, version, none, 700, 200)
    assert free_memory(tmp_path) == 10_000


def test_an_image_is_measured_once(one_process, monkeypatch):
    asked = []
    monkeypatch.setattr("finetune.capacity.activation_bytes", lambda unet: asked.append(1) or 10**9)
    monkeypatch.setattr("finetune.capacity.free_memory", lambda: 0)
    assert largest_split(one_process, UNet2DModel(**UNET), Split(12, 1, 1)).micro_batch_size == 1
    assert len(asked) == 1


def test_another_error_is_no_want_of_memory(one_process):
    unet = UNet2DModel(**UNET)
    unet.conv_in = torch.nn.Conv2d(3, 8, 3)
    with pytest.raises(RuntimeError, match="expected input"):
        largest_split(one_process, unet, Split(12, 1, 1))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_not_even_single_images_fit(one_process, where):
    above(0, where)
    with pytest.raises(UserError, match="auto: not even single images fit into the memory of cpu; use a smaller data"):
        largest_split(one_process, UNet2DModel(**UNET), Split(12, 1, 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("base")
    make_base(base)
    return base


@pytest.mark.parametrize("why", ["runs out", "has less free"])
def test_one_of_two_has_less_memory_and_both_take_what_it_can(base, tmp_path, why):
    def before(process):
        if process == 1 and why == "runs out":
            above(2)
        elif process == 1:
            at_call(model, "make_ema", 1, partial(pretend_free, 2), after=True)

    ended = [each.wait() for each in two(*command(base, tmp_path), folder=tmp_path, before=before)]
    assert [each.returncode for each in ended] == [0, 0], ended
    assert "8 = 2 per micro-batch x 2 accumulation steps x 2 process(es)" in ended[0].stdout
    same_run(base, tmp_path / "run")


def pretend_free(images):
    """As much as this many images need, and half an image more; two processes share it."""
    unet = UNet2DModel(**UNET)
    needed = state_bytes(unet, averaged=False) + (images + 0.5) * activation_bytes(unet) / 0.8
    psutil.virtual_memory = lambda: SimpleNamespace(available=2 * needed)


def address_space():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmSize"))


def limit_address_space(images):
    """From where the network stands ready: what it takes for so many images and half as many again."""
    unet = UNet2DModel(**LARGER)
    room = int(1.5 * images * activation_bytes(unet))

    def limit():
        ctypes.CDLL(None).mallopt(-3, 1 << 16)  # M_MMAP_THRESHOLD: memory that is freed leaves the address space
        resource.setrlimit(resource.RLIMIT_AS, (address_space() + room, resource.RLIM_INFINITY))

    at_call(model, "make_ema", 1, limit, after=True)


def test_under_a_real_limit_auto_finishes_the_run_that_64_cannot(tmp_path):
    config = tiny_config(
        write_pictures(tmp_path / "pictures", 64, (32, 32)),
        tmp_path / "unlimited",
        model={"unet": LARGER},
        training={"micro_batch_size": 64, "global_batch_size": 64, "num_epochs": 2},
    )
    file = write_config(tmp_path / "config.yaml", config)
    limited = partial(script, "--config", file, folder=tmp_path, before=lambda: limit_address_space(32))
    whole = script("--config", file, folder=tmp_path)
    assert whole.returncode == 0, whole.stderr

    died = limited(f"output_dir={tmp_path / 'died'}")
    assert died.returncode == 1
    assert is_said(died, 64, step=1)

    done = limited(f"output_dir={tmp_path / 'limited'}", "training.micro_batch_size=auto")
    assert done.returncode == 0, done.stderr
    found = re.search(r"64 = (\d+) per micro-batch", done.stdout)[1]
    assert 1 < int(found) < 64
    apart = relative_difference(weights(tmp_path / "unlimited", 2), weights(tmp_path / "limited", 2))
    assert apart < FLOAT32
