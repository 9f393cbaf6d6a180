"""What servers leave behind that were killed does not stay, nor stop the next one."""

import os
import subprocess
import sys
import tempfile

import pytest

from service.command_errors import StartupError
from service.processes import metrics_folder
from tests.server import ROOT, environment

# In namespaces of its own a process may mount a file system.
APART = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def can_mount() -> bool:
    try:
        return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@pytest.fixture(autouse=True)
def everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_folders_of_processes_that_ended_are_removed_and_those_of_others_stay(everywhere):
    with subprocess.Popen(["true"]) as ended:
        pass
    left = [everywhere / f"dat-serve-metrics-{name}" for name in (ended.pid, os.getppid(), "other")]
    for folder in left:
        folder.mkdir()
        (folder / "counter_1.db").touch()
    folder = metrics_folder.open_folder(3)
    assert [one.exists() for one in left] == [False, True, True]
    assert list(folder.iterdir()) == []
    metrics_folder.close_folder(folder)
    assert not folder.exists()


def test_a_process_with_the_number_of_one_that_was_killed_begins_anew(everywhere):
    """As in a container that is started again, where the first process is number 1."""
    left = everywhere / f"dat-serve-metrics-{os.getpid()}"
    left.mkdir()
    (left / "counter_7.db").touch()
    assert metrics_folder.open_folder(3) == left
    assert list(left.iterdir()) == []


@pytest.mark.skipif(not can_mount(), reason="no namespaces for this user")
@pytest.mark.parametrize("size", ["4k", "100k"])
def test_a_folder_without_room_ends_the_start_in_words(everywhere, size):
    """It would kill, without a word, whoever writes to a page of a file that is mapped."""
    (everywhere / "small").mkdir()
    serve = (
        f"mount -t tmpfs -o size={size} none small && cd {ROOT} && exec {sys.executable} -m service"
    )
    ports = {f"DAT_SERVER__{one}_PORT": 0 for one in ("HTTP", "GRPC", "METRICS")}
    small = {"DAT_SERVER__FRONT_ENDS": 1, "TMPDIR": everywhere / "small"}
    done = subprocess.run(
        [*APART, serve],
        cwd=everywhere,
        env=environment(ports | small),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "needs 3 MiB in a folder for temporary files: No space left on device" in line


def test_without_a_folder_for_temporary_files_the_start_ends_in_words(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", "/proc")
    with pytest.raises(StartupError, match="mount a tmpfs on /tmp, or name a folder in TMPDIR"):
        metrics_folder.open_folder(3)
