"""Two processes that wait for each other: as long as it takes for a task, not for long for gradients."""

import os
import signal
import socket
import sys
import time
from ast import literal_eval
from datetime import timedelta
from itertools import count

import psutil
import pytest

from finetune.core import groups
from finetune.data import loading
from finetune.training.window import Window
from harness.compare import valid_checkpoints
from harness.configs import tiny_config, write_config, write_pictures
from harness.faults import at_call
from harness.processes import run_two, start_two

pytestmark = pytest.mark.slow


@pytest.fixture
def config(tmp_path):
    training = {"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 4}
    config = tiny_config(write_pictures(tmp_path / "pictures", 16), tmp_path / "run", training=training)
    return write_config(tmp_path / "config.yaml", config)


def short_timeouts(seconds):
    groups.GRADIENTS_TIMEOUT = timedelta(seconds=seconds)


def test_a_first_decode_longer_than_the_gradients_timeout_does_not_end_the_run(config, tmp_path):
    """The main process decodes for 6 s where gradients wait for 3 s."""

    def before(process):
        short_timeouts(3)
        load = loading.load_data

        def slowly(*arguments):
            if process == 0:
                time.sleep(6)
            return load(*arguments)

        loading.load_data = slowly

    outcomes = run_two("--config", config, folder=tmp_path, before=before)
    assert [outcome.returncode for outcome in outcomes] == [0, 0], outcomes


def test_a_process_that_does_not_answer_is_told_apart_and_the_seconds_are_named(config, tmp_path):
    """One process is stopped in the third update: nothing closes its connections."""

    def before(process):
        short_timeouts(4)
        if process == 1:
            add, calls = Window.add, count(1)

            def stop(window, *arguments):
                add(window, *arguments)
                if next(calls) == 3:
                    os.kill(os.getpid(), signal.SIGSTOP)

            Window.add = stop

    one, other = start_two("--config", config, "checkpoint.every_steps=1", folder=tmp_path, before=before)
    ended = one.wait(40)
    other.kill(signal.SIGKILL)
    other.kill(signal.SIGCONT)
    other.wait()
    assert ended.returncode == 1
    assert ended.error.startswith("launch: another process of this run has not answered for 4 s, so this one cannot")
    assert valid_checkpoints(tmp_path / "run")[-1] == 2


def test_a_connection_that_never_comes_about_is_one_line_that_names_the_interface(config, tmp_path):
    """The other process never starts."""
    one, other = start_two(
        "--config",
        config,
        folder=tmp_path,
        before=lambda process: short_timeouts(3) if process == 0 else time.sleep(1000),
    )
    ended = one.wait(40)
    other.kill(signal.SIGKILL)
    other.wait()
    assert ended.returncode == 1
    assert ended.error.startswith("launch: the processes did not connect to each other within 3 s (")
    assert "GLOO_SOCKET_IFNAME" in ended.error
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="macOS has no TCP_USER_TIMEOUT")
def test_every_connection_between_processes_notices_a_host_that_is_silent(config, tmp_path):
    """With and without something on its way; what comes of it is tested between two hosts, which needs root."""

    def before(process):
        at_call(Window, "add", 1, lambda: (tmp_path / f"options-{process}").write_text(repr(options())))

    def options():
        found = []
        for connection in psutil.Process().net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED:
                with socket.socket(fileno=os.dup(connection.fd)) as each:
                    kept = each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
                    found.append((kept, *(each.getsockopt(socket.IPPROTO_TCP, name) for name in names)))
        return found

    run_two("--config", config, folder=tmp_path, before=before)
    for process in range(2):
        found = literal_eval((tmp_path / f"options-{process}").read_text())
        assert len(found) >= 3  # two groups and the store
        assert set(found) == {(1, 150, 30, 5, 300_000)}  # half of five minutes, then five times 30 s
