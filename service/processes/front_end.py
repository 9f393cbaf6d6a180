"""A front end: both transports, the tasks and the decoders, before the queues of the workers."""

import asyncio
import os
import pickle
import signal
import socket
from collections.abc import Callable, Sequence
from math import ceil
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics

from service import process
from service.event_loop import measure_lag, open_loop_pool
from service.images.decoders import Decoders
from service.leaving import await_threads, end_stuck, leave_on_signal
from service.lifecycle import Lifecycle
from service.logs import LineWriter
from service.machine import cores, raise_open_files
from service.memory import give_back_when_quiet
from service.metrics import Metrics
from service.models.card import ModelFacts
from service.models.lineup import Lineup
from service.open_core import open_core, open_decoders
from service.ports import Ports
from service.processes.arena import Arena, plan
from service.processes.birth import Birth
from service.processes.channel import Line
from service.processes.heart import beat
from service.processes.messages import (
    Leave,
    Listening,
    Models,
    NewConnection,
    NewWorker,
    Opened,
    Serving,
)
from service.processes.remote_queue import RemoteQueue, Workers
from service.served_tasks import TASKS
from service.servers import Servers, open_servers
from service.settings import Limits, Settings
from service.tasks.catalogue import Catalogue
from service.tasks.core import AnyCore

_CLOSE_S = 2.0  # beyond the grace, to end what is idle
_LOOK_PERIOD_S = 0.1
# Images of a worker that may be on their way beside those on its device, in batches.
_DEPTH, _BATCHES_AHEAD = 2, 2
# Of a slot: pixels where the size of the input changes with the image, and results.
_LARGE_SLOT, _SMALL_SLOT = 4 << 20, 1 << 18


async def answer(birth: Birth, settings: Settings, lineup: Lineup, lines: LineWriter) -> None:
    """Run a front end until the supervisor says to leave, or SIGTERM does; then drain it.

    Args:
        birth: what the supervisor gave the process.
        settings: of the server.
        lineup: the models.
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
    catalogue = Catalogue()
    ports = Ports(None, birth.grpc, shared=True)
    async with (
        open_servers(TASKS, shared, ports, catalogue, front_end.lifecycle, metrics) as servers,
        asyncio.TaskGroup() as group,
    ):
        front_end.listen(servers, group)
        background = [
            group.create_task(beat(front_end.board, birth.row)),
            group.create_task(measure_lag(metrics)),
            group.create_task(give_back_when_quiet()),
            group.create_task(front_end.connect(catalogue, lineup, servers)),
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
        "decode_threads": limits.decode_threads or max(1, cores() // front_ends),
        "max_streams": ceil(limits.max_streams / front_ends),
    }
    connections = {"max_connections": ceil(server.connections / front_ends)}
    return settings.model_copy(
        update={
            "limits": Limits(**limits.model_dump() | own),
            "server": server.model_copy(update=connections),
        }
    )


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
        self.lifecycle = Lifecycle(
            lambda: not self.board.looping[0],
            lambda: any(queue.usable for queue in self._queues),
        )
        self._birth = birth
        self._settings = settings
        self._metrics = metrics
        self._decoders = decoders
        self._leave = leave
        self._queues: list[RemoteQueue] = []
        self._workers: Workers | None = None
        self._facts = asyncio.get_running_loop().create_future()
        self._take_connection: Callable[[int], None] = os.close
        self._come = asyncio.Queue[tuple[int, int]]()  # workers with the sockets to them
        self._line = Line(birth.open_line(), self._receive, lambda: os._exit(0))

    def listen(self, servers: Servers, group: asyncio.TaskGroup) -> None:
        """Take connections from now on."""

        def adopt(descriptor: int) -> None:
            group.create_task(self._adopt(servers, socket.socket(fileno=descriptor)))

        self._take_connection = adopt
        self._line.send(Listening())

    async def _adopt(self, servers: Servers, connection: socket.socket) -> None:
        def ended() -> None:
            self.board.closed[self._birth.row] += 1

        try:
            await servers.adopt(connection, ended)
        except OSError:
            ended()

    async def connect(self, catalogue: Catalogue, lineup: Lineup, servers: Servers) -> None:
        """Wait for the models and a worker, and from then on keep up with the workers."""
        facts: list[ModelFacts] = await self._facts
        size, slots = self._plan(facts)
        assert self._workers is not None
        catalogue.fill(self._cores, lineup.default)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._connect_workers(size, slots))
            await self._workers.met.wait()
            process.loaded()
            for queue in self._queues:
                queue.open()
            self.lifecycle.observe(lambda: servers.health.show(serving=self.lifecycle.ready))
            await self.lifecycle.start()
            self._line.send(Serving())
            await self._keep_up()

    async def drain(self, servers: Servers, metrics: Metrics) -> None:
        """Answer what is in flight, and no more."""
        server = self._settings.server
        await self.lifecycle.drain()
        metrics.draining.set(1)
        if self._queues:
            await asyncio.sleep(server.drain_delay_s)
        for queue in self._queues:
            queue.begin_drain()
        if self._workers is not None:
            # A little before the connections are cut, so that callers can still be told.
            asyncio.get_running_loop().call_later(0.9 * server.drain_grace_s, self._workers.give_up)
        await servers.stop(server.drain_grace_s)

    def _plan(self, facts: Sequence[ModelFacts]) -> tuple[int, int]:
        """Make room for the images of all models, and a queue and a core for each."""
        birth, count = self._birth, len(self.board.state)
        ahead = [
            ceil((count * _DEPTH + _BATCHES_AHEAD) * one.card.max_batch / birth.front_ends)
            for one in facts
        ]
        size, slots, of_models = plan(
            [(many, _slot_size(one)) for many, one in zip(ahead, facts, strict=True)]
        )
        arena = Arena(birth.arena, size, slots)
        self._workers = workers = Workers(self.board, birth.row, arena)
        self._cores: list[AnyCore] = []
        for model, one in enumerate(facts):
            card = one.card
            counted = self._metrics.add_model(
                card.name, card.version, card.task, one.queue_limit, card.device.split(",")
            )
            queue = RemoteQueue(
                workers,
                self.board,
                birth.row,
                model,
                queue_limit=one.queue_limit,
                arena=arena,
                slots=of_models[model],
                ahead=ahead[model],
                metrics=counted,
            )
            self._queues.append(queue)
            limits = self._settings.limits
            self._cores.append(open_core(one, queue, self._decoders, limits, counted, TASKS))
        return size, slots

    async def _connect_workers(self, size: int, slots: int) -> None:
        assert self._workers is not None
        while True:
            worker, descriptor = await self._come.get()
            over = socket.socket(fileno=descriptor)
            channel = await self._workers.connect(worker, over)
            channel.send(Opened(self._birth.row, size, slots))

    async def _keep_up(self) -> None:
        """Tell the observers of the lifecycle what changes on the board; for ever."""
        assert self._workers is not None
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
            # All processes have one position in this file.
            facts = os.pread(descriptors[0], os.fstat(descriptors[0]).st_size, 0)
            os.close(descriptors[0])
            if not self._facts.done():
                self._facts.set_result(pickle.loads(facts))  # noqa: S301  # from a worker of ours
        elif isinstance(message, Leave):
            self._leave.set()


def _slot_size(facts: ModelFacts) -> int:
    if facts.card.image_size is None:
        return _LARGE_SLOT
    height, width = facts.card.image_size
    return max(_SMALL_SLOT, height * width * 3)
