"""Memory that work leaves behind: kept while there is more, given back when there is little."""

import asyncio
import ctypes
from time import process_time

_PERIOD_S = 5.0
_QUIET_CPU_S = 2.5  # of a period: half a core

# Of glibc; other C libraries have their own ways.
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_MOST_OF_MMAP_THRESHOLD = 32 << 20


def keep_freed() -> None:
    """Keep what is freed in one heap of the process; to be called before threads begin.

    By default threads have heaps of 64 MiB, and the last one of each goes back to the system as
    soon as it is empty: a batch that crosses into it asks for every page anew in each pass, which
    has cost up to a tenth of the time. One heap for all also gives all back, see `give_back`.
    """
    if _mallopt is not None:
        _mallopt(_M_ARENA_MAX, 1)
        _mallopt(_M_TRIM_THRESHOLD, -1)
        _mallopt(_M_MMAP_THRESHOLD, _MOST_OF_MMAP_THRESHOLD)


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
    """Give free memory back, from all over the heap; takes milliseconds."""
    if _malloc_trim is not None:
        _malloc_trim(0)
