"""Threads that are there from the start.

Pools of the standard library begin a thread when there is work for it. Where the system gives no
more threads, that is in the middle of a request of a replica that said it was ready.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, BrokenBarrierError


def open_pool(
    threads: int, name: str, begin: Callable[[], None] = lambda: None
) -> ThreadPoolExecutor:
    """A pool, all of whose threads run.

    Args:
        threads: how many.
        name: that the names of the threads begin with.
        begin: what each thread does first.

    Raises:
        RuntimeError: the system gives no more threads.
    """
    pool = ThreadPoolExecutor(threads, name, initializer=begin)
    together = Barrier(threads)

    def meet() -> None:
        try:
            together.wait()
        except BrokenBarrierError:
            return  # another one could not begin

    try:
        # None is free for the next until all are there.
        met = [pool.submit(meet) for _ in range(threads)]
    except RuntimeError:
        together.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    for one in met:
        one.result()
    return pool
