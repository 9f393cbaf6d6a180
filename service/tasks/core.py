"""What every task does with a request: encoded images in, one outcome for each of them out.

The only place where a request is understood: its limits, its deadline, and what becomes of each
of its images. A task adds its options, how it prepares an image and what it makes of the device's
output.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Literal, TypeVar, cast

import structlog

from service.batching.batcher import Admission, Batcher, Refusal, Served
from service.errors import (
    DeadlineExceeded,
    ImageTooLarge,
    Internal,
    InvalidImage,
    NoImages,
    ServiceError,
    TooManyImages,
)
from service.images.containers import declared_pixels
from service.images.decoders import Decoders, DecodingRequest
from service.metrics import ModelMetrics
from service.models.load import Label, ModelCard
from service.settings import Limits

Explain = Literal["none", "points", "objects"]
# One image of a request: its bytes, or why the transport could not get at them.
Upload = bytes | InvalidImage


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request of any task may ask for.

    Attributes:
        model: name of the model; `None` means the default.
        explain: `points` adds the sampling locations; `objects`, of detectors alone, says of
            each object as well which of them lie inside.
        timeout_s: time until the answer is of no use, seconds; `None` means the server's default.
    """

    model: str | None = None
    explain: Explain = "none"
    timeout_s: float | None = None


