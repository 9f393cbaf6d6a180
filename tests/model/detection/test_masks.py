import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.detection.masks import paste, paste_whole


def oracle(probabilities, box, y, x):
    """The probability under the centre of one pixel, zero outside of the mask."""
    cells = probabilities.shape[0]
    row = (y + 0.5 - box[1]) / (box[3] - box[1]) * cells - 0.5
    column = (x + 0.5 - box[0]) / (box[2] - box[0]) * cells - 0.5
    total = 0.0
    for i in range(cells):
        for j in range(cells):
            weight = max(0, 1 - abs(row - i)) * max(0, 1 - abs(column - j))
            total += weight * probabilities[i, j].item()
    return total


@st.composite
def boxes(draw):
    x, y = (draw(st.floats(-5, 12)) for _ in "xy")
    width, height = (draw(st.floats(0.5, 15)) for _ in "xy")
    return x, y, x + width, y + height


@settings(deadline=None)
@given(boxes(), st.integers(0, 2**32 - 1))
def test_pixels_read_the_mask_bilinearly(box, seed):
    H, W = 9, 11
    masks = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(seed))
    (pasted,) = paste(masks, torch.tensor([box]), (H, W))
    whole = np.zeros((H, W), np.float32)
    h, w = pasted.probabilities.shape
    whole[pasted.top : pasted.top + h, pasted.left : pasted.left + w] = pasted.probabilities
    expected = [[oracle(masks[0], box, y, x) for x in range(W)] for y in range(H)]
    np.testing.assert_allclose(whole, expected, atol=1e-4)


def test_a_mask_fades_at_the_edge_of_its_box():
    (mask,) = paste_whole(torch.full((1, 28, 28), 0.6), torch.tensor([[2, 2, 58, 58]]), (60, 60))
    assert mask[3:57, 3:57].all()
    assert not mask[:3].any()


def test_a_box_without_area_covers_nothing():
    flat = torch.tensor([[3.0, 2.0, 3.0, 8.0], [4.0, 4.0, 4.0, 4.0]])
    assert not paste_whole(torch.ones(2, 28, 28), flat, (10, 10)).any()
