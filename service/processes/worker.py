"""A worker: one device, with the engines and the queues of all models."""

import asyncio
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, disable_created_metrics

from service import process
from service.batching.batcher import Batcher
from service.command_errors import CommandError
from service.computed_tasks import TASKS
from service.cpus import seats
from service.engine.device import Device
from service.event_loop import open_loop_pool
from service.memory import give_back, give_back_when_quiet
from service.metrics.replica import Metrics
from service.models.lineup import ModelEntry
from service.open_model import ModelUnusable, OpenModel, Shared, open_model
from service.processes.birth import Birth
from service.processes.board import Board, WorkerPlaces, WorkerState
from service.processes.channel import Line, from_memory, in_memory
from service.processes.client import Client
from service.processes.heart import beat
from service.processes.messages import (
    Leave,
    Load,
    Loaded,
    NewFrontEnd,
    NotLoaded,
    Unload,
    Unloaded,
)
from service.processes.shared_forecast import PublishedForecast
from service.settings.settings import Settings

log = structlog.get_logger(__name__)

LOST_EXIT_CODE = os.EX_UNAVAILABLE  # 69
_CLOSE_S = 0.5
# In which what was on a lost device is answered.
_LAST_WORDS_S = 0.05


async def work(birth: Birth, settings: Settings) -> None:
    """Run a worker until the supervisor says to leave.

    Args:
        birth: what the supervisor gave the process.
        settings: of the server.

    Raises:
        ModelUnusable: the weights or the class names of a model cannot be used.
        ModelFileError: sizes are given for a model that has a fixed one.
        DeviceUnavailable: the device is not there.
        RuntimeError: the device cannot be used, or the system gives no more threads.
    """
    worker = _Worker(birth, settings)
    with open_loop_pool():
        await worker.load()
        await worker.serve()


