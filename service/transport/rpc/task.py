"""How a task looks over gRPC, and the messages that answer its requests."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol

from google.protobuf.message import Message

from service.errors import ServiceError
from service.models.card import ModelCard
from service.tasks.core import AnyCore, Options, TaskAnswer, TaskOptions, show_each
from service.transport.rpc.messages import error_message


class RpcCall(Protocol):
    """A call with one answer whose request holds images, as its first field.

    Attributes:
        name: of what it asks for; the models that have it among their tasks may answer.
        service: that has the call.
        method: the call.
        request: the message that asks.
    """

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def service(self) -> str: ...  # noqa: D102

    @property
    def method(self) -> str: ...  # noqa: D102

    @property
    def request(self) -> type[Message]: ...  # noqa: D102

    def options(self, request: Any, remaining_s: float | None, /) -> Options:
        """The options of a request without its images, and the seconds left for it."""

    async def work(
        self, core: AnyCore, images: Sequence[bytes], options: Any, identity: str
    ) -> list[Any]:
        """What becomes of each image."""

    def answer(self, card: ModelCard, outcomes: list[Any]) -> Message:
        """The message that answers a request."""


@dataclass(frozen=True)
class RpcTask(Generic[TaskOptions, TaskAnswer]):
    """How a task looks over gRPC.

    Attributes:
        name: of the task.
        service: that has its two calls.
        method: the call with one answer; the name of the streaming call is this one with `Stream`
            behind it.
        request: the message that asks.
        options: of the core from a request without its images, and the seconds left for it.
        response: the message that answers: `model`, `version` and `results`.
        result: the message of one image, which holds an `error` or what `show` gives.
        show: what the task says of an image, by the fields of `result`.
        stream_request: the message of a stream that asks.
        stream_response: the message of a stream that answers.
    """

    name: str
    service: str
    method: str
    request: type[Message]
    options: Callable[[Any, float | None], TaskOptions]
    response: type[Message]
    result: type[Message]
    show: Callable[[TaskAnswer], Mapping[str, Message]]
    stream_request: type[Any]
    stream_response: Callable[..., Message]

    async def work(
        self, core: AnyCore, images: Sequence[bytes], options: Any, identity: str
    ) -> list[Any]:
        """What becomes of each image."""
        return await core.answer(images, options, identity)

    def answer(self, card: ModelCard, outcomes: list[TaskAnswer | ServiceError]) -> Message:
        """The message that answers a request.

        Raises:
            Internal: the only answer of the request cannot be shown.
        """
        results = show_each(outcomes, self._result)
        return self.response(model=card.name, version=card.version, results=results)

    def _result(self, outcome: TaskAnswer | ServiceError) -> Message:
        if isinstance(outcome, ServiceError):
            return self.result(error=error_message(outcome))
        return self.result(**self.show(outcome))
