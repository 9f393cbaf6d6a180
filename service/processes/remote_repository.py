"""The repository of the supervisor, as a front end has it and as the supervisor answers for it."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import structlog

from service.errors import Internal, Overloaded, ServiceError
from service.processes.channel import Line, from_memory, in_memory
from service.processes.child import Child
from service.processes.messages import Ask, Told
from service.tasks.repository import Listed, Repository
from service.tasks.statistics import ModelStatistics

# After which a front end whose line to the supervisor is full may ask again, seconds.
_AGAIN_S = 1.0

log = structlog.get_logger(__name__)


class RemoteRepository:
    """Asks the supervisor; a `Repository`.

    Args:
        line: to the supervisor.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self._ids = count()
        self._asked: dict[int, asyncio.Future[Any]] = {}

    async def index(self) -> Sequence[Listed]:
        """See `Repository`."""
        listed: Sequence[Listed] = await self._ask("index")
        return listed

    async def statistics(self) -> Mapping[str, ModelStatistics]:
        """See `Repository`."""
        found: Mapping[str, ModelStatistics] = await self._ask("statistics")
        return found

    async def load(self, name: str) -> None:
        """See `Repository`."""
        await self._ask("load", name)

    async def unload(self, name: str) -> None:
        """See `Repository`."""
        await self._ask("unload", name)

    async def _ask(self, method: Any, model: str = "") -> Any:
        identity = next(self._ids)
        self._asked[identity] = asked = asyncio.get_running_loop().create_future()
        try:
            if not self._line.send(Ask(identity, method, model)):
                raise Overloaded("the supervisor is busy", _AGAIN_S)
            return await asked
        finally:
            del self._asked[identity]

    def take(self, message: Told, descriptor: int) -> None:
        """Take an answer."""
        answer = from_memory(descriptor)
        asked = self._asked.get(message.id)
        if asked is None or asked.done():  # its caller left
            return
        if isinstance(answer, ServiceError):
            asked.set_exception(answer)
        else:
            asked.set_result(answer)


async def answer_for(repository: Repository, ask: Ask, child: Child) -> None:
    """Answer what a front end asks, if it is there still.

    Args:
        repository: of the server.
        ask: the question.
        child: the front end.
    """
    asker = child.line
    answer: Any = None
    try:
        match ask.method:
            case "index":
                answer = await repository.index()
            case "statistics":
                answer = await repository.statistics()
            case "load":
                await repository.load(ask.model)
            case "unload":
                await repository.unload(ask.model)
    except ServiceError as error:
        answer = error
    except Exception:
        log.exception("repository failed", method=ask.method, model=ask.model)
        answer = Internal("internal error")
    if child.line is asker:
        descriptor = in_memory(answer)
        child.send(Told(ask.id), [descriptor])
        os.close(descriptor)
