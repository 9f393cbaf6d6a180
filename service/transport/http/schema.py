"""The JSON of the HTTP interface: what OpenAPI documents and what clients parse."""

from math import ceil
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, FailFast, Field, StrictStr

from service.errors import ServiceError, Unauthenticated
from service.priority import Priority
from service.settings.model import ResizeMode
from service.tasks.attention import AttentionOptions
from service.tasks.catalogue import Catalogue
from service.tasks.core import AnyCore
from service.tasks.passage import Timing
from service.tasks.points import LayerPoints
from service.transport.attention_text import read_layer, read_queries
from service.transport.http.attention_schema import rounded_pixels

Base64 = Annotated[
    StrictStr,
    Field(
        description="A file's bytes, base64 (RFC 4648, in either alphabet, with or without padding "
        "and line breaks), perhaps as a `data:` URL."
    ),
]


class CommonOptionsBody(BaseModel):
    """Options of every request for images, in the query, the JSON body or the form fields."""

    model_config = ConfigDict(extra="forbid")

    queries: str | list[tuple[float, float]] | None = Field(
        None,
        description="With `explain=attention`, 1 to 8 positions in pixels of the uploaded image: "
        "`x,y;x,y`, in JSON also `[[x, y]]`; or `auto`: in each layer, the cells that receive the "
        "most attention. Absent: the centre.",
        examples=["80,64;120.5,30"],
    )
    layers: Annotated[list[str], FailFast()] = Field(
        [],
        description="With `explain=attention`, 1 to 4 deformable layers as `stage.block`, in a "
        "query or form separated by commas; empty: the last of each of the last two stages.",
        examples=[["2.1", "3.1"]],
    )
    top_n: int | None = Field(
        None,
        description="With `explain=attention`, keys of each query, best first; absent: 8.",
        json_schema_extra={"minimum": 1, "maximum": 32},
    )
    timeout: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from the head of the request until the answer is of no use.",
    )
    model: str | None = Field(None, description="Name of the model; absent: the default.")
    priority: Priority = Field(
        "high",
        description="`low` lets the requests of others go first, for what nobody waits for; the "
        "header `X-Priority` says the same.",
    )

    @classmethod
    def of_text(cls, given: dict[str, str]) -> Self:
        """From a query or the fields of a form.

        Raises:
            pydantic.ValidationError: an option is unknown or ill-typed.
        """
        lists = {
            name: text.split(",") if text else []
            for name, text in given.items()
            if name in cls.lists()
        }
        return cls.model_validate(given | lists)

    @classmethod
    def lists(cls) -> tuple[str, ...]:
        """The options that are lists, in text separated by commas."""
        return ("layers",)

    def common(self) -> dict[str, Any]:
        """What the options of the core have of these.

        Raises:
            InvalidOption: a query or a layer is not written as it should be.
        """
        return {
            "model": self.model,
            "attention": self._attention(),
            "timeout_s": self.timeout,
            "priority": self.priority,
        }

    def _attention(self) -> AttentionOptions:
        return AttentionOptions(
            queries=read_queries(self.queries),
            layers=tuple(map(read_layer, self.layers)),
            top_n=self.top_n,
        )


class OptionsBody(CommonOptionsBody):
    """Options of a request of any task."""

    explain: Literal["none", "points", "attention"] = Field(
        "none",
        description="`points` returns where every deformable layer looked; `attention` as well "
        "what chosen queries attend to.",
    )

    def of_every_task(self) -> dict[str, Any]:
        """What every task's options of the core have of these.

        Raises:
            InvalidOption: a query or a layer is not written as it should be.
        """
        return {"explain": self.explain} | self.common()


class ImagesBody(BaseModel):
    """The images of a JSON body: one or several."""

    image: Base64 | None = None
    images: list[Base64] | None = None


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str = Field(description="Stable name of the failure.", examples=["invalid_image"])
    message: str = Field(examples=["the bytes are not a JPEG, PNG or WebP image"])
    request_id: str | None = Field(None, examples=["4f9a1c2e"])


class ErrorAnswer(BaseModel):
    """The answer to a request that failed as a whole."""

    error: ErrorBody


class HealthAnswer(BaseModel):
    """Whether the replica is in the state that the probe asks for."""

    status: Literal["ok", "unavailable"]


class ImageSize(BaseModel):
    """Size of an image, pixels; of an uploaded one after its EXIF orientation."""

    width: int = Field(examples=[640])
    height: int = Field(examples=[480])


