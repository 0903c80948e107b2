"""Two process groups: one for gradients, with a short timeout, and a control group, which may wait a day.

A process that decodes, samples or writes alone lets the others wait in the control group for as long as it takes. In
the gradients' group all of them have the same work, so that a process which does not come within minutes never will.
Busy and gone are told apart by the kernels of the hosts, which answer each other whatever their processes do.
"""

import os
import socket
import stat
import sys
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined] # re-exported without saying so

from finetune.core.errors import UserError, first_line
from finetune.core.launcher import launch_error

GRADIENTS_TIMEOUT = timedelta(minutes=10)  # also for the connections of both groups
CONTROL_TIMEOUT = timedelta(days=1)
SILENCE = timedelta(minutes=5)  # after which a host is taken for gone: longer than the restart of a switch
_PROBES = 5  # in the second half of that time
_control: list[dist.ProcessGroup] = []  # empty, or the one of this launch


def processes() -> PartialState:
    """The processes of this launch, connected to each other by the first call.

    PartialState ignores ACCELERATE_USE_CPU, so pass it: each of several CPU processes would take itself for the only
    one. The timeout has to be set here: the Accelerator's own handler comes after the group is made.

    Raises:
        UserError: if they cannot connect.
    """
    try:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
        state = PartialState(cpu=cpu, timeout=GRADIENTS_TIMEOUT, **_store_of_attempt())
        if dist.is_initialized() and not _control:
            # The timeout applies to connecting too: short at first, raised afterwards.
            group = dist.new_group(backend="gloo", timeout=GRADIENTS_TIMEOUT)
            dist.distributed_c10d._set_pg_timeout(CONTROL_TIMEOUT, group)
            _control.append(group)
            _notice_silent_hosts()
    except RuntimeError as error:  # DistError among them
        address = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '')}"
        raise UserError(
            f"launch: the processes did not connect to each other within {GRADIENTS_TIMEOUT.total_seconds():.0f} s "
            f"({first_line(error)}); expected each to reach {address} and every other one. Start all of them; on "
            "several hosts set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the network interface between them, "
            "which must not be the loopback one",
            exit_code=1,
        ) from error
    except ValueError as error:  # what Accelerate and torch raise for a variable that is missing
        raise launch_error(
            f"launch: the environment names other processes, and not how to reach them ({first_line(error)}); expected "
            "MASTER_ADDR, MASTER_PORT, RANK, LOCAL_RANK and WORLD_SIZE, as torchrun and accelerate launch set them, or "
            "none of them for one process: unset what is left over"
        ) from error
    return state


def control_group() -> dist.ProcessGroup | None:
    """The group to wait in for what may take long; None if this process is alone."""
    return _control[0] if _control else None


def _store_of_attempt() -> dict[str, Any]:
    """The store for processes that the launcher has started again (`--max_restarts`); empty at their first start.

    The store is the launcher's, and with Accelerate's `rdzv_backend: static` it outlives them: a new process would look
    up the address of a dead one there, and wait for it for as long as a connection may take.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    outlives = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and attempt != "0"
    if not outlives or size == 1 or dist.is_initialized():
        return {}
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(*address, size, is_master=False, timeout=GRADIENTS_TIMEOUT)
    return {"store": PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}


def _notice_silent_hosts() -> None:
    """Have the kernel end this process's connections to a host that has been silent for `SILENCE`.

    A host that lost its power or link closes nothing: without this, a process in the control group would wait for it
    for a day. The kernel of a living host answers for a process that decodes for hours, or is stopped. gloo has no
    option for it, so this goes over the sockets that are open: those of both groups, and of the store that they met in.
    """
    half = max(1, round(SILENCE.total_seconds() / 2))
    idle = "TCP_KEEPALIVE" if sys.platform == "darwin" else "TCP_KEEPIDLE"
    options = {idle: half, "TCP_KEEPINTVL": max(1, half // _PROBES), "TCP_KEEPCNT": _PROBES}
    options["TCP_USER_TIMEOUT"] = round(SILENCE.total_seconds() * 1000)  # also while something is on its way; in ms
    for name in os.listdir("/dev/fd"):
        with suppress(OSError):  # the listing's own descriptor is closed by now
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    for option, value in options.items():
                        if hasattr(socket, option):  # macOS has no TCP_USER_TIMEOUT
                            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def gathered(value: Any) -> list[Any]:
    """Every process's value, which has to be picklable, in the order of the processes."""
    values = [value] * processes().num_processes
    if len(values) == 1:
        return values
    dist.all_gather_object(values, value, group=_control[0])
    return values


def from_main_process(value: Any) -> Any:
    """The main process's value, which has to be picklable."""
    if processes().num_processes == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_control[0], device=torch.device("cpu"))
    return values[0]


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, of equal shape and type, on the CPU."""
    total = tensor.detach().cpu().clone()
    if processes().num_processes > 1:
        dist.all_reduce(total, group=_control[0])
    return total


def leave_groups() -> None:
    """Destroy both groups, if they were made."""
    _control.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
