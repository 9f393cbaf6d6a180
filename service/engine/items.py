"""What crosses between a task and the device: numpy and plain values.

So these values could cross to another process, and neither side knows what the other is made of.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Wanted:
    """What a request wants from the device beside the answer itself.

    The device copies out what is wanted and no more.

    Attributes:
        points: the sampling locations of every deformable layer.
    """

    points: bool = False


def wanted_of(batch: "Sequence[Item]") -> Wanted:
    """What any image of a batch wants."""
    return Wanted(points=any(item.wanted.points for item in batch))


class Item(Protocol):
    """One image on its way to the device."""

    @property
    def group(self) -> Hashable:
        """What all images of one batch have in common."""

    @property
    def wanted(self) -> Wanted:
        """What its request wants."""


@dataclass(frozen=True)
class ClassificationInput:
    """One image on its way to a classifier.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes of the model's input size.
        wanted: beside the classes.
    """

    pixels: NDArray[np.uint8]
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def group(self) -> None:
        """All images of a classifier have one size."""


@dataclass(frozen=True)
class ClassificationOutput:
    """What a classifier says of one image.

    Attributes:
        scores: softmax probabilities `(num_classes,)`, float32, best first.
        classes: `(num_classes,)`, int32, the class of each score.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless wanted.
    """

    scores: NDArray[np.float32]
    classes: NDArray[np.int32]
    sampling_locations: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class DetectionInput:
    """One image on its way to a detector.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes, resized and padded.
        resized: `(H, W)` without the padding, pixels.
        scale_xy: by which the image was enlarged.
        wanted: beside the objects.
    """

    pixels: NDArray[np.uint8]
    resized: tuple[int, int]
    scale_xy: tuple[float, float]
    wanted: Wanted = field(default_factory=Wanted)

    @property
    def padded_size(self) -> tuple[int, int]:
        """`(H, W)` with the padding, pixels."""
        height, width, _ = self.pixels.shape
        return height, width

    @property
    def group(self) -> tuple[int, int]:
        """Only images of one padded size may share a batch."""
        return self.padded_size


@dataclass(frozen=True)
class DetectionOutput:
    """What a detector says of one image.

    Attributes:
        boxes: `(N, 4)`, `(x1, y1, x2, y2)` in pixels of the image.
        scores: `(N,)`, best first.
        classes: `(N,)`, indices.
        mask_probabilities: `(N, 28, 28)` over each box, or `None` from a detector without masks.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless wanted.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    mask_probabilities: NDArray[np.float32] | None
    sampling_locations: tuple[NDArray[np.float32], ...] = ()
