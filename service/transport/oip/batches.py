"""What is known of single images, as one array whose first axis is the image."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from service.errors import InvalidOption
from service.transport.oip.tensors import BYTES, DTYPES, Values, written


def stacked(name: str, values: Sequence[Values]) -> Values:
    """An output of which each image has one array.

    Raises:
        InvalidOption: they differ in shape from image to image.
    """
    shapes = {value.shape for value in values}
    if len(shapes) > 1:
        raise InvalidOption(
            f"the output {name} has the shapes {' and '.join(map(written, sorted(shapes)))} for "
            "these images; send images of different sizes in requests of their own"
        )
    return np.stack(values)


def filled_up(
    rows: Sequence[Sequence[Any]], datatype: str, filling: Any, each: tuple[int, ...] = ()
) -> Values:
    """An output of which each image has some, `(images, most, *each)`.

    Args:
        rows: what each image has.
        datatype: of the output.
        filling: what stands behind them where other images have more.
        each: the shape of one.
    """
    dtype = np.dtype(object) if datatype == BYTES else DTYPES[datatype]
    values = np.full((len(rows), max(map(len, rows)), *each), filling, dtype)
    for value, row in zip(values, rows, strict=True):
        if row:
            value[: len(row)] = row
    return values
