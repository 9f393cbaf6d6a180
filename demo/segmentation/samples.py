"""Renders the pictures in `demo/segmentation/samples`: `python -m demo.segmentation.samples`."""

from pathlib import Path

from demo.canvas import jpeg
from demo.detection.samples import QUALITY, SEED
from demo.detection.scenes import LARGE, scene

FOLDER = Path(__file__).parent / "samples"

# Scene, height and width of every file.
PICTURES = {
    "four": (0, 480, 640),
    "two": (6, 480, 640),
}


def main() -> None:
    """Write the pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, (index, height, width) in PICTURES.items():
        rendered = scene(SEED, index, height, width, LARGE)
        (FOLDER / f"{name}.jpg").write_bytes(jpeg(rendered.pixels, QUALITY))


if __name__ == "__main__":
    main()
