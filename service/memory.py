"""Memory that a peak leaves behind, given back to the system when there is little to do."""

import asyncio
import ctypes
from time import process_time

_PERIOD_S = 5.0
_QUIET_CPU_S = 2.5  # of a period: half a core

# Of glibc, which keeps what threads freed: the next batch is faster for it, but memory stays at
# its peak. Other C libraries have their own ways.
_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)


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
