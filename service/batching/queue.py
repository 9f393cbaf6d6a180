"""The queue of a model as those see it who ask for answers; `Batcher` is one, in this process."""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from service.batching.admission import Admission, Refusal
from service.batching.forecast import Forecast
from service.batching.waiting import T
from service.priority import Priority

Result = TypeVar("Result")

# Where pixels of a shape go.
Empty = Callable[[tuple[int, ...]], NDArray[np.uint8]]


@dataclass(frozen=True)
class Served(Generic[Result]):
    """An answer with the figures of its batch.

    Attributes:
        result: what the runner returned for the item.
        queue_s: from the queue to the device, seconds.
        compute_s: of the whole batch on the device, seconds.
        batch_size: items of the batch, without padding.
    """

    result: Result
    queue_s: float
    compute_s: float
    batch_size: int


class HeldPlace(Protocol):
    """The place of an item in the queue, and whose it is; see `Admission`."""

    @property
    def request_id(self) -> str:
        """Of the request."""

    @property
    def since(self) -> float:
        """When its caller asked; loop time, seconds."""

    @property
    def patient_until(self) -> float:
        """When its caller, as callers are, will have left; loop time, seconds."""

    @property
    def priority(self) -> Priority:
        """The class of the request."""

    @property
    def due(self) -> float:
        """From when on it counts as one of the upper class, loop time, seconds."""

    def give_back(self) -> None:
        """Note that the item left the queue."""


class Turn(Protocol):
    """The turn of one image to be decoded and submitted."""

    def fill(self, work: Callable[[Empty], T]) -> T:
        """Do the work of decoding, in a thread; its argument says where pixels of a shape go."""

    def submit(
        self, item: Any, admission: Admission, deadline: float, waited_s: float
    ) -> Awaitable[Served[Any]]:
        """Queue the item of the image and wait for its answer; see `Batcher.submit`."""


class Queue(Protocol):
    """What a task needs of the queue of a model, in this process or in another."""

    @property
    def forecast(self) -> Forecast:
        """Learns from the images and their callers."""

    def refusal(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Refusal | None:
        """Why so many places could not be taken now; see `AdmissionControl.refusal`."""

    def check_room(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> None:
        """Refuse what could not be admitted now; see `AdmissionControl.check_room`."""

    def admit(
        self,
        places: int,
        timeout_s: float | None = None,
        request_id: str = "",
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Admission:
        """Take places in the queue for a request; see `AdmissionControl.admit`."""

    def ahead(self, place: HeldPlace, deadline: float) -> AbstractAsyncContextManager[Turn]:
        """Wait for the turn of an image; see `Batcher.ahead`."""
