"""Memory of this machine as the kernel counts it: what is free, and what this process holds and held at its peak."""

import resource
import sys
from contextlib import suppress
from pathlib import Path

import psutil

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still allocate on a CPU: free memory, within the limits of its control groups.

    psutil does not see the limit of a container or a batch job, and exceeding it gets the process killed.

    Args:
        root: prefix of the paths in /proc and /sys.
    """
    free, own = psutil.virtual_memory().available, root / "proc/self/cgroup"
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        version2 = not controllers
        if not version2 and "memory" not in controllers.split(","):
            continue
        tree = root / "sys/fs/cgroup" / ("" if version2 else "memory")
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):  # the limits of the groups above apply too
            if folder.is_relative_to(tree):
                free = min(free, _left_in_group(folder, version2))
    return max(int(free), 0)


def _left_in_group(folder: Path, version2: bool) -> float:
    """Bytes below a control group's limit. Inactive file pages are reclaimed under pressure, and do not count."""
    limit, usage, inactive = (
        ("memory.max", "memory.current", "inactive_file")
        if version2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return float("inf") if allowed == "max" else int(allowed) - used + int(statistics.get(inactive, 0))
    except OSError:  # the root has no limit; a container does not see the groups above its own
        return float("inf")


def resident_memory() -> int:
    """Bytes that this process holds: the interpreter and its libraries, weights, and pages of mapped files."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes that this process has held, since its start or since `forget_peak`.

    From /proc where there is one: getrusage also counts what the process that started this one held then.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak() -> int:
    """Have `peak_memory` count from here on, where the kernel allows it; returns the peak until now."""
    peak = peak_memory()
    with suppress(OSError):  # not Linux, or a container that does not allow it: the next peak is at least this one
        _CLEAR.write_text("5")
    return peak
