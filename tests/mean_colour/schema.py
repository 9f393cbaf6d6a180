"""The JSON of the task."""

from typing import Any, Literal

from pydantic import BaseModel

from service.transport.http.schema import (
    ErrorBody,
    ImagesBody,
    ImageSize,
    LayerPointsBody,
    OptionsBody,
    TimingBody,
)
from service.transport.http.task import RED_SQUARE, HttpTask
from service.transport.http.uploads import Form
from tests.mean_colour.core import MeanColour, MeanColourOptions


class MeanColourOptionsBody(OptionsBody):
    """Options of a request for colours."""

    inverted: bool = False

    def options(self) -> MeanColourOptions:
        """The same for the core."""
        return MeanColourOptions(**self.of_every_task(), inverted=self.inverted)


class MeanColourJson(ImagesBody, MeanColourOptionsBody):
    """A JSON body."""


class MeanColourResult(BaseModel):
    """What became of one image."""

    status: Literal["ok", "error"]
    colour: tuple[float, float, float] | None = None
    image: ImageSize | None = None
    points: list[LayerPointsBody] | None = None
    timing: TimingBody | None = None
    error: ErrorBody | None = None


class MeanColourAnswer(BaseModel):
    """One result for each image."""

    model: str
    version: str
    request_id: str
    results: list[MeanColourResult]


def _show(answer: MeanColour) -> dict[str, Any]:
    return {"colour": answer.colour}


HTTP_MEAN_COLOUR = HttpTask(
    "mean-colour",
    Form(MeanColourOptionsBody, MeanColourJson),
    MeanColourAnswer,
    MeanColourResult,
    _show,
    "The mean colours of the images of one request",
    {"image": RED_SQUARE},
)
