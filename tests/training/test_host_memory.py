"""What the kernel says of memory: what is free within a control group's limit, and a process's peak."""

from types import SimpleNamespace

import pytest
import torch

from finetune.training.host_memory import forget_peak, free_memory, peak_memory, resident_memory


def control_group(folder, version, limit, usage, inactive):
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}[version]
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    statistic = {1: "total_inactive_file", 2: "inactive_file"}[version]
    (folder / "memory.stat").write_text(f"anon 1\n{statistic} {inactive}\n")


@pytest.mark.parametrize(
    ("version", "line", "tree", "unlimited"),
    [(1, "4:cpuset,memory:{}\n2:cpu:/\n", "memory", 2**63 - 4096), (2, "0::{}\n", "", "max")],
    ids=["version 1", "version 2"],
)
@pytest.mark.parametrize("seen", ["on the host", "in a container"])
def test_free_memory_stays_below_the_limit_of_a_control_group(
    tmp_path, monkeypatch, version, line, tree, unlimited, seen
):
    """Of 1000 bytes allowed 700 are taken, 200 of them for files that can be dropped: 500 are free."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10_000))
    assert free_memory(tmp_path) == 10_000  # not Linux, no groups
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line.format("/job/step"))
    assert free_memory(tmp_path) == 10_000  # a container without the folder
    groups = tmp_path / "sys/fs/cgroup" / tree
    limited = groups / "job" if seen == "on the host" else groups
    control_group(groups, version, unlimited, 5000, 0)
    control_group(limited, version, 1000, 700, 200)
    if seen == "on the host":
        control_group(limited / "step", version, unlimited, 300, 0)
    assert free_memory(tmp_path) == 500
    control_group(limited, version, 1000, 1300, 200)
    assert free_memory(tmp_path) == 0
    control_group(limited, version, unlimited, 700, 200)
    assert free_memory(tmp_path) == 10_000


def test_the_peak_is_kept_after_memory_is_freed_and_forgotten_when_asked():
    """Counters are kept per thread and up to 64 pages apart: a megabyte is their resolution."""
    megabyte, size = 10**6, 200 * 10**6
    forget_peak()
    before = resident_memory()
    held = torch.ones(size, dtype=torch.uint8)  # above 32 MB, so that the C allocator returns it at once
    del held
    assert resident_memory() == pytest.approx(before, abs=5 * megabyte)
    assert peak_memory() - before == pytest.approx(size, abs=5 * megabyte)
    assert forget_peak() - before == pytest.approx(size, abs=5 * megabyte)
    assert peak_memory() == pytest.approx(before, abs=5 * megabyte)


def test_without_proc_the_peak_is_getrusages(monkeypatch, tmp_path):
    """getrusage may report the larger peak of a process before this one, never a smaller one."""
    ours = peak_memory()
    monkeypatch.setattr("finetune.training.host_memory._STATUS", tmp_path / "none")
    monkeypatch.setattr("finetune.training.host_memory._CLEAR", tmp_path / "none" / "either")
    assert 0.99 * ours < peak_memory() < 2**40
    assert forget_peak() <= peak_memory()
