"""A front end: both transports, the tasks and the decoders, before the queues of the workers."""

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from math import ceil
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, disable_created_metrics

from service import process
from service.event_loop import measure_lag, open_loop_pool
from service.images.decoders import Decoders
from service.leaving import await_threads, end_stuck, leave_on_signal
from service.lifecycle import Lifecycle
from service.logs import LineWriter
from service.machine import raise_open_files
from service.memory import give_back_when_quiet
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from service.models.card import ModelFacts
from service.open_core import open_core, open_decoders
from service.ports import Ports
from service.processes.arena import Arena
from service.processes.birth import Birth
from service.processes.channel import Line, from_memory
from service.processes.heart import beat
from service.processes.messages import (
    Follows,
    Leave,
    Listening,
    Models,
    NewConnection,
    NewWorker,
    Opened,
    Serving,
    Told,
)
from service.processes.remote_queue import RemoteQueue, Workers
from service.processes.remote_repository import RemoteRepository
from service.security.security import open_security
from service.served_tasks import TASKS
from service.servers import Servers, open_servers
from service.settings.limits import Limits
from service.settings.settings import Settings
from service.tasks.catalogue import Catalogue, Held
from service.tasks.core import AnyCore

_CLOSE_S = 2.0  # beyond the grace, to end what is idle
_LOOK_PERIOD_S = 0.1
# Images of a worker that may be on their way beside those on its device, in batches.
_DEPTH, _BATCHES_AHEAD = 2, 2
# Of a slot: pixels where the size of the input changes with the image, and results.
_LARGE_SLOT, _SMALL_SLOT = 4 << 20, 1 << 18


async def answer(birth: Birth, settings: Settings, lines: LineWriter) -> None:
    """Run a front end until the supervisor says to leave, or SIGTERM does; then drain it.

    Args:
        birth: what the supervisor gave the process.
        settings: of the server.
        lines: of the log.

    Raises:
        StartupError: the gRPC port was taken meanwhile.
        RuntimeError: the system gives no more threads.
    """
    server = settings.server
    leave = leave_on_signal(server.drain_delay_s + server.drain_grace_s + _CLOSE_S, lines.flush)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes
    raise_open_files()
    process.leave_limits_to_us()
    disable_created_metrics()
    metrics = Metrics(CollectorRegistry())
    lines.on_dropped(metrics.log_lines_dropped.inc)
    of_loop = open_loop_pool()
    shared = share(settings, birth.front_ends)
    decoders = open_decoders(shared.limits, metrics)
    front_end = _FrontEnd(birth, shared, metrics, decoders, leave)
    ports = Ports(None, birth.grpc, shared=True)
    async with AsyncExitStack() as serving:
        security = await serving.enter_async_context(
            open_security(settings.security, metrics, 1 / birth.front_ends)
        )
        servers = await serving.enter_async_context(
            open_servers(
                TASKS,
                shared,
                ports,
                front_end.catalogue,
                front_end.lifecycle,
                metrics,
                security,
                front_end.repository,
            )
        )
        group = await serving.enter_async_context(asyncio.TaskGroup())
        front_end.listen(servers, group)
        background = [
            group.create_task(beat(front_end.board, birth.row)),
            group.create_task(front_end.show_connections(servers)),
            group.create_task(measure_lag(metrics)),
            group.create_task(give_back_when_quiet()),
            group.create_task(front_end.connect(servers)),
        ]
        await leave.wait()
        await front_end.drain(servers, metrics)
        for task in background:
            task.cancel()
    for pool in (of_loop, decoders.pool):
        pool.shutdown(wait=False, cancel_futures=True)
    if not await_threads(_CLOSE_S / 2):
        end_stuck(lines.flush)


