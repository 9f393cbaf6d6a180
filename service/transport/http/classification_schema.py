"""The JSON of classification."""

from typing import Any, Literal

from pydantic import BaseModel, Field

from service.tasks.classification import Classification, ClassifyOptions
from service.transport.http.attention_schema import AttentionLayerBody
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


class ClassifyOptionsBody(OptionsBody):
    """Options of a request for classes."""

    top_k: int = Field(
        ClassifyOptions.top_k,
        description="Predictions for each image, best first, at least 1; at most all classes.",
        json_schema_extra={"minimum": 1},
    )

    def options(self) -> ClassifyOptions:
        """These options in the form that the core takes."""
        return ClassifyOptions(**self.of_every_task(), top_k=self.top_k)


class ClassifyJson(ImagesBody, ClassifyOptionsBody):
    """A JSON body: one image or several, with options."""


class PredictionBody(BaseModel):
    """A class with its probability."""

    label: str = Field(examples=["star"])
    index: int = Field(description="Index of the class, from 0.", examples=[2])
    score: float = Field(description="Softmax probability.", examples=[0.998])
    wnid: str | None = Field(
        None, description="WordNet id, of ImageNet's classes.", examples=["n01440764"]
    )


class ImageResult(BaseModel):
    """What became of one image: `ok` with predictions, or `error`."""

    status: Literal["ok", "error"]
    predictions: list[PredictionBody] | None = None
    image: ImageSize | None = None
    points: list[LayerPointsBody] | None = Field(
        default=None, description="One entry for each deformable layer; present when asked for."
    )
    attention: list[AttentionLayerBody] | None = Field(
        default=None, description="One entry for each layer; present when asked for."
    )
    timing: TimingBody | None = None
    error: ErrorBody | None = None


class ClassifyAnswer(BaseModel):
    """One result for each image of the request, in order."""

    model: str = Field(examples=["dat_nano"])
    version: str = Field(examples=["1"])
    request_id: str
    results: list[ImageResult]


def _show(answer: Classification) -> dict[str, Any]:
    return {"predictions": [PredictionBody(**vars(found)) for found in answer.predictions]}


HTTP_CLASSIFY = HttpTask(
    "classify",
    Form(ClassifyOptionsBody, ClassifyJson),
    ClassifyAnswer,
    ImageResult,
    _show,
    "Classify the images of one request",
    {"images": [RED_SQUARE, RED_SQUARE]},
)
