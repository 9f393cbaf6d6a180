"""Renders the sample pictures in `demo/samples`: `python -m demo.samples`."""

from pathlib import Path

from demo.canvas import jpeg
from demo.scenes import CLASSES, scene

FOLDER = Path(__file__).parent / "samples"
SEED = 3
QUALITY = 85

# (scene, height, width); the scene's class names the file.
PICTURES = (
    (0, 360, 540),
    (1, 320, 320),
    (2, 600, 400),
    (3, 400, 640),
    (4, 240, 200),
    (5, 420, 420),
    (6, 480, 640),
    (7, 300, 460),
    (8, 640, 480),
    (9, 400, 300),
    (10, 460, 700),
    (11, 500, 320),
)


def main() -> None:
    """Write one JPEG per class."""
    FOLDER.mkdir(exist_ok=True)
    for index, height, width in PICTURES:
        rendered = scene(SEED, index, height, width)
        (FOLDER / f"{CLASSES[rendered.label]}.jpg").write_bytes(jpeg(rendered.pixels, QUALITY))


if __name__ == "__main__":
    main()
