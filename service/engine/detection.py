"""One detector on its device: loaded, warmed up, and run in batches of equally large images."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from numpy.typing import NDArray

from model.detection.detector import Detector
from model.detection.transforms import Normalise
from service.engine.device import Device
from service.metrics import ModelMetrics

# A batch gains nothing on a CPU, where one large image keeps all cores busy.
DEFAULT_MAX_BATCH = {"cpu": 1, "cuda": 8}
WARM_UP_SIZE = (320, 320)  # pixels


@dataclass(frozen=True)
class DetectionInput:
    """One image on its way to the device.

    Attributes:
        pixels: `(H, W, 3)` RGB bytes, resized and padded.
        resized: `(H, W)` without the padding, pixels.
        scale_xy: by which the image was enlarged.
        explain: whether its sampling locations are asked for.
    """

    pixels: NDArray[np.uint8]
    resized: tuple[int, int]
    scale_xy: tuple[float, float]
    explain: bool = False

    @property
    def padded_size(self) -> tuple[int, int]:
        """`(H, W)` with the padding; only images of one such size may share a batch."""
        height, width, _ = self.pixels.shape
        return height, width


@dataclass(frozen=True)
class DetectionOutput:
    """What the device says of one image.

    Attributes:
        boxes: `(N, 4)`, `(x1, y1, x2, y2)` in pixels of the image.
        scores: `(N,)`, best first.
        classes: `(N,)`, indices.
        mask_probabilities: `(N, 28, 28)` over each box, or `None` from a detector without masks.
        sampling_locations: for each deformable layer `(G, Hk, Wk, 2)`, (y, x), normalised as in
            `model.attention`; empty unless asked for.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    mask_probabilities: NDArray[np.float32] | None
    sampling_locations: tuple[NDArray[np.float32], ...] = ()


class DetectionEngine:
    """Runs batches of one detector on a device, in float32.

    Attributes:
        max_batch: most images in one batch.
    """

    def __init__(
        self, detector: Detector, device: Device, metrics: ModelMetrics, *, max_batch: int = 0
    ) -> None:
        self.max_batch = max_batch or DEFAULT_MAX_BATCH[device.torch_device.type]
        self._detector = detector
        self._device = device
        self._metrics = metrics

    async def load(self) -> None:
        """Move the detector to the device and run it once.

        Raises:
            RuntimeError: the device cannot be used.
        """
        await self._device.run(self._load)

    async def run_batch(self, batch: Sequence[DetectionInput]) -> list[DetectionOutput]:
        """Detect in at most `max_batch` images of one padded size; what the batcher calls.

        Raises:
            RuntimeError: the device failed.
        """
        return await self._device.run(lambda: self.forward(batch))

    def _load(self) -> None:
        device = self._device.torch_device
        start = perf_counter()
        self._normalise = Normalise().to(device)
        self._detector.to(device).eval()
        self._metrics.load_seconds["build"].set(perf_counter() - start)
        start = perf_counter()
        blank = np.zeros((*WARM_UP_SIZE, 3), np.uint8)
        self._run([DetectionInput(blank, WARM_UP_SIZE, (1.0, 1.0), explain=True)])
        self._metrics.load_seconds["warmup"].set(perf_counter() - start)

    def forward(self, batch: Sequence[DetectionInput]) -> list[DetectionOutput]:
        """Detect in a batch in the calling thread, which must be the device's after `load`."""
        outputs = self._run(batch)
        self._metrics.real_rows.inc(len(batch))
        self._metrics.replays["eager"].inc()
        return outputs

    def _run(self, batch: Sequence[DetectionInput]) -> list[DetectionOutput]:
        device = self._device.torch_device
        with torch.inference_mode():
            pixels = torch.from_numpy(np.stack([item.pixels for item in batch])).to(device)
            resized = torch.tensor([item.resized for item in batch], device=device)
            scales = torch.tensor([item.scale_xy for item in batch], device=device)
            images = self._normalise(pixels, resized)
            found, locations = self._detector.forward_explained(images, resized, scales)
            # One copy for the batch, and none where nobody asked.
            explained = (
                [layer.float().cpu().numpy() for layer in locations]
                if any(item.explain for item in batch)
                else []
            )
        return [
            DetectionOutput(
                one.boxes.cpu().numpy(),
                one.scores.cpu().numpy(),
                one.labels.cpu().numpy(),
                None if one.mask_probabilities is None else one.mask_probabilities.cpu().numpy(),
                tuple(layer[row] for layer in explained) if item.explain else (),
            )
            for row, (item, one) in enumerate(zip(batch, found, strict=True))
        ]
