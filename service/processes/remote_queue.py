"""The queues of the workers, as the tasks of a front end see them."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from threading import Lock
from time import monotonic, perf_counter
from typing import Any

import numpy as np
import structlog

from service.batching.admission import Admission, AdmissionControl, Refusal
from service.batching.gathering import too_late
from service.batching.queue import Empty, HeldPlace, Served, Turn
from service.batching.waiting import T, Turns
from service.errors import DeadlineExceeded, EngineUnavailable, WorkerLost
from service.metrics.model import ModelMetrics
from service.priority import Priority
from service.processes.arena import QUEUED, TAKEN, Arena, Slot, Slots
from service.processes.board import Board, SharedPlaces, WorkerState, class_of
from service.processes.channel import Channel
from service.processes.messages import Answer, Cancel, Failure, Ready, Submit, Withdrawn
from service.processes.shared_forecast import SharedForecast

log = structlog.get_logger(__name__)


class _Turn:
    """The turn of an image, with a slot for its pixels and its result.

    The slot is free again when nobody uses it: the turn is over, no decoder writes into it, and no
    worker has anything to do with it.

    Args:
        queue: of the model.
        slot: for the image.
    """

    def __init__(self, queue: "RemoteQueue", slot: Slot) -> None:
        self._queue = queue
        self._slot = slot
        self._loop = asyncio.get_running_loop()
        self._lock = Lock()
        self._users = 1  # of the slot

    def fill(self, work: Callable[[Empty], T]) -> T:
        """Do the work of decoding, into the slot."""
        with self._lock:
            if not self._users:
                raise too_late()
            self._users += 1
        try:
            return work(lambda shape: self._queue.arena.array(self._slot, shape))
        finally:
            if self._leave():
                self._loop.call_soon_threadsafe(self._queue.give_back, self._slot)

    async def submit(
        self, item: Any, admission: Admission, deadline: float, waited_s: float
    ) -> Served[Any]:
        """Queue the item of the image and wait for its answer; see `Batcher.submit`."""
        message = Submit(
            0,
            self._queue.model,
            self._slot,
            self._queue.arena.pack(item, self._slot),
            perf_counter() - waited_s,
            deadline,
            admission.since,
            admission.patient_until,
            admission.request_id,
            admission.priority,
            admission.due,
        )
        pending = Pending(message, self._loop.create_future(), self, admission)
        with self._lock:
            self._users += 1
        workers = self._queue.workers
        workers.submit(pending)
        try:
            async with asyncio.timeout_at(deadline):
                return await pending.future
        except TimeoutError:
            raise too_late() from None
        finally:
            if not pending.settled:
                workers.cancel(pending)

    def end(self) -> None:
        """Note that the turn is over, or that no worker has the item any more."""
        if self._leave():
            self._queue.give_back(self._slot)

    def _leave(self) -> bool:
        """Note that one does not use the slot any more, and say whether it was the last."""
        with self._lock:
            self._users -= 1
            return not self._users

    def give_place_back(self, priority: Priority) -> None:
        """Give back the place of an item whose caller left, and that no worker took."""
        self._queue.places.give_back(1, priority)


@dataclass(eq=False, slots=True)
class Pending:
    """An item that was submitted and has no answer yet.

    Attributes:
        message: that brings it to a worker.
        future: its answer.
        turn: of its image.
        admission: holds a place for it.
        link: to the worker that has it; `None` while it waits for one.
        left: whether its caller no longer waits.
        settled: whether no worker has anything to do with it any more.
    """

    message: Submit
    future: asyncio.Future[Served[Any]]
    turn: _Turn
    admission: Admission
    link: "Link | None" = None
    left: bool = False
    settled: bool = False


class Link:
    """The connection of a front end to one worker process, until that ends.

    Attributes:
        worker: index of the worker.
        channel: to it.
        ready: whether it runs batches.
        pending: items that it has, by their ids.
    """

    channel: Channel

    def __init__(self, worker: int) -> None:
        self.worker = worker
        self.ready = False
        self.pending: dict[int, Pending] = {}


class Workers:
    """The workers as one front end sees them: who gets an item, and what became of it.

    Args:
        board: of the server.
        row: of this front end on the board.
        arena: of this front end.

    Attributes:
        met: is set when the first worker runs batches.
    """

    def __init__(self, board: Board, row: int, arena: Arena) -> None:
        self._board = board
        self._row = row
        self._arena = arena
        self._links: dict[int, Link] = {}
        self._unsent: dict[int, Pending] = {}
        self._next = 0
        self.met = asyncio.Event()
        self._able: dict[int, bool] = {}  # which models can be run
        self._status = b""  # of the board, when that was looked at
        # Places that each worker gave back on our behalf, as far as it told us.
        self._known = np.zeros_like(board.taken[row])

    async def connect(self, worker: int, over: socket.socket) -> Channel:
        """Take a new worker process, which does not run batches yet; the one before has ended.

        Args:
            worker: its index.
            over: the socket to it.
        """
        if (before := self._links.get(worker)) is not None:
            self._lost(before)
        link = Link(worker)
        link.channel = await Channel.open(
            over, partial(self._receive, link), partial(self._lost, link)
        )
        self._links[worker] = link
        return link.channel

    def submit(self, pending: Pending) -> None:
        """Bring an item to the least loaded worker, or keep it until there is one."""
        self._next += 1
        pending.message = pending.message._replace(id=self._next)
        self._send(pending)

    def cancel(self, pending: Pending) -> None:
        """Note that nobody waits for an item any more; its slot is free once it is settled."""
        pending.left = True
        if pending.link is None:
            del self._unsent[pending.message.id]
            pending.admission.give_back()
            self._settle(pending)
            return
        pending.admission.forget()  # whether its place was given back, the worker will tell
        pending.link.channel.send(Cancel(pending.message.id))

    def look_after_waiting(self) -> None:
        """Bring the items that wait for a worker to one, or answer them if none comes in time.

        To be called again and again.
        """
        self._send_unsent()
        if not self._unsent or any(link.ready for link in self._links.values()):
            return
        back_at = float(self._board.back_at.min())
        for pending in list(self._unsent.values()):
            if back_at > pending.message.deadline and not pending.future.done():
                pending.future.set_exception(WorkerLost(max(1.0, back_at - monotonic())))

    def give_up(self) -> None:
        """Answer everything: this front end is at the end of its time to drain."""
        of_workers = (link.pending.values() for link in self._links.values())
        for pending in [*chain(*of_workers), *self._unsent.values()]:
            if not pending.future.done():
                pending.future.set_exception(
                    EngineUnavailable("it is not done at the end of the time to drain", "hung")
                )

    def able(self, model: int) -> bool:
        """Whether any worker that this front end knows can run a model."""
        if (status := self._board.status()) != self._status:
            self._able, self._status = {}, status
        if model not in self._able:
            able = self._board.able(model)
            links = self._links.values()
            self._able[model] = any(link.ready and able[link.worker] for link in links)
        return self._able[model]

    def forget(self, model: int) -> None:
        """Note that this front end has nothing of a version any more; another gets its place."""
        self._known[model] = 0

    def _receive(self, link: Link, message: Any) -> None:
        """Take what a worker tells."""
        if isinstance(message, Ready):
            link.ready = True
            self._able.clear()
            self.met.set()
            self._send_unsent()
            return
        pending = link.pending.pop(message.id)
        if isinstance(message, Withdrawn):
            pending.turn.give_place_back(pending.message.priority)
        else:
            self._count_taken(pending, link)
            if isinstance(message, Answer):
                served = self._arena.unpack(message.parcel, copy=True)
                if not pending.future.done():
                    pending.future.set_result(served)
            else:
                assert isinstance(message, Failure)
                if not pending.future.done():
                    pending.future.set_exception(message.error)
        self._settle(pending)

    def _lost(self, link: Link) -> None:
        """Answer what was on the device of a worker that ended; what waited goes on waiting."""
        if self._links.get(link.worker) is not link:
            return
        del self._links[link.worker]
        self._able.clear()
        log.warning("worker lost", worker=link.worker, images=len(link.pending))
        for pending in link.pending.values():
            if self._arena.taken[pending.message.slot.number] == TAKEN:
                self._count_taken(pending, link)
                if not pending.future.done():
                    pending.future.set_exception(WorkerLost())
                self._settle(pending)
            elif pending.left:
                pending.turn.give_place_back(pending.message.priority)
                self._settle(pending)
            else:
                pending.link = None
                self._unsent[pending.message.id] = pending
        # Nobody else writes these cells now, and the worker may have ended between two of them.
        board, row = self._board, self._row
        board.taken[row, :, link.worker] = self._known[:, link.worker]
        board.sent[row, link.worker] = board.done[row, link.worker]
        self._send_unsent()

    def _send(self, pending: Pending) -> None:
        link = self._least_loaded(pending.message.model)
        if link is None:
            self._unsent[pending.message.id] = pending
            return
        pending.link = link
        link.pending[pending.message.id] = pending
        self._arena.taken[pending.message.slot.number] = QUEUED
        self._board.sent[self._row, link.worker] += 1
        link.channel.send(pending.message)

    def _least_loaded(self, model: int) -> Link | None:
        """The worker that gets the next item of a model, if any can run it."""
        if not self.able(model):
            return None
        ready = [link for link in self._links.values() if link.ready]
        if len(ready) == 1:
            return ready[0]
        able, loads = self._board.able(model), self._board.loads()
        fit = (link for link in ready if able[link.worker])
        return min(fit, key=lambda link: loads[link.worker], default=None)

    def _send_unsent(self) -> None:
        unsent, self._unsent = self._unsent, {}
        for pending in unsent.values():
            self._send(pending)

    def _count_taken(self, pending: Pending, link: Link) -> None:
        message = pending.message
        self._known[message.model, link.worker, class_of(message.priority)] += 1
        if not pending.left:
            pending.admission.forget()

    def _settle(self, pending: Pending) -> None:
        pending.settled = True
        pending.turn.end()


class RemoteQueue:
    """The queue of one model, which the workers serve together; see `batching.queue.Queue`.

    Args:
        workers: that have the model.
        board: of the server.
        row: of this front end on the board.
        model: its index.
        queue_limit: most items admitted and not yet in a batch, of all front ends together.
        arena: of this front end.
        slots: of the model.
        ahead: images that may be decoded and not yet answered.
        kept: beyond these, of the upper class; together as many as there are slots.
        metrics: of the model.

    Attributes:
        workers: as above.
        model: likewise.
        arena: likewise.
        forecast: learns from the images and their callers.
        places: in the queue.
    """

    def __init__(
        self,
        workers: Workers,
        board: Board,
        row: int,
        model: int,
        *,
        queue_limit: int,
        arena: Arena,
        slots: Slots,
        ahead: int,
        kept: int,
        metrics: ModelMetrics,
    ) -> None:
        self.workers = workers
        self._board = board
        self.model = model
        self.arena = arena
        self._slots = slots
        self._ahead = Turns(ahead, kept)
        self.forecast = SharedForecast(board, model)
        self.places = SharedPlaces(board, row, model, queue_limit)
        self._admission = AdmissionControl(
            self.places,
            self.forecast,
            metrics,
            unavailable=self._unavailable,
            released=lambda: None,
        )

    @property
    def usable(self) -> bool:
        """Whether any worker can run the model."""
        return self.workers.able(self.model)

    def open(self) -> None:
        """Begin to admit."""
        self._admission.open()

    def begin_drain(self) -> None:
        """Stop admitting."""
        self._admission.drain()

    async def end(self) -> None:
        """Wait until no slot is used, when nobody asks any more; then give up the slots."""
        for _ in range(self._slots.count):
            await self._ahead.acquire("high", 0.0)
        self.workers.forget(self.model)
        self.arena.close_slots(self._slots)

    def refusal(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Refusal | None:
        """Why so many places could not be taken now; see `AdmissionControl.refusal`."""
        return self._admission.refusal(places, timeout_s, priority, decode_s)

    def check_room(
        self,
        places: int = 1,
        timeout_s: float | None = None,
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> None:
        """Refuse what could not be admitted now; see `AdmissionControl.check_room`.

        Raises:
            ServiceError: as said there.
        """
        self._admission.check_room(places, timeout_s, priority, decode_s)

    def admit(
        self,
        places: int,
        timeout_s: float | None = None,
        request_id: str = "",
        priority: Priority = "high",
        decode_s: float = 0.0,
    ) -> Admission:
        """Take places in the queue for a request; see `AdmissionControl.admit`.

        Raises:
            ServiceError: as said there.
        """
        return self._admission.admit(places, timeout_s, request_id, priority, decode_s)

    @asynccontextmanager
    async def ahead(self, place: HeldPlace, deadline: float) -> AsyncIterator[Turn]:
        """Wait for the turn of an image, in which it has a slot; see `Batcher.ahead`.

        Args:
            place: of the image.
            deadline: loop time after which the answer is of no use, seconds.

        Raises:
            DeadlineExceeded: the deadline passed first.
        """
        try:
            async with asyncio.timeout_at(deadline):
                await self._ahead.acquire(place.priority, place.due)
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed before the image was decoded") from None
        turn = _Turn(self, self._slots.take())
        try:
            yield turn
        finally:
            turn.end()

    def give_back(self, slot: Slot) -> None:
        """Let the next image have a slot."""
        self.arena.trim(slot)
        self._slots.give_back(slot)
        self._ahead.release()

    def _unavailable(self) -> EngineUnavailable | None:
        """Why nothing can be run now, if so."""
        if self.usable:
            return None
        ready = (self._board.state == WorkerState.READY).any()
        # One that can run it has not told this front end yet.
        if ready and not self._board.able(self.model).any():
            return EngineUnavailable(
                "the model fails again and again; ask another replica, or later: this one tries "
                "the model from time to time",
                "error",
            )
        return WorkerLost(max(1.0, float(self._board.back_at.min()) - monotonic()))
