"""Scenes as the detector sees them: JPEG files through the serving preprocessing."""

import io
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.detection.scenes import Scene
from model.detection import DETECTORS
from model.resizing import resize_bilinear

CONFIG = DETECTORS["mask_rcnn_dat_nano"]


def decoded(file: bytes) -> NDArray[np.uint8]:
    """Return the pixels `(H, W, 3)` of a JPEG file."""
    with Image.open(io.BytesIO(file)) as image:
        return np.asarray(image.convert("RGB"))


def view(rendered: Scene, file: bytes) -> Scene:
    """Return a scene at the detector's input, as far as it is not padding."""
    height, width = rendered.instances.shape
    size = CONFIG.resizing((height, width)).resized
    rows, columns = (
        ((np.arange(new) + 0.5) * old / new).astype(int)
        for old, new in zip((height, width), size, strict=True)
    )
    return replace(
        rendered,
        pixels=resize_bilinear(decoded(file), size),
        instances=rendered.instances[rows[:, None], columns],
    )