class LayerPointsBody(BaseModel):
    """Where one deformable layer read its keys and values.

    Points are [x, y] in pixels of the uploaded image after its EXIF orientation, from the
    top-left corner of the top-left pixel; they may lie outside the image.
    """

    stage: int = Field(description="Stage, from 0.", examples=[3])
    block: int = Field(description="Block in its stage, from 0.", examples=[1])
    sampling_locations: list[list[list[list[float]]]] = Field(
        description="Offset groups, rows, columns, [x, y]."
    )
    reference_points: list[list[list[float]]] = Field(
        description="Rows, columns, [x, y]: where the points of every group moved from."
    )

    @classmethod
    def of(cls, layer: LayerPoints) -> "LayerPointsBody":
        """The points of a layer as the core gives them."""
        return cls.model_construct(
            stage=layer.stage,
            block=layer.block,
            sampling_locations=rounded_pixels(layer.sampling_locations),
            reference_points=rounded_pixels(layer.reference_points),
        )


class TimingBody(BaseModel):
    """Where the time of one image went."""

    decode_s: float = Field(description="Decoding and resizing, seconds.")
    queue_s: float = Field(description="Waiting for the device, seconds.")
    compute_s: float = Field(description="The forward pass of its batch, seconds.")
    batch_size: int = Field(description="Images in its batch.")

    @classmethod
    def of(cls, timing: Timing) -> "TimingBody":
        """The timing of an image as the core gives it."""
        return cls(**vars(timing))


class ModelBody(BaseModel):
    """A model that is served here."""

    name: str = Field(description="What requests call it.", examples=["dat_nano"])
    version: str = Field(examples=["1"])
    default: bool = Field(description="Whether it answers requests of its task that name no model.")
    task: str = Field(examples=["classify"])
    variant: str = Field(examples=["dat_nano"])
    image_size: ImageSize | None = Field(
        None,
        description="Size of its input, pixels; absent where that changes with the image.",
    )
    resize_mode: ResizeMode | None = Field(
        None, description="How a detector resizes the images of requests that name no mode."
    )
    letterbox_size: int | None = Field(None, description="Side of a detector's letterbox, pixels.")
    classes: int = Field(examples=[12])
    parameters: int = Field(description="How many there are, as published for the variant.")
    flops: int | None = Field(
        None,
        description="FLOPs of one image, a multiply-add counted as one; absent where they change "
        "with the image.",
    )
    device: str = Field(examples=["cpu"])
    dtype: str = Field(description="Precision of its features.", examples=["float32"])
    max_batch: int = Field(description="Most images in one batch.")
    explained_layers: list[str] = Field(
        description="The layers that `explain=attention` can name, as `stage.block`.",
        examples=[["2.2", "3.1"]],
    )

    @classmethod
    def of(cls, core: AnyCore, catalogue: Catalogue) -> "ModelBody":
        """The model that a core answers for."""
        return cls(**_card(core, catalogue))


class LabelBody(BaseModel):
    """A class of a model."""

    index: int = Field(description="From 0.")
    label: str = Field(examples=["star"])
    wnid: str | None = Field(None, description="WordNet id, of ImageNet's classes.")
    colour: tuple[int, int, int] | None = Field(
        None, description="[red, green, blue] in which a segmenter draws it, 0 to 255."
    )


class LabelledModelBody(ModelBody):
    """A model with the names of its classes."""

    labels: list[LabelBody]

    @classmethod
    def of(cls, core: AnyCore, catalogue: Catalogue) -> "LabelledModelBody":
        """The model that a core answers for, with its classes."""
        labels = [
            LabelBody(index=index, label=label.name, wnid=label.wnid, colour=label.colour)
            for index, label in enumerate(core.labels)
        ]
        return cls(labels=labels, **_card(core, catalogue))


class ModelsAnswer(BaseModel):
    """All models that are served here."""

    models: list[ModelBody]


def _card(core: AnyCore, catalogue: Catalogue) -> dict[str, Any]:
    size = core.card.image_size
    return vars(core.card) | {
        "default": catalogue.is_default(core),
        "explained_layers": [f"{stage}.{block}" for stage, block in core.explained_layers],
        "image_size": None if size is None else ImageSize(width=size[1], height=size[0]),
    }


def error_body(error: ServiceError, request_id: str) -> ErrorBody:
    """The JSON of a failure."""
    return ErrorBody(code=error.code, message=str(error), request_id=request_id)


def error_headers(error: ServiceError) -> dict[str, str]:
    """What the headers of an answer say of a failure."""
    headers = {}
    if error.retry_after_s is not None:
        headers["retry-after"] = str(max(1, ceil(error.retry_after_s)))
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = error.challenge
    return headers
