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
# Of an arena, whose first part has a mark for each slot. What nobody writes to takes no memory.
_MOST_SLOTS, _MOST_BYTES = 1 << 20, 1 << 46
# Of a slot that is free: a large image may be followed by none for long, bytes.
_KEPT = 4 << 20
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
    """The shared memory; it grows when more slots are wanted.

    Args:
        descriptor: of the memory.

    Attributes:
        taken: for each slot `QUEUED`, or `TAKEN` once its item left for the device.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._maps: list[NDArray[np.uint8]] = []
        self._numbers, self._offsets = _Ranges(_MOST_SLOTS), _Ranges(_MOST_BYTES)
        self._offsets.take(_MOST_SLOTS)  # for the marks
        self._reach(_MOST_SLOTS)
        self.taken = self._bytes[:_MOST_SLOTS]

    def open_slots(self, count: int, least: int) -> "Slots":
        """Slots for the images of one version of a model.

        Args:
            count: of the slots.
            least: bytes of each.
        """
        size = _pages(least)
        number, start = self._numbers.take(count), self._offsets.take(count * size)
        self._reach(start + count * size)
        return Slots(number, start, count, size)

    def close_slots(self, slots: "Slots") -> None:
        """Take slots back that nobody uses any more, with their memory."""
        first, size = slots.first, slots.count * slots.first.size
        self._memory.madvise(mmap.MADV_REMOVE, first.offset, size)
        self._numbers.give_back(first.number, slots.count)
        self._offsets.give_back(first.offset, size)

    def trim(self, slot: Slot) -> None:
        """Give back the memory of a slot that nobody uses, but for what most images take."""
        if slot.size > _KEPT:
            self._memory.madvise(mmap.MADV_REMOVE, slot.offset + _KEPT, slot.size - _KEPT)

    def array(self, slot: Slot, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of bytes at the start of a slot, or of its own where that is too small."""
        size = int(np.prod(shape))
        self._reach(slot.offset + slot.size)
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
        self._reach(offset + size)
        view = self._bytes[offset : offset + size]
        return bytearray(view) if copy else view

    def _offset(self, view: NDArray[np.uint8], slot: Slot) -> int | None:
        """Where data lie in a slot, if they do."""
        for mapped in self._maps:
            at = view.ctypes.data - mapped.ctypes.data
            if slot.offset <= at and at + view.size <= slot.offset + slot.size:
                return at
        return None

    def _reach(self, end: int) -> None:
        """See at least so many bytes of the memory, which is made as large if it is not.

        What lies in the part that was seen before stays where it is.
        """
        if self._maps and len(self._maps[-1]) >= end:
            return
        size = os.fstat(self._descriptor).st_size
        if size < end:
            size = max(end, 2 * size)
            os.ftruncate(self._descriptor, size)
        self._memory = mmap.mmap(self._descriptor, size)
        self._bytes = np.frombuffer(self._memory, np.uint8)
        self._maps.append(self._bytes)


class Slots:
    """The slots of one version of a model in the arena of a front end.

    Those that were free for the shortest time are used first, so that few pages are.

    Args:
        first: number of the first slot.
        start: offset of the first slot.
        count: of the slots.
        size: of each slot, bytes.

    Attributes:
        first: the slot that lies before the others.
        count: of the slots.
    """

    def __init__(self, first: int, start: int, count: int, size: int) -> None:
        self._free = [Slot(first + n, start + n * size, size) for n in reversed(range(count))]
        self.first = self._free[-1]
        self.count = count

    def take(self) -> Slot:
        """A free slot; there must be one."""
        return self._free.pop()

    def give_back(self, slot: Slot) -> None:
        """Make a slot free."""
        self._free.append(slot)


class _Ranges:
    """Gives out ranges of numbers from 0 on; the first one that is free and long enough.

    Args:
        count: of the numbers.
    """

    def __init__(self, count: int) -> None:
        self._free = [(0, count)]

    def take(self, count: int) -> int:
        """The first of so many numbers that are free."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= count:
                self._free[index] = (start + count, end)
                return start
        raise MemoryError(f"{count} more are not left")

    def give_back(self, start: int, count: int) -> None:
        """Make a range free."""
        merged: list[tuple[int, int]] = []
        for begin, end in sorted([*self._free, (start, start + count)]):
            if merged and merged[-1][1] == begin:
                begin = merged.pop()[0]  # noqa: PLW2901
            merged.append((begin, end))
        self._free = merged


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNED) * _ALIGNED
