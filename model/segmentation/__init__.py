"""Official segmenters over DAT++, SemanticFPN and UPerNet, for inference.

from model.segmentation import load_segmenter
loaded = load_segmenter(Path("upn_tiny.pth"))
labels = loaded.segment(pixels).labels  # of an RGB image (H, W, 3), one of loaded.class_names each

Torch is imported by the first use of a network, as in `model`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.segmentation.config import SEGMENTERS, SegmenterConfig

if TYPE_CHECKING:
    from model.segmentation.labelling import Segmentation
    from model.segmentation.segmenter import (
        ExplainedLogits,
        LoadedSegmenter,
        Segmenter,
        create_segmenter,
        load_segmenter,
        segment,
    )

__all__ = [
    "SEGMENTERS",
    "ExplainedLogits",
    "LoadedSegmenter",
    "Segmentation",
    "Segmenter",
    "SegmenterConfig",
    "create_segmenter",
    "load_segmenter",
    "segment",
]


def __getattr__(name: str) -> Any:
    """Import a name of `model.segmentation.segmenter` when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("model.segmentation.segmenter"), name)