def share(settings: Settings, front_ends: int) -> Settings:
    """The settings of one of several front ends: what is limited in all is shared by them."""
    limits, server = settings.limits, settings.server
    bytes_in_flight = max(limits.max_body_bytes, limits.bytes_in_flight // front_ends)
    pixels_in_flight = max(limits.max_request_pixels, limits.pixels_in_flight // front_ends)
    own = {
        "max_bytes_in_flight": bytes_in_flight,
        "max_pixels_in_flight": pixels_in_flight,
        "decode_threads": max(1, limits.decoders // front_ends),
        "max_streams": ceil(limits.max_streams / front_ends),
    }
    connections = {"max_connections": ceil(server.connections / front_ends)}
    return settings.model_copy(
        update={
            "limits": Limits(**limits.model_dump() | own),
            "server": server.model_copy(update=connections),
        }
    )


class _Served(NamedTuple):
    """A version of a model that this front end answers for.

    Attributes:
        queue: of the workers for it.
        core: answers for it.
        metrics: of the model.
    """

    queue: RemoteQueue
    core: AnyCore
    metrics: ModelMetrics


class _FrontEnd:
    """What a front end has of the workers."""

    def __init__(
        self,
        birth: Birth,
        settings: Settings,
        metrics: Metrics,
        decoders: Decoders,
        leave: asyncio.Event,
    ) -> None:
        self.board = birth.open_board()
        self.catalogue = Catalogue()
        self.lifecycle = Lifecycle(
            lambda: not self.board.looping[0],
            lambda: any(served.queue.usable for served in self._serving.values()),
        )
        self._birth = birth
        self._settings = settings
        self._metrics = metrics
        self._decoders = decoders
        self._leave = leave
        self._arena = Arena(birth.arena)
        self._workers = Workers(self.board, birth.row, self._arena)
        self._serving: dict[int, _Served] = {}
        # Versions whose last requests are under way.
        self._ending: dict[int, tuple[RemoteQueue, asyncio.Task[None]]] = {}
        self._models_came = asyncio.Event()
        self._generation = -1
        self._received = 0
        self._take_connection: Callable[[int], None] = os.close
        self._come = asyncio.Queue[tuple[int, int]]()  # workers with the sockets to them
        self._line = Line(birth.open_line(), self._receive, lambda: os._exit(0))
        self.repository = RemoteRepository(self._line)

    def listen(self, servers: Servers, group: asyncio.TaskGroup) -> None:
        """Take connections from now on."""

        def adopt(descriptor: int) -> None:
            self._received += 1
            group.create_task(self._adopt(servers, socket.socket(fileno=descriptor)))

        self._take_connection = adopt
        self._line.send(Listening())

    async def _adopt(self, servers: Servers, connection: socket.socket) -> None:
        with suppress(OSError):  # its client has left already
            await servers.adopt(connection)

    async def show_connections(self, servers: Servers) -> None:
        """Show on the board how many connections there are; for ever."""
        while True:
            self.board.balance[self._birth.row] = servers.connections - self._received
            await asyncio.sleep(_LOOK_PERIOD_S)

    async def connect(self, servers: Servers) -> None:
        """Wait for the models and a worker, and from then on keep up with the workers."""
        await self._models_came.wait()
        async with asyncio.TaskGroup() as group:
            group.create_task(self._connect_workers())
            await self._workers.met.wait()
            process.loaded()
            self._begin()
            self.lifecycle.observe(lambda: servers.health.show(serving=self.lifecycle.ready))
            await self.lifecycle.start()
            self._line.send(Serving())
            await self._keep_up()

    def _begin(self) -> None:
        """Admit requests."""
        for served in self._serving.values():
            served.queue.open()

    async def drain(self, servers: Servers, metrics: Metrics) -> None:
        """Answer what is in flight, and no more."""
        server = self._settings.server
        await self.lifecycle.drain()
        metrics.draining.set(1)
        if self._serving:
            await asyncio.sleep(server.drain_delay_s)
        for _, ending in self._ending.values():
            ending.cancel()
        # A little before the connections are cut, so that callers can still be told.
        asyncio.get_running_loop().call_later(0.9 * server.drain_grace_s, self._workers.give_up)
        await servers.stop(server.drain_grace_s, self._begin_drain)

    def _begin_drain(self) -> None:
        """Admit no request more."""
        for served in self._serving.values():
            served.queue.begin_drain()
        for queue, _ in self._ending.values():
            queue.begin_drain()

    def _follow(self, message: Models, models: Mapping[int, ModelFacts]) -> None:
        """Let the versions that serve now have the requests that come; those before end theirs."""
        gone = [place for place in self._serving if place not in models]
        names = {facts.card.name for facts in models.values()}
        for place in gone:
            served = self._serving.pop(place)
            if served.core.card.name in names:
                served.metrics.hide()
            else:
                served.metrics.forget()
            ending = asyncio.create_task(self._end(place, served.queue, Held(served.core)))
            self._ending[place] = served.queue, ending
        for place, facts in models.items():
            if place not in self._serving:
                self._serving[place] = self._open(place, facts)
        self.catalogue.fill([self._serving[place].core for place in models], message.default)
        self._generation = message.generation
        self._models_came.set()
        self._tell()

    async def _end(self, place: int, queue: RemoteQueue, held: Held) -> None:
        """Wait until a version has answered its last request, and say so."""
        await held.end()
        await queue.end()
        del self._ending[place]
        self._tell()

    def _tell(self) -> None:
        self._line.send(Follows(self._generation, (*self._serving, *self._ending)))

    def _open(self, place: int, facts: ModelFacts) -> _Served:
        """Make room for the images of a version, and a queue and a core for it."""
        birth, workers = self._birth, len(self.board.state)
        card = replace(facts.card, device=self._devices(facts.card.device))
        batches = workers * _DEPTH + _BATCHES_AHEAD
        ahead = ceil(batches * card.max_batch / birth.front_ends)
        # The upper class may be half a batch further ahead, rather than wait for the lower one.
        kept = ceil(card.max_batch / 2)
        limits, shown = self._settings.limits, replace(facts, card=card)
        slots = self._arena.open_slots(ahead + kept, _slot_size(facts, limits))
        metrics = self._metrics.add_model(
            card.name, card.version, card.task, facts.queue_limit, devices=()
        )
        queue = RemoteQueue(
            self._workers,
            self.board,
            birth.row,
            place,
            queue_limit=facts.queue_limit,
            arena=self._arena,
            slots=slots,
            ahead=ahead,
            kept=kept,
            metrics=metrics,
        )
        if self.lifecycle.started:
            queue.open()
        core = open_core(shown, queue, self._decoders, limits, metrics, TASKS)
        return _Served(queue, core, metrics)

    def _devices(self, of_one: str) -> str:
        """The devices of all workers, from that of one of them."""
        named = self._settings.engine.device
        return named if "," in named else of_one

    async def _connect_workers(self) -> None:
        while True:
            worker, descriptor = await self._come.get()
            over = socket.socket(fileno=descriptor)
            channel = await self._workers.connect(worker, over)
            channel.send(Opened(self._birth.row))

    async def _keep_up(self) -> None:
        """Tell the observers of the lifecycle what changes on the board; for ever."""
        seen = None
        while True:
            self._workers.look_after_waiting()
            if seen != (now := (self.lifecycle.live, self.lifecycle.ready)):
                seen = now
                self.lifecycle.changed()
            await asyncio.sleep(_LOOK_PERIOD_S)

    def _receive(self, message: Any, descriptors: Sequence[int]) -> None:
        if isinstance(message, NewConnection):
            self._take_connection(descriptors[0])
        elif isinstance(message, NewWorker):
            self._come.put_nowait((message.worker, descriptors[0]))
        elif isinstance(message, Models):
            self._follow(message, from_memory(descriptors[0]))
        elif isinstance(message, Told):
            self.repository.take(message, descriptors[0])
        elif isinstance(message, Leave):
            self._leave.set()


def _slot_size(facts: ModelFacts, limits: Limits) -> int:
    task = next(task for task in TASKS if task.name == facts.card.task)
    if facts.card.image_size is None:
        return max(_LARGE_SLOT, task.output_bytes * limits.max_pixels)
    height, width = facts.card.image_size
    return max(_SMALL_SLOT, height * width * 3)
