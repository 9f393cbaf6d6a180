"""Measures the bundled detector on new scenes: `python -m demo.detection.evaluate`.

Each scene goes the way of an uploaded picture: JPEG file, decoding, the official resize, the
detector, masks pasted into the picture. pycocotools compares with the truth. Prints one line of
JSON:

- `box_ap`, `mask_ap`: average precision, mean over the IoU thresholds 0.5 to 0.95 and the classes;
- `box_ap50`, `mask_ap50`: the same at 0.5 alone;
- `points_at_objects`: share of the sampling points of the last deformable layer that lie in the
  box of an object;
- `..._of_another_scene` and `..._without_offset`: the controls, the same share for the points of
  the scene before, and for points that do not move.
"""

import argparse
import contextlib
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from pycocotools.mask import encode
from torch import Tensor

from demo.detection.coco import SEED, corner_and_size, dataset
from demo.detection.losses import pixels_xy
from demo.detection.scenes import Scene, upload
from demo.detection.views import decoded
from model.attention import DeformableAttentionPP
from model.detection import Detections, Detector, ExplainedDetections, load_detector
from model.detection.masks import paste_whole
from model.detection.normalise import Normalise
from model.detection.transforms import to_model_pixels

CHECKPOINT = Path(__file__).parent / "mask_rcnn_dat_nano.safetensors"


def bundled_detector() -> Detector:
    """Return the bundled detector in evaluation mode."""
    return load_detector(CHECKPOINT).detector


def detect(detector: Detector, pixels: NDArray[np.uint8]) -> ExplainedDetections:
    """Detections in one image `(H, W, 3)`, as a batch of one."""
    resize = detector.config.resizing(pixels.shape[:2])
    sizes = torch.tensor([resize.resized])
    padded = torch.from_numpy(to_model_pixels(pixels, resize)[None])
    images = Normalise(next(detector.parameters()).dtype)(padded, sizes)
    return detector.forward_explained(images, sizes, torch.tensor([resize.scale_xy]))


@torch.inference_mode()
def evaluate(detector: Detector, uploads: Iterable[tuple[Scene, bytes]]) -> dict[str, float]:
    """Measure average precision and where the points went; see the module."""
    scenes: list[Scene] = []
    results: list[dict[str, Any]] = []
    shares: dict[str, list[float]] = {"": [], "_of_another_scene": [], "_without_offset": []}
    before: Tensor | None = None
    for rendered, file in uploads:
        explained = detect(detector, decoded(file))
        results += _results(explained.detections[0], rendered.instances.shape, len(scenes))
        scenes.append(rendered)

        size = detector.config.resizing(rendered.instances.shape).padded
        attention = detector.backbone_for(size).deformable_layers[-1].attention
        assert isinstance(attention, DeformableAttentionPP)
        points = explained.sampling_locations[-1]
        unmoved = attention.move(torch.zeros_like(points))
        for name, locations in zip(shares, (points, before, unmoved), strict=True):
            if locations is not None:
                shares[name].append(_share_at_objects(detector, locations, rendered))
        before = points
    truth = dataset(scenes)
    figures = {f"points_at_objects{name}": float(np.mean(of)) for name, of in shares.items()}
    figures["box_ap"], figures["box_ap50"] = _average_precision(truth, results, "bbox")
    figures["mask_ap"], figures["mask_ap50"] = _average_precision(truth, results, "segm")
    return {name: round(figure, 4) for name, figure in figures.items()}


def _share_at_objects(detector: Detector, locations: Tensor, rendered: Scene) -> float:
    """Share of points `(1, G, Hk, Wk, 2)` that lie in the box of an object."""
    resize = detector.config.resizing(rendered.instances.shape)
    xy = resize.to_image(pixels_xy(detector, locations, resize.padded)[0])[:, None]
    inside = (xy >= rendered.boxes[:, :2]) & (xy < rendered.boxes[:, 2:])
    return float(inside.all(-1).any(-1).mean())


def _results(found: Detections, image_size: tuple[int, int], image: int) -> list[dict[str, Any]]:
    """Detections in the format of COCO's results."""
    assert found.mask_probabilities is not None
    masks = paste_whole(found.mask_probabilities, found.boxes, image_size)
    return [
        {
            "image_id": image,
            "category_id": int(label) + 1,
            "bbox": corner_and_size(box.numpy()),
            "score": float(score),
            "segmentation": encode(np.asfortranarray(mask.astype(np.uint8))),
        }
        for label, box, score, mask in zip(
            found.labels, found.boxes, found.scores, masks, strict=True
        )
    ]


def _average_precision(
    truth: Any, results: list[dict[str, Any]], kind: Literal["bbox", "segm"]
) -> tuple[float, float]:
    """Over all thresholds, and at 0.5."""
    if not results:
        return 0.0, 0.0
    with contextlib.redirect_stdout(io.StringIO()):
        known = COCO()
        known.dataset = truth
        known.createIndex()
        measured = COCOeval(known, known.loadRes(results), kind)
        measured.evaluate()
        measured.accumulate()
        measured.summarize()
    return float(measured.stats[0]), float(measured.stats[1])


def main() -> None:
    """Evaluate the bundled detector and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    uploads = (upload(SEED, index) for index in range(arguments.scenes))
    figures = evaluate(bundled_detector().cast(getattr(torch, arguments.dtype)), uploads)
    print(json.dumps(vars(arguments) | {"seed": SEED} | figures))


if __name__ == "__main__":
    main()
