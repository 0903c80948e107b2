"""The output folder: locked by one run at a time, and large enough."""

import errno
import os
import socket
import subprocess
import sys

import pytest

from finetune.core.errors import UserError
from finetune.run import folder
from finetune.run.folder import Lock
from harness.configs import ROOT, tiny_config, write_config, write_pictures
from harness.faults import mount_own
from harness.processes import run_two


def test_a_second_run_on_the_same_folder_is_refused(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from finetune.run.folder import Lock\n"
        "lock = Lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            for _ in range(2):  # being refused leaves the file as it was
                with pytest.raises(UserError) as refused:
                    Lock(tmp_path)
                holder = f"process {other.pid} on {socket.gethostname()}"
                assert str(refused.value) == (
                    f"output_dir: {tmp_path}: another run is writing here ({holder}); stop it, or set another "
                    "output_dir"
                )
        finally:
            other.kill()
    Lock(tmp_path)  # the lock ends with its holder, even a killed one
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])  # NFS without its lock daemon; Lustre without flock
def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch, number):
    def no_locks(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(folder.fcntl, "lockf", no_locks)
    with pytest.raises(
        UserError, match=rf"cannot be locked \({os.strerror(number)}\); set a folder on a file system with"
    ):
        Lock(tmp_path)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not writable"):
        Lock(tmp_path / "file")


@pytest.mark.root
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a folder")
def test_an_output_folder_that_is_not_shared_is_found_before_the_first_update(tmp_path):
    """The second process sees an empty folder where the first one's run lies, as on a host without the shared disk."""
    (tmp_path / "runs").mkdir()
    training = {"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 2}
    config = tiny_config(write_pictures(tmp_path / "pictures", 16), tmp_path / "runs/run", training=training)
    command = ("--config", write_config(tmp_path / "config.yaml", config))

    def before(process):
        folder.CACHE_SECONDS = 1.0
        if process == 1:
            mount_own(tmp_path / "runs")

    one, other = run_two(*command, folder=tmp_path, before=before)
    assert (one.returncode, other.returncode) == (2, 2)
    host = socket.gethostname()
    assert one.error.startswith(f"output_dir: {tmp_path}/runs/run: {host} cannot see the files that {host} writes ")
    assert other.errors == []
    assert [file.name for file in (tmp_path / "runs/run").iterdir()] == [".lock"]
    assert [outcome.returncode for outcome in run_two(*command, folder=tmp_path)] == [0, 0]
    assert list((tmp_path / "runs/run").glob(".shared-*")) == []


@pytest.mark.slow
def test_what_is_printed_is_printed_once_and_not_once_a_host(tmp_path):
    """Two processes that are each the first of their host: LOCAL_RANK is 0 for both."""
    training = {"micro_batch_size": 4, "global_batch_size": 8, "max_train_steps": 2}
    config = tiny_config(write_pictures(tmp_path / "pictures", 16), tmp_path / "run", training=training)

    def before(process):
        os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=str(process))

    command = ("--config", write_config(tmp_path / "config.yaml", config), "--check")
    one, other = run_two(*command, folder=tmp_path, before=before)
    assert (one.returncode, other.returncode) == (0, 0)
    assert "2 process(es)" in one.stdout
    assert other.stdout == ""
