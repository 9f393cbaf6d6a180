"""A worker: one device, with the engines and the queues of all models."""

import asyncio
import os
import pickle
from collections.abc import Sequence
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, disable_created_metrics

from service import process
from service.batching.batcher import Batcher
from service.computed_tasks import TASKS
from service.engine.device import Device
from service.event_loop import open_loop_pool
from service.machine import cores
from service.memory import give_back_when_quiet
from service.metrics import Metrics
from service.models.lineup import Lineup
from service.open_model import OpenModel, Shared, open_model
from service.processes.birth import Birth
from service.processes.board import Board, WorkerPlaces, WorkerState
from service.processes.channel import Line
from service.processes.client import Client
from service.processes.heart import beat
from service.processes.messages import Leave, Models, NewFrontEnd
from service.processes.shared_forecast import PublishedForecast
from service.settings import Settings

LOST_EXIT_CODE = os.EX_UNAVAILABLE  # 69
_CLOSE_S = 0.5
# In which what was on a lost device is answered.
_LAST_WORDS_S = 0.05


async def work(birth: Birth, settings: Settings, lineup: Lineup) -> None:
    """Run a worker until the supervisor says to leave.

    Args:
        birth: what the supervisor gave the process.
        settings: of the server.
        lineup: the models.

    Raises:
        ModelUnusable: the weights or the class names of a model cannot be used.
        ModelFileError: sizes are given for a model that has a fixed one.
        DeviceUnavailable: the device is not there.
        RuntimeError: the device cannot be used, or the system gives no more threads.
    """
    worker = _Worker(birth, settings)
    with open_loop_pool():
        await worker.load(lineup)
        await worker.serve()


class _Worker:
    """The device of the process, and who asks for what it computes."""

    def __init__(self, birth: Birth, settings: Settings) -> None:
        self._index = birth.index
        self._board = birth.open_board()
        self._settings = settings
        process.choose_kernels(settings.engine.kernels, settings.engine.cache)
        process.compute_float32_in_full()
        disable_created_metrics()
        names = settings.engine.device.split(",")
        name = names[self._index]
        self._device = Device(
            name,
            settings.engine.threads or max(1, cores() // len(names)),
            names[: self._index].count(name),
            settings.engine.hang_timeout_s,
        )
        process.compute_alone()
        self._metrics = Metrics(CollectorRegistry())
        self._models: list[OpenModel] = []
        self._queues: list[Batcher[Any, Any]] = []
        self._clients: dict[Client, asyncio.Task[None]] = {}
        self._ready = asyncio.Event()
        self._leave = asyncio.Event()
        self._line = Line(birth.open_line(), self._receive, lambda: os._exit(0))

    async def load(self, lineup: Lineup) -> None:
        """Read and warm up the models, and tell the supervisor what they are."""
        watching = asyncio.create_task(self._device.watch())
        shared = Shared(self._settings, [self._device], self._metrics, TASKS)
        loop = asyncio.get_running_loop()
        for index, entry in enumerate(lineup.models):
            forecast = PublishedForecast(self._board, self._index, index)
            places = partial(_places, self._board, self._index, index)
            opened = await loop.run_in_executor(None, open_model, entry, shared, places, forecast)
            self._models.append(opened)
            self._queues.append(opened.batcher)
        for opened in self._models:
            await opened.load()
        watching.cancel()
        facts = os.memfd_create("dat-serve-models")
        with os.fdopen(facts, "wb") as file:
            pickle.dump([opened.facts for opened in self._models], file)
            file.flush()
            self._line.send(Models(), [facts])

    async def serve(self) -> None:
        """Run batches until told to leave."""
        board, index = self._board, self._index
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(queue.run()) for queue in self._queues]
            tasks += [
                group.create_task(self._device.watch()),
                group.create_task(give_back_when_quiet()),
                group.create_task(beat(board, board.extent.rows + index)),
            ]
            self._device.on_loss(lambda: self._lost(group))
            for queue in self._queues:
                queue.on_change(self._show)
                queue.open()
            self._show()
            process.loaded()
            board.state[index] = WorkerState.READY
            self._ready.set()
            await self._leave.wait()
            for task in tasks:
                task.cancel()
        self._device.close(_CLOSE_S)

    def _show(self) -> None:
        for model, opened in enumerate(self._models):
            serving = self._device.healthy and opened.batcher.trusted
            self._board.serving[self._index, model] = serving
            opened.metrics.ready.set(serving)

    def _receive(self, message: Any, descriptors: Sequence[int]) -> None:
        if isinstance(message, NewFrontEnd):
            channel, arena = descriptors
            client = Client(message.row, arena, self._board, self._index, self._queues)
            opening = asyncio.create_task(client.open(channel, ready=self._ready))
            self._clients[client] = opening
            client.on_gone(lambda: self._clients.pop(client))
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


def _places(board: Board, worker: int, model: int, _: int) -> WorkerPlaces:
    return WorkerPlaces(board, worker, model)
