"""The folder in which the processes of a server keep their metrics.

Here nothing of prometheus_client is imported, which looks for the folder when it is.
"""

import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile, gettempdir

from service.command_errors import StartupError

_PREFIX = "dat-serve-metrics-"
_BYTES_OF_PROCESS = 1 << 20


def open_folder(processes: int) -> Path:
    """A folder for the files of this server; those of servers that were killed are removed.

    The files are mapped into memory, and who writes to a page that finds no room is killed: so the
    room is asked for at the start.

    Args:
        processes: how many write there.

    Raises:
        StartupError: there is no folder for temporary files, or it has not enough room.
    """
    room = processes * _BYTES_OF_PROCESS
    try:
        folder = _make_folder()
        with TemporaryFile(dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, room)
    except OSError as fault:
        raise StartupError(
            f"DAT_SERVER__FRONT_ENDS needs {room >> 20} MiB in a folder for temporary files: "
            f"{fault.strerror}; mount a tmpfs on /tmp, or name a folder in TMPDIR"
        ) from fault
    return folder


def _make_folder() -> Path:
    everywhere = Path(gettempdir())
    for left in everywhere.glob(f"{_PREFIX}*"):
        owner = left.name.removeprefix(_PREFIX)
        # In a container that is started again this process has the number of the one before it.
        own = owner == str(os.getpid())
        if own or (owner.isdigit() and not Path("/proc", owner).exists()):
            shutil.rmtree(left, ignore_errors=True)
    folder = everywhere / f"{_PREFIX}{os.getpid()}"
    folder.mkdir(mode=0o700)
    return folder


def close_folder(folder: Path) -> None:
    """Remove the folder at the end."""
    shutil.rmtree(folder, ignore_errors=True)
