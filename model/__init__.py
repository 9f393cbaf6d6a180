"""DAT and DAT++ vision transformers with deformable attention, for inference.

from model import load_model
logits = load_model(Path("dat_tiny_in1k_224.pth"))(images)

Torch is imported by the first use of a network: configurations, pre-processing and geometry do
without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.config import VARIANTS, DatConfig

if TYPE_CHECKING:
    from model.dat import DAT, Explained, create_model, load_model

__all__ = ["DAT", "VARIANTS", "DatConfig", "Explained", "create_model", "load_model"]


def __getattr__(name: str) -> Any:
    """Import a name of `model.dat` when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("model.dat"), name)
