"""Official detectors over DAT++: RetinaNet, Mask R-CNN and Cascade Mask R-CNN, for inference.

from model.detection import load_detector
detections = load_detector(Path("rtn_tiny_3x.pth")).detector(images, resized_sizes, scales_xy)

Torch is imported by the first use of a network, as in `model`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from model.detection.config import DETECTORS, DetectorConfig

if TYPE_CHECKING:
    from model.detection.detections import Detections
    from model.detection.detector import (
        Detector,
        ExplainedDetections,
        LoadedDetector,
        create_detector,
        load_detector,
    )

__all__ = [
    "DETECTORS",
    "Detections",
    "Detector",
    "DetectorConfig",
    "ExplainedDetections",
    "LoadedDetector",
    "create_detector",
    "load_detector",
]


def __getattr__(name: str) -> Any:
    """Import a name of `model.detection.detector` when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("model.detection.detector"), name)
