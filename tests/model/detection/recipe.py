"""Deterministic weights and pictures for the golden cases of the detectors. numpy only.

The rule of the classifiers (`tests.recipe`) with BatchNorm's buffers, and with the adjustments
that a case carries: a purely random detector would score every place alike.
"""

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests import recipe

SHAPES_DRAWN = 24


def tensor(
    key: str, shape: Sequence[int], seed: int, overrides: Sequence[Any], stored: Mapping[str, Any]
) -> NDArray[np.float32]:
    """The value of one entry of the state dict.

    Args:
        key: its official name.
        shape: its shape.
        seed: of the case.
        overrides: `[pattern of names, operation, arguments]`, applied in order.
        stored: the case, with the vectors of the operation `set`.
    """
    drawn = _drawn(key, shape, seed)
    for pattern, operation, *arguments in overrides:
        if not fnmatch.fnmatchcase(key, pattern):
            continue
        if operation == "scale":
            drawn = drawn * float(arguments[0])
        elif operation == "shift":
            drawn = drawn + float(arguments[0])
        elif operation == "shift_at":
            drawn[int(arguments[0])] += float(arguments[1])
        elif operation == "centre":
            drawn = drawn - drawn.mean(axis=1, keepdims=True)
        else:
            assert operation == "set"
            drawn = np.asarray(stored[f"set:{key}"], np.float64)
    return np.asarray(drawn, np.float32)


def _drawn(key: str, shape: Sequence[int], seed: int) -> NDArray[np.float64]:
    last = key.rsplit(".", 1)[-1]
    if last not in ("running_mean", "running_var"):
        return recipe.value(key, shape, seed)
    n = (recipe.uniform(key, seed, shape) - 0.5) * np.sqrt(12.0)
    drawn: NDArray[np.float64] = 0.1 * n if last == "running_mean" else 1 + 0.1 * np.abs(n)
    return drawn


def picture(seed: int, height: int, width: int) -> NDArray[np.uint8]:
    """RGB `(H, W, 3)`: gradients under flat or striped boxes and ellipses; integers only."""
    numbers = iter(recipe.uniform("detector-image", seed, (9 + SHAPES_DRAWN * 9,)))

    def draw(low: int, high: int) -> int:
        return low + int(next(numbers) * (high - low))

    y, x = np.arange(height)[:, None], np.arange(width)[None]
    pixels = np.empty((height, width, 3), np.int64)
    for channel in range(3):
        top, bottom, slope = draw(0, 256), draw(0, 256), draw(-128, 128)
        vertical = (top * (height - 1 - y) + bottom * y) // (height - 1)
        pixels[:, :, channel] = vertical + (x * slope) // (2 * width)
    for _ in range(SHAPES_DRAWN):
        kind, middle_y, middle_x = draw(0, 3), draw(0, height), draw(0, width)
        reach_y, reach_x = draw(6, max(height // 4, 8)), draw(6, max(width // 4, 8))
        colour, stripe = [draw(0, 256) for _ in range(3)], draw(3, 12)
        dy, dx = y - middle_y, x - middle_x
        inside = (np.abs(dy) <= reach_y) & (np.abs(dx) <= reach_x)
        if kind == 1:
            inside = (dy * reach_x) ** 2 + (dx * reach_y) ** 2 <= (reach_x * reach_y) ** 2
        elif kind == 2:
            inside &= ((x + y) // stripe) % 2 == 0
        pixels[inside] = colour
    return np.clip(pixels, 0, 255).astype(np.uint8)
