"""Draws where the last deformable layer looks: `python -m demo.picture`, to `docs/points.png`.

Every panel is what the model sees of a scene, with its answer below.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from demo.canvas import jpeg
from demo.evaluate import bundled_model
from demo.scenes import CLASSES, scene
from demo.views import view
from model import DAT
from model.normalise import Normalise
from model.transforms import Preprocessing

PICTURE = Path(__file__).parent.parent / "docs" / "points.png"
SEED = 4
SCENES = (0, 13, 26, 39, 5, 18, 10, 35)
COLUMNS = 4
# Scenes are rendered at twice the model's input, drawn on at eight times, and reduced again for
# smooth lines.
RENDERED = 2
ENLARGED = 8
GROUP_COLOURS = ((255, 205, 60), (90, 225, 255), (255, 120, 200), (160, 255, 120))
INK = (20, 20, 24)
PAPER = (250, 250, 250)
CAPTION = 30
LEGEND = "white: reference points of the last layer; coloured: where they moved, by offset group"
GAP = 12


def panel(model: DAT, index: int) -> tuple[Image.Image, str]:
    """Return one scene with its points drawn over it, and what the model calls it."""
    config = model.config
    preprocessing = Preprocessing.of(config)
    side, crop = preprocessing.resize_to[0], config.image_size[0]
    rendered = scene(SEED, index, side * RENDERED, side * RENDERED)
    seen = view(rendered, jpeg(rendered.pixels, 92), config)
    with torch.inference_mode():
        explained = model.forward_explained(Normalise()(torch.from_numpy(seen.pixels[None])))

    start = preprocessing.crop_offset[0] * RENDERED
    stop = start + crop * RENDERED
    picture = Image.fromarray(rendered.pixels[start:stop, start:stop])
    picture = picture.resize((crop * ENLARGED,) * 2, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    references = model.deformable_layers[-1].attention.reference_points.numpy()
    locations = explained.sampling_locations[-1][0].numpy()  # (G, Hk, Wk, 2)
    stride, first = config.cell_geometry(3)
    half_span = stride * (config.map_size(3)[0] - 1) / 2

    def drawn(points_yx: NDArray[np.float32]) -> NDArray[np.float32]:
        pixels_yx = first + half_span * (points_yx.reshape(-1, 2) + 1)
        return pixels_yx[:, ::-1] * ENLARGED

    starts = drawn(references)
    for group, colour in zip(locations, GROUP_COLOURS, strict=False):
        for start_xy, stop_xy in zip(starts, drawn(group), strict=True):
            _line(draw, start_xy, stop_xy, colour)
    for start_xy in starts:
        draw.circle(start_xy.tolist(), 13, fill=PAPER, outline=INK, width=4)
    for group, colour in zip(locations, GROUP_COLOURS, strict=False):
        for stop_xy in drawn(group):
            draw.circle(stop_xy.tolist(), 19, fill=colour, outline=INK, width=5)
    scores = explained.logits[0].softmax(0)
    label = int(scores.argmax())
    caption = f"{CLASSES[label]}  {float(scores[label]):.2f}"
    return picture.reduce(ENLARGED // RENDERED), caption


def _line(
    draw: ImageDraw.ImageDraw,
    start_xy: NDArray[np.float32],
    stop_xy: NDArray[np.float32],
    colour: tuple[int, int, int],
) -> None:
    ends = [*start_xy.tolist(), *stop_xy.tolist()]
    draw.line(ends, INK, 9)
    draw.line(ends, colour, 5)


def main() -> None:
    """Draw all panels on one sheet."""
    model = bundled_model()
    panels = [panel(model, index) for index in SCENES]
    side = panels[0][0].width
    rows = -(-len(panels) // COLUMNS)
    size = (COLUMNS * (side + GAP) + GAP, rows * (side + CAPTION + GAP) + GAP + CAPTION)
    sheet = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(18)
    for place, (picture, caption) in enumerate(panels):
        row, column = divmod(place, COLUMNS)
        left, top = GAP + column * (side + GAP), GAP + row * (side + CAPTION + GAP)
        sheet.paste(picture, (left, top))
        draw.text((left + side / 2, top + side + CAPTION / 2), caption, INK, font, "mm")
    draw.text((size[0] / 2, size[1] - CAPTION / 2 - GAP), LEGEND, INK, font, "mm")
    PICTURE.parent.mkdir(exist_ok=True)
    sheet.quantize(256, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
