"""Freed memory: kept while the process is busy, given back to the system when it is quiet."""

import asyncio
import ctypes
from threading import Event, Lock
from time import process_time

_PERIOD_S = 5.0
_QUIET_CPU_S = 2.5  # of a period: half a core

_libc = ctypes.CDLL(None)
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.malloc.restype = _libc.realloc.restype = ctypes.c_void_p
# Other C libraries have their own ways.
_glibc = _libc if hasattr(_libc, "mallopt") else None

# Parameters of mallopt(3).
_M_MXFAST, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = 1, -1, -2, -3
_MIB = 1 << 20

# Larger than what a thread caches, so that it comes from the thread's own heap.
_FOOTHOLD = 2048
# glibc looks at the end of a heap when as much as this is freed in one piece.
_LARGE_FREE = 1 << 17

_footholds: list[int] = []
# Two threads that move the same foothold at once would free it twice.
_giving_back = Lock()
_keeping = Event()


def reach_heap() -> None:
    """Let `give_back` reach the heap of the calling thread; to be called when the thread begins.

    glibc trims the end of a heap only when something in that heap is freed. So a block in it is
    held for this: to make it larger and smaller again is to free something there.
    """
    if _glibc is not None:
        _footholds.append(_glibc.malloc(_FOOTHOLD))


def keep_freed() -> None:
    """Keep what a thread frees for the next thing that it does.

    A thread has heaps of 64 MiB, and by default the last of them goes back to the system as soon
    as it is empty: a batch that reaches into it asks for its pages anew in every pass, which has
    cost up to a tenth of the time. A single heap for all threads costs more where they are many:
    memory that one core frees goes to another, whose cache does not hold it.

    To be called when all is loaded: what loading takes for a while goes back at once.
    """
    if _glibc is not None:
        _keeping.set()
        # glibc joins the small pieces that it put aside whenever a large one is freed, and a pass
        # frees hundreds of both: joining them at once takes a tenth less of its time.
        _glibc.mallopt(_M_MXFAST, 0)
        _glibc.mallopt(_M_TRIM_THRESHOLD, -1)
        # An empty heap stays unless the one before it has this much room.
        _glibc.mallopt(_M_TOP_PAD, 60 * _MIB)
        _glibc.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the most that it can be


async def give_back_when_quiet() -> None:
    """Give free memory back at the end of each period in which the process did little; for ever.

    The first batches afterwards ask the system for theirs again, some milliseconds each, which
    is why a busy process keeps it.
    """
    while True:
        before = process_time()
        await asyncio.sleep(_PERIOD_S)
        if process_time() - before < _QUIET_CPU_S:
            await asyncio.to_thread(give_back)


def give_back() -> None:
    """Give free memory back, from all over the heaps; takes milliseconds.

    Several threads may call it at once.
    """
    if _glibc is None:
        return
    with _giving_back:
        if _keeping.is_set():
            _give_back_ends()
        _glibc.malloc_trim(0)


def _give_back_ends() -> None:
    """Cut off the free end of every thread's heap, which `malloc_trim` leaves as it is."""
    assert _glibc is not None
    _glibc.mallopt(_M_TRIM_THRESHOLD, 0)
    _glibc.mallopt(_M_TOP_PAD, 0)
    for number, block in enumerate(_footholds):
        larger = _glibc.realloc(block, _LARGE_FREE + _FOOTHOLD)
        _footholds[number] = _glibc.realloc(larger, _FOOTHOLD)
    keep_freed()
