"""What servers leave behind that were killed does not stay, nor stop the next one."""

import os
import subprocess
import tempfile

import pytest

from service.processes import metrics_folder


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
    folder = metrics_folder.open_folder()
    assert [one.exists() for one in left] == [False, True, True]
    assert list(folder.iterdir()) == []
    metrics_folder.close_folder(folder)
    assert not folder.exists()


def test_a_process_with_the_number_of_one_that_was_killed_begins_anew(everywhere):
    """As in a container that is started again, where the first process is number 1."""
    left = everywhere / f"dat-serve-metrics-{os.getpid()}"
    left.mkdir()
    (left / "counter_7.db").touch()
    assert metrics_folder.open_folder() == left
    assert list(left.iterdir()) == []
