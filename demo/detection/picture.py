"""Draws what the detector finds: `python -m demo.detection.picture`, to `docs/detection.png`.

Every panel is a scene with the boxes, masks and classes found in it, and the sampling points of
the last deformable layer.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo.canvas import jpeg
from demo.detection.evaluate import bundled_detector, detect
from demo.detection.losses import pixels_xy
from demo.detection.scenes import CLASSES, scene
from demo.detection.views import decoded
from demo.picture import GROUP_COLOURS, INK, PAPER
from model.detection import Detector
from model.detection.masks import paste_whole

PICTURE = Path(__file__).parent.parent.parent / "docs" / "detection.png"
SEED = 4
SCENES = (20, 25, 7, 28, 17, 14)
COLUMNS = 3
HEIGHT, WIDTH = 360, 480
# Drawn at three times the size and reduced again for smooth lines.
ENLARGED = 3
LEAST_SCORE = 0.6
COLOURS = (
    (230, 60, 60),
    (50, 120, 240),
    (40, 170, 80),
    (240, 150, 20),
    (160, 70, 210),
    (0, 170, 180),
)
LEGEND = (
    f"scores from {LEAST_SCORE} on; dots: where the last deformable layer reads the picture, "
    "by group"
)
GAP = 12
CAPTION = 30


def panel(detector: Detector, index: int) -> Image.Image:
    """Return one scene with all that is found in it drawn over it."""
    rendered = scene(SEED, index, HEIGHT, WIDTH)
    with torch.inference_mode():
        explained = detect(detector, decoded(jpeg(rendered.pixels, 92)))
    (found,) = explained.detections
    assert found.mask_probabilities is not None
    masks = paste_whole(found.mask_probabilities, found.boxes, (HEIGHT, WIDTH))
    certain = found.scores >= LEAST_SCORE

    pixels = rendered.pixels.astype(np.float32)
    for mask, colour in zip(masks[certain.numpy()], _cycle(len(masks)), strict=False):
        pixels[mask] += 0.45 * (np.array(colour, np.float32) - pixels[mask])
    picture = Image.fromarray(pixels.round().astype(np.uint8))
    picture = picture.resize((WIDTH * ENLARGED, HEIGHT * ENLARGED), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    _draw_points(draw, detector, explained.sampling_locations[-1])
    font = ImageFont.load_default(14 * ENLARGED)
    entries = zip(
        found.boxes[certain] * ENLARGED, found.labels[certain], found.scores[certain], strict=True
    )
    for (box, label, score), colour in zip(entries, _cycle(len(masks)), strict=False):
        left, top, right, bottom = box.tolist()
        draw.rectangle((left, top, right, bottom), outline=colour, width=2 * ENLARGED)
        text = f"{CLASSES[int(label)]} {float(score):.2f}"
        width = draw.textlength(text, font) + 2 * ENLARGED
        # Inside of the picture, also for an object at its edge.
        left = min(left, picture.width - width)
        top = max(top - 17 * ENLARGED, 0)
        draw.rectangle((left, top, left + width, top + 17 * ENLARGED), fill=colour)
        draw.text((left + ENLARGED, top + 8.5 * ENLARGED), text, PAPER, font, "lm")
    return picture.reduce(ENLARGED)


def _cycle(count: int) -> list[tuple[int, int, int]]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _draw_points(
    draw: ImageDraw.ImageDraw, detector: Detector, sampling_locations: torch.Tensor
) -> None:
    resize = detector.config.resizing((HEIGHT, WIDTH))
    groups = sampling_locations[0].unsqueeze(1)  # (G, 1, Hk, Wk, 2)
    for group, colour in zip(groups, GROUP_COLOURS, strict=False):
        points: NDArray[np.float64] = resize.to_image(
            pixels_xy(detector, group.unsqueeze(0), resize.padded)[0]
        )
        for x, y in (points * ENLARGED).tolist():
            draw.circle((x, y), 3.5 * ENLARGED, fill=colour, outline=INK, width=ENLARGED)


def main() -> None:
    """Draw all panels on one sheet."""
    detector = bundled_detector()
    rows = -(-len(SCENES) // COLUMNS)
    size = (COLUMNS * (WIDTH + GAP) + GAP, rows * (HEIGHT + GAP) + GAP + CAPTION)
    sheet = Image.new("RGB", size, PAPER)
    for place, index in enumerate(SCENES):
        row, column = divmod(place, COLUMNS)
        corner = (GAP + column * (WIDTH + GAP), GAP + row * (HEIGHT + GAP))
        sheet.paste(panel(detector, index), corner)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(18)
    draw.text((size[0] / 2, size[1] - CAPTION / 2 - GAP / 2), LEGEND, INK, font, "mm")
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
