"""One detector on its device: loaded, warmed up, and run in batches of equally large images."""

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from time import perf_counter

import numpy as np
from torch import Tensor
from typing_extensions import override

from model.attention_weights import AttentionWeights
from model.cost import flops
from model.detection.detector import Detector, ExplainedFound
from model.detection.normalise import Normalise
from service.engine import bfloat16, gpu
from service.engine.asked import Layers, attention_of, by_layer, cells_of, flat
from service.engine.computing import Computing, memory_of
from service.engine.device import Device
from service.engine.engine import Engine
from service.engine.graphs import Capture, CudaCapture
from service.engine.items import DetectionInput, DetectionOutput, Wanted, wanted_of
from service.engine.pipeline import Pipeline
from service.engine.slots import Row
from service.metrics import ModelMetrics

# A batch gains nothing on a CPU, where one large image keeps all cores busy.
DEFAULT_MAX_BATCH = {"cpu": 1, "cuda": 8}
WARM_UP_SIZE = (320, 320)  # pixels

Size = tuple[int, int]


class DetectionEngine(Engine):
    """Runs batches of one detector on a device.

    All from pixels to what was found has one graph for each shape where the device has graphs.

    Args:
        dtype: of the features; `auto` means `gpu.default_dtype`.
        max_batch: most images in one batch; 0 means `DEFAULT_MAX_BATCH`, or the largest bucket.
        buckets: batch sizes of the graphs; empty means `default_buckets`.
        sizes: padded sizes `(H, W)` that are made ready by `load`, with a graph for each bucket.
        capture: how a graph is captured; `None` means CUDA graphs where there are kernels on CUDA,
            without which a detector waits for what it found, and none elsewhere.
    """

    def __init__(
        self,
        detector: Detector,
        device: Device,
        metrics: ModelMetrics,
        *,
        dtype: str = "auto",
        max_batch: int = 0,
        buckets: Sequence[int] = (),
        sizes: Sequence[Size] = (),
        capture: Capture | None = None,
    ) -> None:
        super().__init__(
            device,
            metrics,
            dtype=dtype,
            max_batch=max_batch,
            buckets=buckets,
            default_max_batch=DEFAULT_MAX_BATCH[device.torch_device.type],
        )
        self._detector: Detector | None = detector
        self._has_masks = detector.config.has_masks
        self._sizes = tuple(sizes)
        self._capture = capture
        self._pipeline: Pipeline[ExplainedFound] | None = None

    @override
    async def settle(self) -> None:
        await self._loaded.settle()

    @override
    def _load(self) -> Generator[None, None, Computing]:
        detector = self._detector
        assert detector is not None, "the model was unloaded: this is a bug"
        device = self._device.torch_device
        began = perf_counter()
        kernels = gpu.kernels_on(device)
        normalise = Normalise(self.dtype).to(device)
        detector.cast(self.dtype).to(device).eval()
        built = perf_counter()
        self._metrics.load_seconds["build"].set(built - began)
        if device.type == "cpu":
            bfloat16.advise(self.dtype, flops(detector.config.backbone))
        capture = self._capture
        if capture is None and kernels == "on":
            capture = CudaCapture(device)

        def find(
            pixels: Tensor,
            resized: Tensor,
            scales: Tensor,
            cells: Tensor | None = None,
            *,
            layers: Layers = (),
        ) -> ExplainedFound:
            images = normalise(pixels, resized)
            return detector.find(images, resized, scales, layers, cells)

        pipeline = Pipeline(
            self._device,
            find,
            self.buckets,
            self._metrics,
            capture=capture,
            # The detector itself forgets sizes after a while.
            reads=detector.backbone_for,
        )
        for size in self._sizes:
            detector.backbone_for(size)
        self._pipeline = pipeline
        yield from pipeline.capture_ahead([_row(_blank(size)) for size in self._sizes])
        self._metrics.load_seconds["warmup"].set(perf_counter() - built)
        return Computing(
            device=self._device.name,
            hardware=gpu.describe(device),
            backend="torch",
            dtype=self.dtype,
            kernels=kernels,
            tf32=gpu.tf32(device),
            graphs=len(pipeline),
            weights_bytes=memory_of(detector),
            graphs_bytes=pipeline.graphs_bytes,
            seconds=perf_counter() - began,
        )

    @override
    def _warm_ups(self) -> Iterator[Callable[[], object]]:
        blank = self._blank()
        warm_up = partial(
            self._loaded.warm_up, [_row(blank)], partial(_select, wanted=Wanted(points=True))
        )
        yield self._pace.timed(warm_up, blank.pixels.size)

    @override
    def _unload(self) -> None:
        if self._pipeline is not None:
            self._pipeline.forget()
        self._pipeline = self._detector = None

    @override
    def _blank(self) -> DetectionInput:
        # One of the sizes that are ready: another would push one of them out.
        return _blank(min(self._sizes, default=WARM_UP_SIZE))

    @property
    def _loaded(self) -> Pipeline[ExplainedFound]:
        assert self._pipeline is not None, "the model is not loaded: this is a bug"
        return self._pipeline

    @override
    def launch(self, batch: Sequence[DetectionInput]) -> Callable[[], list[DetectionOutput]]:
        wanted = wanted_of(batch)
        results = self._loaded.launch(
            [_row(item, wanted.attention) for item in batch],
            partial(_select, wanted=wanted),
            wanted.attention,
        )
        return lambda: _split(results(), batch, wanted.attention, masks=self._has_masks)


def _blank(size: Size) -> DetectionInput:
    return DetectionInput(np.zeros((*size, 3), np.uint8), size, (1.0, 1.0))


def _row(item: DetectionInput, layers: Layers = ()) -> Row:
    """What an image gives to each argument of what finds."""
    row = (
        item.pixels,
        np.array(item.resized, np.int64),
        np.array(item.scale_xy, np.float32),
    )
    return (*row, cells_of(item, layers)) if layers else row


def _select(outputs: ExplainedFound, *, wanted: Wanted) -> list[Tensor]:
    found, locations, attention = outputs
    explained = (*flat(attention), *(locations if wanted.points else ()))
    return [part for part in (*found, *explained) if part is not None]


def _split(
    selected: Sequence[Tensor], batch: Sequence[DetectionInput], layers: Layers, *, masks: bool
) -> list[DetectionOutput]:
    """The output of each image of a batch."""
    boxes, scores, labels, counts, *others = selected
    probabilities = others.pop(0).numpy() if masks else None
    end = len(AttentionWeights._fields) * len(layers)
    attention, locations = by_layer(others[:end]), [layer.numpy() for layer in others[end:]]
    return [
        DetectionOutput(
            boxes.numpy()[row, :count],
            scores.numpy()[row, :count],
            labels.numpy()[row, :count],
            None if probabilities is None else probabilities[row, :count],
            tuple(layer[row] for layer in locations) if item.wanted.points else (),
            attention_of(item, layers, attention, row),
        )
        for row, (item, count) in enumerate(zip(batch, counts.tolist(), strict=True))
    ]
