"""Fused kernels for CUDA, in Triton; plain torch is their reference and runs everywhere else.

Each computes what a layer of `model` computes, in inference, without the tensors between its
steps. Sizes of maps are arguments of a kernel, so a new input size needs no new kernel; block
sizes are fixed, nothing is tuned at run time, nothing waits for the device, and all that is
allocated is the output: calls can be captured in a CUDA graph once each has run before.

Triton is imported by the first layer that uses a kernel, not with this package.
"""

from importlib.util import find_spec
from shutil import which

import torch
from torch import Tensor

# Torch's builds for CUDA bring Triton, but it starts with a C compiler, which an image may lack.
INSTALLED = find_spec("triton") is not None and any(map(which, ("gcc", "clang")))
# For the whole process, as `torch.backends.cudnn.enabled`; False leaves all layers to plain torch.
enabled = True
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF = (torch.bfloat16, torch.float16)
BYTES = (torch.uint8,)


def usable(tokens: Tensor, dtypes: tuple[torch.dtype, ...] = DTYPES) -> bool:
    """Whether layers may take the kernels for this input: on CUDA, and without gradients."""
    return (
        enabled
        and INSTALLED
        and tokens.is_cuda
        and tokens.dtype in dtypes
        and not torch.is_grad_enabled()
    )
