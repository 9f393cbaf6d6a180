"""The queue, and the batches that leave it."""

from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from service.settings.group import LARGEST_SIDE, Group, one_or_more, written_list

# One less would leave one cell of the last map, which has no scale.
_LEAST_INPUT_SIDE = 33

Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1024)], ...],
    Field(max_length=64),
    BeforeValidator(one_or_more),
]


def _written_sizes(value: object) -> object:
    sizes = written_list(value)
    if not isinstance(sizes, list | tuple) or not all(
        isinstance(size, list | tuple) and len(size) == 2 for size in sizes
    ):
        raise ValueError(
            "must be a list of a height and a width each, as in [[512, 512], [512, 768]]"
        )
    return sizes


InputSide = Annotated[int, Field(ge=_LEAST_INPUT_SIDE, le=LARGEST_SIDE)]
InputSizes = Annotated[
    tuple[tuple[InputSide, InputSide], ...],
    Field(max_length=7),  # with the letterbox no more than a detector remembers
    BeforeValidator(_written_sizes),
]


class Batching(Group):
    """The queue and the batches that leave it."""

    max_batch: int = Field(
        0,
        ge=0,
        le=1024,
        description="Most images in one batch; 0: 8 on CPU, on CUDA 64 of 224 pixels a side and "
        "fewer larger ones.",
    )
    buckets: Sizes = Field(
        (),
        description="Batch sizes the device runs, as in `1,2,4`; a batch is padded to the next "
        "one. Empty: every size on CPU, where padding costs; on CUDA powers of two and the halves "
        "between them: 1, 2, 3, 4, 6, 8, 12.",
    )
    sizes: InputSizes = Field(
        (),
        description="Input sizes of detectors (padded, so multiples of 32) and segmenters made "
        "ready at the start, as a JSON list of `[height, width]`: on CUDA a graph for each bucket, "
        "on CPU the geometry. Others run eagerly until they come again.",
    )
    queue_limit: int = Field(
        256,
        gt=0,
        le=65_536,
        description="Most images that are admitted and not yet on the device; beyond it 429.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Batching":
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets must be distinct sizes")
        if self.buckets and self.max_batch not in (0, max(self.buckets)):
            raise ValueError("max_batch must equal the largest of the buckets")
        return self
