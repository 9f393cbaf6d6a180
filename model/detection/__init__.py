"""Official detectors over DAT++: RetinaNet, Mask R-CNN and Cascade Mask R-CNN, for inference.

from model.detection import load_detector
detections = load_detector(Path("rtn_tiny_3x.pth")).detector(images, resized_sizes, scales_xy)
"""

from model.detection.config import DETECTORS, DetectorConfig
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
