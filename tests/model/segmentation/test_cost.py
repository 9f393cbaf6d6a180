"""FLOPs of segmenters against those that operations have when they are called."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from model.segmentation import SEGMENTERS, create_segmenter
from model.segmentation.cost import flops, head_flops

# From those who ran the official code, at 512x683: 10^9 multiply-adds behind the backbone.
SIZE = (512, 683)
PUBLISHED = {"upernet_dat_pp_tiny": 282, "semantic_fpn_dat_pp_tiny": 29}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_heads_cost_what_was_measured(name):
    assert round(head_flops(SEGMENTERS[name], SIZE) / 1e9) == PUBLISHED[name]


@pytest.mark.parametrize("size", [(64, 96), (131, 97)])
@pytest.mark.parametrize("name", ["upernet_dat_pp_small", "semantic_fpn_dat_nano"])
def test_a_head_computes_what_is_counted(name, size):
    with torch.device("meta"):
        segmenter = create_segmenter(name)
        maps = [
            torch.empty(1, *segmenter.config.backbone.map_size(stage, size), dim)
            for stage, dim in enumerate(segmenter.config.dims)
        ]
    # It does not know the fused operations, which run where no gradient is wanted.
    with FlopCounterMode(display=False) as operations:
        segmenter.decode_head(maps)
    assert head_flops(segmenter.config, size) == operations.get_total_flops() // 2


def test_the_backbone_and_its_norms_come_on_top():
    config = SEGMENTERS["upernet_dat_pp_tiny"]
    behind = flops(config, (224, 224)) - head_flops(config, (224, 224))
    # That of the classifier, whose last norm and whose linear layer are a thousandth of it.
    assert 4.28e9 < behind < 4.30e9
