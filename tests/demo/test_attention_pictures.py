import re

import numpy as np
import pytest
from PIL import Image

from demo import attention_pictures
from demo.attention_pictures import DRAWN, FOLDER, Demo, bilinear

LARGEST = 150_000  # bytes


def test_pictures_are_small_and_all_there():
    drawn = [FOLDER / name for name in (*(f"{name}.png" for name in DRAWN), "bilinear.svg")]
    assert max(path.stat().st_size for path in drawn) < LARGEST


def test_the_shares_of_four_cells_are_one():
    drawn = bilinear()
    assert (FOLDER / "bilinear.svg").read_text("utf-8") == drawn
    shares = [float(share) for share in re.findall(r">(\d\.\d{3})<", drawn)]
    assert len(shares) == 4
    assert sum(shares) == pytest.approx(1)


def test_points_are_drawn_where_they_are():
    demo = Demo()
    points, _ = demo.attention(attention_pictures.LAYER)
    drawn = attention_pictures.offsets(demo).convert("RGB")
    with Image.open(FOLDER / "offsets.png") as kept:
        assert kept.size == drawn.size
    margin = attention_pictures.BESIDE
    third = 3 * attention_pictures.GAP + 2 * attention_pictures.SIDE + 5 * margin
    enlarged = attention_pictures.SIDE / demo.model.config.image_size[0]
    for x, y in points[-1]:
        at = round(third + x * enlarged), round(attention_pictures.GAP + margin + y * enlarged)
        found = drawn.getpixel(at)
        assert isinstance(found, tuple)
        apart = np.subtract(found, attention_pictures.GROUPS[-1])
        assert np.abs(apart).max() < 40
