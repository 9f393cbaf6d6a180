"""The JSON of segmentation."""

from base64 import b64encode
from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field
from typing_extensions import override

from service.tasks.segmentation import (
    Segment,
    SegmentedImage,
    SegmentFormat,
    SegmentOptions,
    TestTime,
)
from service.transport.http.attention_schema import AttentionLayerBody
from service.transport.http.masks_schema import MaskBody
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


class SegmentOptionsBody(OptionsBody):
    """Options of a request for segments."""

    format: SegmentFormat = Field(
        "png",
        description="Form of the labels: `png`: one file of the size of the image whose pixels are "
        "indices of classes, in their colours; `rle` or `polygon`: a mask of each class; "
        "`summary`: none, but the mean probability of each class.",
    )
    classes: Annotated[list[str], FailFast()] = Field(
        [],
        description="Names of the classes that are wanted, in a query or form separated by commas; "
        "empty: all classes.",
    )
    min_share: float = Field(
        0.0,
        description="Least share of the pixels of a class that is wanted.",
        json_schema_extra={"minimum": 0, "maximum": 1},
    )
    confidence: bool = Field(
        False,
        description="Whether to return by how much the probability of each label is above that of "
        "the next class; the labels take up to several times as long then.",
    )
    test_time: TestTime = Field(
        "official",
        description="`official`: the image is seen once; `official_ms`: at six scales, each "
        "mirrored as well, as in the official tests at several scales, which takes some 20 times "
        "as long.",
    )

    @classmethod
    @override
    def lists(cls) -> tuple[str, ...]:
        return (*super().lists(), "classes")

    def options(self) -> SegmentOptions:
        """These options in the form that the core takes."""
        return SegmentOptions(
            **self.of_every_task(),
            format=self.format,
            classes=tuple(self.classes),
            min_share=self.min_share,
            confidence=self.confidence,
            test_time=self.test_time,
        )


class SegmentJson(ImagesBody, SegmentOptionsBody):
    """A JSON body: one image or several, with options."""


class SegmentBody(BaseModel):
    """The pixels of one class."""

    label: str = Field(examples=["sky"])
    index: int = Field(description="Index of the class, from 0.", examples=[2])
    colour: tuple[int, int, int] = Field(
        description="[red, green, blue] of the class, 0 to 255.", examples=[(6, 230, 230)]
    )
    share: float = Field(description="Of the pixels of the image.", examples=[0.41])
    box: tuple[int, int, int, int] = Field(
        description="[x1, y1, x2, y2] around them, pixels of the uploaded image after its EXIF "
        "orientation."
    )
    probability: float | None = Field(
        None,
        description="Of the class, the mean over these pixels; present with `format=summary` and "
        "with `confidence`.",
        examples=[0.93],
    )
    mask: MaskBody | None = Field(
        None, description="The pixels; present with `format=rle` and `format=polygon`."
    )

    @classmethod
    def of(cls, segment: Segment) -> "SegmentBody":
        """A segment as the core gives it."""
        mask = None if segment.mask is None else MaskBody.of(segment.mask)
        return cls.model_construct(**vars(segment) | {"mask": mask})


class SegmentResult(BaseModel):
    """What became of one image: `ok` with segments, or `error`."""

    status: Literal["ok", "error"]
    segments: list[SegmentBody] | None = Field(
        None, description="One for each class in the image that is wanted, the largest first."
    )
    label_map: str | None = Field(
        None,
        description="A PNG of the size of the image, base64, whose pixels are indices of classes; "
        "those of classes that are not wanted have the index behind the last class, and are "
        "transparent. Present with `format=png`.",
    )
    confidence: str | None = Field(
        None,
        description="A grey PNG of the size of the image, base64: by how much the probability of "
        "the label is above that of the next class, times 255. Present when asked for.",
    )
    image: ImageSize | None = None
    input: ImageSize | None = Field(
        default=None, description="Size at which the segmenter saw the image, pixels."
    )
    points: list[LayerPointsBody] | None = Field(
        default=None, description="One entry for each deformable layer; present when asked for."
    )
    attention: list[AttentionLayerBody] | None = Field(
        default=None, description="One entry for each layer; present when asked for."
    )
    timing: TimingBody | None = None
    error: ErrorBody | None = None


class SegmentAnswer(BaseModel):
    """One result for each image of the request, in order."""

    model: str = Field(examples=["semantic_fpn_dat_pp_tiny"])
    version: str = Field(examples=["1"])
    request_id: str
    results: list[SegmentResult]


def _show(answer: SegmentedImage) -> dict[str, Any]:
    height, width = answer.input_size
    return {
        "segments": [SegmentBody.of(segment) for segment in answer.segments],
        "label_map": _base64(answer.label_map),
        "confidence": _base64(answer.confidence),
        "input": ImageSize(width=width, height=height),
    }


def _base64(file: bytes | None) -> str | None:
    return None if file is None else b64encode(file).decode()


HTTP_SEGMENT = HttpTask(
    "segment",
    Form(SegmentOptionsBody, SegmentJson),
    SegmentAnswer,
    SegmentResult,
    _show,
    "Label every pixel of the images of one request",
    {"image": RED_SQUARE},
)
