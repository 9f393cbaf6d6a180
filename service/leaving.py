"""The end of a process that was told to leave, whatever still hangs in it."""

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from threading import Thread
from time import monotonic
from types import FrameType

import structlog

log = structlog.get_logger(__name__)

STUCK_EXIT_CODE = os.EX_SOFTWARE  # 70
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Files of the frames in which a thread waits, and of those that tell an idle one.
_WAITS = ("/threading.py", "/queue.py", "/selectors.py")
_IDLE = (
    "/concurrent/futures/thread.py",
    "/engine/worker.py",
    "/socketserver.py",
    "/threading.py",
    "/leaving.py",
)


def leave_while_starting() -> None:
    """Until `leave_on_signal`: end at once, with 0, on SIGTERM, and let SIGHUP wait.

    Libraries take seconds to load, in which the first process of a container would get neither:
    the kernel drops its signals that have no handler, so it would start, serve, and be killed.
    """
    signal.signal(signal.SIGTERM, lambda _number, _frame: os._exit(0))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def leave_on_signal(
    within_s: float, flush: Callable[[], None], on_hangup: Callable[[], None] = lambda: None
) -> asyncio.Event:
    """An event that the first SIGTERM or SIGINT sets; a second one ends the process at once.

    A thread of its own reads the signals: the event loop may be busy with a checkpoint, and the
    end of the interpreter waits for threads that may never end.

    Args:
        within_s: after the first signal the process ends with `STUCK_EXIT_CODE`, seconds.
        flush: writes what waits to be logged.
        on_hangup: is called on the event loop at each SIGHUP; that of a terminal that is closed
            ends the process like SIGTERM.
    """
    loop, leave = asyncio.get_running_loop(), asyncio.Event()
    # A terminal that is closed sends SIGHUP as well; what `nohup` started goes on.
    attended = _attended() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        # The next one ends the process even if no Python runs any more. From the first process of a
        # container the kernel would keep it then; there the thread below ends the process.
        if os.getpid() != 1:
            for one in _SIGNALS:
                signal.signal(one, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, on_signal)
    signal.signal(signal.SIGHUP, lambda _number, _frame: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})

    def tell(callback: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the loop is closed: the process is at its end
            loop.call_soon_threadsafe(callback)

    def watch() -> None:
        with reader, writer:
            while _await_signal(reader) == signal.SIGHUP and not (attended and not _attended()):
                tell(on_hangup)
            tell(leave.set)
            deadline = monotonic() + within_s
            try:
                while (number := _await_signal(reader, deadline)) == signal.SIGHUP:
                    pass
            except TimeoutError:
                end_stuck(flush)
            os._exit(128 + number)

    Thread(target=watch, name="signals", daemon=True).start()
    return leave


def end_stuck(flush: Callable[[], None]) -> None:
    """End the process with `STUCK_EXIT_CODE`, and say in the log what it could not wait for."""
    end(STUCK_EXIT_CODE, "stuck", flush, threads=busy_threads())


def end(code: int, event: str, flush: Callable[[], None], **fields: object) -> None:
    """End the process at once, after one line in the log."""
    log.log(40 if code else 20, event, **fields)
    flush()
    os._exit(code)


def await_threads(timeout_s: float) -> bool:
    """Wait for the threads that the end of the interpreter would wait for.

    Args:
        timeout_s: for all of them together, seconds.

    Returns:
        Whether all have ended.
    """
    deadline = monotonic() + timeout_s
    waited_for = [
        thread
        for thread in threading.enumerate()
        if not thread.daemon and thread is not threading.main_thread()
    ]
    for thread in waited_for:
        thread.join(max(0.0, deadline - monotonic()))
    return not any(thread.is_alive() for thread in waited_for)


def busy_threads() -> list[str]:
    """What every thread that does not wait for work is doing: its name, and the line it is at."""
    frames, here = sys._current_frames(), threading.get_ident()
    lines = []
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        while frame is not None and frame.f_back and frame.f_code.co_filename.endswith(_WAITS):
            frame = frame.f_back
        if frame is None or thread.ident == here or frame.f_code.co_filename.endswith(_IDLE):
            continue
        code = frame.f_code
        lines.append(f"{thread.name}: {code.co_filename}:{frame.f_lineno} in {code.co_name}")
    return lines


def _attended() -> bool:
    """Whether the process has a terminal that could be closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _await_signal(reader: socket.socket, deadline: float | None = None) -> int:
    """The next of our signals, or SIGHUP.

    Args:
        reader: of the numbers of signals.
        deadline: monotonic, seconds.

    Raises:
        TimeoutError: none came in time.
    """
    while True:
        if deadline is not None:
            reader.settimeout(max(1e-3, deadline - monotonic()))
        number = reader.recv(1)[0]
        if number in (*_SIGNALS, signal.SIGHUP):
            return number
