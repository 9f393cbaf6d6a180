"""One device, and the one thread that gives it work."""

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from service.engine.lanes import Lanes
from service.machine import cores
from service.memory import reach_heap

T = TypeVar("T")


def compute_alone() -> None:
    """Let the calling thread compute without a team of others: cores are for the device's threads.

    With more OpenMP threads than cores, even idle ones, the teams of a process sleep between two
    operations instead of waiting awake, which costs a single image a third of its speed.
    """
    torch.set_num_threads(1)


class DeviceUnavailable(Exception):
    """The device that was asked for is not there."""


class Device:
    """A device that the models of a replica share.

    Args:
        name: `cpu`, `cuda` (the first GPU), `cuda:N`, or `auto`: a GPU if there is one.
        threads: of one forward pass on a CPU; 0 means one for each core.
        index: of several CPU devices.

    Attributes:
        torch_device: what torch calls it.
        name: that no other device of the replica has.
        depth: batches that it takes at a time, see `Dispatchable`; on CUDA a second one, which is
            copied in meanwhile.
        healthy: whether the device can still be trusted.
        threads: of one forward pass on a CPU.
        lanes: that share a batch on a CPU.

    Raises:
        DeviceUnavailable: the device is not there.
    """

    def __init__(self, name: str = "auto", threads: int = 0, index: int = 0) -> None:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.torch_device = torch.device("cuda:0" if name == "cuda" else name)
        on_cuda = self.torch_device.type == "cuda"
        if on_cuda:
            _check_gpu(self.torch_device)
        self.name = str(self.torch_device) if on_cuda else f"cpu:{index}"
        self.depth = 2 if on_cuda else 1
        self.healthy = True
        self.threads = threads or cores()
        self.lanes = Lanes(self.threads)
        self._thread = ThreadPoolExecutor(1, "engine", initializer=self._enter)
        self._results = ThreadPoolExecutor(1, "results", initializer=reach_heap)

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in the thread of the device."""
        return await self._guarded(self._thread, work)

    async def wait(self, result: Callable[[], T]) -> T:
        """Get what a batch has when the device is done with it.

        On CUDA in another thread, so that the thread of the device can begin the next batch.
        """
        if self.torch_device.type == "cpu":
            return result()
        return await self._guarded(self._results, result)

    async def _guarded(self, thread: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work)
        except torch.AcceleratorError:
            # After such an error the CUDA context of the process is lost: only a restart helps.
            self.healthy = False
            raise

    def close(self) -> None:
        """Wait for the work in hand and end the threads."""
        for pool in (self._thread, self._results, self.lanes):
            pool.shutdown()

    def _enter(self) -> None:
        reach_heap()
        # Both are settings of the calling thread.
        torch.set_num_threads(self.threads)
        if self.torch_device.type == "cuda":
            torch.cuda.set_device(self.torch_device)


def open_devices(names: str, threads: int = 0) -> list[Device]:
    """The devices of a replica.

    Args:
        names: as torch calls them, with commas between; `auto` is a GPU if there is one.
        threads: of one forward pass on a CPU; 0 shares the cores among the devices.

    Raises:
        DeviceUnavailable: one is not there.
    """
    split = names.split(",")
    share = threads or max(1, cores() // len(split))
    seen = Counter[str]()
    devices = []
    for name in split:
        devices.append(Device(name, share, seen[name]))
        seen[name] += 1
    return devices


def _check_gpu(device: torch.device) -> None:
    if not torch.cuda.is_available():
        raise DeviceUnavailable(f"the engine's device is {device}, but torch sees no GPU")
    count = torch.cuda.device_count()
    if device.index >= count:
        raise DeviceUnavailable(f"the engine's device is {device}, but torch sees {count} GPUs")
