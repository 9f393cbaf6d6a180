"""Scenes with label maps: `python -m demo.segmentation.maps --out DIR`.

Writes pictures to `DIR/images` and a label map for each to `DIR/maps`, as `dat-serve evaluate
--segmentation` takes them.
"""

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from demo.detection import scenes
from demo.detection.scenes import CLASSES, Scene

SEED = 1
NAMES = ("background", *CLASSES)


def upload(seed: int, index: int) -> tuple[Scene, bytes]:
    """Return scene `index` of the series `seed` at a random size, and as a JPEG file."""
    return scenes.upload(seed, index, kind=scenes.LARGE)


def labels(rendered: Scene) -> NDArray[np.uint8]:
    """Return the class of every pixel of a scene, uint8 `(H, W)`, an index into `NAMES`."""
    of_instance = np.concatenate([[0], rendered.labels + 1]).astype(np.uint8)
    return of_instance[rendered.instances]


def write(folder: Path, count: int, seed: int) -> None:
    """Write the first scenes of a series."""
    for name in ("images", "maps"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rendered, file = upload(seed, index)
        (folder / "images" / f"{index:05}.jpg").write_bytes(file)
        Image.fromarray(labels(rendered)).save(folder / "maps" / f"{index:05}.png")


def main() -> None:
    """Write the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED, help="0 is that of the training")
    arguments = parser.parse_args()
    write(arguments.out, arguments.scenes, arguments.seed)


if __name__ == "__main__":
    main()
