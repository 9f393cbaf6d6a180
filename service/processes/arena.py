"""Memory that a front end shares with the workers: a slot for each image on its way.

Decoders write the pixels of an image into its slot, and the engine reads them there; then the
worker writes the result into the same slot. The memory has no name, so nothing stays behind when
its processes end, and it takes no more pages than were written to.
"""

import mmap
import os
import pickle
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_PAGE = mmap.PAGESIZE
_ALIGNED = 64  # bytes
QUEUED, TAKEN = 0, 1


class Slot(NamedTuple):
    """Where the data of one image lie in the arena.

    Attributes:
        number: among all slots.
        offset: of its first byte.
        size: bytes.
    """

    number: int
    offset: int
    size: int


class Parcel(NamedTuple):
    """An object whose arrays lie in a slot.

    Attributes:
        pickled: the object without the data of its arrays (pickle, protocol 5).
        buffers: those data, in order: `(offset, bytes)` in the arena, or themselves where the
            slot has no room for them.
    """

    pickled: bytes
    buffers: tuple[tuple[int, int] | bytes, ...]


class Arena:
    """The shared memory.

    Args:
        descriptor: of the memory.
        size: bytes; the memory is made as large as that if it is not.

    Attributes:
        taken: for each slot `QUEUED`, or `TAKEN` once its item left for the device.
    """

    def __init__(self, descriptor: int, size: int, slots: int) -> None:
        if os.fstat(descriptor).st_size < size:
            os.ftruncate(descriptor, size)
        self._memory = mmap.mmap(descriptor, size)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._start = self._bytes.ctypes.data
        self.taken = self._bytes[:slots]

    def array(self, slot: Slot, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of bytes at the start of a slot, or of its own where that is too small."""
        size = int(np.prod(shape))
        if size > slot.size:
            return np.empty(shape, np.uint8)
        return self._bytes[slot.offset : slot.offset + size].reshape(shape)

    def pack(self, content: Any, slot: Slot) -> Parcel:
        """Put the arrays of an object into a slot; those that lie there stay."""
        found: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(content, 5, buffer_callback=found.append)
        views = [np.frombuffer(one.raw(), np.uint8) for one in found]
        free = slot.offset
        for view in views:
            at = self._offset(view, slot)
            if at is not None:
                free = max(free, _aligned(at + view.size))
        buffers: list[tuple[int, int] | bytes] = []
        for view in views:
            at = self._offset(view, slot)
            if at is None and free + view.size <= slot.offset + slot.size:
                at = free
                self._bytes[at : at + view.size] = view
                free = _aligned(at + view.size)
            buffers.append(view.tobytes() if at is None else (at, view.size))
        return Parcel(pickled, tuple(buffers))

    def unpack(self, parcel: Parcel, *, copy: bool) -> Any:
        """The object of a parcel.

        Args:
            parcel: that `pack` made, here or in another process.
            copy: whether its arrays are its own; else they lie in the slot.
        """
        data = [
            buffer if isinstance(buffer, bytes) else self._read(*buffer, copy=copy)
            for buffer in parcel.buffers
        ]
        return pickle.loads(parcel.pickled, buffers=data)  # noqa: S301  # between our processes

    def _read(self, offset: int, size: int, *, copy: bool) -> Any:
        view = self._bytes[offset : offset + size]
        return bytearray(view) if copy else view

    def _offset(self, view: NDArray[np.uint8], slot: Slot) -> int | None:
        """Where data lie in a slot, if they do."""
        at = view.ctypes.data - self._start
        return at if slot.offset <= at and at + view.size <= slot.offset + slot.size else None


class Slots:
    """The slots of one model in the arena of a front end.

    Those that were free for the shortest time are used first, so that few pages are.

    Args:
        first: index of the first slot.
        start: offset of the first slot.
        count: of the slots.
        size: of each slot, bytes.
    """

    def __init__(self, first: int, start: int, count: int, size: int) -> None:
        self._free = [Slot(first + n, start + n * size, size) for n in reversed(range(count))]

    def take(self) -> Slot:
        """A free slot; there must be one."""
        return self._free.pop()

    def give_back(self, slot: Slot) -> None:
        """Make a slot free."""
        self._free.append(slot)


def plan(models: list[tuple[int, int]]) -> tuple[int, int, list[Slots]]:
    """Lay out an arena.

    Args:
        models: for each model the number of its slots, and the least bytes of a slot.

    Returns:
        The bytes of the arena, the number of its slots, and the slots of each model.
    """
    slots = sum(count for count, _ in models)
    start, first, planned = _pages(slots), 0, []
    for count, least in models:
        size = _pages(least)
        planned.append(Slots(first, start, count, size))
        start, first = start + count * size, first + count
    return start, slots, planned


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED
