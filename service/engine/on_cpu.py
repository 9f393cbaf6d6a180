"""How a CPU runs a classifier: passes that were traced once, shared among its cores."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.cost import flops
from model.packing import pack
from model.tracing import trace
from service.engine.classify import Classify, Ranked
from service.engine.device import Device
from service.engine.graphs import pick_bucket
from service.engine.items import Wanted
from service.engine.openvino import OpenVinoClassify
from service.metrics import ModelMetrics
from service.settings import Backend

# From how many FLOPs of an image on several threads of a CPU compute it faster than one. Below,
# they wait for each other longer than they compute.
TEAM_FLOPS = 500_000_000


class OnCpu:
    """Runs batches of a classifier in the lanes of a CPU, or in OpenVINO.

    To be made in the thread of the device. Whatever is wanted is there after a pass, so nothing
    depends on it.

    Attributes:
        graphs: none.
        graphs_bytes: likewise.
    """

    graphs = 0
    graphs_bytes = 0

    def __init__(
        self,
        classify: Classify,
        buckets: Sequence[int],
        device: Device,
        metrics: ModelMetrics,
        *,
        backend: Backend,
        dtype: torch.dtype,
        cache: Path | None,
    ) -> None:
        image_size = classify.model.config.image_size
        self._buckets = buckets
        self._metrics = metrics
        self._staging = torch.zeros((buckets[-1], *image_size, 3), dtype=torch.uint8)
        self._compute = (
            _in_openvino(classify, buckets, device, dtype, cache)
            if backend == "openvino"
            else _in_lanes(classify, buckets, device, self._staging)
        )

    def launch(
        self, images: Sequence[NDArray[np.uint8]], _: Wanted
    ) -> Callable[[], Sequence[Ranked]]:
        """Run a batch; the function that is returned has its parts, each of some images."""
        padding = pick_bucket(len(images), self._buckets) - len(images)
        parts = self._run(images)
        self._metrics.real_rows.inc(len(images))
        self._metrics.padding_rows.inc(padding)
        self._metrics.replays["eager"].inc()
        return lambda: parts

    def forget(self) -> None:
        """Nothing: there are no graphs."""

    def warm_up(self, images: Sequence[NDArray[np.uint8]], _: Wanted) -> None:
        """Run a batch that counts nowhere."""
        self._run(images)

    def _run(self, images: Sequence[NDArray[np.uint8]]) -> Sequence[Ranked]:
        # Rows past the batch keep what an earlier one left.
        rows = self._staging[: pick_bucket(len(images), self._buckets)]
        for row, image in zip(rows.numpy(), images, strict=False):
            row[...] = image
        return self._compute(rows)


def _in_openvino(
    classify: Classify,
    buckets: Sequence[int],
    device: Device,
    dtype: torch.dtype,
    cache: Path | None,
) -> Callable[[Tensor], Sequence[Ranked]]:
    image_size = classify.model.config.image_size
    compiled = OpenVinoClassify(classify, image_size, buckets, device.threads, cache, dtype=dtype)
    return lambda pixels: [compiled(pixels)]


def _in_lanes(
    classify: Classify, buckets: Sequence[int], device: Device, staging: Tensor
) -> Callable[[Tensor], Sequence[Ranked]]:
    pack(classify.model)
    team = flops(classify.model.config) >= TEAM_FLOPS
    sizes = {size for n in buckets for size in device.lanes.share_sizes(n, team=team)}
    traced: dict[int, Callable[[Tensor], Ranked]] = {
        size: trace(classify, staging[:size]) for size in sizes
    }

    def compute(share: Tensor) -> Ranked:
        return traced[len(share)](share)

    return lambda pixels: device.lanes.map(
        lambda rows: compute(pixels[rows]), len(pixels), team=team
    )
