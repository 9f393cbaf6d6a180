"""What the requests for images have in common: the end of their client, and their times."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

from fastapi import Request

from service.errors import Cancelled, ServiceError
from service.tasks.core import Answer

T = TypeVar("T")


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Await `work`, and cancel it when the client leaves first.

    Raises:
        Cancelled: the client left.
    """
    working = asyncio.current_task()
    assert working is not None
    leaving = asyncio.create_task(_cancel_when_left(request, working))
    try:
        return await work
    except asyncio.CancelledError:
        if not leaving.done() or working.uncancel():
            raise
        raise Cancelled("the client left") from None
    finally:
        leaving.cancel()


async def _cancel_when_left(request: Request, task: asyncio.Task[Any]) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    task.cancel()


def server_timing(outcomes: Sequence[Answer | ServiceError]) -> dict[str, str]:
    """The header with the longest time in each stage."""
    answers = [outcome for outcome in outcomes if isinstance(outcome, Answer)]
    if not answers:
        return {}
    timings = [answer.timing for answer in answers]
    stages = {
        "decode": max(timing.decode_s for timing in timings),
        "queue": max(timing.queue_s for timing in timings),
        "compute": max(timing.compute_s for timing in timings),
    }
    pictures = [answer.picture for answer in answers if answer.picture is not None]
    if pictures:
        stages["render"] = max(picture.render_s for picture in pictures)
    parts = [f"{name};dur={seconds * 1e3:.2f}" for name, seconds in stages.items()]
    batch = max(timing.batch_size for timing in timings)
    return {"Server-Timing": ", ".join([*parts, f'batch;desc="{batch}"'])}
