"""Memory through which a batch goes to a device, and its results come back."""

from collections.abc import Sequence
from itertools import accumulate
from math import ceil, prod
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

# What an image gives to each input of the work of a device; first its pixels `(H, W, 3)`.
Row = tuple[NDArray[Any], ...]

_ALIGNMENT = 256  # bytes; what kernels may expect of a tensor


class _Block:
    """Bytes that hold one group of tensors after another; grows to the largest so far."""

    def __init__(self, device: torch.device, *, pinned: bool = False) -> None:
        self._device = device
        self._pinned = pinned
        self._bytes = self._allocate(0)

    def _allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device, pin_memory=self._pinned)

    def tensors(self, like: Sequence[tuple[Sequence[int], torch.dtype]]) -> list[Tensor]:
        """Tensors of these shapes and types, with any contents; the last group is no more."""
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in like]
        spaces = (ceil(size / _ALIGNMENT) * _ALIGNMENT for size in sizes)
        starts = list(accumulate(spaces, initial=0))
        if starts[-1] > len(self._bytes):
            self._bytes = self._allocate(0)  # before there is more
            self._bytes = self._allocate(starts[-1])
        return [
            self._bytes[start : start + size].view(dtype).view(*shape)
            for start, size, (shape, dtype) in zip(starts, sizes, like, strict=False)
        ]


class Slot:
    """The memory of one batch on its way, and where it is.

    Attributes:
        copied: an event, when the inputs are on the device.
        done: an event, when the results are on the host.
    """

    def __init__(self, device: torch.device) -> None:
        on_cuda = device.type == "cuda"
        host = torch.device("cpu")
        self._staged = _Block(host, pinned=on_cuda)
        self._arrived = _Block(device) if on_cuda else None
        self._results = _Block(host, pinned=on_cuda)
        self.copied = torch.get_device_module(device).Event()
        self.done = torch.get_device_module(device).Event()
        self._idle = True

    def await_idle(self) -> None:
        """Wait for a batch whose results nobody waited for."""
        if not self._idle:
            self.copied.synchronize()
            self.done.synchronize()
        self._idle = False

    def await_done(self) -> None:
        """Wait until the results are on the host, and so the inputs no longer needed."""
        self.done.synchronize()
        self._idle = True

    def stage(self, rows: Sequence[Row], bucket: int) -> list[Tensor]:
        """The inputs of a batch on the host, each `(bucket, ...)`.

        The pixels of the padding are what an earlier batch left, but all else is as of an image.
        """
        staged = self._staged.tensors(
            [((bucket, *part.shape), getattr(torch, part.dtype.name)) for part in rows[0]]
        )
        for name, tensor in enumerate(staged):
            parts = [torch.from_numpy(row[name]) for row in rows]
            if name:
                parts += parts[:1] * (bucket - len(rows))
            # One call for all: each one gives the interpreter up, and waits behind every decoder
            # and the event loop to have it back.
            torch.stack(parts, out=tensor[: len(parts)])
        return staged

    def copy_in(self, staged: Sequence[Tensor], count: int) -> list[Tensor]:
        """The same on the device, when the current stream comes to it.

        It is always the same stream: memory that is new to it may still be in use in others.

        Args:
            staged: what `stage` gave.
            count: images of the batch; the pixels of no others are copied.
        """
        if self._arrived is None:
            return list(staged)
        arrived = self._arrived.tensors([(tensor.shape, tensor.dtype) for tensor in staged])
        for name, (there, here) in enumerate(zip(arrived, staged, strict=True)):
            whole = len(here) if name else count
            there[:whole].copy_(here[:whole], non_blocking=True)
        return arrived

    def copy_out(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors on the host, when the current stream comes to it; until the next batch."""
        results = self._results.tensors([(tensor.shape, tensor.dtype) for tensor in tensors])
        for here, there in zip(results, tensors, strict=True):
            here.copy_(there, non_blocking=True)
        return results
