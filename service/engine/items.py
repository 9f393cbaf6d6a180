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
        logits: of a classifier.
        attention: of which deformable layers, by their index, ascending.
    """

    points: bool = False
    logits: bool = False
    attention: tuple[int, ...] = ()


def wanted_of(batch: "Sequence[Item]") -> Wanted:
    """What any image of a batch wants."""
    layers = {layer for item in batch for layer in item.wanted.attention}
    return Wanted(
        points=any(item.wanted.points for item in batch),
        logits=any(item.wanted.logits for item in batch),
        attention=tuple(sorted(layers)),
    )


# For each layer whose attention is wanted, the cells of `MOST_QUERIES` queries, along the rows of
# the map; or which of the cells that the model chooses, as in `model.attention_weights.Asked`.
Cells = tuple[tuple[int, ...], ...]


class Item(Protocol):
    """One image on its way to the device."""

    @property
    def group(self) -> Hashable:
        """What all images of one batch have in common."""

    @property
    def wanted(self) -> Wanted:
        """What its request wants."""


class AskingItem(Item, Protocol):
    """An image whose request may ask about attention."""

    @property
    def cells(self) -> Cells:
        """Whose attention it wants, in each layer of `wanted.attention`."""


@dataclass(frozen=True)
class LayerAttention:
    """The attention in one deformable layer, see `model.attention_weights.AttentionWeights`.

    Attributes:
        cells: `(MOST_QUERIES,)`, int64, of the queries.
        weights: `(MOST_QUERIES, G, Ns)`, of each key.
        received: `(G, Ns)`, by each key from all queries of the map.
    """

    cells: NDArray[np.int64]
    weights: NDArray[np.float32]
    received: NDArray[np.float32]


@dataclass(frozen=True)
class ClassificationInput:
    """One image on its way to a classifier.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes of the model's input size.
        wanted: beside the classes.
        cells: whose attention is wanted.
    """

    pixels: NDArray[np.uint8]
    wanted: Wanted = field(default_factory=Wanted)
    cells: Cells = ()

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
        attention: for each layer of which it is wanted.
        logits: `(num_classes,)`, of each class in turn; `None` unless wanted.
    """

    scores: NDArray[np.float32]
    classes: NDArray[np.int32]
    sampling_locations: tuple[NDArray[np.float32], ...] = ()
    attention: tuple[LayerAttention, ...] = ()
    logits: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class DetectionInput:
    """One image on its way to a detector.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes, resized and padded.
        resized: `(H, W)` without the padding, pixels.
        scale_xy: by which the image was enlarged.
        wanted: beside the objects.
        cells: whose attention is wanted.
    """

    pixels: NDArray[np.uint8]
    resized: tuple[int, int]
    scale_xy: tuple[float, float]
    wanted: Wanted = field(default_factory=Wanted)
    cells: Cells = ()

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
        attention: for each layer of which it is wanted.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    mask_probabilities: NDArray[np.float32] | None
    sampling_locations: tuple[NDArray[np.float32], ...] = ()
    attention: tuple[LayerAttention, ...] = ()


@dataclass(frozen=True)
class SegmentationInput:
    """One image on its way to a segmenter.

    Attributes:
        scales: `(h, w, 3)` RGB bytes of the image at each size at which the network sees it.
        image_size: `(H, W)` of the image, whose pixels are labelled.
        explained: which of the scales points and attention are of.
        mirrored: whether the network sees each of them mirrored from left to right as well.
        probabilities: whether those of the classes are wanted.
        margins: whether it is wanted how sure each label is.
        wanted: beside the labels.
        cells: whose attention is wanted.
    """

    scales: tuple[NDArray[np.uint8], ...]
    image_size: tuple[int, int]
    explained: int = 0
    mirrored: bool = False
    probabilities: bool = False
    margins: bool = False
    wanted: Wanted = field(default_factory=Wanted)
    cells: Cells = ()

    @property
    def pixels(self) -> NDArray[np.uint8]:
        """The image at the size that is explained."""
        return self.scales[self.explained]

    @property
    def group(self) -> Hashable:
        """Only images of the same sizes may share a batch, however large they were."""
        return self.mirrored, *(scale.shape for scale in self.scales)


@dataclass(frozen=True)
class SegmentationOutput:
    """What a segmenter says of one image of `(H, W)` pixels.

    Attributes:
        labels: `(H, W)`, the class of each pixel, uint8, or int16 of more than 256 classes.
        finite: whether all that the network computed were numbers.
        probabilities: `(num_classes,)`, float64, of each class the sum of its probabilities where
            it is the label; or `None`.
        margins: `(H, W)`, uint8, by how much the probability of the label is above that of the
            next class, from 0 to 255; or `None`.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless wanted.
        attention: for each layer of which it is wanted.
    """

    labels: NDArray[np.uint8] | NDArray[np.int16]
    finite: bool
    probabilities: NDArray[np.float64] | None = None
    margins: NDArray[np.uint8] | None = None
    sampling_locations: tuple[NDArray[np.float32], ...] = ()
    attention: tuple[LayerAttention, ...] = ()
