"""Bilinear reading along one axis, as the kernels share it."""

import triton
import triton.language as tl


@triton.jit
def corners(position, size):
    """The two cells around positions in `grid_sample` coordinates with `align_corners=True`.

    A cell outside has weight zero and the index of one inside; weights of a position that is no
    number are none either.

    Args:
        position: float32, any shape.
        size: cells of the axis.

    Returns:
        First index, second index (int32), first weight, second weight (float32).
    """
    cell = (position + 1) * ((size - 1) * 0.5)
    first = tl.floor(cell)
    second = first + 1
    last = size - 1.0
    # The comparisons come first: they hold for no NaN, which has no index.
    first_index = tl.where(first >= 0, tl.minimum(first, last), 0.0).to(tl.int32)
    second_index = tl.where(second >= 0, tl.minimum(second, last), 0.0).to(tl.int32)
    first_weight = (second - cell) * ((first >= 0) & (first <= last))
    second_weight = (cell - first) * ((second >= 0) & (second <= last))
    return first_index, second_index, first_weight, second_weight
