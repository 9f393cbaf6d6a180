"""Scenes as COCO has them: `python -m demo.detection.coco --out DIR`.

Writes pictures to `DIR/images` and their truth to `DIR/instances.json`, in the format of COCO's
`instances_*.json` (https://cocodataset.org/#format-data): categories count from 1, boxes are
`(x, y, width, height)`, masks are runs of pixels.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.detection.scenes import CLASSES, LONGEST, Scene, upload

SEED = 1


def dataset(scenes: Iterable[Scene]) -> dict[str, Any]:
    """The truth about scenes; image `n` is the scene `n`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, rendered in enumerate(scenes):
        height, width = rendered.instances.shape
        name = f"{index:05}.jpg"
        images.append({"id": index, "file_name": name, "height": height, "width": width})
        for label, mask, box in zip(
            rendered.labels.tolist(), rendered.masks, rendered.boxes, strict=True
        ):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index,
                    "category_id": label + 1,
                    "bbox": corner_and_size(box),
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": [height, width], "counts": run_lengths(mask)},
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    return {"images": images, "annotations": annotations, "categories": categories}


def corner_and_size(box: NDArray[np.float32]) -> list[float]:
    """`[x, y, width, height]` of a box `(x1, y1, x2, y2)`."""
    x1, y1, x2, y2 = box.tolist()
    return [x1, y1, x2 - x1, y2 - y1]


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs of pixels down the columns of a mask `(H, W)`, outside and inside in turn."""
    pixels = mask.ravel(order="F")
    turns = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    ends = [0] * bool(pixels[0]) + [0, *turns.tolist(), len(pixels)]
    return np.diff(ends).tolist()


def write(folder: Path, scenes: int, seed: int, longest: float = LONGEST) -> None:
    """Write the first scenes of a series; `longest` is as in `demo.detection.scenes.upload`."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    written = []
    for index in range(scenes):
        rendered, file = upload(seed, index, longest)
        (images / f"{index:05}.jpg").write_bytes(file)
        written.append(rendered)
    (folder / "instances.json").write_text(json.dumps(dataset(written)))


def main() -> None:
    """Write the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED, help="0 is that of the training")
    parser.add_argument(
        "--longest", type=float, default=LONGEST, help="longer side over the shorter one, at most"
    )
    arguments = parser.parse_args()
    write(arguments.out, arguments.scenes, arguments.seed, arguments.longest)


if __name__ == "__main__":
    main()
