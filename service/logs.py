"""Log lines: one event with fields each, for people or for machines.

Whoever logs hands over what there is to say and goes on; one thread writes it. Where nobody reads,
lines are dropped and counted, and nothing waits for them. Values come from anywhere, so a line
shows them in printable ASCII, and none of them can pass for a line or a field of its own.
"""

import asyncio
import atexit
import json
import logging
import os
import re
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from logging.handlers import QueueHandler
from queue import SimpleQueue
from threading import Event, RLock, Thread
from time import sleep
from typing import Any, TextIO

import structlog
from structlog.dev import Column, ConsoleRenderer, KeyValueColumnFormatter, LogLevelColumnFormatter
from structlog.processors import ExceptionRenderer, add_log_level
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict

from service.settings.log import Log
from service.threads import show_name

_LINES = 4096  # that wait to be written
_AT_ONCE = 256  # lines of one write
# What the writer waits for more lines. One that waits for the next line is woken by it, and wants
# the interpreter in the middle of the request that the line is of.
_GATHER_S = 0.005
_CHARACTERS = 1000  # of one value
_FLUSH_S = 1.0  # what the end of the process may wait for a reader
_SUM_S = 1.0

Render = Callable[[EventDict], str]


class _Gap:
    """Where in the queue lines are missing."""


