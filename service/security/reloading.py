"""Files that are read again when they change, as those of mounted Secrets do."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import structlog

from service.metrics.replica import Metrics, Reloaded

T = TypeVar("T")

LOOK_S = 0.5

log = structlog.get_logger(__name__)


class Reloading(Generic[T]):
    """What files hold; when new content cannot be used, what they held before.

    A look at the files follows links, so it sees the one link that Kubernetes swaps for all
    files of a Secret. Changed files are read when they have been the same for two looks, because
    several files are seldom written at once.

    Args:
        kind: what they hold, in the log and in the metrics.
        paths: of the files.
        read: what the files hold; raises an error that says why it cannot be used.
        changed: is told of new content, on the event loop.
        metrics: count how often that was.

    Attributes:
        value: what is in use.

    Raises:
        Exception: that of `read`.
    """

    def __init__(
        self,
        kind: Reloaded,
        paths: Sequence[Path],
        read: Callable[[], T],
        changed: Callable[[T], None],
        metrics: Metrics,
    ) -> None:
        self._kind = kind
        self._paths = paths
        self._read = read
        self._changed = changed
        self._reloads = metrics.reloads[kind]
        self._used = self._last = self._look()
        self.value = read()
        changed(self.value)

    async def watch(self) -> None:
        """Look at the files until cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            seen = await asyncio.to_thread(self._look)
            if seen == self._last and seen != self._used:
                self._used = seen
                await self._reload()
            self._last = seen

    async def _reload(self) -> None:
        files = list(map(str, self._paths))
        try:
            self.value = await asyncio.to_thread(self._read)
        except Exception as error:  # nothing that is in a file may end the watch
            self._reloads["failed"].inc()
            log.error(  # noqa: TRY400
                "reload failed",
                kind=self._kind,
                files=files,
                reason=str(error) or type(error).__name__,
            )
            return
        self._changed(self.value)
        self._reloads["ok"].inc()
        log.info("reloaded", kind=self._kind, files=files)

    def _look(self) -> list[tuple[int, ...]]:
        return [_stamp(path) for path in self._paths]


def _stamp(path: Path) -> tuple[int, ...]:
    """What differs when a file was written, replaced, or made readable; empty without a file."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
