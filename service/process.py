"""What is switched for the whole process. Only who stands on top of it calls this.

Libraries have such switches in their environment, in global variables and in settings of a thread.
They are all here, so that nobody has to wonder who set one. Nothing is imported before it is
needed, for some of them are read when a library is.
"""

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from service import memory

# OpenMP's threads wait for each other at the end of every operation. By default they do so awake
# for milliseconds, for a core that a neighbour or our own event loop may have: beside one busy
# process two threads so answered a twentieth of what they do in quiet. A hundred microseconds are
# as fast in quiet (`bench.neighbour`); a thread that sleeps at once is not.
ENVIRONMENT: Mapping[str, str] = MappingProxyType({"GOMP_SPINCOUNT": "2000"})

# How long a thread that wants the interpreter waits before it asks for it, seconds. A forward pass
# on a CPU gives it up and wants it back at each of its hundreds of operations.
_SWITCH_INTERVAL_S = 0.0001


def begin() -> None:
    """Switch it; to be called before torch is imported, which reads the variables once.

    Variables that are set already stay as they are.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


def compute_alone() -> None:
    """Let the calling thread compute without a team of others: cores are for the device's threads.

    With more OpenMP threads than cores, even idle ones, the teams of a process sleep between two
    operations instead of waiting awake, which costs a single image a third of its speed. OpenCV
    would share each image among threads of its own.
    """
    import cv2  # noqa: PLC0415
    import torch  # noqa: PLC0415

    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def leave_limits_to_us() -> None:
    """Have Pillow decode whatever it is given.

    Its own limit of pixels is a warning at half of it and an error above; ours is a setting, which
    is checked before Pillow sees a byte.
    """
    from PIL import Image  # noqa: PLC0415

    Image.MAX_IMAGE_PIXELS = None


def choose_kernels(enabled: bool, cache: Path | None) -> None:
    """Switch our kernels on or off, and say where torch and Triton keep compiled code.

    Args:
        enabled: whether layers may take the kernels.
        cache: the folder; `None` leaves it to the libraries.
    """
    if cache is not None:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
        os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    from model import kernels  # noqa: PLC0415

    kernels.enabled = enabled


def silence_grpc() -> None:
    """Have gRPC leave its failures to who asked; to be called before it is imported."""
    os.environ["GRPC_VERBOSITY"] = "NONE"


def loaded() -> None:
    """Turn from loading to serving; to be called once, when all is loaded.

    The collector of garbage passes over all that was loaded: torch and the interfaces are hundreds
    of thousands of objects that stay for ever, and to look through them takes a fifth of a second,
    in which nobody is answered. Memory that is freed from now on stays with its thread.
    """
    memory.keep_freed()
    gc.collect()
    gc.freeze()
