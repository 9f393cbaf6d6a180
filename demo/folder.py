"""Writes scenes that the demo model was not trained on as a folder of labelled images.

`python -m demo.folder --out DIR`: one subfolder for each class, as `dat-serve evaluate` takes it.
"""

import argparse
from pathlib import Path

from demo.evaluate import LARGEST_PICTURE
from demo.scenes import CLASSES
from demo.views import upload


def write(folder: Path, scenes: int, seed: int) -> None:
    """Write the first scenes of a series as JPEG files."""
    for index in range(scenes):
        rendered, file = upload(seed, index, LARGEST_PICTURE)
        path = folder / CLASSES[rendered.label] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file)


def main() -> None:
    """Write the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1, help="0 is that of the training")
    arguments = parser.parse_args()
    write(arguments.out, arguments.scenes, arguments.seed)


if __name__ == "__main__":
    main()
