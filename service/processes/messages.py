"""What front ends and workers tell each other, and what the supervisor tells them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from service.errors import ServiceError
from service.models.lineup import ModelEntry
from service.priority import Priority
from service.processes.arena import Parcel, Slot

# Over a channel, from a front end to a worker


class Opened(NamedTuple):
    """The first message: the arena of the front end is there."""

    row: int


class Submit(NamedTuple):
    """An item for the queue of a model.

    Attributes:
        id: of the item, among those of the front end.
        model: the place of its version.
        slot: where the item lies and its result goes.
        parcel: of the item.
        enqueued_at: since when it waits; perf_counter, seconds, one clock for all processes.
        deadline: loop time, seconds, likewise.
        since: when its caller asked, loop time, seconds.
        patient_until: when its caller, as callers are, will have left; loop time, seconds.
        request_id: of its request.
        priority: the class of its request.
        due: from when on it counts as one of the upper class, loop time, seconds.
    """

    id: int
    model: int
    slot: Slot
    parcel: Parcel
    enqueued_at: float
    deadline: float
    since: float
    patient_until: float
    request_id: str
    priority: Priority
    due: float


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


class Load(NamedTuple):
    """To a worker: versions that it is to load, in memory; of the first message before it serves.

    Attributes:
        versions: of each the place and what it is made of.
    """

    versions: Sequence[tuple[int, ModelEntry]] = ()


class Loaded(NamedTuple):
    """From a worker: a version can be run; its `ModelFacts` in memory.

    Attributes:
        place: of the version.
        name: of the model.
        version: as answers call it.
    """

    place: int
    name: str
    version: str


class NotLoaded(NamedTuple):
    """From a worker: a version cannot be loaded."""

    place: int
    reason: str


class Unload(NamedTuple):
    """To a worker: no front end has anything of a version any more."""

    place: int


class Unloaded(NamedTuple):
    """From a worker: a version is gone, and its place on the board is not written any more."""

    place: int


class Models(NamedTuple):
    """To a front end: the versions that serve from now on; `{place: ModelFacts}`, in memory.

    Attributes:
        generation: counts these messages.
        default: name of the model that answers requests without a name.
    """

    generation: int
    default: str | None


class Follows(NamedTuple):
    """From a front end: what it has.

    Attributes:
        generation: of the newest `Models` that it follows.
        places: of its versions, those too whose last requests are under way.
    """

    generation: int
    places: tuple[int, ...]


class Ask(NamedTuple):
    """From a front end: what it asks of the `Repository` of the server.

    Attributes:
        id: of the question, among those of the front end.
        method: of the repository.
        model: that is to be loaded or unloaded.
    """

    id: int
    method: Literal["index", "statistics", "load", "unload"]
    model: str = ""


class Told(NamedTuple):
    """To a front end: the answer to a question, or a `ServiceError`, in memory."""

    id: int


class Listening(NamedTuple):
    """From a front end: it takes connections, and answers what it can without a model."""


class NewConnection(NamedTuple):
    """To a front end: an HTTP connection."""


class Serving(NamedTuple):
    """From a front end: it has the models and a worker."""


class Leave(NamedTuple):
    """To all: answer what is in flight, and end."""
