"""The supervisor: starts front ends and workers, replaces those that end, and drains them."""

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics

from service.command_errors import CommandError
from service.http_server import serve_metrics
from service.leaving import leave_on_signal
from service.logs import LineWriter
from service.machine import raise_open_files
from service.metrics.replica import Metrics
from service.models.lineup import Lineup
from service.ports import Ports, reserve_grpc
from service.processes.acceptor import Acceptor, Door
from service.processes.birth import Birth
from service.processes.board import Board, Extent, WorkerState
from service.processes.channel import pair
from service.processes.child import Child
from service.processes.heart import Pulse
from service.processes.merged_metrics import MergedMetrics, registry_of
from service.processes.messages import (
    Ask,
    Follows,
    Leave,
    Listening,
    NewFrontEnd,
    NewWorker,
    Serving,
)
from service.processes.remote_repository import answer_for
from service.processes.rollout import Rollout, places
from service.reloading import Reloads
from service.settings.settings import Settings

log = structlog.get_logger(__name__)

_LOOK_PERIOD_S = 0.25
# An event loop that does not turn for so long will not come back, seconds. A machine may stop for
# less, and so may a process that somebody looks at.
_SILENT_S = 10.0
# One that does not turn for so long gets no more connections for the time being.
_STILL_S = 0.75
_CLOSE_S = 3.0
_WORKERS_S = 2.0


class ChildFailed(CommandError):
    """A process could not start; it has said why."""


async def supervise(
    settings: Settings,
    lineup: Lineup,
    ports: Ports,
    metrics_port: socket.socket,
    lines: LineWriter,
    *,
    front_ends: int,
    folder: Path,
) -> None:
    """Run a server of many processes until SIGTERM or SIGINT, then drain it.

    Args:
        settings: of all but the models.
        lineup: the models.
        ports: already open.
        metrics_port: likewise, of the metrics.
        lines: of the log.
        front_ends: how many.
        folder: of the metrics of all processes.

    Raises:
        ChildFailed: a process could not start.
        StartupError: the gRPC port was taken meanwhile.
    """
    server = settings.server
    reload = asyncio.Event()
    leave = leave_on_signal(
        server.drain_delay_s + server.drain_grace_s + 2 * _CLOSE_S, lines.flush, reload.set
    )
    raise_open_files()
    disable_created_metrics()
    metrics = Metrics(CollectorRegistry())
    lines.on_dropped(metrics.log_lines_dropped.inc)
    assert ports.http is not None
    with reserve_grpc(server) as grpc_port:
        supervisor = Supervisor(
            settings, lineup, ports.http, grpc_port, front_ends=front_ends, folder=folder
        )
        with serve_metrics(metrics_port, server, metrics, registry_of(supervisor.metrics)):
            try:
                await supervisor.run(leave, reload, metrics, metrics_port.getsockname()[1])
            finally:
                supervisor.kill_all()
    log.info("stopped")


