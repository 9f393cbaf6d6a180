"""Masks in JSON."""

import json
from typing import Any

import numpy as np
import pytest

from service.tasks.masks import EncodedMask, PngMask, Polygons, RunLengths
from service.transport.http.masks_schema import MaskBody

RINGS = [[[0, 0], [640, 0], [640, 87]], [[3, 4], [5, 4], [5, 6], [3, 6]]]
MASKS: dict[str, tuple[EncodedMask, Any]] = {
    "rle": (RunLengths((4, 5), "05"), {"size": [4, 5], "counts": "05"}),
    "polygon": (Polygons(tuple(map(np.array, RINGS))), RINGS),
    "png": (PngMask(b"png", 1, 2), {"png": "cG5n", "left": 1, "top": 2}),
}


@pytest.mark.parametrize("form", MASKS)
def test_a_mask_is_written_as_it_is_declared(form: str) -> None:
    """Pydantic warns of what is not, in a text as long as the mask; a warning is an error here."""
    mask, written = MASKS[form]
    assert json.loads(MaskBody.of(mask).model_dump_json(exclude_none=True)) == {form: written}
