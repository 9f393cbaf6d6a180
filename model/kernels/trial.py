"""A kernel that does next to nothing: where it cannot be built or run, none can.

In plain torch: `values + 1`.
"""

import mmap
import subprocess
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import TritonError, knobs

_BLOCK = 128
# What Triton raises where it cannot compile, what the C compiler ends with, and what the system
# says to the library that it made.
_NOT_BUILT = (TritonError, RuntimeError, OSError, ImportError, subprocess.CalledProcessError)


@triton.jit
def _add_one(values, sums, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    kept = index < count
    tl.store(sums + index, tl.load(values + index, mask=kept) + 1, mask=kept)


def add_one(values: Tensor) -> Tensor:
    """`values + 1`, of contiguous values on CUDA."""
    sums = torch.empty_like(values)
    _add_one[triton.cdiv(values.numel(), _BLOCK),](values, sums, values.numel(), BLOCK=_BLOCK)
    return sums


def fault(device: torch.device) -> str | None:
    """Why no kernel can be used on a device, if so; waits for the device."""
    if (reason := cache_fault(Path(knobs.cache.dir))) is not None:
        return reason
    values = torch.arange(3.0, device=device)
    try:
        sums = add_one(values)
    except torch.AcceleratorError:
        raise  # the device's own, with kernels or without
    except _NOT_BUILT as error:
        return f"a kernel cannot be built: {error}".partition("\n")[0]
    return None if sums.tolist() == [1.0, 2.0, 3.0] else "a kernel gives wrong sums"


def cache_fault(folder: Path) -> str | None:
    """Why Triton cannot keep what it compiles in a folder, and load it from there, if so."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder) as file:
            file.write(b"\0")
            file.flush()
            try:
                mmap.mmap(file.fileno(), 1, prot=mmap.PROT_READ | mmap.PROT_EXEC).close()
            except PermissionError:
                return f"nothing may be executed from the cache {folder}: it is mounted noexec"
    except OSError as error:
        return f"the cache {folder} cannot be written: {error.strerror}"
    return None
