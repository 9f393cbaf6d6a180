"""The JSON of detection."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, FailFast, Field
from typing_extensions import override

from service.settings.model import ResizeMode
from service.tasks.core import Explain
from service.tasks.detection import DetectedImage, Detection, DetectOptions
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


class DetectOptionsBody(OptionsBody):
    """Options of a request for objects."""

    explain: Explain = Field(  # type: ignore[assignment]
        "none",
        description="`points` returns where every deformable layer looked; `objects` says of "
        "every detection as well which of those points lie inside it; `attention` returns the "
        "points and what chosen queries attend to, and so does `objects` with `queries`, `layers` "
        "or `top_n`.",
    )
    score_threshold: float = Field(
        DetectOptions.score_threshold,
        description="Least score of a detection; the detectors keep none below "
        f"{DetectOptions.score_threshold}.",
        json_schema_extra={"minimum": 0, "maximum": 1},
    )
    max_detections: int = Field(
        DetectOptions.max_detections,
        description="Most detections in an image, best first.",
        json_schema_extra={"minimum": 1, "maximum": DetectOptions.max_detections},
    )
    classes: Annotated[list[str], FailFast()] = Field(
        [],
        description="Names of the classes that are wanted, in a query or form separated by commas; "
        "empty: all classes.",
    )
    masks: Literal["none", "rle", "polygon", "png"] | None = Field(
        None, description="Form of the masks; absent: `rle` where the model has masks."
    )

    resize_mode: ResizeMode | None = Field(
        None,
        description="`official`: resize to fit the sizes of the training, pad to multiples of 32; "
        "`letterbox`: resize to fit the square of the model, pad until it is full. Absent: as the "
        "model is set.",
    )

    @classmethod
    @override
    def lists(cls) -> tuple[str, ...]:
        return (*super().lists(), "classes")

    def options(self) -> DetectOptions:
        """These options in the form that the core takes."""
        return DetectOptions(
            **self.of_every_task(),
            score_threshold=self.score_threshold,
            max_detections=self.max_detections,
            classes=tuple(self.classes),
            masks=self.masks,
            resize_mode=self.resize_mode,
        )


class DetectJson(ImagesBody, DetectOptionsBody):
    """A JSON body: one image or several, with options."""


class PointsInsideBody(BaseModel):
    """Which points of one deformable layer lie inside of an object."""

    stage: int = Field(description="Stage, from 0.")
    block: int = Field(description="Block in its stage, from 0.")
    indices: list[int] = Field(
        description="Into the sampling locations of the layer, counted over groups, rows, columns."
    )


class DetectionBody(BaseModel):
    """One object."""

    label: str = Field(examples=["person"])
    index: int = Field(description="Index of the class, from 0.", examples=[0])
    score: float = Field(examples=[0.93])
    box: tuple[float, float, float, float] = Field(
        description="[x1, y1, x2, y2] in pixels of the uploaded image after its EXIF orientation."
    )
    mask: MaskBody | None = None
    points_inside: list[PointsInsideBody] | None = None

    @classmethod
    def of(cls, found: Detection) -> "DetectionBody":
        """A detection as the core gives it."""
        inside = found.points_inside
        return cls(
            label=found.label,
            index=found.index,
            score=found.score,
            box=found.box,
            mask=None if found.mask is None else MaskBody.of(found.mask),
            points_inside=None
            if inside is None
            else [
                PointsInsideBody.model_construct(
                    stage=layer.stage, block=layer.block, indices=layer.indices.tolist()
                )
                for layer in inside
            ],
        )


class DetectResult(BaseModel):
    """What became of one image: `ok` with detections, perhaps none, or `error`."""

    status: Literal["ok", "error"]
    detections: list[DetectionBody] | None = None
    image: ImageSize | None = None
    input: ImageSize | None = Field(
        default=None, description="Size at which the detector saw the image, pixels."
    )
    resize_mode: ResizeMode | None = Field(
        default=None, description="How the image was resized to that."
    )
    points: list[LayerPointsBody] | None = Field(
        default=None, description="One entry for each deformable layer; present when asked for."
    )
    attention: list[AttentionLayerBody] | None = Field(
        default=None, description="One entry for each layer; present when asked for."
    )
    timing: TimingBody | None = None
    error: ErrorBody | None = None


class DetectAnswer(BaseModel):
    """One result for each image of the request, in order."""

    model: str = Field(examples=["mask_rcnn_dat_pp_tiny"])
    version: str = Field(examples=["1"])
    request_id: str
    results: list[DetectResult]


def _show(answer: DetectedImage) -> dict[str, Any]:
    height, width = answer.input_size
    return {
        "detections": [DetectionBody.of(found) for found in answer.detections],
        "input": ImageSize(width=width, height=height),
        "resize_mode": answer.resize_mode,
    }


HTTP_DETECT = HttpTask(
    "detect",
    Form(DetectOptionsBody, DetectJson),
    DetectAnswer,
    DetectResult,
    _show,
    "Detect the objects in the images of one request",
    {"image": RED_SQUARE},
)
