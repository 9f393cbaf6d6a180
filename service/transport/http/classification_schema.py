"""The JSON of classification."""

from typing import Literal

from pydantic import BaseModel, Field

from service.errors import ServiceError
from service.models.load import ModelCard
from service.tasks.classification import Classification, ClassifyOptions
from service.tasks.core import show_each
from service.transport.http.schema import (
    ErrorBody,
    ImagesBody,
    ImageSize,
    LayerPointsBody,
    OptionsBody,
    TimingBody,
    error_body,
)


class ClassifyOptionsBody(OptionsBody):
    """Options of a request for classes."""

    top_k: int = Field(
        5,
        description="Predictions for each image, best first, at least 1; at most all classes.",
        json_schema_extra={"minimum": 1},
    )

    def options(self) -> ClassifyOptions:
        """The same for the core."""
        return ClassifyOptions(
            model=self.model, explain=self.explain, timeout_s=self.timeout, top_k=self.top_k
        )


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
    timing: TimingBody | None = None
    error: ErrorBody | None = None

    @classmethod
    def of(cls, outcome: Classification | ServiceError, request_id: str) -> "ImageResult":
        """From the core's."""
        if isinstance(outcome, ServiceError):
            return cls(status="error", error=error_body(outcome, request_id))
        points = outcome.points
        return cls(
            status="ok",
            predictions=[PredictionBody(**vars(p)) for p in outcome.predictions],
            image=ImageSize(width=outcome.width, height=outcome.height),
            points=None if points is None else [LayerPointsBody.of(layer) for layer in points],
            timing=TimingBody.of(outcome.timing),
        )


class ClassifyAnswer(BaseModel):
    """One result for each image of the request, in order."""

    model: str = Field(examples=["dat_nano"])
    version: str = Field(examples=["1"])
    request_id: str
    results: list[ImageResult]

    @classmethod
    def of(
        cls,
        card: ModelCard,
        outcomes: list[Classification | ServiceError],
        request_id: str,
    ) -> "ClassifyAnswer":
        """From the core's."""
        return cls(
            model=card.name,
            version=card.version,
            request_id=request_id,
            results=show_each(outcomes, lambda outcome: ImageResult.of(outcome, request_id)),
        )
