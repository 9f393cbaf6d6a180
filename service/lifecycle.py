"""Where a replica is in its life, as its probes see it."""

import asyncio
from collections.abc import Awaitable, Callable


class Lifecycle:
    """The states of a replica, from starting through ready to draining.

    The one place that says whether the replica is live and ready: `live` and `ready` can be read,
    and observers are told when they may have changed.

    Args:
        sound: whether every device can still be trusted.
        useful: whether a device that can be trusted has a model that works.

    Attributes:
        started: whether warm-up is over.
        draining: whether the replica was told to leave.
    """

    def __init__(self, sound: Callable[[], bool], useful: Callable[[], bool]) -> None:
        self.started = False
        self.draining = False
        self._sound = sound
        self._useful = useful
        self._observers: list[Callable[[], Awaitable[None]]] = []
        self._telling: set[asyncio.Task[None]] = set()

    @property
    def live(self) -> bool:
        """Whether the process should go on; false when only a restart can help."""
        return self._sound()

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.started and not self.draining and self._useful()

    def observe(self, observer: Callable[[], Awaitable[None]]) -> None:
        """Await an observer whenever `live` or `ready` may have changed."""
        self._observers.append(observer)

    async def start(self) -> None:
        """Note that warm-up is over."""
        self.started = True
        await self._tell()

    async def drain(self) -> None:
        """Note that the replica was told to leave."""
        self.draining = True
        await self._tell()

    def changed(self) -> None:
        """Tell the observers that `live` or `ready` may have changed; in the event loop."""
        task = asyncio.get_running_loop().create_task(self._tell())
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell(self) -> None:
        for observer in self._observers:
            await observer()
