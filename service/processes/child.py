"""One process of the server as the supervisor sees it: started, watched, replaced."""

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import structlog

from service.processes import birth as births
from service.processes.birth import Birth
from service.processes.channel import Line, line_pair

log = structlog.get_logger(__name__)

# So many deaths are a loop, however long each process took to start. They are forgotten once one
# has been of use for so long.
_LOOP = 5
_WELL_S = 10.0
_PAUSES_S = (0.1, 0.5, 1.0, 2.0, 4.0, 8.0)


class Child:
    """A place for a process, which is filled anew when the process ends.

    Args:
        name: as it is logged and counted.

    Attributes:
        name: as above.
        line: to the process that runs now.
        useful: whether any process of this place has come as far as to be of use.
        started_s: how long the last one took for that, seconds.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.line: Line | None = None
        self.useful = False
        self.started_s = 5.0
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._deaths = 0
        self._useful_since: float | None = None  # of the process that runs now
        self._reason: str | None = None
        self._ended: asyncio.Future[int] | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while it runs."""
        return None if self._process is None else self._process.pid

    @property
    def looping(self) -> bool:
        """Whether its processes die again and again."""
        self._forget_if_well()
        return self._deaths >= _LOOP

    @property
    def pause_s(self) -> float:
        """How long to wait before the next start, by how many died lately; seconds."""
        return _PAUSES_S[min(self._deaths, len(_PAUSES_S)) - 1] if self._deaths else 0.0

    def start(
        self,
        birth: Callable[[int], Birth],
        receive: Callable[[Any, list[int]], None],
    ) -> asyncio.Future[int]:
        """Start a process.

        Args:
            birth: what it is given, by the descriptor of its line.
            receive: takes what it tells, with descriptors.

        Returns:
            Its exit code, once it ends; that of a signal is negative.
        """
        ours, theirs = line_pair()
        self._reason, self._began, self._useful_since = None, monotonic(), None
        with theirs:
            given = birth(theirs.fileno())
            command = [*births.COMMAND, str(os.getpid()), given.text()]
            # What it is to inherit is named; it inherits nothing else.
            self._process = subprocess.Popen(command, pass_fds=given.descriptors)  # noqa: S603
        self.line = Line(ours, receive, lambda: None)
        loop, process = asyncio.get_running_loop(), self._process
        self._ended = ended = loop.create_future()
        watched = os.pidfd_open(process.pid)

        def reap() -> None:
            loop.remove_reader(watched)
            os.close(watched)
            code = process.wait()
            self._process = None
            if self.line is not None:
                self.line.close()
                self.line = None
            if not ended.done():
                ended.set_result(code)

        loop.add_reader(watched, reap)
        return ended

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        """Tell the process something, if it runs."""
        if self.line is not None:
            self.line.send(message, descriptors)

    def is_useful(self) -> None:
        """Note that the process has come as far as to be of use."""
        self.useful, self._useful_since = True, monotonic()
        self.started_s = self._useful_since - self._began

    def kill(self, reason: str) -> None:
        """End the process at once."""
        if self._process is not None:
            self._reason = reason
            self._process.send_signal(signal.SIGKILL)

    async def end(self) -> None:
        """Wait until the process that runs now, if any, has ended."""
        if self._ended is not None:
            await asyncio.wait([self._ended])

    def died(self, code: int) -> str:
        """Remember that the process ended, and say why."""
        self._forget_if_well()
        self._deaths += 1
        self._useful_since = None
        if self._reason is not None:
            return self._reason
        if code == os.EX_UNAVAILABLE:
            return "device_lost"
        if code == 0:
            return "left"
        return "killed" if code < 0 else "failed"

    def _forget_if_well(self) -> None:
        if self._useful_since is not None and monotonic() - self._useful_since > _WELL_S:
            self._deaths = 0
