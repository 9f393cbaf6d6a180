"""The folder in which the processes of a server keep their metrics.

Here nothing of prometheus_client is imported, which looks for the folder when it is.
"""

import os
import shutil
from pathlib import Path
from tempfile import gettempdir

_PREFIX = "dat-serve-metrics-"


def open_folder() -> Path:
    """A folder for the files of this server; those of servers that were killed are removed."""
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
