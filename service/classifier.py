"""The core that all transports call: encoded images in, predictions out.

The only place where a request is understood: its options, its limits, its deadline, and what
becomes of each of its images.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from model.dat import DAT
from model.transforms import PixelMap, Preprocessing
from service.batcher import Admission, Batcher, Served
from service.engine.engine import EngineInput, EngineOutput
from service.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidImage,
    InvalidOption,
    NoImages,
    ServiceError,
    TooManyImages,
)
from service.images import PreparedImage, prepare
from service.metrics import ModelMetrics
from service.served_model import ModelCard, ServedModel
from service.settings import Limits

Explain = Literal["none", "points"]
# One image of a request: its bytes, or why the transport could not get at them.
Upload = bytes | InvalidImage


@dataclass(frozen=True)
class Options:
    """What a request asks for beside the classes of its images.

    Attributes:
        model: name of the model; `None` means the default.
        top_k: predictions for each image, best first; at most all classes are given.
        explain: `points` adds the sampling locations.
        timeout_s: time until the answer is of no use, seconds; `None` means the server's default.
    """

    model: str | None = None
    top_k: int = 5
    explain: Explain = "none"
    timeout_s: float | None = None


@dataclass(frozen=True)
class Prediction:
    """A class with its softmax probability, and its WordNet id where it has one."""

    label: str
    index: int
    score: float
    wnid: str | None


@dataclass(frozen=True)
class LayerPoints:
    """Where one deformable layer read its keys and values.

    Points are (x, y) in pixels of the uploaded image after its EXIF orientation, from the
    top-left corner of the top-left pixel; they may lie outside the image.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        sampling_locations: `(G, Hk, Wk, 2)`, float32.
        reference_points: `(Hk, Wk, 2)`, float32, where the points of every group moved from.
    """

    stage: int
    block: int
    sampling_locations: NDArray[np.float32]
    reference_points: NDArray[np.float32]


@dataclass(frozen=True)
class Timing:
    """Where the time of one image went, seconds, and the images in its batch."""

    decode_s: float
    queue_s: float
    compute_s: float
    batch_size: int


@dataclass(frozen=True)
class Classification:
    """The answer for one image.

    Attributes:
        predictions: best first.
        width: of the uploaded image after its EXIF orientation, pixels.
        height: likewise.
        points: one entry for each deformable layer, or `None` when not asked for.
        timing: where the time went.
    """

    predictions: tuple[Prediction, ...]
    width: int
    height: int
    points: tuple[LayerPoints, ...] | None
    timing: Timing


class Classifier:
    """Classifies requests of one model.

    Attributes:
        card: what a caller may know of the model.
        labels: its classes, in order of the class index.
    """

    def __init__(
        self,
        served: ServedModel,
        card: ModelCard,
        batcher: Batcher[EngineInput, EngineOutput],
        *,
        decoders: ThreadPoolExecutor,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        self.card = card
        self.labels = served.labels
        self._preprocessing = Preprocessing.of(served.network.config)
        self._layers = point_layers(served.network)
        self._batcher = batcher
        self._decoders = decoders
        self._limits = limits
        self._metrics = metrics

    async def classify(
        self, uploads: Sequence[Upload], options: Options
    ) -> list[Classification | ServiceError]:
        """Classify the images of one request.

        Returns:
            What became of each image, in order. A request with a single image raises its
            failure instead, so that the failure becomes the status of the request.

        Raises:
            ServiceError: the request as a whole cannot be answered; see `service.errors`.
        """
        loop = asyncio.get_running_loop()
        self._check(uploads, options)
        timeout_s = options.timeout_s
        deadline = loop.time() + (
            self._limits.default_timeout_s if timeout_s is None else timeout_s
        )
        if options.explain == "points":
            self._metrics.explained.inc()
        with self._batcher.admit(len(uploads)) as admission:
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._outcome(upload, options, admission, deadline))
                    for upload in uploads
                ]
        outcomes = [task.result() for task in running]
        if len(outcomes) == 1 and isinstance(outcomes[0], ServiceError):
            raise outcomes[0]
        return outcomes

    def _check(self, uploads: Sequence[Upload], options: Options) -> None:
        if options.top_k < 1:
            raise InvalidOption(f"top_k must be at least 1, not {options.top_k}")
        if options.timeout_s is not None and not 0 < options.timeout_s < float("inf"):
            raise InvalidOption(f"timeout must be a positive number, not {options.timeout_s}")
        if not uploads:
            raise NoImages("the request holds no image")
        if len(uploads) > self._limits.max_images:
            raise TooManyImages(
                f"the request holds {len(uploads)} images; the limit is {self._limits.max_images}"
            )

    async def _outcome(
        self, upload: Upload, options: Options, admission: Admission, deadline: float
    ) -> Classification | ServiceError:
        try:
            return await self._classify(upload, options, admission, deadline)
        except InvalidImage as error:
            self._metrics.decode_errors[error.reason].inc()
            return error
        except ServiceError as error:
            return error

    async def _classify(
        self, upload: Upload, options: Options, admission: Admission, deadline: float
    ) -> Classification:
        start = perf_counter()
        try:
            image = await self._decode(upload, deadline)
        except ServiceError:
            admission.give_back()
            raise
        decode_s = perf_counter() - start
        self._metrics.stage["decode"].observe(decode_s)
        explain = options.explain == "points"
        item = EngineInput(image.pixels, explain)
        served = await self._batcher.submit(item, admission, deadline)
        self._metrics.images.inc()
        start = perf_counter()
        answer = self._answer(image, served, options, decode_s)
        self._metrics.stage["postprocess"].observe(perf_counter() - start)
        return answer

    async def _decode(self, upload: Upload, deadline: float) -> PreparedImage:
        if isinstance(upload, InvalidImage):
            raise upload
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                return await loop.run_in_executor(
                    self._decoders, prepare, upload, self._limits, self._preprocessing
                )
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the image was decoded") from None

    def _answer(
        self, image: PreparedImage, served: Served[EngineOutput], options: Options, decode_s: float
    ) -> Classification:
        scores = served.result.scores
        if not np.isfinite(scores).all():
            raise EngineFailed("the model gave no number for this image")
        best = np.argsort(-scores, kind="stable")[: options.top_k]
        points = None
        if options.explain == "points":
            points = tuple(
                layer.points(locations, image.pixel_map)
                for layer, locations in zip(
                    self._layers, served.result.sampling_locations, strict=True
                )
            )
        return Classification(
            tuple(self._prediction(int(index), scores) for index in best),
            image.width,
            image.height,
            points,
            Timing(decode_s, served.queue_s, served.compute_s, served.batch_size),
        )

    def _prediction(self, index: int, scores: NDArray[np.float32]) -> Prediction:
        label = self.labels[index]
        return Prediction(label.name, index, float(scores[index]), label.wnid)


@dataclass(frozen=True)
class PointLayer:
    """How the positions of one deformable layer become pixels.

    Attributes:
        stage: from 0.
        block: from 0, in its stage.
        map_size: `(W, H)` of the feature map, cells.
        cell_stride: pixels of the model's input from one cell to the next.
        first_cell: centre of the first cell in the model's input, pixels.
        reference_points: `(Hk, Wk, 2)`, (y, x), normalised.
    """

    stage: int
    block: int
    map_size: tuple[int, int]
    cell_stride: float
    first_cell: float
    reference_points: NDArray[np.float32]

    def points(self, locations: NDArray[np.float32], pixel_map: PixelMap) -> LayerPoints:
        """Pixels of the uploaded image from `(G, Hk, Wk, 2)` normalised (y, x)."""
        return LayerPoints(
            self.stage,
            self.block,
            self._pixels(locations, pixel_map),
            self._pixels(self.reference_points, pixel_map),
        )

    def _pixels(
        self, locations_yx: NDArray[np.float32], pixel_map: PixelMap
    ) -> NDArray[np.float32]:
        # -1 and +1 are the centres of the first and the last cell (align_corners).
        last_cell = np.subtract(self.map_size, 1)
        cells_xy = (locations_yx[..., ::-1].astype(np.float64) + 1) / 2 * last_cell
        model_xy = self.first_cell + self.cell_stride * cells_xy
        return pixel_map.to_image(model_xy).astype(np.float32)


def point_layers(network: DAT) -> tuple[PointLayer, ...]:
    """The geometry of every deformable layer, in the order of the engine's output."""
    layers = []
    for stage, block, attention in network.deformable_layers:
        height, width = network.config.map_size(stage)
        stride, first = network.config.cell_geometry(stage)
        reference = attention.reference_points.numpy()
        layers.append(PointLayer(stage, block, (width, height), stride, first, reference))
    return tuple(layers)
