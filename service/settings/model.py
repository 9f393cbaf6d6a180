"""Which models are served, and from which files."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from service.settings.group import LARGEST_SIDE, Group, form, written_list

ResizeMode = Literal["official", "letterbox"]
Weights = Literal["model", "ema"]

Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
PaddedSide = Annotated[int, Field(ge=64, le=LARGEST_SIDE, multiple_of=32)]


def _written_size(value: object) -> object:
    size = written_list(value)
    if (isinstance(size, list) and len(size) != 2) or (
        isinstance(size, str) and not size.isdecimal()
    ):
        raise ValueError("must be a side, as in 224, or a height and a width, as in [224, 320]")
    return size


InputSize = Annotated[Side | tuple[Side, Side], BeforeValidator(_written_size)]
Name = Annotated[
    str,
    form(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}",
        "of letters, digits, dots, dashes and underscores, at most 100, and begin with one of the "
        "first two",
    ),
]
Version = Annotated[
    str,
    form(
        r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}",
        "of letters, digits, dots, dashes, underscores and plus signs, at most 100, and begin with "
        "a letter or a digit, so that it can stand in a path",
    ),
]
Sha256 = Annotated[str, form(r"[0-9a-fA-F]{64}", "64 hexadecimal digits")]


class ModelChoice(Group):
    """One model: which weights, and what answers call it."""

    name: Name | None = Field(
        None,
        description="Name of the model in requests and metrics; without it, its variant. Without "
        "any setting of the model the three demo models are served.",
    )
    variant: str | None = Field(
        None,
        description="`dat_nano`, or a published variant such as `dat_tiny_224`; without it the "
        "name if that is one, else what the checkpoint shows.",
    )
    version: Version = Field("1", description="Version shown in every answer.")
    checkpoint: Path | None = Field(
        None,
        description="Weights: an official `.pth` or this repository's `.safetensors`; "
        "the demo models need none.",
    )
    sha256: Sha256 | None = Field(
        None,
        description="SHA-256 that the checkpoint file must have, hexadecimal.",
    )
    weights: Weights = Field(
        "model",
        description="Which weights of a checkpoint that holds two sets: `model`, those that were "
        "trained, or `ema`, their moving average.",
    )
    labels: Path | None = Field(
        None,
        description="Class names in order of the class index: a JSON list, or a text file with "
        "one on each line; without it those stored in the checkpoint, or ImageNet's for 1000 "
        "classes.",
    )
    image_size: InputSize | None = Field(
        None,
        description="Input size, pixels: a side, or `[height, width]`; without it that of the "
        "checkpoint or of the variant.",
    )
    resize_mode: ResizeMode | None = Field(
        None,
        description="How a detector resizes the images of requests that name no mode: `official`, "
        "or `letterbox`; without it `official`.",
    )
    letterbox_size: PaddedSide | None = Field(
        None,
        description="Side of a detector's letterbox, pixels, a multiple of 32; without it that "
        "of the variant.",
    )


class Model(ModelChoice):
    """What is served."""

    file: Path | None = Field(
        None,
        description="Several models: a model file (TOML); no other setting of the model may be "
        "given beside it.",
    )

    folder: Path | None = Field(
        None,
        description="Folder in which the models are found: its `models.toml`, or else its one "
        "checkpoint, with `labels.txt` or `labels.json` beside it. The name of the model counts "
        "where it has none of its own, other settings of the model for a checkpoint.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        beside = self.model_fields_set - {"file"}
        if self.folder is not None:
            for other in ("file", "checkpoint"):
                if getattr(self, other) is not None:
                    raise ValueError(f"folder and {other} both say where the model is; leave one")
        if self.file is not None and beside:
            raise ValueError(f"a model file is given, so {', '.join(sorted(beside))} belongs there")
        return self
