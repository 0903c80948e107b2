"""Two hosts in this machine: network namespaces with a cable between them, which can be pulled. Needs root."""

import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from harness.processes import Training, nothing

_NEW_NET, _NEW_UTS = 0x40000000, 0x04000000  # of <linux/sched.h>
_CABLE = "cable0"
CABLE = {"GLOO_SOCKET_IFNAME": _CABLE}  # for the environment of a command on one of them


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A host: its number, its name, which is also that of its network namespace, and its address."""

    def __init__(self, number: int):
        self.number, self.name, self.address = number, f"host{number}-{os.getpid()}", f"10.77.0.{number + 1}"

    def enter(self) -> None:
        """This process, and what it starts, is on this host from here on."""
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as namespace:
            assert libc.setns(namespace.fileno(), _NEW_NET) == 0
        assert libc.unshare(_NEW_UTS) == 0
        socket.sethostname(self.name)

    def cable(self, state: str) -> None:
        """The host's end of the cable is `up` or `down`; nobody is told."""
        _ip("-n", self.name, "link", "set", _CABLE, state)


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Two hosts that are connected, as long as the context lasts."""
    hosts = [Host(0), Host(1)]
    try:
        for host in hosts:
            _ip("netns", "add", host.name)
            _ip("-n", host.name, "link", "set", "lo", "up")
        one, other = hosts
        _ip("-n", one.name, "link", "add", _CABLE, "type", "veth", "peer", "name", _CABLE, "netns", other.name)
        for host in hosts:
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", _CABLE)
            host.cable("up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "delete", host.name], capture_output=True)


def hosts_are_possible() -> bool:
    """Whether this user may make network namespaces here, and a cable between two of them."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    try:
        with two_hosts():
            return True
    except subprocess.CalledProcessError:
        return False


def start_on(
    hosts: list[Host],
    *arguments: str | Path,
    folder: Path,
    before: Callable[[int], None] = nothing,
    per_host: int = 1,
    **environment: str,
) -> list[Training]:
    """train.py on so many processes of each host. `before` gets the number of its process."""
    world = len(hosts) * per_host
    environment |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": "29500"} | CABLE
    environment |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(per_host), "ACCELERATE_USE_CPU": "true"}

    def on(process: int) -> None:
        hosts[process // per_host].enter()
        before(process)

    return [
        Training(
            arguments,
            folder / str(process),
            partial(on, process),
            environment | {"RANK": str(process), "LOCAL_RANK": str(process % per_host)},
        )
        for process in range(world)
    ]
