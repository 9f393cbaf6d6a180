"""KServe: a custom predictor over its V1 protocol, which leaves a body that is no JSON as it is.

Its batcher is a sidecar in Go that an `InferenceService` of a Kubernetes cluster puts before the
predictor, for JSON alone; so the predictor has a small one: what waits when the engine is free is
a batch.
"""

import asyncio
from typing import Any

import kserve

from bench.peers.classifier import Classifier
from bench.peers.setting import Setting

SETTING = Setting.read()


class Classify(kserve.Model):
    """A predictor with an engine."""

    def __init__(self) -> None:
        super().__init__("classify")
        self._waiting: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._computing: asyncio.Task[None] | None = None
        self.load()

    def load(self) -> bool:
        """Load the engine."""
        self._classifier = Classifier(SETTING.threads, SETTING.batch)
        self.ready = True
        return self.ready

    async def predict(self, payload: bytes, *_: object) -> Any:
        """The payload is the JPEG."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((payload, answered))
        if self._computing is None:
            self._computing = asyncio.create_task(self._compute())
        return await answered

    async def _compute(self) -> None:
        await asyncio.sleep(SETTING.wait_ms / 1e3)
        while batch := self._waiting[: SETTING.batch]:
            del self._waiting[: len(batch)]
            answers = await asyncio.to_thread(self._classifier.answer, [jpeg for jpeg, _ in batch])
            for (_, answered), answer in zip(batch, answers, strict=True):
                answered.set_result(answer)
        self._computing = None


if __name__ == "__main__":
    kserve.ModelServer(
        http_port=SETTING.port,
        workers=SETTING.workers,
        enable_grpc=False,
        enable_latency_logging=False,
    ).start([Classify()])