class LineWriter:
    """Writes lines from a thread of its own, in the order in which they were handed over.

    Args:
        descriptor: of the file, pipe or terminal.
        render: makes the line of an event, without its end.

    Attributes:
        dropped: lines that nobody read in time.
    """

    def __init__(self, descriptor: int, render: Render) -> None:
        self._descriptor = descriptor
        self._render = render
        self._queue = SimpleQueue[EventDict | _Gap | Event]()
        self._dropping = False
        self._untold = 0
        # What is lost may be found out while the same thread collects garbage.
        self._losing = RLock()
        self._count: Callable[[int], object] = lambda _: None
        self.dropped = 0
        Thread(target=self._run, name="log", daemon=True).start()

    def put(self, event: EventDict) -> None:
        """Take a line to be written later; never waits."""
        waiting = self._queue.qsize()
        # Once full, it takes lines again when half of them are gone: one gap instead of many.
        if waiting >= (_LINES // 2 if self._dropping else _LINES):
            self._dropping = True
            self._lose(1)
            return
        if self._dropping:
            self._dropping = False
            self._queue.put(_Gap())
        self._queue.put(event)

    # What structlog calls, by severity.
    debug = info = warning = error = critical = put

    def on_dropped(self, count: Callable[[int], object]) -> None:
        """Count dropped lines, those before included, with a function such as a metric's `inc`."""
        with self._losing:
            count(self.dropped)
            self._count = count

    def flush(self, timeout_s: float = _FLUSH_S) -> None:
        """Wait until all lines so far are written, or nobody has read them for so long, seconds."""
        written = Event()
        self._queue.put(written)
        written.wait(timeout_s)

    def _lose(self, lines: int) -> None:
        with self._losing:
            self.dropped += lines
            self._untold += lines
            self._count(lines)

    def _run(self) -> None:
        show_name()
        taken = True
        while True:
            lines, told = 0, 0
            text: list[str] = []
            flushed: Event | None = None
            for item in self._take(gap=not taken):
                if isinstance(item, Event):
                    flushed = item
                    break
                if isinstance(item, _Gap):
                    if missing := self._untold - told:
                        text.append(self._line(_warning("log lines dropped", lines=missing)))
                        told += missing
                else:
                    lines += 1
                    text.append(self._line(item))
            taken = self._write_lines(text, lines, told)
            if flushed is not None:
                flushed.set()
            if taken and self._untold and self._queue.empty():
                self._queue.put(_Gap())

    def _take(self, *, gap: bool) -> Iterator[EventDict | _Gap | Event]:
        """The lines that wait, once there is one; after a gap where the last ones were lost."""
        first = self._queue.get()
        if not isinstance(first, Event) and self._queue.qsize() < _AT_ONCE:
            sleep(_GATHER_S)
        if gap:
            yield _Gap()
        yield first
        for _ in range(min(self._queue.qsize(), _AT_ONCE)):
            yield self._queue.get()

    def _line(self, event: EventDict) -> str:
        try:
            return self._render(event) + "\n"
        except Exception as error:  # no value of an event may end the log
            fault = _warning("a log line could not be written", error=type(error).__name__)
            return self._render(fault) + "\n"

    def _write_lines(self, text: list[str], lines: int, told: int) -> bool:
        """Write lines, and say whether they were taken."""
        try:
            self._write("".join(text).encode())
        except OSError:  # the reader is gone, or the disk is full: another line may find it better
            self._lose(lines)
            return False
        with self._losing:
            self._untold -= told
        return True

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except BlockingIOError:  # whoever started the process made it so
                select.select((), (self._descriptor,), ())


def configure(
    settings: Log, stream: TextIO | None = sys.stdout, process: str | None = None
) -> LineWriter:
    """Send structlog, the standard library's loggers and warnings to a stream in one form.

    Args:
        settings: of the log.
        stream: where lines go.
        process: that they are of, where several write to the stream.

    Returns:
        What writes; at the end of the process it is flushed.
    """
    # A closed descriptor would become a socket's, and a client would read the log.
    descriptor = os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno()
    render = _json if settings.format == "json" else _console(colors=os.isatty(descriptor))
    writer = LineWriter(descriptor, render)
    level = logging.getLevelNamesMapping()[settings.level.upper()]
    named = [] if process is None else [partial(_of_process, process)]
    structlog.configure(
        processors=[add_log_level, *named, _EXCEPTIONS, _plain],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: writer,
        cache_logger_on_first_use=True,
    )
    # Libraries speak up when something is wrong; their own chatter stays out.
    logging.basicConfig(handlers=[_OfLibraries(writer)], level=max(level, logging.WARNING))
    logging.captureWarnings(capture=True)
    atexit.register(writer.flush)
    return writer


def never_wait_for_errors() -> None:
    """Let libraries write to standard error without waiting where nobody reads it.

    What they write then is lost. Only for a pipe, which can be opened anew: its other writers keep
    waiting as they did.
    """
    if sys.stderr is None or not stat.S_ISFIFO(os.fstat(2).st_mode):
        return
    try:
        pipe = os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:  # nobody reads any more, or the pipe is another user's
        return
    os.dup2(pipe, 2)
    os.close(pipe)


class Summed:
    """Says the same event once, and from then on once a second how many times it came.

    For what a crowd can cause, on the event loop.

    Args:
        say: a method of a logger, such as `log.info`.
        event: what it says.
    """

    def __init__(self, say: Callable[..., object], event: str) -> None:
        self._say = say
        self._event = event
        self._times: dict[tuple[tuple[str, object], ...], int] = {}

    def add(self, **fields: object) -> None:
        """Count one.

        Args:
            fields: with few possible values, and never what a caller chose: each combination has
                a line of its own.
        """
        kind = tuple(fields.items())
        if kind in self._times:
            self._times[kind] += 1
            return
        self._say(self._event, **fields)
        self._begin(kind)

    def _begin(self, kind: tuple[tuple[str, object], ...]) -> None:
        self._times[kind] = 0
        asyncio.get_running_loop().call_later(_SUM_S, self._end, kind)

    def _end(self, kind: tuple[tuple[str, object], ...]) -> None:
        if times := self._times.pop(kind):
            self._say(self._event, **dict(kind), times=times)
            self._begin(kind)


def printable(text: str) -> str:
    """One line without control characters, which keeps the letters of every language."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


# Without local variables, which hold the bytes of callers.
_EXCEPTIONS = ExceptionRenderer(ExceptionDictTransformer(show_locals=False))


def _plain(_logger: object, _method: str, event: EventDict) -> tuple[tuple[EventDict], EventDict]:
    """Reduce an event to what may wait in the queue: short values, and no object of a request."""
    event["timestamp"] = time.time()
    for key, value in event.items():
        event[key] = _short(value)
    return (event,), {}


def _of_process(process: str, _logger: object, _method: str, event: EventDict) -> EventDict:
    event["process"] = process
    return event


def _short(value: object) -> object:
    match value:
        case str():
            return _cut(value)
        case int() | float() | None:
            return value
        case list() | tuple():
            return [_short(one) for one in value]
        case dict():
            return {key: _short(one) for key, one in value.items()}
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[:_CHARACTERS]}..."


class _OfLibraries(QueueHandler):
    """Hands on what goes to the loggers of the standard library."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__(SimpleQueue())
        self._writer = writer

    def prepare(self, record: logging.LogRecord) -> EventDict:
        event = {
            "event": record.getMessage(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "exc_info": record.exc_info,
        }
        (plain,), _ = _plain(None, "", _EXCEPTIONS(None, "", event))
        return plain

    def enqueue(self, record: EventDict) -> None:  # type: ignore[override]  # what prepare made
        self._writer.put(record)


def _warning(event: str, **fields: object) -> EventDict:
    return {"timestamp": time.time(), "level": "warning", "event": event, **fields}


def _json(event: EventDict) -> str:
    event["timestamp"] = _time(event["timestamp"])
    text = json.dumps(event)
    # Half a surrogate pair is not a character, and these words are not JSON: many readers refuse
    # both.
    if _NO_JSON.search(text):
        whole = json.dumps(event, ensure_ascii=False).encode("utf-8", "replace")
        text = json.dumps(json.loads(whole, parse_constant=str))
    return text


_NO_JSON = re.compile(r"\\ud|NaN|Infinity")


def _console(*, colors: bool) -> Render:
    styles = ConsoleRenderer.get_default_column_styles(colors)
    levels = ConsoleRenderer.get_default_level_styles(colors)

    def values(
        style: str, show: Callable[[Any], str], key: str | None = None, width: int = 0
    ) -> Any:
        return KeyValueColumnFormatter(key, style, styles.reset, value_repr=show, width=width)

    fields = ConsoleRenderer(
        columns=[
            Column("timestamp", values(styles.timestamp, _time)),
            Column("level", LogLevelColumnFormatter(levels, styles.reset)),
            Column("event", values(styles.bright, _phrase, width=30)),
            Column("", values(styles.kv_value, _word, styles.kv_key)),
        ]
    )

    def render(event: EventDict) -> str:
        traces = event.pop("exception", ())
        return "\n".join([fields(None, "", event), *_traceback(traces)])

    return render


def _traceback(traces: list[dict[str, Any]]) -> Iterator[str]:
    """Lines that are indented, so that none passes for an event."""
    for trace in traces:
        yield f"  {trace['exc_type']}: {printable(trace['exc_value'])}"
        for frame in trace["frames"]:
            yield printable(f"    {frame['filename']}:{frame['lineno']} in {frame['name']}")
        for group in trace.get("exceptions", ()):
            yield from (f"  {line}" for line in _traceback(group))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds")[:-6] + "Z"


_BARE = r"[!#-&(-<>-\[\]-~]+"  # neither space nor `=`, `'`, `"` or `\`
_BARE_WORD = re.compile(_BARE)
_BARE_WORDS = re.compile(f"{_BARE}( {_BARE})*")


def _phrase(value: object) -> str:
    text = str(value)
    return text if _BARE_WORDS.fullmatch(text) else _quote(text)


def _word(value: object) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if _BARE_WORD.fullmatch(text) else _quote(text)


def _quote(text: str) -> str:
    """A JSON string in which no `=` stands, so that a search for a field finds only the field."""
    return json.dumps(text).replace("=", "\\u003d")
