"""Fused kernels for CUDA, in Triton; plain torch is their reference and runs everywhere else.

Each computes what a layer of `model` computes, in inference, without the tensors between its
steps. Sizes of maps are arguments of a kernel, so a new input size needs no new kernel; block
sizes are fixed, nothing is tuned at run time, nothing waits for the device, and all that is
allocated is the output: calls can be captured in a CUDA graph once each has run before.

Triton is imported by the first layer that uses a kernel, not with this package.
"""

import os
from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

# For the whole process, as `torch.backends.cudnn.enabled`; False leaves all layers to plain torch.
enabled = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
BYTES = (torch.uint8,)
OLDEST_CAPABILITY = (8, 0)  # that Triton compiles for

# What came of the trial on each device.
_tried: dict[torch.device, str | None] = {}


def _missing() -> str | None:
    """What Triton lacks on this machine."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    # Torch's builds for CUDA bring Triton, but it starts with a compiler, which an image may lack.
    if not any(map(which, (os.environ.get("CC", "gcc"), "gcc", "clang"))):
        return "there is no C compiler (gcc, clang, or what CC names)"
    return None


INSTALLED = _missing() is None


def usable(tokens: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether layers may take the kernels for this input: on CUDA, and without gradients."""
    return (
        enabled
        and INSTALLED
        and tokens.is_cuda
        and tokens.dtype in dtypes
        and not torch.is_grad_enabled()
        and _tried.get(tokens.device) is None
    )


def why_not(device: torch.device) -> str | None:
    """Why layers on a device do without the kernels; `None` where they have them.

    The first time that nothing else is in the way, a small kernel is built and run there. If it
    fails, `usable` is false on the device from then on.

    Args:
        device: with an index, if it is a GPU.
    """
    if not enabled:
        return "switched off"
    if device.type != "cuda":
        return device.type
    if (missing := _missing()) is not None:
        return missing
    if device not in _tried:
        _tried[device] = _try(device)
    return _tried[device]


def _try(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        has, needs = (".".join(map(str, one)) for one in (capability, OLDEST_CAPABILITY))
        return f"the GPU has compute capability {has}, and Triton needs {needs}"
    from model.kernels.trial import fault  # noqa: PLC0415

    return fault(device)
