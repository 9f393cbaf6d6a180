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
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MIB = 1 << 20


def keep_freed() -> None:
    """Keep what a thread frees for the next thing that it does.

    A thread has heaps of 64 MiB, and by default the last of them goes back to the system as soon
    as it is empty: a batch that reaches into it asks for its pages anew in every pass, which has
    cost up to a tenth of the time. A single heap for all threads costs more where they are many:
    what one core frees, another gets, and its cache has none of it.

    To be called when all is loaded: what loading takes for a while goes back at once.
    """
    if _mallopt is not None:
        _mallopt(_M_TRIM_THRESHOLD, -1)
        # An empty heap stays unless the one before it has this much room.
        _mallopt(_M_TOP_PAD, 60 * _MIB)
        _mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)  # the most that it can be


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
