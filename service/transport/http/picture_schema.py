"""The options of a request for a picture, over HTTP."""

from typing import Annotated, Any

from pydantic import FailFast, Field
from typing_extensions import override

from service.settings.model import ResizeMode
from service.tasks.drawing import LEAST_SIZE, MOST_SIZE, FileFormat, Layout, Shown
from service.tasks.pictures import PICTURED_SCORE, REGIONS_OPACITY, PictureOptions
from service.transport.http.schema import CommonOptionsBody, ImagesBody
from service.transport.http.task import RED_SQUARE
from service.transport.http.uploads import Form


class PictureOptionsBody(CommonOptionsBody):
    """Options of a request for a picture."""

    show: Annotated[list[Shown], FailFast()] = Field(
        [],
        description="What is drawn over the image, in a query or form separated by commas: "
        "`points`; `attention`: points as large as the attention that they receive; `arrows`: "
        "from the reference points to the points; `keys`: what queries attend to; `boxes` and "
        "`masks`, of detectors; `segments`, of segmenters. Empty: `points,arrows` of a classifier, "
        "`points,boxes,masks` of a detector, `segments` of a segmenter.",
        examples=[["attention", "arrows"]],
    )
    layers: Annotated[list[str], FailFast()] = Field(
        [],
        description="1 to 4 deformable layers as `stage.block`, in a query or form separated by "
        "commas; empty: the last one.",
        examples=[["3.1"]],
    )
    groups: Annotated[list[int], FailFast()] = Field(
        [],
        description="Offset groups that are drawn, from 0, in a query or form separated by "
        "commas; empty: all.",
    )
    queries: str | list[tuple[float, float]] | None = Field(
        None,
        description="With `show=keys`, 1 to 8 positions in pixels of the uploaded image: "
        "`x,y;x,y`, in JSON also `[[x, y]]`; or `auto`: in each layer, the cells that receive the "
        "most attention. Absent: the centre.",
        examples=["80,64;120.5,30"],
    )
    top_n: int | None = Field(
        None,
        description="With `show=keys`, keys of each query, best first; absent: 8.",
        json_schema_extra={"minimum": 1, "maximum": 32},
    )
    opacity: float | None = Field(
        None,
        description="Of all that is drawn, absent: 1; where segments are shown, of their colours, "
        f"absent: {REGIONS_OPACITY}.",
        json_schema_extra={"minimum": 0, "maximum": 1},
    )
    size: int | None = Field(
        None,
        description="The larger side of the image in the picture, pixels; absent: as in the "
        "upload, from 320 to 1280.",
        json_schema_extra={"minimum": LEAST_SIZE, "maximum": MOST_SIZE},
    )
    format: FileFormat = Field("png", description="Of the file.")
    layout: Layout = Field("alone", description="`beside`: the plain image stands to the left.")
    score_threshold: float | None = Field(
        None,
        description=f"Least score of an object, of detectors alone; absent: {PICTURED_SCORE}.",
        json_schema_extra={"minimum": 0, "maximum": 1},
    )
    classes: Annotated[list[str], FailFast()] = Field(
        [],
        description="Names of the classes whose objects or segments are drawn, not of "
        "classifiers, in a query or form separated by commas; empty: all classes.",
    )
    resize_mode: ResizeMode | None = Field(
        None, description="How a detector resizes the image; absent: as the model is set."
    )

    @classmethod
    @override
    def lists(cls) -> tuple[str, ...]:
        return (*super().lists(), "show", "groups", "classes")

    def options(self) -> PictureOptions:
        """These options in the form that the core takes."""
        return PictureOptions(
            **self.common(),
            show=tuple(self.show),
            groups=tuple(self.groups),
            opacity=self.opacity,
            size=self.size,
            form=self.format,
            layout=self.layout,
            score_threshold=self.score_threshold,
            classes=tuple(self.classes),
            resize_mode=self.resize_mode,
        )


class PictureJson(ImagesBody, PictureOptionsBody):
    """A JSON body: one image, with options."""


FORM = Form(PictureOptionsBody, PictureJson)
EXAMPLE: dict[str, Any] = {"image": RED_SQUARE}
SUMMARY = "Draw where a model looked in an image, and what it found"
