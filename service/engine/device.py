"""One device, and the threads that give it work."""

import asyncio
import os
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from heapq import heappop, heappush
from threading import Event
from time import monotonic

import structlog
import torch

from service.command_errors import StartupError
from service.cpus import seats
from service.engine import gpu
from service.engine.lanes import Lanes
from service.engine.pace import HANG_FLOOR_S, Pace
from service.engine.worker import T, Worker, WorkerDied
from service.errors import BatchFailure, EngineUnavailable, OutOfMemory
from service.machine import is_out_of_memory
from service.memory import reach_heap

log = structlog.get_logger(__name__)

LOAD_LIMIT_S = 3600.0  # torch.compile takes many minutes
CAPTURE_LIMIT_S = 300.0
_LOOK_PERIOD_S = 0.25


class DeviceUnavailable(StartupError):
    """The device that was asked for is not there."""


class Device:
    """A device that the models of a replica share.

    It is lost for good when its context is broken, when its thread ended, or when work takes so
    much longer than it should that it will not come back (`watch`). Then all that waits for it
    fails with `EngineUnavailable`, and nothing runs on it any more.

    Args:
        name: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`: a GPU if there is one.
        threads: of one forward pass on a CPU; 0 means one for each core.
        index: of several CPU devices.
        hang_timeout_s: after which a batch counts as hung, seconds; 0 goes by the time of others.
        cpus: that its threads may run on; `None` leaves it to the system.

    Attributes:
        torch_device: what torch calls it.
        name: that no other device of the replica has.
        depth: batches that it takes at a time, see `Dispatchable`: a second one is copied in
            meanwhile on CUDA, and on a CPU begins without a turn of the event loop between the two.
        cores: of a CPU, that batches may have a part of; 1 on CUDA.
        threads: of one forward pass on a CPU.
        lanes: that share a batch on a CPU.
        captures: to be held by whoever captures a graph between batches, so that batches that wait
            for the thread meanwhile go before the next graph.

    Raises:
        DeviceUnavailable: the device is not there.
        RuntimeError: the system gives no more threads.
    """

    def __init__(
        self,
        name: str = "auto",
        threads: int = 0,
        index: int = 0,
        hang_timeout_s: float = 0,
        cpus: frozenset[int] | None = None,
    ) -> None:
        if name == "auto":
            name = _choose()
        self.torch_device = torch.device("cuda:0" if name == "cuda" else name)
        on_cuda = self.torch_device.type == "cuda"
        if on_cuda:
            _check_gpu(self.torch_device)
        self.name = str(self.torch_device) if on_cuda else f"cpu:{index}"
        self.depth = 2
        self._cpus = cpus
        self.threads = threads or seats(1)[0].threads
        self.cores = 1 if on_cuda else self.threads
        self.lanes = Lanes(self.cores, self._begin)
        self.captures = asyncio.Lock()
        self._hang_timeout_s = hang_timeout_s
        self._lost = Event()
        self._loss: EngineUnavailable | None = None
        self._on_loss: Callable[[], None] = lambda: None
        self._worker = Worker(f"engine {self.name}", self._enter)
        # On a CPU a model is loaded beside the batches of the others. A GPU has its streams and
        # its graphs from one thread.
        self._loader = (
            self._worker if on_cuda else Worker(f"loader {self.name}", self._enter_loader)
        )
        # For batches that have a part of the cores, one for each core; the next one that is free.
        self._beside = [
            Worker(f"part {index} of {self.name}", self._begin)
            for index in range(self.cores if self.cores > 1 else 0)
        ]
        self._free = list(range(len(self._beside)))
        # Where results are waited for, the next batch can begin meanwhile.
        self._results = Worker(f"results {self.name}", reach_heap) if on_cuda else None

    @property
    def healthy(self) -> bool:
        """Whether the device can still be trusted."""
        return not self._lost.is_set()

    def pace(self) -> Pace:
        """The pace of the batches of one more model."""
        return Pace(self._hang_timeout_s, HANG_FLOOR_S[self.torch_device.type])

    def on_loss(self, observer: Callable[[], None]) -> None:
        """Call an observer, in the event loop, when the device is lost."""
        self._on_loss = observer

    async def run(self, work: Callable[[], T], limit_s: float = LOAD_LIMIT_S) -> T:
        """Do work in the thread of the device.

        Args:
            work: what the device does.
            limit_s: time after which the device counts as hung, seconds; by default that of
                loading a model.

        Raises:
            EngineUnavailable: the device is lost, now or before.
            OutOfMemory: the work needs more memory than there is.
        """
        return await self._guarded(
            lambda: self._worker.submit(partial(self._attempt, work), limit_s)
        )

    async def load(self, steps: Callable[[], Generator[None, None, T]]) -> T:
        """Do the long work of loading a model, while batches of others are run.

        On a CPU it is done in a thread of its own, on CUDA in the thread of the device, where the
        batches that wait go before the next step.

        Args:
            steps: begins it; a step ends where it yields, and what it returns is the result.

        Raises:
            EngineUnavailable: the device is lost, now or before.
            OutOfMemory: the work needs more memory than there is.
        """
        under_way: list[Generator[None, None, T]] = []
        done: list[T] = []

        def step() -> None:
            if not under_way:
                under_way.append(steps())
            try:
                next(under_way[0])
            except StopIteration as end:
                done.append(end.value)

        while not done:
            await self._guarded(
                lambda: self._loader.submit(partial(self._attempt, step), LOAD_LIMIT_S)
            )
        return done.pop()

    async def compute(self, launch: Callable[[], Callable[[], T]], limit_s: float, cores: int) -> T:
        """Begin a batch in a thread of the device, and get its results once it is done.

        On CUDA another thread waits for the results, so that the next batch can begin meanwhile.
        The first thread hands the batch to it: a turn of a busy event loop takes longer than a
        batch. On a CPU a batch that has a part of the cores has a thread of its own.

        Args:
            launch: begins it; what it returns waits for the results.
            limit_s: time after which either counts as hung, seconds.
            cores: that it has; those of all batches at a time are at most those of the device.

        Raises:
            EngineUnavailable: the device is lost, now or before.
            OutOfMemory: the batch needs more memory than there is.
        """
        if cores < self.cores:
            return (await self._compute_beside(launch, limit_s))()
        results = self._results
        if results is None:
            return (await self.run(launch, limit_s))()

        def begin() -> Callable[[], T]:
            return partial(self._attempt, self._attempt(launch))

        return await self._guarded(lambda: self._worker.submit_chain(begin, results, limit_s))

    async def _compute_beside(
        self, launch: Callable[[], Callable[[], T]], limit_s: float
    ) -> Callable[[], T]:
        # The same threads again and again, which keep the memory that a batch frees.
        index = heappop(self._free)
        try:
            return await self._guarded(
                lambda: self._beside[index].submit(partial(self._attempt, launch), limit_s)
            )
        finally:
            heappush(self._free, index)

    async def watch(self) -> None:
        """Look after the threads as long as the device is healthy."""
        workers = self._workers()
        looked = monotonic()
        while self._loss is None:
            await asyncio.sleep(_LOOK_PERIOD_S)
            now = monotonic()
            step_s, looked = min(now - looked, 2 * _LOOK_PERIOD_S), now
            for worker in workers:
                if not worker.alive:
                    self.give_up("lost", "its thread ended")
                elif worker.overdue(step_s):
                    self.give_up("hung", "its work does not come back")

    def give_up(self, cause: BatchFailure, story: str) -> None:
        """Run nothing on the device any more, and fail all that waits for it; in the event loop.

        Args:
            cause: as counted.
            story: what happened, for callers and the log.
        """
        if self._loss is not None:
            return
        self._lost.set()
        self._loss = EngineUnavailable(f"the device {self.name} is lost: {story}", cause)
        log.error("device lost", device=self.name, cause=cause, reason=story)
        for worker in self._workers():
            worker.give_up(self._loss.again)
        self._on_loss()

    def close(self, timeout_s: float | None = None) -> bool:
        """Wait for the work in hand and end the threads.

        Args:
            timeout_s: for each thread, seconds; `None` waits for ever.

        Returns:
            Whether they ended.
        """
        ended = True
        for worker in self._workers():
            ended &= worker.close(timeout_s)
        self.lanes.shutdown(wait=ended)
        return ended

    def _workers(self) -> list[Worker]:
        threads = dict.fromkeys((self._worker, *self._beside, self._loader, self._results))
        return [worker for worker in threads if worker is not None]

    async def _guarded(self, submit: Callable[[], asyncio.Future[T]]) -> T:
        if self._loss is not None:
            raise self._loss.again()
        try:
            return await submit()
        except _Lost as error:
            # After such an error the CUDA context of the process is lost: only a restart helps.
            log.exception("device failed", device=self.name)
            self.give_up("lost", "its context is broken")
            raise self._loss_for_caller() from error.__cause__
        except WorkerDied as error:
            log.exception("device failed", device=self.name)
            self.give_up("lost", "its thread ended")
            raise self._loss_for_caller() from error

    def _loss_for_caller(self) -> EngineUnavailable:
        assert self._loss is not None
        return self._loss.again()

    def _attempt(self, work: Callable[[], T]) -> T:
        """Do work in the calling thread of the device, and say what its failure means."""
        if self._lost.is_set():
            raise _Lost
        try:
            return work()
        except Exception as error:
            if any(map(is_out_of_memory, _with_causes(error))):
                # The frames hold what was computed so far.
                for cause in _with_causes(error):
                    traceback.clear_frames(cause.__traceback__)
                shortage = OutOfMemory("there is not enough memory for this image")
                shortage.__cause__ = error.with_traceback(None)
            elif self._context_is_lost():
                self._lost.set()  # before the thread takes the next batch
                raise _Lost from error
            else:
                raise
        if self.torch_device.type == "cuda":
            torch.cuda.empty_cache()
        raise shortage

    def _context_is_lost(self) -> bool:
        """Whether the device has not got over an error.

        A broken context fails in whatever follows; what was wrong with one call alone does not,
        such as an argument of a launch, or memory that there was none of.
        """
        try:
            torch.get_device_module(self.torch_device).synchronize(self.torch_device)
        except RuntimeError:
            return True
        return False

    def _begin(self) -> None:
        """What every thread of a device on a CPU does first; teams of it run where it runs."""
        reach_heap()
        if self._cpus is not None:
            os.sched_setaffinity(0, self._cpus)  # of the calling thread

    def _enter_loader(self) -> None:
        self._begin()
        torch.set_num_threads(1)  # the other cores are for those who compute

    def _enter(self) -> None:
        self._begin()
        # All are settings of the calling thread.
        if self.torch_device.type == "cpu":
            torch.set_num_threads(self.threads)
        else:
            torch.set_num_threads(1)  # it only copies, and the cores are for those who decode
            torch.cuda.set_device(self.torch_device)
            # Graphs can be captured in it, and then what ran before has warmed up for them.
            torch.cuda.set_stream(torch.cuda.Stream(self.torch_device))


