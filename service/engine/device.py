"""One device, and the one thread that touches it."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from service.engine.lanes import Lanes

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
    """The device that the models of a replica share.

    Attributes:
        torch_device: what torch calls it.
        turn: held by the model whose batch the device has or gets next; first come, first served.
        healthy: whether the device can still be trusted.
        lanes: that share a batch on a CPU.

    Raises:
        DeviceUnavailable: the device is not there.
    """

    def __init__(self, name: str = "auto", threads: int = 0) -> None:
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.torch_device = torch.device(name)
        if self.torch_device.type == "cuda" and not torch.cuda.is_available():
            raise DeviceUnavailable(f"the engine's device is {name}, but torch sees no GPU")
        self.turn = asyncio.Lock()
        self.healthy = True
        self._threads = threads or torch.get_num_threads()
        self.lanes = Lanes(self._threads)
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="engine", initializer=self._enter
        )

    async def run(self, work: Callable[[], T]) -> T:
        """Do work in the thread of the device."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except torch.AcceleratorError:
            # After such an error the CUDA context of the process is lost: only a restart helps.
            self.healthy = False
            raise

    def close(self) -> None:
        """Wait for the work in hand and end the thread."""
        self._thread.shutdown()
        self.lanes.close()

    def _enter(self) -> None:
        # Both are settings of the calling thread.
        torch.set_num_threads(self._threads)
        if self.torch_device.type == "cuda":
            torch.cuda.set_device(self.torch_device)
