"""What is known of a model without its weights."""

from dataclasses import dataclass
from typing import Any

from service.settings.model import ResizeMode


@dataclass(frozen=True)
class Label:
    """A class of a model.

    Attributes:
        name: of the class.
        wnid: its WordNet id, where it has one.
        colour: in which a segmenter draws it, RGB, each part from 0 to 255.
    """

    name: str
    wnid: str | None = None
    colour: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class ModelCard:
    """What a caller may know of a model.

    Attributes:
        name: that requests use.
        version: shown in every answer.
        task: what it does.
        variant: which network it is.
        image_size: `(H, W)` of its input, pixels; `None` where it changes with the image.
        resize_mode: of requests that name none; `None` where there is but one way to resize.
        letterbox_size: side of the letterbox, pixels; `None` where there is none.
        classes: how many it tells apart.
        parameters: as published for the variant.
        flops: of one image, see `model.cost`; `None` where they change with the image.
        device: that runs it.
        dtype: of its features.
        max_batch: most images in one batch.
        buckets: sizes of batches that the device runs, ascending; others are padded to the next.
    """

    name: str
    version: str
    task: str
    variant: str
    image_size: tuple[int, int] | None
    resize_mode: ResizeMode | None
    letterbox_size: int | None
    classes: int
    parameters: int
    flops: int | None
    device: str
    dtype: str
    max_batch: int
    buckets: tuple[int, ...]


@dataclass(frozen=True)
class ModelFacts:
    """All that is needed to answer for a model but the engine that computes it.

    Attributes:
        config: what the network is made of.
        card: what a caller may know of it.
        labels: its classes, in order of the class index.
        queue_limit: most images admitted and not yet on a device.
    """

    config: Any
    card: ModelCard
    labels: tuple[Label, ...]
    queue_limit: int
