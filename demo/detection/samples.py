"""Renders the sample pictures in `demo/detection/samples`: `python -m demo.detection.samples`."""

from pathlib import Path

from demo.canvas import jpeg
from demo.detection.scenes import scene

FOLDER = Path(__file__).parent / "samples"
SEED = 3
QUALITY = 85

# Scene, height and width of every file.
PICTURES = {
    "few": (2, 360, 540),
    "many": (7, 480, 640),
    "upright": (11, 600, 400),
}


def main() -> None:
    """Write the pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, (index, height, width) in PICTURES.items():
        rendered = scene(SEED, index, height, width)
        (FOLDER / f"{name}.jpg").write_bytes(jpeg(rendered.pixels, QUALITY))


if __name__ == "__main__":
    main()
