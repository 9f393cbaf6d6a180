"""The way of one image through the decoders, the queue and the device, step by step."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, NamedTuple, Self

from service.batching.admission import Admission
from service.batching.queue import Queue, Turn
from service.engine.items import Item
from service.errors import DeadlineExceeded, InvalidImage
from service.images.decode import Empty, Source
from service.images.decoders import DecodingRequest, T
from service.metrics.model import ModelMetrics


@dataclass(frozen=True)
class Timing:
    """Where the time of one image went, seconds, and the images in its batch."""

    decode_s: float
    queue_s: float
    compute_s: float
    batch_size: int


class Computed(NamedTuple):
    """The output of the device for an image, and where the time of that image went."""

    output: Any
    timing: Timing


@dataclass(frozen=True)
class RequestPassage:
    """What the images of one request have in common on their way.

    Attributes:
        queue: of the model.
        admission: their places in the queue.
        decoding: their turns at the decoders.
        deadline: loop time, seconds.
        metrics: of the model.
    """

    queue: Queue
    admission: Admission
    decoding: DecodingRequest
    deadline: float
    metrics: ModelMetrics

    def image(self, upload: Source | InvalidImage, pixels: int) -> "ImagePassage":
        """The way of one image, as a context.

        Args:
            upload: as it came, or why the transport could not get at it.
            pixels: that it says it has.
        """
        return ImagePassage(self, upload, pixels)


class ImagePassage:
    """One image: `decode` it, then `submit` what the device takes.

    Its place in the queue is given back at the end of the context if it was not submitted.
    """

    def __init__(self, request: RequestPassage, upload: Source | InvalidImage, pixels: int) -> None:
        self._request = request
        self._upload = upload
        self._pixels = pixels
        self._ahead = AsyncExitStack()
        self._turn: Turn | None = None
        self._submitted = False
        self._computed_at: float | None = None
        self._waited_s = self._decode_s = 0.0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._ahead.aclose()
        if not self._submitted:
            self._request.admission.give_back()
        if error is None and self._computed_at is not None:
            seconds = perf_counter() - self._computed_at
            self._request.metrics.stage["postprocess"].observe(seconds)

    async def decode(self, work: Callable[[Source, Empty], T]) -> T:
        """Make an upload the input of the model, in a thread, when it is this image's turn.

        Args:
            work: makes the input from the upload; where the pixels go it asks of its second
                argument, a function of their shape.

        Raises:
            InvalidImage: the bytes are not a usable image.
            DeadlineExceeded: the deadline passed first.
        """
        upload, request = self._upload, self._request
        if isinstance(upload, InvalidImage):
            raise upload
        came = perf_counter()
        ahead = request.queue.ahead(request.admission, request.deadline)
        turn = await self._ahead.enter_async_context(ahead)
        start = perf_counter()
        try:
            async with asyncio.timeout_at(request.deadline):
                prepared = await request.decoding.run(
                    self._pixels, lambda: turn.fill(lambda empty: work(upload, empty))
                )
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the image was decoded") from None
        self._turn = turn
        self._waited_s, self._decode_s = start - came, perf_counter() - start
        request.metrics.stage["decode"].observe(self._decode_s)
        return prepared

    async def submit(self, item: Item) -> Computed:
        """Queue an image for the device and wait for its output.

        Raises:
            DeadlineExceeded: the deadline passed first.
            EngineFailed: the image failed on the device.
            EngineUnavailable: the device was lost.
        """
        request, turn = self._request, self._turn
        assert turn is not None, "an image is decoded first"
        self._submitted = True
        async with self._ahead:
            served = await turn.submit(item, request.admission, request.deadline, self._waited_s)
        request.metrics.images.inc()
        self._computed_at = perf_counter()
        timing = Timing(self._decode_s, served.queue_s, served.compute_s, served.batch_size)
        return Computed(served.result, timing)
