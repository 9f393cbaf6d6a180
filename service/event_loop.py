"""What every event loop that serves has: threads for what it hands over, and a look at its lag."""

import asyncio
from concurrent.futures import ThreadPoolExecutor

from service.metrics.replica import Metrics
from service.threads import open_pool

_LAG_PERIOD_S = 0.5
# Of what the event loop hands over: answers with points, and memory that is given back.
_THREADS = 4


def open_loop_pool() -> ThreadPoolExecutor:
    """The threads of the running event loop.

    Raises:
        RuntimeError: the system gives no more threads.
    """
    pool = open_pool(_THREADS, "loop")
    asyncio.get_running_loop().set_default_executor(pool)
    return pool


async def measure_lag(metrics: Metrics) -> None:
    """Tell the metrics how late the event loop wakes timers; for ever."""
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _LAG_PERIOD_S
        await asyncio.sleep(_LAG_PERIOD_S)
        metrics.event_loop_lag.observe(max(0.0, loop.time() - due))
