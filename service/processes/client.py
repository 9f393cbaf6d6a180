"""A front end as a worker sees it: items come, and each gets exactly one answer."""

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from typing import Any

from service.batching.batcher import Batcher
from service.batching.gathering import Entry
from service.errors import EngineFailed, ServiceError
from service.processes.arena import TAKEN, Arena
from service.processes.board import Board, class_of
from service.processes.channel import Channel
from service.processes.messages import (
    Answer,
    Cancel,
    Failure,
    Opened,
    Ready,
    Submit,
    Withdrawn,
)


class Client:
    """One front end, from its channel to its end.

    Args:
        row: of the front end on the board.
        arena: descriptor of its memory.
        board: of the server.
        worker: index of this worker.
        queues: of the versions that are loaded, by their places.
    """

    def __init__(
        self,
        row: int,
        arena: int,
        board: Board,
        worker: int,
        queues: Mapping[int, Batcher[Any, Any]],
    ) -> None:
        self._row = row
        self._descriptor = arena
        self._board = board
        self._worker = worker
        self._queues = queues
        self._arena: Arena | None = None
        self._channel: Channel | None = None
        self._items: dict[int, _Item] = {}
        self._here = True
        self._only_taken = False
        self._on_gone: Callable[[], object] = lambda: None

    async def open(self, channel: int, ready: asyncio.Event) -> None:
        """Listen to the front end, and tell it when batches are run.

        Args:
            channel: descriptor of the socket to it.
            ready: is set then.
        """
        over = socket.socket(fileno=channel)
        self._channel = await Channel.open(over, self._receive, self._gone)
        await ready.wait()
        self._channel.send(Ready())

    def on_gone(self, observer: Callable[[], object]) -> None:
        """Call an observer when the front end has ended."""
        self._on_gone = observer

    def answer_only_taken(self) -> None:
        """Leave what did not reach the device to other workers: this one ends."""
        self._only_taken = True

    def take(self, message: Submit) -> bool:
        """Note that an item leaves the queue for the device; its place is given back."""
        if self._only_taken or not self._here:
            return False
        assert self._arena is not None
        # In this order: a front end that finds the mark corrects the count.
        self._arena.taken[message.slot.number] = TAKEN
        of_class = class_of(message.priority)
        self._board.taken[self._row, message.model, self._worker, of_class] += 1
        return True

    def _receive(self, message: Any) -> None:
        if isinstance(message, Submit):
            self._submit(message)
        elif isinstance(message, Cancel):
            item = self._items.get(message.id)
            if item is not None and self._withdraw(item):
                self._end(item, Withdrawn(message.id))
        else:
            assert isinstance(message, Opened)
            self._arena = Arena(self._descriptor)

    def _submit(self, message: Submit) -> None:
        assert self._arena is not None
        place = _Place(self, message)
        entry = self._queues[message.model].enqueue(
            self._arena.unpack(message.parcel, copy=False),
            place,
            message.enqueued_at,
            message.deadline,
        )
        self._items[message.id] = item = _Item(message, entry, place)
        entry.future.add_done_callback(lambda _: self._answer(item))

    def _answer(self, item: "_Item") -> None:
        message, future = item.message, item.entry.future
        if future.cancelled():
            return
        error = future.exception()
        if not self._here or (self._only_taken and not item.place.taken):
            return
        if error is None:
            assert self._arena is not None
            parcel = self._arena.pack(future.result(), message.slot)
            self._end(item, Answer(message.id, parcel))
        elif isinstance(error, ServiceError):
            self._end(item, Failure(message.id, error.with_traceback(None)))
        else:
            self._end(item, Failure(message.id, EngineFailed("the image failed on the device")))

    def _withdraw(self, item: "_Item") -> bool:
        """Take an item out of the queue, and say whether it still was there."""
        withdrawn = self._queues[item.message.model].withdraw(item.entry)
        if withdrawn:
            # What waits for its answer would hold it, and with it the arena.
            item.entry.future.cancel()
        return withdrawn

    def _end(self, item: "_Item", answer: Answer | Failure | Withdrawn) -> None:
        assert self._channel is not None
        del self._items[item.message.id]
        self._board.done[self._row, self._worker] += 1
        self._channel.send(answer)

    def _gone(self) -> None:
        """Give up the items of a front end that ended."""
        self._here = False
        os.close(self._descriptor)
        for item in self._items.values():
            self._withdraw(item)
        self._items.clear()
        # The memory is given back with the last of its arrays that is on the device.
        self._arena = self._channel = None
        self._on_gone()


class _Place:
    """The place of an item in the queue; see `HeldPlace`.

    Attributes:
        request_id: of its request.
        since: as in `Submit`.
        patient_until: likewise.
        priority: likewise.
        due: likewise.
        taken: whether the item left for the device.
    """

    def __init__(self, client: Client, message: Submit) -> None:
        self.request_id = message.request_id
        self.since = message.since
        self.patient_until = message.patient_until
        self.priority = message.priority
        self.due = message.due
        self.taken = False
        self._client = client
        self._message = message

    def give_back(self) -> None:
        """Note that the item left the queue."""
        self.taken = self._client.take(self._message)


class _Item:
    """An item of the front end that has no answer yet."""

    __slots__ = ("entry", "message", "place")

    def __init__(self, message: Submit, entry: Entry[Any, Any], place: _Place) -> None:
        self.message = message
        self.entry = entry
        self.place = place
