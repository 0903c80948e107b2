"""The output folder: locked by one run at a time, and large enough."""

import errno
import os
import socket
import subprocess
import sys
from collections import namedtuple

import pytest

from finetune.core.errors import UserError
from finetune.run import folder
from finetune.run.folder import Lock, require_room
from harness.configs import ROOT


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


def test_a_file_system_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match=r"cannot be locked \(No locks available\); set a folder on a file system with"):
        Lock(tmp_path)


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        Lock(tmp_path / "file")


def test_too_little_room_is_refused_with_both_numbers(tmp_path, monkeypatch):
    disk = namedtuple("Disk", "total used free")
    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: disk(5000, 3766, 1234))
    require_room(tmp_path / "not" / "there", 1234, "files")
    with pytest.raises(UserError) as failure:
        require_room(tmp_path, 1235, "files")
    assert str(failure.value).startswith(
        f"output_dir: {tmp_path}: found 1,234 bytes free, expected 1,235 for files; free some"
    )
