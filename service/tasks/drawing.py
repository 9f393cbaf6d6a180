"""How a picture of an answer is drawn: what of it, how large, in which form."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from service.errors import InvalidOption
from service.images.decode import decode_at
from service.pictures import raster, vector
from service.pictures.compose import Layer as DrawnLayer
from service.pictures.compose import Query, Said, Thing, Window, compose
from service.pictures.regions import Regions
from service.pictures.shapes import Scene
from service.settings.limits import Limits
from service.tasks.attention import AttendedLayer, AttendedQuery, Layer
from service.tasks.points import LayerPoints

Shown = Literal["points", "attention", "arrows", "keys", "boxes", "masks", "segments"]
FileFormat = Literal["png", "webp", "svg"]
Layout = Literal["alone", "beside"]

LEAST_SIZE, MOST_SIZE = 32, 8000  # twice that is what WebP can hold
# Where a request names no size, that of the image within these.
DEFAULT_LEAST, DEFAULT_MOST = 320, 1280
MEDIA_TYPES: dict[FileFormat, str] = {
    "png": "image/png",
    "webp": "image/webp",
    "svg": "image/svg+xml",
}
# To draw and encode a pixel takes as long, and as much memory, as to decode so many.
_DECODED_FOR_DRAWN = 4
_SIDE_OF_GAP = 100  # the gap between two pictures in the larger side of one
_MOST_POINTS = 20_000  # of a picture: more would cover it, and take seconds


@dataclass(frozen=True)
class Drawing:
    """What a picture shows, and its form.

    Attributes:
        show: what is drawn over the image.
        layers: `(stage, block)` of those whose points, arrows and keys are drawn.
        groups: offset groups of these, from 0; none means all.
        opacity: of all that is drawn, from 0 to 1; where segments are shown, of their colours.
        size: the larger side of the image in the picture, pixels; `None`: as in the upload, from
            `DEFAULT_LEAST` to `DEFAULT_MOST`.
        form: of the file.
        layout: `beside`: the plain image stands to the left.
    """

    show: tuple[Shown, ...]
    layers: tuple[Layer, ...] = ()
    groups: tuple[int, ...] = ()
    opacity: float = 1.0
    size: int | None = None
    form: FileFormat = "png"
    layout: Layout = "alone"

    def photo_size(self, width: int, height: int) -> tuple[int, int]:
        """`(W, H)` of an image of `width` x `height` pixels in the picture, pixels."""
        longer = max(width, height)
        side = self.size or min(max(longer, DEFAULT_LEAST), DEFAULT_MOST)
        return max(1, round(width * side / longer)), max(1, round(height * side / longer))

    def decoding_pixels(self, image_pixels: int, limits: Limits) -> int:
        """An image with so many pixels would take as long to decode as this one to draw, at most.

        Args:
            image_pixels: of the upload, which is decoded once more.
            limits: of the server.
        """
        if self.size:
            picture = self.size**2
        else:
            picture = max(DEFAULT_LEAST**2, min(DEFAULT_MOST**2, image_pixels))
        drawn = min(2 * picture if self.layout == "beside" else picture, limits.max_picture_pixels)
        return image_pixels + _DECODED_FOR_DRAWN * drawn


@dataclass(frozen=True)
class Picture:
    """A picture of an answer.

    Attributes:
        data: the file.
        media_type: of the file.
        width: pixels.
        height: pixels.
        render_s: how long it took to decode the image again, draw and encode, seconds.
    """

    data: bytes
    media_type: str
    width: int
    height: int
    render_s: float


class Answered(Protocol):
    """What a picture needs of an answer; see `service.tasks.core.Answer`."""

    @property
    def width(self) -> int: ...  # noqa: D102

    @property
    def height(self) -> int: ...  # noqa: D102

    @property
    def points(self) -> tuple[LayerPoints, ...] | None: ...  # noqa: D102

    @property
    def attention(self) -> tuple[AttendedLayer, ...] | None: ...  # noqa: D102


@dataclass(frozen=True)
class Drawn:
    """A file, with the size of its picture in pixels."""

    data: bytes
    width: int
    height: int


def draw(  # noqa: PLR0917
    upload: bytes,
    limits: Limits,
    drawing: Drawing,
    answer: Answered,
    things: Sequence[Thing],
    regions: Regions | None = None,
) -> Drawn:
    """Draw a picture; takes a decoder's thread.

    Args:
        upload: the image, which was decoded without failure before.
        limits: of the server.
        drawing: what is wanted.
        answer: what the model said of the image.
        things: that were found in it.
        regions: that it has.

    Raises:
        InvalidOption: the picture would be too large, or have too many points.
    """
    size = width, height = drawing.photo_size(answer.width, answer.height)
    gap = max(2, round(max(size) / _SIDE_OF_GAP)) if drawing.layout == "beside" else None
    opacity = drawing.opacity if regions is None else 1.0
    scene = Scene(width, height, (), opacity, gap)
    if scene.full_width * height > limits.max_picture_pixels:
        raise InvalidOption(
            f"the picture would have {scene.full_width}x{height} pixels; the limit is "
            f"{limits.max_picture_pixels} pixels in all, so ask for a smaller size"
        )
    said = _said(drawing, answer, things, regions)
    count = sum(layer.count for layer in said.layers)
    if count > _MOST_POINTS:
        raise InvalidOption(
            f"the layers have {count} points; at most {_MOST_POINTS} are drawn, so choose fewer "
            "layers or groups"
        )
    photo = np.asarray(decode_at(upload, limits, size))
    shapes = compose(said, size)
    scene = replace(scene, shapes=shapes)
    if drawing.form == "svg":
        data = vector.draw(raster.encode(photo, "jpeg"), scene)
    else:
        data = raster.encode(raster.draw(photo, scene), drawing.form)
    return Drawn(data, scene.full_width, height)


def _said(
    drawing: Drawing, answer: Answered, things: Sequence[Thing], regions: Regions | None
) -> Said:
    attended = {(layer.stage, layer.block): layer for layer in answer.attention or ()}
    return Said(
        answer.width,
        answer.height,
        layers=tuple(
            _layer(drawing, layer, attended.get((layer.stage, layer.block)))
            for layer in answer.points or ()
            if (layer.stage, layer.block) in drawing.layers
        ),
        windows=tuple(
            tuple(_windows(drawing, layer))
            for layer in answer.attention or ()
            if "keys" in drawing.show
        ),
        things=tuple(things),
        points="points" in drawing.show or "attention" in drawing.show,
        arrows="arrows" in drawing.show,
        boxes="boxes" in drawing.show,
        regions=regions,
    )


def _windows(drawing: Drawing, layer: AttendedLayer) -> Iterator[Window]:
    """What the queries of a layer see, where each sees a window."""
    for query in layer.queries:
        if query.window is not None and query.cell_size is not None:
            cells, weights = _cells(query, drawing.groups)
            yield Window(query.window, query.centre, cells, weights, query.cell_size)


def _cells(
    query: AttendedQuery, heads: tuple[int, ...]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The cells `(n, 2)` that a query attends to, and the weights `(n,)` of all heads or some."""
    if not heads:
        return query.points[:, 0], query.weights
    chosen = list(heads)
    keys, first, places = np.unique(
        query.group_keys[chosen], return_index=True, return_inverse=True
    )
    weights = np.zeros(len(keys), np.float32)
    np.add.at(weights, places.ravel(), query.group_weights[chosen].ravel())
    return query.group_points[chosen].reshape(-1, 2)[first], weights


def _layer(drawing: Drawing, layer: LayerPoints, attended: AttendedLayer | None) -> DrawnLayer:
    every = len(layer.sampling_locations)
    groups = list(drawing.groups or range(every))
    received: NDArray[np.float32] | None = None
    queries: tuple[Query, ...] = ()
    if attended is not None and "attention" in drawing.show:
        received = attended.received.reshape(every, -1)[groups]
    if attended is not None and "keys" in drawing.show:
        queries = tuple(
            Query(query.centre, query.group_points[groups], query.group_weights[groups])
            for query in attended.queries
        )
    return DrawnLayer(
        tuple(groups),
        layer.sampling_locations.reshape(every, -1, 2)[groups],
        layer.reference_points.reshape(-1, 2),
        received,
        queries,
    )
