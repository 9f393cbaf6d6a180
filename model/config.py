"""What a DAT classifier is made of, and the table of published variants.

DAT: Xia et al., "Vision Transformer with Deformable Attention", CVPR 2022, arXiv:2201.00520.
DAT++: Xia et al., "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention",
arXiv:2309.01430. Variants as in github.com/LeapLabTHU/DAT (v1: commit 797f187, DAT++: 32173fc).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil
from operator import index
from typing import Literal

Family = Literal["dat", "dat_pp"]

LARGEST_SIZE = 8192  # pixels a side; a file that asks for more is damaged


def sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """`(H, W)` of an input, pixels, from the two or from the side of a square.

    Raises:
        ValueError: it is neither.
    """
    try:
        given = image_size if isinstance(image_size, Sequence) else (image_size, image_size)
        height, width = map(index, given)
    except (TypeError, ValueError) as fault:
        raise ValueError(
            f"image_size is the side of a square or (height, width), in whole pixels; got "
            f"{image_size!r:.50}"
        ) from fault
    return height, width


@dataclass(frozen=True)
class StageConfig:
    """One stage of blocks at one resolution.

    Attributes:
        blocks: the attention of each block, in order: `L` window, `S` shifted window,
            `N` neighbourhood, `D` deformable, `Q` deformable as in Deformable DETR.
        dim: channels.
        heads: attention heads.
        offset_groups: groups of channels that share sampling points; 0 without a `D` block.
        offset_stride: cells of the feature map per sampling point, on each axis.
        offset_kernel: side of the depthwise convolution of the offset network.
        points: sampling points of each query and head of a `Q` block.
    """

    blocks: str
    dim: int
    heads: int
    offset_groups: int = 0
    offset_stride: int = 1
    offset_kernel: int = 0
    points: int = 0


@dataclass(frozen=True)
class DatConfig:
    """One classifier.

    Attributes:
        name: the variant's name.
        family: `dat` (CVPR 2022) or `dat_pp`; they differ in stem, blocks and geometry.
        stages: the four stages.
        image_size: `(H, W)` of the input, pixels; given as one number, a square.
        table_size: the input size for which the position tables of the checkpoint were made,
            pixels; it differs from `image_size` in `dat_pp_base_384` alone.
        num_classes: outputs of the head.
        window: side of a window (`L`, `S`) or neighbourhood (`N`), cells.
        offset_range_factor: reach of a sampling point, in half cells of the key grid (`dat` only).
        crop: whether the official evaluation resizes to 256/224 of the input and crops its
            centre, or resizes straight to the input.
    """

    name: str
    family: Family
    stages: tuple[StageConfig, ...]
    image_size: tuple[int, int] = (224, 224)
    table_size: int = 224
    num_classes: int = 1000
    window: int = 7
    offset_range_factor: float = 2.0
    crop: bool = True

    def __post_init__(self) -> None:
        """Check the sizes.

        Raises:
            ValueError: a size is one that the family cannot take.
        """
        object.__setattr__(self, "image_size", sides(self.image_size))
        height, width = self.image_size
        if not all(1 <= size <= LARGEST_SIZE for size in (height, width, self.table_size)):
            raise ValueError(
                f"{self.name}: sizes are from 1 to {LARGEST_SIZE} pixels; got {height}x{width} "
                f"with tables for {self.table_size}"
            )
        if self.num_classes < 1:
            raise ValueError(f"{self.name}: a head has 1 class or more; got {self.num_classes}")
        if not 1 <= self.window <= LARGEST_SIZE:
            raise ValueError(
                f"{self.name}: windows have 1 to {LARGEST_SIZE} cells a side; got {self.window}"
            )
        if self.family == "dat":
            cell = 4 << (len(self.stages) - 1)
            if (height, width) != (self.table_size,) * 2 or height % (cell * self.window):
                raise ValueError(
                    f"{self.name}: a DAT (v1) input is square, equal to the size of its tables "
                    f"({self.table_size}) and a multiple of {cell} windows of {self.window}; got "
                    f"{height}x{width}"
                )
        elif min(height, width) < 33:
            raise ValueError(
                f"{self.name}: a DAT++ input needs at least 33 pixels a side; got {height}x{width}"
            )

    def resized(
        self,
        image_size: int | tuple[int, int],
        *,
        window: int | None = None,
        table_size: int | None = None,
    ) -> "DatConfig":
        """The same model for another input size.

        Args:
            image_size: `(H, W)` or the side of a square, pixels.
            window: of DAT (v1), cells; kept if the size is a multiple of 32 windows, else it
                becomes 1/32 of the size, as from 7 at 224 to the official 12 at 384.
            table_size: of DAT++, whose tables need not fit the size.

        Raises:
            ValueError: a size that the family cannot take.
        """
        size = sides(image_size)
        if self.family == "dat_pp":
            return replace(self, image_size=size, table_size=table_size or self.table_size)
        side, cell = size[0], 4 << (len(self.stages) - 1)
        window = window or self.window
        if side % (cell * window):
            window = max(1, side // cell)
        return replace(self, image_size=size, table_size=side, window=window)

    def first_block(self, kind: str) -> tuple[int, int]:
        """`(stage, block)` of the first block with this letter."""
        return next(
            (index, stage.blocks.index(kind))
            for index, stage in enumerate(self.stages)
            if kind in stage.blocks
        )

    def map_size(self, stage: int, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """`(H, W)` of the feature map of a stage, cells."""
        height, width = image_size or self.image_size
        cell = 4 << stage
        return ceil(height / cell), ceil(width / cell)

    def cell_geometry(self, stage: int) -> tuple[float, float]:
        """Where the cells of a stage lie in the input: `(stride, first)` in pixels.

        The centre of the receptive field of cell `i` is at `first + stride * i`, with the
        origin at the edge of the first pixel (receptive-field arithmetic over the strided
        convolutions; the rest of the network is symmetric around its cell).
        """
        # (kernel, stride, padding) of the stem and of each downsampling
        stem = [(4, 4, 0)] if self.family == "dat" else [(3, 2, 1)] * 2
        down = (2, 2, 0) if self.family == "dat" else (3, 2, 1)
        stride, first = 1.0, 0.5
        for kernel, step, padding in [*stem, *[down] * stage]:
            first += ((kernel - 1) / 2 - padding) * stride
            stride *= step
        return stride, first


def _dat(
    dim: int, depth: int, heads: int, groups: int, last_groups: int
) -> tuple[StageConfig, ...]:
    return (
        StageConfig("LS", dim, heads),
        StageConfig("LS", 2 * dim, 2 * heads),
        StageConfig("LD" * (depth // 2), 4 * dim, 4 * heads, groups, 1, 5),
        StageConfig("LD", 8 * dim, 8 * heads, last_groups, 1, 3),
    )


def _deformable_detr(
    stages: tuple[StageConfig, ...], points: tuple[int, int, int, int]
) -> tuple[StageConfig, ...]:
    """The same stages with the attention of Deformable DETR in the place of DAT's."""
    return tuple(
        StageConfig(stage.blocks.replace("D", "Q"), stage.dim, stage.heads, points=count)
        for stage, count in zip(stages, points, strict=True)
    )


