"""A thread of a device: does its work in order, and can be given up when it does not come back."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

from service.threads import show_name

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Job(Generic[T]):
    worker: "Worker"  # that it was given to
    work: Callable[[], Any]
    then: "Worker | None"
    limit_s: float
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[T]


class Worker:
    """One thread, which runs from the start.

    A pool of the standard library does not do: it joins its threads at the end of the process, and
    whatever waits for a thread that hangs or died would wait for ever.

    Args:
        name: of the thread.
        begin: what the thread does first.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def __init__(self, name: str, begin: Callable[[], None]) -> None:
        self._jobs = SimpleQueue[_Job[Any] | None]()
        self._unanswered: set[_Job[Any]] = set()
        self._in_hand: _Job[Any] | None = None
        self._given_up = False
        self._looked_at: _Job[Any] | None = None
        self._looked_on_s = 0.0
        began = Future[None]()
        self._thread = Thread(target=self._run, args=(begin, began), name=name, daemon=True)
        self._thread.start()
        began.result()

    @property
    def alive(self) -> bool:
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[], T], limit_s: float) -> asyncio.Future[T]:
        """Do work when all that came before it is done.

        Args:
            work: may raise anything; what is not an `Exception` ends the thread.
            limit_s: after which the work is overdue, from when the thread takes it up, seconds.
        """
        return self._submit(work, None, limit_s)

    def submit_chain(
        self, work: Callable[[], Callable[[], T]], then: "Worker", limit_s: float
    ) -> asyncio.Future[T]:
        """Do work here, and in another worker what it returns, without a turn of the event loop.

        Args:
            work: as of `submit`.
            then: is given up whenever this worker is.
            limit_s: for each of the two, as of `submit`.
        """
        return self._submit(work, then, limit_s)

    def _submit(
        self, work: Callable[[], Any], then: "Worker | None", limit_s: float
    ) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        job = _Job[Any](self, work, then, limit_s, loop, loop.create_future())
        self._unanswered.add(job)
        self._jobs.put(job)
        return job.future

    def overdue(self, step_s: float) -> bool:
        """Look whether the work in hand takes longer than it may; to be asked again and again.

        Time is added up from look to look, so that a process that is stopped for a while, with
        its machine or by a signal, is not taken for one that hangs.

        Args:
            step_s: since the last look, as far as it counts; seconds.
        """
        job = self._in_hand
        if job is None or job is not self._looked_at:
            self._looked_at, self._looked_on_s = job, 0.0
            return False
        self._looked_on_s += step_s
        return self._looked_on_s > job.limit_s

    def give_up(self, error: Callable[[], Exception]) -> None:
        """Do no further work, and answer all that waits, the work in hand too.

        Args:
            error: makes one for each that waits.
        """
        self._given_up = True
        self._jobs.put(None)
        for job in self._unanswered:
            if not job.future.done():
                job.future.set_exception(error())
        self._unanswered.clear()

    def close(self, timeout_s: float | None) -> bool:
        """End the thread after the work in hand.

        Args:
            timeout_s: to wait for that, seconds; `None` waits for ever.

        Returns:
            Whether it ended.
        """
        self._jobs.put(None)
        self._thread.join(timeout_s)
        return not self.alive

    def _run(self, begin: Callable[[], None], began: Future[None]) -> None:
        try:
            show_name()
            begin()
        except BaseException as error:
            began.set_exception(error)
            return
        began.set_result(None)
        while (job := self._jobs.get()) is not None and not self._given_up:
            self._in_hand = job
            try:
                result = job.work()
            except BaseException as error:
                self._post(job, None, error)
                if not isinstance(error, Exception):
                    return
            else:
                if job.then is None:
                    self._post(job, result, None)
                else:
                    then, job.then, job.work = job.then, None, result
                    then._jobs.put(job)
                del result  # of megabytes, and the next work may be long in coming
            self._in_hand = None
            del job

    def _post(self, job: _Job[Any], result: Any, error: BaseException | None) -> None:
        if error is not None and not isinstance(error, Exception):
            # The error itself would end the event loop.
            died = WorkerDied(f"the thread {self._thread.name} ended with {error!r}")
            died.__cause__ = error
            error = died
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            job.loop.call_soon_threadsafe(job.worker._answer, job, result, error)

    def _answer(self, job: _Job[Any], result: Any, error: Exception | None) -> None:
        self._unanswered.discard(job)
        if job.future.done():  # given up, or its caller left
            return
        if error is None:
            job.future.set_result(result)
        else:
            job.future.set_exception(error)


class WorkerDied(Exception):
    """The thread ended in the middle of its work."""
