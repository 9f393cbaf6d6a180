"""What a detector is made of, and the table of the published ones.

DAT++: Xia et al., arXiv:2309.01430, section 4.2. Variants as in
github.com/LeapLabTHU/DAT-Detection (commit 4d4023d, on mmdetection 2.26.0).
"""

import math
from dataclasses import dataclass
from typing import Literal

from model.config import VARIANTS, DatConfig
from model.detection.transforms import DIVISOR, LONG_SIDE, SHORT_SIDE, Resizing

Kind = Literal["retinanet", "mask_rcnn", "cascade_mask_rcnn"]

STAGES = 4  # of the backbone; their maps have strides 4, 8, 16 and 32
SCORE_THRESHOLD = 0.05  # the score of a detection must be above it
MOST_DETECTIONS = 100  # in an image


@dataclass(frozen=True)
class DetectorConfig:
    """One detector.

    Attributes:
        name: the detector's name.
        kind: what follows the pyramid.
        backbone: its stem and stages; the size of the image changes from request to request.
        num_classes: classes without the background.
        channels: of the pyramid and of the convolutions of the heads.
        hidden: width of the linear layers of box heads.
        scale: short and long side that images are resized to fit, in either orientation, pixels.
    """

    name: str
    kind: Kind
    backbone: DatConfig
    num_classes: int = 80
    channels: int = 256
    hidden: int = 1024
    scale: tuple[int, int] = (SHORT_SIDE, LONG_SIDE)

    @property
    def has_masks(self) -> bool:
        """Whether it finds the pixels of an object, beside its box."""
        return self.kind != "retinanet"

    def resizing(self, image_size: tuple[int, int]) -> Resizing:
        """How an image of `(H, W)` pixels becomes the input."""
        short_side, long_side = self.scale
        return Resizing(image_size, long_side, short_side)

    @property
    def letterbox_size(self) -> int:
        """Side of the square of about as many pixels as the largest input, pixels."""
        return round(math.sqrt(math.prod(self.scale)) / DIVISOR) * DIVISOR

    @property
    def first_stage(self) -> int:
        """The first stage of the backbone whose map enters the pyramid, counted from 0."""
        return 1 if self.kind == "retinanet" else 0

    @property
    def extra_convolutions(self) -> int:
        """How many levels of the pyramid are made by convolutions on the backbone's last map."""
        return {"retinanet": 2, "mask_rcnn": 1, "cascade_mask_rcnn": 0}[self.kind]

    @property
    def refinements(self) -> int:
        """How many box heads work one after the other."""
        return 3 if self.kind == "cascade_mask_rcnn" else 1


def _detector(kind: Kind, size: str) -> DetectorConfig:
    return DetectorConfig(f"{kind}_dat_pp_{size}", kind, VARIANTS[f"dat_pp_{size}_224"])


DETECTORS: dict[str, DetectorConfig] = {
    config.name: config
    for config in (
        _detector("retinanet", "tiny"),
        _detector("retinanet", "small"),
        _detector("mask_rcnn", "tiny"),
        _detector("mask_rcnn", "small"),
        _detector("cascade_mask_rcnn", "tiny"),
        _detector("cascade_mask_rcnn", "small"),
        _detector("cascade_mask_rcnn", "base"),
        # The demo detector of this repository (demo/detection/README.md).
        DetectorConfig(
            "mask_rcnn_dat_nano", "mask_rcnn", VARIANTS["dat_nano"], 12, 64, 128, (192, 320)
        ),
    )
}
