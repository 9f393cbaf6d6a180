"""The backbone at the sizes of detectors: what is done in parts is the same as in one."""

import pytest
import torch

from model import attention, local_attention
from model.backbone import Backbone
from tests.model.detection.conftest import SMALL_BACKBONE, small_detector


@pytest.fixture(scope="module")
def backbone():
    return small_detector("mask_rcnn").backbone


def maps(backbone, images):
    with torch.inference_mode():
        return backbone.for_size(images.shape[2:])(images)


def assert_same(ours, expected):
    for parts in zip(ours, expected, strict=True):
        for one, other in zip(*parts, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_attention_in_bands_is_attention(backbone, monkeypatch):
    images = torch.randn(2, 3, 96, 160)
    whole = maps(backbone, images)
    monkeypatch.setattr(attention, "BANDED_FROM", 0)
    for band in (1, 30_000):  # one row of queries, and several with a rest
        monkeypatch.setattr(attention, "BAND", band)
        assert_same(maps(backbone, images), whole)


@pytest.mark.parametrize("size", [(64, 160), (224, 256)])
def test_tiles_that_share_their_bias_give_the_same(backbone, monkeypatch, size):
    images = torch.randn(2, 3, *size)
    monkeypatch.setattr(local_attention, "SHARED_FROM", 10**9)
    own = maps(backbone, images)
    monkeypatch.setattr(local_attention, "SHARED_FROM", 1)
    assert_same(maps(backbone, images), own)


def test_the_largest_official_input_keeps_little_in_memory(backbone):
    """Of what depends on the size, not on the parameters."""
    view = backbone.for_size((800, 1344))
    names = dict(view.named_parameters()).keys()
    kept = sum(tensor.nbytes for name, tensor in view.named_buffers() if name not in names)
    assert kept < 16 << 20


def test_a_size_is_fitted_as_if_it_were_built_for_it(backbone):
    images = torch.randn(1, 3, 64, 128)
    built = Backbone(SMALL_BACKBONE.resized((64, 128)), first_stage=0).eval()
    built.load_state_dict(backbone.state_dict())
    with torch.inference_mode():
        assert_same(maps(backbone, images), built(images))


def test_the_norms_are_on_the_way_out_only(backbone):
    """Another norm changes its own map and no later one."""
    images = torch.randn(1, 3, 64, 96)
    before = maps(backbone, images)
    changed = backbone.for_size((64, 96))
    changed.norms[1] = torch.nn.LayerNorm(changed.config.stages[1].dim).eval()
    with torch.inference_mode():
        after = changed(images)
    same = [torch.equal(one, other) for one, other in zip(before.maps, after.maps, strict=True)]
    assert same == [True, False, True, True]