class _Worker:
    """The device of the process, and who asks for what it computes."""

    def __init__(self, birth: Birth, settings: Settings) -> None:
        self._index = birth.index
        self._board = birth.open_board()
        process.choose_kernels(settings.engine.kernels, settings.engine.cache)
        process.compute_float32_in_full()
        disable_created_metrics()
        names = settings.engine.device.split(",")
        name = names[self._index]
        seat = seats(len(names))[self._index]
        self._device = Device(
            name,
            settings.engine.threads or seat.threads,
            names[: self._index].count(name),
            settings.engine.hang_timeout_s,
            seat.cpus,
        )
        process.compute_alone()
        self._metrics = Metrics(CollectorRegistry())
        self._shared = Shared(settings, [self._device], self._metrics, TASKS)
        # By their places on the board.
        self._models: dict[int, OpenModel] = {}
        self._queues: dict[int, Batcher[Any, Any]] = {}
        self._running: dict[int, asyncio.Task[None]] = {}
        self._wanted = asyncio.Queue[Load | Unload]()
        self._clients: dict[Client, asyncio.Task[None]] = {}
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._line = Line(birth.open_line(), self._receive, lambda: os._exit(0))

    async def load(self) -> None:
        """Read and warm up the models that the supervisor names first."""
        watching = asyncio.create_task(self._device.watch())
        first = await self._wanted.get()
        assert isinstance(first, Load)
        for place, entry in first.versions:
            self._models[place] = await self._open(place, entry)
        watching.cancel()

    async def serve(self) -> None:
        """Run batches until told to leave."""
        board, index = self._board, self._index
        async with asyncio.TaskGroup() as group:
            for place in self._models:
                self._begin(place, group)
            tasks = [
                group.create_task(self._device.watch()),
                group.create_task(give_back_when_quiet()),
                group.create_task(beat(board, board.extent.rows + index)),
                group.create_task(self._follow(group)),
            ]
            self._device.on_loss(lambda: self._lost(group))
            process.loaded()
            board.state[index] = WorkerState.READY
            for place in self._models:
                self._tell_loaded(place)
            self._ready.set()
            await self._leave.wait()
            for task in (*tasks, *self._running.values()):
                task.cancel()
        self._shared.reader.shutdown(wait=False)
        if not self._device.close(_CLOSE_S):
            os._exit(0)  # in the middle of loading

    async def _open(self, place: int, entry: ModelEntry) -> OpenModel:
        forecast = PublishedForecast(self._board, self._index, place)
        places = partial(_places, self._board, self._index, place)
        loop = asyncio.get_running_loop()
        try:
            opened = await loop.run_in_executor(
                self._shared.reader, open_model, entry, self._shared, places, forecast
            )
        except ModelUnusable as error:
            raise ModelUnusable(_named(str(error), entry)) from error
        try:
            await opened.load()
        except BaseException:
            await opened.close()
            raise
        return opened

    def _begin(self, place: int, group: asyncio.TaskGroup) -> None:
        """Run the batches of a version."""
        opened = self._models[place]
        for other in self._of_name(opened.facts.card.name):
            other.metrics.hide()
        self._queues[place] = queue = opened.batcher
        self._running[place] = group.create_task(queue.run())
        queue.on_change(self._show)
        queue.open()
        self._show()

    def _tell_loaded(self, place: int) -> None:
        facts = self._models[place].facts
        descriptor = in_memory(facts)
        self._line.send(Loaded(place, facts.card.name, facts.card.version), [descriptor])
        os.close(descriptor)

    async def _follow(self, group: asyncio.TaskGroup) -> None:
        """Load and unload versions beside those that are run, one at a time, for ever."""
        while True:
            wanted = await self._wanted.get()
            if isinstance(wanted, Unload):
                await self._unload(wanted.place)
                continue
            for place, entry in wanted.versions:
                try:
                    self._models[place] = await self._open(place, entry)
                except Exception as error:
                    if not isinstance(error, CommandError):
                        log.exception("load failed", model=entry.name)
                    self._line.send(NotLoaded(place, str(error)))
                    await asyncio.to_thread(give_back)
                else:
                    self._begin(place, group)
                    self._tell_loaded(place)

    async def _unload(self, place: int) -> None:
        """Give back the memory of a version that no front end has anything of."""
        if place in self._models:
            opened = self._models.pop(place)
            self._board.serving[self._index, place] = 0
            opened.batcher.begin_drain()
            await asyncio.wait([self._running.pop(place)])
            del self._queues[place]
            opened.metrics.forget()
            for other in self._of_name(opened.facts.card.name):
                other.batcher.show()
            self._show()
            await opened.close()
            del opened
            await asyncio.to_thread(give_back)
        self._line.send(Unloaded(place))

    def _of_name(self, name: str) -> list[OpenModel]:
        return [opened for opened in self._models.values() if opened.facts.card.name == name]

    def _show(self) -> None:
        for place, opened in self._models.items():
            serving = self._device.healthy and opened.batcher.trusted
            self._board.serving[self._index, place] = serving
            opened.metrics.ready.set(serving)

    def _receive(self, message: Any, descriptors: Sequence[int]) -> None:
        if isinstance(message, NewFrontEnd):
            channel, arena = descriptors
            client = Client(message.row, arena, self._board, self._index, self._queues)
            opening = asyncio.create_task(client.open(channel, ready=self._ready))
            self._clients[client] = opening
            client.on_gone(lambda: self._clients.pop(client))
        elif isinstance(message, Load):
            self._wanted.put_nowait(Load(from_memory(descriptors[0])))
        elif isinstance(message, Unload):
            self._wanted.put_nowait(message)
        elif isinstance(message, Leave):
            self._leave.set()

    def _lost(self, group: asyncio.TaskGroup) -> None:
        """End the process of a lost device: in a new one it may be well."""
        self._show()
        for client in self._clients:
            client.answer_only_taken()

        async def end() -> None:
            await asyncio.sleep(_LAST_WORDS_S)
            os._exit(LOST_EXIT_CODE)

        group.create_task(end())


def _named(text: str, entry: ModelEntry) -> str:
    """A text about the files of a model with their own names; see `rollout`."""
    for _, path in entry.files:
        text = text.replace(str(path), os.path.realpath(path))
    return text


def _places(board: Board, worker: int, model: int, _: int) -> WorkerPlaces:
    return WorkerPlaces(board, worker, model)
