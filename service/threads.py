"""Pools whose threads all run from the start.

Pools of the standard library begin a thread when there is work for it. Where the system gives no
more threads, such a pool would find that out in the middle of a request, in a replica that said it
was ready.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, current_thread

from service.machine import cores


def need_spare(others: int) -> None:
    """Check that threads can be started for libraries that do not report it when they cannot.

    gRPC and OpenMP end the process then, in the middle of its start.

    Args:
        others: threads that are needed beside those of gRPC and of a reader of the metrics.

    Raises:
        RuntimeError: the system gives no more threads.
    """
    of_grpc = max(4, min(cores(), 16)) + 3
    open_pool(of_grpc + 1 + others, "spare").shutdown()


def show_name() -> None:
    """Give the calling thread its name for `top` and `perf` as well; from 3.14 on Python does.

    Threads that it begins, such as those of OpenMP, have that name too.
    """
    with suppress(OSError):  # other systems have other ways
        Path("/proc/thread-self/comm").write_text(current_thread().name)


def open_pool(
    threads: int, name: str, begin: Callable[[], None] = lambda: None
) -> ThreadPoolExecutor:
    """A pool whose threads all run.

    Args:
        threads: how many.
        name: that the names of the threads begin with.
        begin: what each thread does first.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def begin_named() -> None:
        show_name()
        begin()

    pool = ThreadPoolExecutor(threads, name, initializer=begin_named)
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
