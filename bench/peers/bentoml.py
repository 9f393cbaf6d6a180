"""BentoML: a service whose images come one by one, before one with adaptive batches.

That is how BentoML takes single images to batches: a batch is a list in its interface. Where
nothing is batched the first service computes itself, in as many processes as there are workers.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import bentoml
from bentoml.validators import ContentType

from bench.peers.classifier import Classifier
from bench.peers.setting import Setting

SETTING = Setting.read()
COMMON: Any = {"traffic": {"timeout": 60}, "logging": {"access": {"enabled": False}}}
Jpeg = Annotated[Path, ContentType("image/jpeg")]

if SETTING.batch > 1:

    @bentoml.service(workers=SETTING.workers, **COMMON)
    class Batches:
        """Processes with an engine each."""

        def __init__(self) -> None:
            self._classifier = Classifier(SETTING.threads, SETTING.batch)

        @bentoml.api(batchable=True, max_batch_size=SETTING.batch, max_latency_ms=60_000)
        def answer(self, jpegs: list[bytes]) -> list[Any]:
            """A batch."""
            return self._classifier.answer(jpegs)

    @bentoml.service(**COMMON)
    class InFront:
        """A process that speaks HTTP."""

        batches = bentoml.depends(Batches)

        @bentoml.api(route="/classify")
        async def classify(self, jpeg: Jpeg, /) -> Any:
            """The body is the JPEG."""
            return (await self.batches.to_async.answer([jpeg.read_bytes()]))[0]

    Classify: Any = InFront

else:

    @bentoml.service(workers=SETTING.workers, **COMMON)
    class Alone:
        """Processes that speak HTTP and compute, an image at a time."""

        def __init__(self) -> None:
            self._classifier = Classifier(SETTING.threads, 1)

        @bentoml.api(route="/classify")
        async def classify(self, jpeg: Jpeg, /) -> Any:
            """The body is the JPEG."""
            return (await asyncio.to_thread(self._classifier.answer, [jpeg.read_bytes()]))[0]

    Classify = Alone
