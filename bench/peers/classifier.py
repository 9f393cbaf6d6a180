"""What every peer computes with: our pre-processing and our engine, in its own process.

The engine is the one that the service opens, with the switches of a process that the service has
(`service.process`). It is called in the thread of the peer, without the threads between the
batcher and the device: what is measured of a peer is its own.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any

from prometheus_client import CollectorRegistry

from model import DAT
from model.transforms import Preprocessing
from service import process
from service.engine.classification import ClassificationEngine
from service.engine.device import Device
from service.engine.items import ClassificationInput
from service.images.decode import prepare
from service.metrics.replica import Metrics
from service.models.classification import CLASSIFICATION
from service.models.lineup import choose_models
from service.models.load import load
from service.settings.settings import Settings

TOP_K = 5


class Classifier:
    """The model of the settings (`DAT_MODEL__...`), loaded.

    Args:
        threads: that decode, and that compute.
        max_batch: most images at a time.
    """

    def __init__(self, threads: int, max_batch: int) -> None:
        process.begin()
        settings = Settings()
        loaded = load(choose_models(settings).find(None), [CLASSIFICATION])
        assert isinstance(loaded.network, DAT)
        self._labels = loaded.labels
        self._limits = settings.limits
        self._preprocessing = Preprocessing.of(loaded.config)
        unread = Metrics(CollectorRegistry()).add_model(loaded.name, "bench", "classify", 1)
        device = Device("cpu", threads)
        self._engine = ClassificationEngine(loaded.network, device, unread, max_batch=max_batch)
        self._decoders = ThreadPoolExecutor(threads, "decode", process.compute_alone)
        self._lock = Lock()
        # Some peers make it in their event loop.
        with ThreadPoolExecutor(1) as apart:
            apart.submit(lambda: asyncio.run(self._engine.load())).result()
        process.compute_alone()
        process.loaded()

    def answer(self, jpegs: Sequence[bytes]) -> list[dict[str, Any]]:
        """The classes of images, as JSON; from one thread or several."""
        decode = self._decoders.map if len(jpegs) > 1 else map
        inputs = list(decode(self._prepare, jpegs))
        with self._lock:
            outputs = self._engine.launch(inputs)()
        return [
            {
                "predictions": [
                    {"label": self._labels[index].name, "score": score}
                    for index, score in zip(
                        output.classes[:TOP_K].tolist(), output.scores[:TOP_K].tolist(), strict=True
                    )
                ]
            }
            for output in outputs
        ]

    def _prepare(self, jpeg: bytes) -> ClassificationInput:
        return ClassificationInput(prepare(jpeg, self._limits, self._preprocessing).pixels)
