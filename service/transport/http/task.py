"""How a task looks over HTTP, and the JSON that answers its requests."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic

from pydantic import BaseModel

from service.errors import ServiceError
from service.models.card import ModelCard
from service.tasks.core import TaskAnswer, show_each
from service.transport.http.attention_schema import AttentionLayerBody
from service.transport.http.schema import (
    ImageSize,
    LayerPointsBody,
    TimingBody,
    error_body,
)
from service.transport.http.uploads import Form


@dataclass(frozen=True)
class HttpTask(Generic[TaskAnswer]):
    """How a task looks over HTTP, at `/v1/<name>`.

    Attributes:
        name: of the task.
        form: of a request.
        answer: the JSON of its answer: `model`, `version`, `request_id` and `results`.
        result: the JSON of one image: `status`, `error`, what all tasks say of an image, and what
            `show` gives.
        show: what this task alone says of an image, by the fields of `result`.
        summary: for the document of the interface.
        example: a JSON body, for the same.
    """

    name: str
    form: Form
    answer: type[BaseModel]
    result: type[BaseModel]
    show: Callable[[TaskAnswer], dict[str, Any]]
    summary: str
    example: dict[str, Any]

    def render(
        self, card: ModelCard, outcomes: list[TaskAnswer | ServiceError], request_id: str
    ) -> str:
        """The JSON of an answer.

        Raises:
            Internal: the only answer of the request cannot be shown.
        """
        answer = self.answer(
            model=card.name,
            version=card.version,
            request_id=request_id,
            results=show_each(outcomes, partial(self._result, request_id)),
        )
        return answer.model_dump_json(exclude_none=True)

    def _result(self, request_id: str, outcome: TaskAnswer | ServiceError) -> BaseModel:
        if isinstance(outcome, ServiceError):
            return self.result(status="error", error=error_body(outcome, request_id))
        points, attention = outcome.points, outcome.attention
        return self.result(
            status="ok",
            image=ImageSize(width=outcome.width, height=outcome.height),
            points=None if points is None else [LayerPointsBody.of(layer) for layer in points],
            attention=None
            if attention is None
            else [AttentionLayerBody.of(layer) for layer in attention],
            timing=TimingBody.of(outcome.timing),
            **self.show(outcome),
        )


# A PNG of 8x8 pixels, for the examples. They name no option: the query of their request may.
RED_SQUARE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAFUlE"
    "QVR42mM8ISfHgA0wMeAAg1MCANDKARQfGKMRAAAAAElFTkSuQmCC"
)
