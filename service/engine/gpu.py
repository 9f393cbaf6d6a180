"""What torch and its driver say of the GPUs of this machine."""

from pathlib import Path

import structlog
import torch

from model import kernels

# Files of the driver, which are there in containers too.
_SIGNS = (Path("/proc/driver/nvidia"), Path("/dev/nvidiactl"), Path("/dev/nvidia0"))

log = structlog.get_logger(__name__)


def why_none() -> str | None:
    """Why torch does not see the NVIDIA GPU of this machine; `None` where it has none."""
    if not any(sign.exists() for sign in _SIGNS):
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return str(error).strip().partition("\n")[0]
    return "torch counts no GPU"


def describe(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def default_dtype(device: torch.device) -> torch.dtype:
    """The precision of features that a device is best at.

    It is float32 on a CPU; on CUDA bfloat16, or float16 where the GPU only emulates bfloat16.
    """
    if device.type != "cuda":
        return torch.float32
    with torch.cuda.device(device):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
    log.info("float16 by default", device=str(device), reason="the GPU only emulates bfloat16")
    return torch.float16


def tf32(device: torch.device) -> str:
    """`on` where float32 may be computed as TF32, else `off`."""
    allowed = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return "on" if device.type == "cuda" and allowed else "off"


def reserved_bytes(device: torch.device) -> int:
    """Memory of a GPU that this process holds and uses; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved(device)


def kernels_on(device: torch.device) -> str:
    """`on`, or `off: ` and why; to be called in the thread that will compute.

    A reason that somebody can do something about is a warning in the log as well.
    """
    reason = kernels.why_not(device)
    if reason is None:
        return "on"
    if device.type == "cuda" and kernels.enabled:
        log.warning("plain torch instead of kernels", device=str(device), reason=reason)
    return f"off: {reason}"
