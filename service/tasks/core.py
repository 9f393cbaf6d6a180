"""What every task does with a request: encoded images in, one outcome for each of them out.

The only place where a request is understood: its limits, its deadline, and what becomes of each
of its images. A task adds its options and, in `Core.answer_image`, the way of one image.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from time import perf_counter
from typing import Any, Generic, Literal, TypeVar, cast

import structlog

from service.batching.admission import Refusal
from service.batching.queue import Queue
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
from service.images.decode import Source
from service.images.decoders import Decoders
from service.metrics.model import ModelMetrics
from service.models.card import Label, ModelCard
from service.pictures.compose import Thing
from service.pictures.regions import Regions
from service.priority import Priority
from service.settings.limits import Limits
from service.tasks.attention import AttendedLayer, AttentionOptions, Layer
from service.tasks.drawing import MEDIA_TYPES, Drawing, Drawn, Picture, draw
from service.tasks.passage import ImagePassage, RequestPassage, Timing
from service.tasks.points import LayerPoints

Explain = Literal["none", "points", "objects", "attention"]
# One image of a request: its bytes or pixels, or why the transport could not get at them.
Upload = Source | InvalidImage


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a request of any task may ask for.

    Attributes:
        model: name of the model; `None` means the default.
        explain: `points` adds the sampling locations; `objects`, of detectors alone, says of
            each object as well which of them lie inside; `attention` adds to the points what
            queries attend to.
        attention: whose attention, and in which layers; with `objects` it asks for attention too.
        timeout_s: time until the answer is of no use, seconds; `None` means the server's default.
        priority: `low` lets the requests of others go first.
        drawing: of the picture of the answer; `None` means that none is drawn.
    """

    model: str | None = None
    explain: Explain = "none"
    attention: AttentionOptions = field(default_factory=AttentionOptions)
    timeout_s: float | None = None
    priority: Priority = "high"
    drawing: Drawing | None = None

    @property
    def attends(self) -> bool:
        """Whether attention is asked for: alone, or beside the objects by what it may name."""
        named = self.attention != AttentionOptions()
        return self.explain == "attention" or (self.explain == "objects" and named)

    @property
    def long_answer(self) -> bool:
        """Whether to write the answer takes so long that the event loop should not wait."""
        return self.explain != "none"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the answer of every task has for an image.

    Attributes:
        width: of the uploaded image after its EXIF orientation, pixels.
        height: likewise.
        timing: where the time went.
        points: one entry for each deformable layer, or `None` when not asked for.
        attention: one entry for each layer that was asked for, or `None`.
        picture: of all this, or `None` when not asked for.
    """

    width: int
    height: int
    timing: Timing
    points: tuple[LayerPoints, ...] | None
    attention: tuple[AttendedLayer, ...] | None = None
    picture: Picture | None = None


TaskOptions = TypeVar("TaskOptions", bound=Options)
TaskAnswer = TypeVar("TaskAnswer", bound=Answer)

log = structlog.get_logger(__name__)


def show_each(
    outcomes: list[TaskAnswer | ServiceError], show: Callable[[TaskAnswer | ServiceError], Any]
) -> list[Any]:
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
    """Log the exception that is being handled, and give the failure that callers see."""
    log.exception(event)
    return Internal("internal error")


class Core(ABC, Generic[TaskOptions, TaskAnswer]):
    """Answers requests of one model.

    Attributes:
        card: what a caller may know of the model.
        labels: its classes, in order of the class index.
    """

    def __init__(
        self,
        card: ModelCard,
        labels: tuple[Label, ...],
        queue: Queue,
        *,
        decoders: Decoders,
        limits: Limits,
        metrics: ModelMetrics,
    ) -> None:
        self.card = card
        self.labels = labels
        self._queue = queue
        self._decoders = decoders
        self._limits = limits
        self._metrics = metrics

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the requests that it answers."""
        return (self.card.task,)

    @property
    def explained_layers(self) -> tuple[Layer, ...]:
        """The layers whose attention a request may name."""
        return ()

    @abstractmethod
    def check(self, options: TaskOptions) -> None:
        """Refuse options that this model cannot follow.

        Raises:
            InvalidOption: the message says which and why.
        """

    @abstractmethod
    async def answer_image(self, passage: ImagePassage, options: TaskOptions) -> TaskAnswer:
        """Decode an image, submit it to the device, and make the answer of the output.

        Raises:
            InvalidImage: the bytes are not a usable image.
            EngineFailed: the output of the device has values that are not numbers.
            ServiceError: the image could not be answered; see `service.errors`.
        """

    def answer_pixels(self, pixels: int) -> int:  # noqa: ARG002
        """How many decoded pixels take as much memory as the answer for an image, at most.

        Args:
            pixels: of the image.
        """
        return 0

    def things(self, answer: TaskAnswer) -> Sequence[Thing]:  # noqa: ARG002
        """The objects of an answer, for its picture."""
        return ()

    def regions(self, answer: TaskAnswer, drawing: Drawing) -> Regions | None:  # noqa: ARG002
        """What the pixels of an answer are, for its picture."""
        return None

    def request_read(self, after_s: float) -> None:
        """Note that a request, for whichever model, was read so long after it had come, seconds."""
        self._queue.forecast.request_read(after_s)

    def refusal(
        self, timeout_s: float | None = None, places: int = 1, priority: Priority = "high"
    ) -> Refusal | None:
        """Why so many images could not be admitted now, if so; asking counts nowhere."""
        return self._queue.refusal(places, timeout_s, priority, self._decoders.wait_s(priority))

    def check_room(
        self, timeout_s: float | None = None, places: int = 1, priority: Priority = "high"
    ) -> None:
        """Refuse, before a request is read, what could not be admitted.

        Args:
            timeout_s: after which the answer is of no use, seconds; `None` where that is not known.
            places: that are needed, as far as is known.
            priority: the class of the request, as far as is known.

        Raises:
            NotReady: the replica does not admit yet, or no longer.
            EngineUnavailable: nothing can be computed.
            Overloaded: the queue is full, or the answer would come too late.
        """
        self._queue.check_room(places, timeout_s, priority, self._decoders.wait_s(priority))

    async def answer(
        self, uploads: Sequence[Upload], options: TaskOptions, request_id: str = ""
    ) -> list[TaskAnswer | ServiceError]:
        """Answer for the images of one request.

        Args:
            uploads: its images.
            options: what it asks for.
            request_id: that its failures are logged with.

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
        outcomes = await self._outcomes(uploads, options, deadline, request_id)
        if len(outcomes) == 1 and isinstance(outcomes[0], ServiceError):
            # If this frame still held it, its traceback and the images would be a cycle.
            raise cast(ServiceError, outcomes.pop())
        return outcomes

    async def _outcomes(
        self, uploads: Sequence[Upload], options: TaskOptions, deadline: float, request_id: str
    ) -> list[TaskAnswer | ServiceError]:
        pixels = [self._declared_pixels(upload) for upload in uploads]
        self._check_pixels(sum(pixels))
        priority, drawing = options.priority, options.drawing
        decode_s = self._decoders.wait_s(priority, pixels)
        # What answers and pictures take is held from the start, so that none is refused when all is
        # computed.
        held = sum(size + self.answer_pixels(size) for size in pixels)
        if drawing is not None:
            held += sum(drawing.decoding_pixels(size, self._limits) for size in pixels)
        with (
            self._queue.admit(
                len(uploads), options.timeout_s, request_id, priority, decode_s
            ) as admission,
            self._decoders.request(held, priority, admission.due) as decoding,
        ):
            request = RequestPassage(self._queue, admission, decoding, deadline, self._metrics)
            images = [
                self._outcome(upload, size, options, request)
                for upload, size in zip(uploads, pixels, strict=True)
            ]
            if len(images) == 1:  # a task of its own would cost as much as all that it does
                outcomes = [await images[0]]
            else:
                async with asyncio.TaskGroup() as tasks:
                    running = [tasks.create_task(image) for image in images]
                outcomes = [task.result() for task in running]
            if not any(isinstance(outcome, ServiceError) for outcome in outcomes):
                admission.all_answered(self._metrics.foretold[priority])
            if drawing is not None:
                outcomes = [
                    await self._drawn(outcome, upload, size, drawing, request)
                    for outcome, upload, size in zip(outcomes, uploads, pixels, strict=True)
                ]
        return outcomes

    def _check(self, uploads: Sequence[Upload], options: TaskOptions) -> None:
        self.check(options)
        if not uploads:
            raise NoImages("the request holds no image")
        if len(uploads) > self._limits.max_images:
            raise TooManyImages(
                f"the request holds {len(uploads)} images; the limit is {self._limits.max_images}"
            )

    def _declared_pixels(self, upload: Upload) -> int:
        """The pixels that an image says it has, at most the limit: decoding refuses more."""
        if isinstance(upload, InvalidImage):
            return 0
        limit = self._limits.max_pixels
        declared = declared_pixels(upload) if isinstance(upload, bytes) else prod(upload.size)
        return limit if declared is None else min(declared, limit)

    def _check_pixels(self, pixels: int) -> None:
        limit = self._limits.max_request_pixels
        if pixels > limit:
            raise ImageTooLarge(
                "too_many_pixels",
                f"the images of the request have {pixels} pixels; its limit is {limit}",
            )

    async def _outcome(
        self, upload: Upload, pixels: int, options: TaskOptions, request: RequestPassage
    ) -> TaskAnswer | ServiceError:
        try:
            async with request.image(upload, pixels) as passage:
                return await self.answer_image(passage, options)
        # Without their tracebacks: those lead to frames that hold the image, and these failures.
        except InvalidImage as error:
            self._metrics.decode_errors[error.reason].inc()
            return error.with_traceback(None)
        except ServiceError as error:
            return error.with_traceback(None)
        except Exception:  # a bug that one image finds must not cost the others their answers
            return _internal("image failed")

    async def _drawn(
        self,
        outcome: TaskAnswer | ServiceError,
        upload: Upload,
        pixels: int,
        drawing: Drawing,
        request: RequestPassage,
    ) -> TaskAnswer | ServiceError:
        """An answer with its picture, which a decoder's thread draws; a failure as it is."""
        if isinstance(outcome, ServiceError):
            return outcome
        assert isinstance(upload, bytes), "what is no image has no answer"
        answer, start, limits = outcome, perf_counter(), self._limits

        def work() -> Drawn:
            regions = self.regions(answer, drawing)
            return draw(upload, limits, drawing, answer, self.things(answer), regions)

        try:
            async with asyncio.timeout_at(request.deadline):
                drawn = await request.decoding.run(drawing.decoding_pixels(pixels, limits), work)
        except TimeoutError:
            return DeadlineExceeded("the deadline passed before the picture was drawn")
        except ServiceError as error:
            return error.with_traceback(None)
        except Exception:  # a bug in a drawing is told and counted as one in an answer is
            return _internal("picture not drawn")
        render_s = perf_counter() - start
        self._metrics.stage["render"].observe(render_s)
        media_type = MEDIA_TYPES[drawing.form]
        picture = Picture(drawn.data, media_type, drawn.width, drawn.height, render_s)
        return replace(answer, picture=picture)


AnyCore = Core[Any, Any]
