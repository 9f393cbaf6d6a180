"""What front ends and workers tell each other, and what the supervisor tells them."""

from typing import NamedTuple

from service.errors import ServiceError
from service.processes.arena import Parcel, Slot

# Over a channel, from a front end to a worker


class Opened(NamedTuple):
    """The first message: the arena of the front end."""

    row: int
    size: int
    slots: int


class Submit(NamedTuple):
    """An item for the queue of a model.

    Attributes:
        id: of the item, among those of the front end.
        model: its index.
        slot: where the item lies and its result goes.
        parcel: of the item.
        enqueued_at: since when it waits; perf_counter, seconds, one clock for all processes.
        deadline: loop time, seconds, likewise.
        patient_until: when its caller, as callers are, will have left; loop time, seconds.
        request_id: of its request.
    """

    id: int
    model: int
    slot: Slot
    parcel: Parcel
    enqueued_at: float
    deadline: float
    patient_until: float
    request_id: str


class Cancel(NamedTuple):
    """Nobody waits for an item any more; it is answered all the same, with `Withdrawn` at best."""

    id: int


# Over a channel, from a worker to a front end


class Ready(NamedTuple):
    """The worker can run batches."""


class Answer(NamedTuple):
    """What became of an item that left for the device: a `Served` in a parcel."""

    id: int
    parcel: Parcel


class Failure(NamedTuple):
    """What became of an item that failed; its place was given back."""

    id: int
    error: ServiceError


class Withdrawn(NamedTuple):
    """A cancelled item left the queue; its place was not given back."""

    id: int


# Between the supervisor and its children; the sockets and memory that belong to them go along


class NewFrontEnd(NamedTuple):
    """To a worker: a front end, with the channel to it and its arena."""

    row: int


class NewWorker(NamedTuple):
    """To a front end: a worker, with the channel to it."""

    worker: int


class Models(NamedTuple):
    """From a worker that read its models, and to every front end: their facts, in memory."""


class Listening(NamedTuple):
    """From a front end: it takes connections, and answers what it can without a model."""


class NewConnection(NamedTuple):
    """To a front end: an HTTP connection."""


class Serving(NamedTuple):
    """From a front end: it has the models and a worker."""


class Leave(NamedTuple):
    """To all: answer what is in flight, and end."""
