"""What every task does with a request: encoded images in, one outcome for each of them out.

The only place where a request is understood: its limits, its deadline, and what becomes of each
of its images. A task adds its options, how it prepares an image and what it makes of the device's
output.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, Literal, TypeVar

from service.batcher import Admission, Batcher, Served
from service.errors import (
    DeadlineExceeded,
    InvalidImage,
    NoImages,
    ServiceError,
    TooManyImages,
)
from service.metrics import ModelMetrics
from service.served_model import Label, ModelCard
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


TaskOptions = TypeVar("TaskOptions", bound=Options)
Prepared = TypeVar("Prepared")
Item = TypeVar("Item")
Output = TypeVar("Output")
TaskAnswer = TypeVar("TaskAnswer", bound=Answer)


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
        workers: ThreadPoolExecutor,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        self.card = card
        self.labels = labels
        self._batcher = batcher
        self._workers = workers
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

    @property
    def has_room(self) -> bool:
        """Whether one more image would be admitted now; asking counts nowhere."""
        return self._batcher.has_room

    def check_room(self) -> None:
        """Refuse, before a request is read, what could not be admitted.

        Raises:
            NotReady: the replica does not admit yet.
            Draining: the replica no longer admits.
            Overloaded: the queue is full.
        """
        self._batcher.check_room()

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

    def _check(self, uploads: Sequence[Upload], options: TaskOptions) -> None:
        self.check(options)
        if not uploads:
            raise NoImages("the request holds no image")
        if len(uploads) > self._limits.max_images:
            raise TooManyImages(
                f"the request holds {len(uploads)} images; the limit is {self._limits.max_images}"
            )

    async def _outcome(
        self, upload: Upload, options: TaskOptions, admission: Admission, deadline: float
    ) -> TaskAnswer | ServiceError:
        try:
            return await self._answer(upload, options, admission, deadline)
        except InvalidImage as error:
            self._metrics.decode_errors[error.reason].inc()
            return error
        except ServiceError as error:
            return error

    async def _answer(
        self, upload: Upload, options: TaskOptions, admission: Admission, deadline: float
    ) -> TaskAnswer:
        start = perf_counter()
        try:
            prepared = await self._decode(upload, options, deadline)
        except ServiceError:
            admission.give_back()
            raise
        decode_s = perf_counter() - start
        self._metrics.stage["decode"].observe(decode_s)
        item = self.item(prepared, options)
        served = await self._batcher.submit(item, admission, deadline)
        self._metrics.images.inc()
        start = perf_counter()
        timing = Timing(decode_s, served.queue_s, served.compute_s, served.batch_size)
        answer = await self.finish(prepared, served, options, timing)
        self._metrics.stage["postprocess"].observe(perf_counter() - start)
        return answer

    async def _decode(self, upload: Upload, options: TaskOptions, deadline: float) -> Prepared:
        if isinstance(upload, InvalidImage):
            raise upload
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout_at(deadline):
                return await loop.run_in_executor(self._workers, self.prepare, upload, options)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the image was decoded") from None
