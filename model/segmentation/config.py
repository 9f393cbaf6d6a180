"""What a segmenter is made of, and the table of the published ones.

DAT++: Xia et al., arXiv:2309.01430, section 4. Variants as in
github.com/LeapLabTHU/DAT-Segmentation (commit fdd2039, on mmsegmentation 0.29.0).
"""

from dataclasses import dataclass
from typing import Literal

from model.config import VARIANTS, DatConfig
from model.segmentation.transforms import LONG_SIDE, SHORT_SIDE, Resizing

Kind = Literal["semantic_fpn", "upernet"]

# Of the official tests at several scales: by which both sides of the scale are multiplied.
RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


@dataclass(frozen=True)
class SegmenterConfig:
    """One segmenter.

    Attributes:
        name: the segmenter's name.
        kind: what follows the backbone.
        backbone: its stem and stages; the size of the image changes from request to request.
        channels: of the convolutions of the head.
        pyramid_channels: of the feature pyramid before the head (`semantic_fpn` alone).
        num_classes: every pixel is of one of them.
        scale: long and short side that images are resized to fit, in either orientation, pixels.
    """

    name: str
    kind: Kind
    backbone: DatConfig
    channels: int
    pyramid_channels: int = 256
    num_classes: int = 150
    scale: tuple[int, int] = (LONG_SIDE, SHORT_SIDE)

    def resizing(self, image_size: tuple[int, int], ratio: float = 1) -> Resizing:
        """How an image of `(H, W)` pixels becomes the input.

        Args:
            image_size: of the image.
            ratio: by which both sides of the scale are multiplied; what is left is cut off, as
                in the official tests at several scales.
        """
        long_side, short_side = (int(side * ratio) for side in self.scale)
        return Resizing(image_size, long_side, short_side)

    @property
    def dims(self) -> tuple[int, ...]:
        """Channels of the maps of the backbone, finest first."""
        return tuple(stage.dim for stage in self.backbone.stages)


def _segmenter(kind: Kind, size: str, channels: int) -> SegmenterConfig:
    return SegmenterConfig(f"{kind}_dat_pp_{size}", kind, VARIANTS[f"dat_pp_{size}_224"], channels)


SEGMENTERS: dict[str, SegmenterConfig] = {
    config.name: config
    for config in (
        _segmenter("semantic_fpn", "tiny", 128),
        _segmenter("semantic_fpn", "small", 128),
        _segmenter("semantic_fpn", "base", 128),
        _segmenter("upernet", "tiny", 512),
        _segmenter("upernet", "small", 512),
        _segmenter("upernet", "base", 512),
        # The demo segmenter of this repository (demo/segmentation/README.md).
        SegmenterConfig(
            "semantic_fpn_dat_nano", "semantic_fpn", VARIANTS["dat_nano"], 64, 64, 13, (320, 192)
        ),
    )
}