class Supervisor:
    """The processes of a server.

    Args:
        settings: of all but the models.
        lineup: the models.
        http: the socket whose connections the front ends get.
        grpc: the port that all front ends listen to.
        front_ends: how many.
        folder: of the metrics of all processes.

    Attributes:
        metrics: of all processes.
    """

    def __init__(
        self,
        settings: Settings,
        lineup: Lineup,
        http: socket.socket,
        grpc: int,
        *,
        front_ends: int,
        folder: Path,
    ) -> None:
        self._settings = settings
        self._http = http
        self._grpc = grpc
        workers = len(settings.engine.device.split(","))
        # Two rows for each: a worker may still count for one that ended.
        extent = Extent(2 * front_ends, workers, places(lineup))
        self._board = Board.create(extent)
        self._workers = [Child(f"worker-{index}") for index in range(workers)]
        self._front_ends = [Child(f"front-end-{index}") for index in range(front_ends)]
        self._rows = [index - front_ends for index in range(front_ends)]
        self._arenas = [-1] * front_ends
        self._pulses: dict[Child, Pulse] = {}
        self._rollout = Rollout(
            settings, lineup, self._board, self._workers, self._front_ends, folder=folder
        )
        self._listening: set[Child] = set()
        self._serving: set[Child] = set()
        self._handed = [0] * front_ends
        self._answering: set[asyncio.Task[None]] = set()  # to what front ends ask
        self._leaving = False
        self._ready = asyncio.Event()
        self._restarts: dict[tuple[str, str], int] = {}
        self.metrics = MergedMetrics(
            folder, self._board, self._rollout.places, self._processes, self._restarts
        )

    async def run(
        self, leave: asyncio.Event, reload: asyncio.Event, metrics: Metrics, metrics_port: int
    ) -> None:
        """Run the processes until told to leave, and drain them.

        Args:
            leave: is set then.
            reload: is set to have the models reloaded.
            metrics: of the supervisor itself.
            metrics_port: as it is logged.

        Raises:
            ChildFailed: a process could not start.
        """
        start = monotonic()
        self._acceptor = Acceptor(self._http, self._doors)
        self._reloads = Reloads(
            self._settings, self._rollout, metrics, reload, self.metrics.collect
        )
        tending = [
            *(asyncio.create_task(self._tend_worker(index)) for index in range(len(self._workers))),
            *(asyncio.create_task(self._tend(index)) for index in range(len(self._front_ends))),
            asyncio.create_task(self._watch()),
        ]
        leaving = asyncio.create_task(leave.wait())
        ready = asyncio.create_task(self._ready.wait())
        reloading = asyncio.create_task(self._reload_when_ready())
        waited_for = {*tending, reloading, leaving, ready}
        while not leaving.done():
            done, waited_for = await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            for one in done:
                one.result()
            if ready in done:
                self._say_ready(metrics_port, monotonic() - start)
        reloading.cancel()
        await self._drain()
        for one in tending:
            one.cancel()

    def kill_all(self) -> None:
        """End every process at once."""
        self._leaving = True
        for child in self._children():
            child.kill("leaving")
        self._rollout.close()

    async def _reload_when_ready(self) -> None:
        await self._ready.wait()
        await self._reloads.run()

    def _say_ready(self, metrics_port: int, seconds: float) -> None:
        log.info(
            "ready",
            http_port=self._http.getsockname()[1],
            grpc_port=self._grpc,
            metrics_port=metrics_port,
            models=self._rollout.names,
            default=self._rollout.default,
            front_ends=len(self._front_ends),
            workers=len(self._workers),
            seconds=round(seconds, 2),
        )

    def _children(self) -> Iterator[Child]:
        yield from self._workers
        yield from self._front_ends

    def _processes(self) -> Iterator[tuple[str, int]]:
        yield "supervisor", os.getpid()
        for child in self._children():
            if (pid := child.pid) is not None:
                yield child.name, pid

    # Workers

    async def _tend_worker(self, index: int) -> None:
        child, board = self._workers[index], self._board
        while not self._leaving:
            board.state[index] = WorkerState.STARTING
            self._pulses[child] = Pulse(board, board.extent.rows + index)
            ended = child.start(
                partial(self._birth_of_worker, index), partial(self._rollout.of_worker, index)
            )
            self._rollout.worker_begins(index)
            for front_end in range(len(self._front_ends)):
                self._introduce(front_end, index)
            pid = child.pid
            code = await ended
            board.state[index] = WorkerState.DOWN
            board.serving[index] = board.running[index] = 0
            self._rollout.worker_ended(index)
            await self._after_death(child, pid, code)

    def _birth_of_worker(self, index: int, line: int) -> Birth:
        board = self._board
        return Birth("worker", index, board.descriptor, board.extent, line)

    # Front ends

    async def _tend(self, index: int) -> None:
        child, board = self._front_ends[index], self._board
        count = len(self._front_ends)
        while not self._leaving:
            self._rows[index] = (self._rows[index] + count) % (2 * count)
            row = self._rows[index]
            board.enter(row)
            self._handed[index] = 0
            self._arenas[index] = os.memfd_create(f"dat-serve-arena-{index}")
            self._pulses[child] = Pulse(board, row)
            ended = child.start(
                partial(self._birth_of_front_end, index), partial(self._of_front_end, index)
            )
            self._rollout.front_end_begins(index)
            for worker in range(len(self._workers)):
                self._introduce(index, worker)
            pid = child.pid
            code = await ended
            board.alive[row] = 0
            self._rollout.front_end_ended(index)
            os.close(self._arenas[index])
            self._arenas[index] = -1
            self._listening.discard(child)
            self._serving.discard(child)
            await self._after_death(child, pid, code)

    def _birth_of_front_end(self, index: int, line: int) -> Birth:
        board = self._board
        return Birth(
            "front-end",
            index,
            board.descriptor,
            board.extent,
            line,
            row=self._rows[index],
            arena=self._arenas[index],
            grpc=self._grpc,
            front_ends=len(self._front_ends),
        )

    def _of_front_end(self, index: int, message: Any, _: list[int]) -> None:
        child = self._front_ends[index]
        if isinstance(message, Listening):
            self._listening.add(child)
        elif isinstance(message, Follows):
            self._rollout.of_front_end(index, message)
        elif isinstance(message, Ask):
            answering = asyncio.create_task(answer_for(self._reloads, message, child))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)
        elif isinstance(message, Serving):
            child.is_useful()
            self._serving.add(child)
            if len(self._serving) == len(self._front_ends):
                self._ready.set()

    def _doors(self) -> list[Door]:
        """The front ends that take connections: those that can answer, if there are any.

        One that does not turn just now is left out likewise.
        """
        listening = [
            (index, child, child.line, self._pulses[child].still_s)
            for index, child in enumerate(self._front_ends)
            if child in self._listening and child.line is not None
        ]
        well = [one for one in listening if one[3] < _STILL_S]
        serving = [one for one in well if one[1] in self._serving]
        return [
            Door(
                line,
                self._handed[index] + int(self._board.balance[self._rows[index]]),
                partial(self._count_handed, index),
            )
            for index, _, line, _ in serving or well or listening
        ]

    def _count_handed(self, index: int) -> None:
        self._handed[index] += 1

    # All

    def _introduce(self, front_end: int, worker: int) -> None:
        """Give a front end and a worker that both run a channel to each other."""
        one, other = self._front_ends[front_end], self._workers[worker]
        if one.line is None or other.line is None:
            return
        ours, theirs = pair()
        with ours, theirs:
            one.send(NewWorker(worker), [ours.fileno()])
            other.send(
                NewFrontEnd(self._rows[front_end]), [theirs.fileno(), self._arenas[front_end]]
            )

    async def _after_death(self, child: Child, pid: int | None, code: int) -> None:
        """Note the end of a process, and wait until it is to be replaced.

        Raises:
            ChildFailed: there is no use in that.
        """
        assert pid is not None
        self.metrics.bury(pid)
        del self._pulses[child]
        if self._leaving:
            return
        if code == 1 and not child.useful:
            raise ChildFailed("")
        reason = child.died(code)
        labels = (child.name, reason)
        self._restarts[labels] = self._restarts.get(labels, 0) + 1
        pause_s = child.pause_s
        log.error("process ended", process=child.name, reason=reason, code=code, again_in_s=pause_s)
        if child in self._workers:
            index = self._workers.index(child)
            self._board.back_at[index] = monotonic() + pause_s + child.started_s
        await asyncio.sleep(pause_s)

    async def _watch(self) -> None:
        """Replace processes that do not turn, and say whether they end again and again."""
        looked = monotonic()
        while True:
            await asyncio.sleep(_LOOK_PERIOD_S)
            now = monotonic()
            step_s, looked = min(now - looked, 2 * _LOOK_PERIOD_S), now
            for child, pulse in list(self._pulses.items()):
                if pulse.look(step_s) > _SILENT_S:
                    child.kill("hung")
            self._board.looping[0] = any(child.looping for child in self._children())

    async def _drain(self) -> None:
        """Let the front ends answer what is in flight, and then end all."""
        server = self._settings.server
        log.info("draining")
        self._leaving = True
        for child in self._front_ends:
            child.send(Leave())
        await asyncio.sleep(server.drain_delay_s)
        self._acceptor.close()
        self._http.close()
        await _ended(self._front_ends, server.drain_grace_s + _CLOSE_S)
        for child in self._workers:
            child.send(Leave())
        await _ended(self._workers, _WORKERS_S)


async def _ended(children: Sequence[Child], within_s: float) -> None:
    """Wait until processes have ended."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await asyncio.gather(*(child.end() for child in children))
