"""What is switched for the whole process; called by the modules that put the server together.

Libraries have such switches in their environment, in global variables and in settings of a thread.
All of them are here, so that nobody has to search for who set one. Libraries are imported where
they are needed, because some read their switches when they are imported.
"""

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from service import memory

# OpenMP's threads wait for each other at the end of every operation. By default they spin for
# milliseconds, while a neighbour or our own event loop may need the core: beside one busy process
# two threads answered a twentieth of what they do on a quiet machine. Spinning for a hundred
# microseconds is as fast on a quiet machine (`bench.neighbour`); sleeping at once is not.
#
# gRPC would write a line for every client whose handshake fails, past our log.
ENVIRONMENT: Mapping[str, str] = MappingProxyType(
    {"GOMP_SPINCOUNT": "2000", "GRPC_VERBOSITY": "ERROR"}
)

# How long a thread that wants the interpreter waits before it asks for it, seconds. A forward pass
# on a CPU gives it up and wants it back at each of its hundreds of operations.
_SWITCH_INTERVAL_S = 0.0001

# After so many new objects the garbage collector looks at them, by default 700. A request makes
# hundreds that wait for the device with it, and leaves none that only the collector finds.
_NEW_OBJECTS = 10_000


def begin() -> None:
    """Set what has to be set before torch is imported, which reads the variables once.

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

    cv2.setNumThreads(1)
    if (torch := sys.modules.get("torch")) is not None:  # a front end does without
        torch.set_num_threads(1)


def leave_limits_to_us() -> None:
    """Have Pillow decode images of any size.

    Pillow warns at its own limit of pixels and fails at twice that. Our limit is a setting, which
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


def share_metrics(folder: Path) -> None:
    """Have this process and its children keep their metrics in files of a folder.

    To be called before prometheus_client is imported, which reads the variable once.
    """
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)


def compute_float32_in_full() -> None:
    """Forbid TF32, which has ten bits of mantissa, on all GPUs.

    By default cuDNN computes convolutions of float32 in it. Other types are not concerned, so that
    this costs them nothing.
    """
    import torch  # noqa: PLC0415

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def silence_grpc() -> None:
    """Have gRPC log nothing, as its caller handles its failures; before gRPC is imported."""
    os.environ["GRPC_VERBOSITY"] = "NONE"


def loaded() -> None:
    """Turn from loading to serving; to be called once, when all is loaded.

    The garbage collector no longer looks at what was loaded: torch and the interfaces are hundreds
    of thousands of objects that stay for ever, and a look through them takes a fifth of a second,
    in which nobody is answered. Memory that is freed from now on stays with its thread.
    """
    memory.keep_freed()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