def _dat_pp(dim: int, heads: int, groups: tuple[int, int, int, int]) -> tuple[StageConfig, ...]:
    return (
        StageConfig("ND", dim, heads, groups[0], 8, 9),
        StageConfig("NDND", 2 * dim, 2 * heads, groups[1], 4, 7),
        StageConfig("ND" * 9, 4 * dim, 4 * heads, groups[2], 2, 5),
        StageConfig("DD", 8 * dim, 8 * heads, groups[3], 1, 3),
    )


_BASE_PP = _dat_pp(128, 4, (2, 4, 8, 16))

VARIANTS: dict[str, DatConfig] = {
    config.name: config
    for config in (
        DatConfig("dat_tiny_224", "dat", _dat(96, 6, 3, 3, 6)),
        DatConfig("dat_small_224", "dat", _dat(96, 18, 3, 3, 6)),
        DatConfig("dat_base_224", "dat", _dat(128, 18, 4, 4, 8)),
        DatConfig("dat_base_384", "dat", _dat(128, 18, 4, 4, 8), (384, 384), 384, window=12),
        DatConfig("dat_pp_tiny_224", "dat_pp", _dat_pp(64, 2, (1, 2, 4, 8))),
        DatConfig("dat_pp_small_224", "dat_pp", _dat_pp(96, 3, (1, 2, 3, 6))),
        DatConfig("dat_pp_base_224", "dat_pp", _BASE_PP),
        # The official 384 configuration keeps img_size 224 in the model section, so the tables
        # stay those of 224, and it evaluates without a crop.
        DatConfig("dat_pp_base_384", "dat_pp", _BASE_PP, (384, 384), 224, crop=False),
        # What the DAT paper compares itself with in appendix A: not published as checkpoints.
        DatConfig(
            "dat_tiny_224_ddetr", "dat", _deformable_detr(_dat(96, 6, 3, 3, 6), (0, 0, 16, 16))
        ),
        # As many keys for a query as in DAT-T.
        DatConfig(
            "dat_tiny_224_ddetr_equal",
            "dat",
            _deformable_detr(_dat(96, 6, 3, 3, 6), (0, 0, 196, 49)),
        ),
        # The demo model of this repository (demo/README.md).
        DatConfig(
            "dat_nano",
            "dat_pp",
            (
                StageConfig("D", 16, 1, 1, 8, 9),
                StageConfig("D", 32, 2, 1, 4, 7),
                StageConfig("DDD", 64, 4, 2, 2, 5),
                StageConfig("DD", 128, 8, 2, 1, 3),
            ),
            (128, 128),
            128,
            num_classes=12,
        ),
    )
}
