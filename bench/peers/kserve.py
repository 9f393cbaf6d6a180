"""KServe: a custom predictor over its V1 protocol, which leaves a body that is no JSON as it is.

Its batcher is a sidecar in Go that an `InferenceService` of a Kubernetes cluster puts before the
predictor, for JSON alone; so the predictor has a small one: what waits when the engine is free is
a batch.
"""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import kserve
from kserve.logging import KSERVE_LOG_CONFIG

from bench.peers.setting import Setting

if TYPE_CHECKING:
    from bench.peers.classifier import Classifier

SETTING = Setting.read()
KSERVE_LOG_CONFIG["loggers"]["uvicorn.access"]["level"] = "WARNING"


class Classify(kserve.Model):
    """A predictor with an engine.

    KServe pickles the one of its first process for its workers, and kills a worker that cannot say
    within five seconds that it lives, so torch and the engine are loaded in another thread.
    """

    def __init__(self, *, loaded: bool = True) -> None:
        super().__init__("classify")
        self._waiting: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._computing: asyncio.Task[None] | None = None
        self.ready = True
        self._classifier = ThreadPoolExecutor(1).submit(_load) if loaded else None

    def __reduce__(self) -> Any:
        return Classify, ()

    async def predict(self, payload: bytes, *_: object) -> Any:
        """The payload is the JPEG."""
        answered: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((payload, answered))
        if self._computing is None:
            self._computing = asyncio.create_task(self._compute())
        return await answered

    async def _compute(self) -> None:
        if SETTING.batch > 1:
            await asyncio.sleep(SETTING.wait_ms / 1e3)
        while batch := self._waiting[: SETTING.batch]:
            del self._waiting[: len(batch)]
            answers = await asyncio.to_thread(self._answer, [jpeg for jpeg, _ in batch])
            for (_, answered), answer in zip(batch, answers, strict=True):
                answered.set_result(answer)
        self._computing = None

    def _answer(self, jpegs: list[bytes]) -> Any:
        assert self._classifier is not None
        return self._classifier.result().answer(jpegs)


def _load() -> "Classifier":
    from bench.peers.classifier import Classifier  # noqa: PLC0415  # so that a worker begins soon

    return Classifier(SETTING.threads, SETTING.batch)


if __name__ == "__main__":
    kserve.ModelServer(
        http_port=SETTING.port,
        workers=SETTING.workers,
        enable_grpc=False,
        enable_latency_logging=False,
    ).start([Classify(loaded=SETTING.workers == 1)])
