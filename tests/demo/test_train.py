import numpy as np
import torch

from demo.train import CONFIG, Pool, augment
from demo.views import location


def test_augmentation_moves_the_object_and_its_place_alike():
    """One bright cell of 4x4 pixels stands for the object."""
    side, count = CONFIG.image_size[0], 64
    rng = np.random.default_rng(0)
    cells = rng.integers(0, side // 4, (count, 2))
    pixels = torch.zeros(count, side, side, 3, dtype=torch.uint8)
    coverage = torch.zeros(count, side // 4, side // 4, dtype=torch.uint8)
    for image, drawn, (y, x) in zip(pixels, coverage, cells.tolist(), strict=True):
        image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = 255
        drawn[y, x] = 255
    centres = torch.from_numpy(location(cells * 4.0 + 2, CONFIG).astype(np.float32))
    pool = Pool(pixels, torch.arange(count), centres, torch.ones(count), coverage)

    moved = augment(pool, torch.Generator().manual_seed(1))

    assert not torch.equal(moved.pixels, pool.pixels)
    for image, drawn, centre in zip(moved.pixels, moved.coverage, moved.centres_yx, strict=True):
        lit = image[..., 0].nonzero().double() + 0.5
        expected = location(lit.mean(0).numpy(), CONFIG)
        np.testing.assert_allclose(centre.numpy(), expected, atol=1e-5)
        (cell,) = drawn.nonzero()
        np.testing.assert_allclose(location(cell.numpy() * 4.0 + 2, CONFIG), expected)