class _Lost(Exception):
    """The context of the device is broken."""


def open_devices(names: str, threads: int = 0, hang_timeout_s: float = 0) -> list[Device]:
    """The devices of a replica.

    Args:
        names: as torch calls them, with commas between; `auto` is a GPU if there is one, and else
            a CPU device on each NUMA node.
        threads: of one forward pass on a CPU; 0 shares the cores among the devices.
        hang_timeout_s: after which a batch counts as hung, seconds; 0 goes by the time of others.

    Raises:
        DeviceUnavailable: a device is not there.
        RuntimeError: the system gives no more threads.
    """
    split = names.split(",")
    if names == "auto":
        chosen = _choose()
        of_devices = seats(None if chosen == "cpu" else 1)
        split = [chosen] * len(of_devices)
    else:
        of_devices = seats(len(split))
    seen = Counter[str]()
    devices = []
    for name, seat in zip(split, of_devices, strict=True):
        devices.append(Device(name, threads or seat.threads, seen[name], hang_timeout_s, seat.cpus))
        seen[name] += 1
    return devices


def _choose() -> str:
    if torch.cuda.is_available():
        return "cuda"
    if (reason := gpu.why_none()) is not None:
        log.warning("cpu instead of gpu", reason=reason)
    return "cpu"


def _check_gpu(device: torch.device) -> None:
    if not torch.cuda.is_available():
        reason = gpu.why_none() or "this machine shows none"
        raise DeviceUnavailable(f"DAT_ENGINE__DEVICE is {device}, but torch sees no GPU: {reason}")
    count = torch.cuda.device_count()
    if device.index >= count:
        raise DeviceUnavailable(
            f"DAT_ENGINE__DEVICE is {device}, but torch sees {count} GPUs, counted from 0"
        )


def _with_causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes: a capture that runs out of memory may end with another error.

    A cause that `raise … from None` suppresses is left out.
    """
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
