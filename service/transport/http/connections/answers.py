"""How do the answers of the application reach the client?"""

import asyncio
from collections.abc import Callable
from typing import Any

from service.transport.unread import LARGE_BYTES, Reader, UnreadAnswers

_HEAD = b"HTTP/1.1 "  # as the head of every answer begins


class Answers(asyncio.Transport):
    """Where uvicorn writes the answers of a connection.

    It writes the head of an answer and its body one by one. They leave together if they come in
    one turn of the event loop: to write gives the interpreter up, which others then have. Large
    ones are counted until the client has taken them.

    Args:
        transport: of the connection.
        reader: the connection.
        unread: counts large answers.
        end: called in place of closing the transport.

    Attributes:
        head: of an answer, which waits for its body.
    """

    def __init__(
        self,
        transport: asyncio.Transport,
        reader: Reader,
        unread: UnreadAnswers,
        end: Callable[[], None],
    ) -> None:
        super().__init__()
        self._transport = transport
        self._reader = reader
        self._unread = unread
        self._end = end
        self.head = b""

    def write(self, data: Any) -> None:  # noqa: D102
        if data.startswith(_HEAD):
            if self.head:
                self.flush()
            self.head = data
            asyncio.get_running_loop().call_soon(self.flush)
            return
        if self.head:
            data, self.head = self.head + data, b""
        if self._transport.is_closing():  # the application is told in the next turn of the loop
            return
        if len(data) <= LARGE_BYTES:
            self._transport.write(data)
            return
        if self._reader.has_taken_all():
            self._unread.forget(self._reader)
        self._transport.write(data)
        self._unread.add(self._reader, len(data))

    def flush(self) -> None:
        """Write a head whose body did not come yet."""
        head, self.head = self.head, b""
        if head:
            self._transport.write(head)

    def is_closing(self) -> bool:  # noqa: D102
        return self._transport.is_closing()

    def close(self) -> None:  # noqa: D102
        self.flush()
        self._end()
