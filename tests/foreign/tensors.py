"""Tensors that foreign clients send, as the modules that run them take these."""

from typing import Any

import numpy as np

MODEL, DETECTOR = "dat_nano", "mask_rcnn_dat_nano"
# Pixels a side of what the demo model reads, and of the image that it is the middle of.
INPUT, WHOLE = 128, 146
KINDS = ("http", "http-aio", "grpc", "grpc-aio")  # of tritonclient
HTTP = ("http", "http-aio")
GRPC = ("grpc", "grpc-aio")


def files(*jpegs: bytes) -> np.ndarray:
    """A tensor of BYTES `(N, 1)`."""
    values = np.empty((len(jpegs), 1), object)
    values[:, 0] = jpegs
    return values


def image(*jpegs: bytes, **more: Any) -> dict[str, Any]:
    return {"name": "image", "array": files(*jpegs), "datatype": "BYTES", **more}


def pixels(array: np.ndarray, **more: Any) -> dict[str, Any]:
    return {"name": "pixels", "array": array, "datatype": "UINT8", **more}


def small_pixels(count: int = 1) -> np.ndarray:
    """Pixels `(N, 146, 146, 3)`, which are not resized."""
    return np.random.default_rng(5).integers(0, 256, (count, WHOLE, WHOLE, 3), np.uint8)


def probabilities(answer: dict[str, Any]) -> np.ndarray:
    found = answer["outputs"]["probabilities"]
    assert isinstance(found, np.ndarray)
    return found