@dataclass(frozen=True)
class Timing:
    """Where the time of one image went, seconds, and the images in its batch."""

    decode_s: float
    queue_s: float
    compute_s: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What every task says of an image.

    Attributes:
        width: of the uploaded image after its EXIF orientation, pixels.
        height: likewise.
        timing: where the time went.
    """

    width: int
    height: int
    timing: Timing


@dataclass(frozen=True)
class _Request:
    """What the images of one request have in common.

    Attributes:
        admission: their places in the queue.
        decoding: their turns at the decoders.
        deadline: loop time, seconds.
    """

    admission: Admission
    decoding: DecodingRequest
    deadline: float


TaskOptions = TypeVar("TaskOptions", bound=Options)
Prepared = TypeVar("Prepared")
Item = TypeVar("Item")
Output = TypeVar("Output")
TaskAnswer = TypeVar("TaskAnswer", bound=Answer)
Shown = TypeVar("Shown")

log = structlog.get_logger(__name__)


def show_each(
    outcomes: list[TaskAnswer | ServiceError], show: Callable[[TaskAnswer | ServiceError], Shown]
) -> list[Shown]:
    """Every outcome in the form of a transport.

    An answer that cannot be shown fails alone: in `outcomes` as well its failure takes its place.

    Args:
        outcomes: of one request, as `Core.answer` returned them.
        show: gives one of them that form.

    Raises:
        Internal: the only answer of the request cannot be shown.
    """
    shown = []
    for index, outcome in enumerate(outcomes):
        try:
            shown.append(show(outcome))
        except Exception:
            failure = _internal("answer not shown")
            if len(outcomes) == 1:
                raise failure from None
            outcomes[index] = failure
            shown.append(show(failure))
    return shown


def _internal(event: str) -> Internal:
    """A failure for the exception that is being handled, which goes to the log."""
    log.exception(event)
    return Internal("internal error")


class Core(ABC, Generic[TaskOptions, Prepared, Item, Output, TaskAnswer]):
    """Answers requests of one model.

    Attributes:
        card: what a caller may know of the model.
        labels: its classes, in order of the class index.
    """

    def __init__(
        self,
        card: ModelCard,
        labels: tuple[Label, ...],
        batcher: Batcher[Item, Output],
        *,
        decoders: Decoders,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        self.card = card
        self.labels = labels
        self._batcher = batcher
        self._decoders = decoders
        self._limits = limits
        self._metrics = metrics

    @abstractmethod
    def check(self, options: TaskOptions) -> None:
        """Refuse options that this model cannot follow.

        Raises:
            InvalidOption: the message says which and why.
        """

    @abstractmethod
    def prepare(self, upload: bytes, options: TaskOptions) -> Prepared:
        """Decode an upload and make it the input of the model; runs in a worker's thread.

        Raises:
            InvalidImage: not a usable image.
        """

    @abstractmethod
    def item(self, prepared: Prepared, options: TaskOptions) -> Item:
        """What the batcher takes."""

    @abstractmethod
    async def finish(
        self, prepared: Prepared, served: Served[Output], options: TaskOptions, timing: Timing
    ) -> TaskAnswer:
        """The answer for an image, from what the device said of it.

        Raises:
            EngineFailed: the device gave no numbers.
        """

    def refusal(self, timeout_s: float | None = None, places: int = 1) -> Refusal | None:
        """Why so many images could not be admitted now, if so; asking counts nowhere."""
        return self._batcher.refusal(places, timeout_s)

    def check_room(self, timeout_s: float | None = None, places: int = 1) -> None:
        """Refuse, before a request is read, what could not be admitted.

        Args:
            timeout_s: after which the answer is of no use, seconds; `None` where that is not known.
            places: that are needed, as far as is known.

        Raises:
            NotReady: the replica does not admit yet, or no longer.
            EngineUnavailable: nothing can be computed.
            Overloaded: the queue is full, or the answer would come too late.
        """
        self._batcher.check_room(places, timeout_s)

    async def answer(
        self, uploads: Sequence[Upload], options: TaskOptions
    ) -> list[TaskAnswer | ServiceError]:
        """Answer for the images of one request.

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
        if options.explain != "none":
            self._metrics.explained[options.explain].inc()
        outcomes = await self._outcomes(uploads, options, deadline)
        if len(outcomes) == 1 and isinstance(outcomes[0], ServiceError):
            # If this frame still held it, its traceback and the images would be a cycle.
            raise cast(ServiceError, outcomes.pop())
        return outcomes

    async def _outcomes(
        self, uploads: Sequence[Upload], options: TaskOptions, deadline: float
    ) -> list[TaskAnswer | ServiceError]:
        pixels = [self._declared_pixels(upload) for upload in uploads]
        self._check_pixels(sum(pixels))
        with (
            self._batcher.admit(len(uploads), options.timeout_s) as admission,
            self._decoders.request(sum(pixels)) as decoding,
        ):
            request = _Request(admission, decoding, deadline)
            async with asyncio.TaskGroup() as tasks:
                running = [
                    tasks.create_task(self._outcome(upload, size, options, request))
                    for upload, size in zip(uploads, pixels, strict=True)
                ]
        return [task.result() for task in running]

    def _check(self, uploads: Sequence[Upload], options: TaskOptions) -> None:
        self.check(options)
        if not uploads:
            raise NoImages("the request holds no image")
        if len(uploads) > self._limits.max_images:
            raise TooManyImages(
                f"the request holds {len(uploads)} images; the limit is {self._limits.max_images}"
            )

    def _declared_pixels(self, upload: Upload) -> int:
        """What an image says that it has; more than the limit is refused when it is decoded."""
        if isinstance(upload, InvalidImage):
            return 0
        declared, limit = declared_pixels(upload), self._limits.max_pixels
        return limit if declared is None else min(declared, limit)

    def _check_pixels(self, pixels: int) -> None:
        limit = self._limits.max_request_pixels
        if pixels > limit:
            raise ImageTooLarge(
                "too_many_pixels",
                f"the images of the request have {pixels} pixels; its limit is {limit}",
            )

    async def _outcome(
        self, upload: Upload, pixels: int, options: TaskOptions, request: _Request
    ) -> TaskAnswer | ServiceError:
        try:
            return await self._answer(upload, pixels, options, request)
        # Without their tracebacks: those lead to frames that hold the image, and these failures.
        except InvalidImage as error:
            self._metrics.decode_errors[error.reason].inc()
            return error.with_traceback(None)
        except ServiceError as error:
            return error.with_traceback(None)
        except Exception:  # a bug that one image finds must not cost the others their answers
            return _internal("image failed")

    async def _answer(
        self, upload: Upload, pixels: int, options: TaskOptions, request: _Request
    ) -> TaskAnswer:
        came = perf_counter()
        async with self._batcher.ahead(request.deadline):
            start = perf_counter()
            waited_s = start - came
            try:
                prepared = await self._decode(upload, pixels, options, request)
            except Exception:
                request.admission.give_back()
                raise
            decode_s = perf_counter() - start
            self._metrics.stage["decode"].observe(decode_s)
            served = await self._batcher.submit(
                self.item(prepared, options), request.admission, request.deadline, waited_s
            )
        self._metrics.images.inc()
        start = perf_counter()
        timing = Timing(decode_s, served.queue_s, served.compute_s, served.batch_size)
        answer = await self.finish(prepared, served, options, timing)
        self._metrics.stage["postprocess"].observe(perf_counter() - start)
        return answer

    async def _decode(
        self, upload: Upload, pixels: int, options: TaskOptions, request: _Request
    ) -> Prepared:
        if isinstance(upload, InvalidImage):
            raise upload

        def work() -> tuple[Prepared, float]:
            start = perf_counter()
            return self.prepare(upload, options), perf_counter() - start

        try:
            async with asyncio.timeout_at(request.deadline):
                prepared, seconds = await request.decoding.run(pixels, work)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the image was decoded") from None
        self._batcher.forecast.decoded(seconds)
        return prepared
