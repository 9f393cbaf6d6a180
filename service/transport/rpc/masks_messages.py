"""The messages of masks."""

from typing import Any

from service.pb import dat_pb2
from service.tasks.masks import EncodedMask, PngMask, Polygons, RunLengths


def mask_message(mask: EncodedMask | None) -> dict[str, Any]:
    """The field of the mask, by its name."""
    match mask:
        case RunLengths(image_size=(height, width), counts=counts):
            runs = dat_pb2.RunLengths(height=height, width=width, counts=counts)
            return {"rle": runs}
        case Polygons(rings=rings):
            points = (dat_pb2.Ring(points=ring.ravel().tolist()) for ring in rings)
            return {"polygon": dat_pb2.Polygons(rings=points)}
        case PngMask():
            return {"png": dat_pb2.PngMask(**vars(mask))}
    return {}
