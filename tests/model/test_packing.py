import pytest
import torch
from torch import nn

from model import fused
from model.fused import has_bfloat16
from model.packing import NARROW, pack
from model.tracing import record


@pytest.mark.parametrize("batch", [1, 3])
def test_a_packed_network_computes_the_same(network, batch):
    images = torch.randn(batch, 3, *network.config.image_size)
    with torch.inference_mode():
        expected = network.forward_explained(images)
        pack(network)
        torch.testing.assert_close(network.forward_explained(images), expected)


def test_every_weight_between_the_images_and_the_head_is_packed(network, monkeypatch):
    monkeypatch.setattr(fused, "FEWEST", 0)
    pack(network)
    for part in (network.stem, network.stages, network.downsamples):
        for layer in part.modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                narrow = isinstance(layer, nn.Linear) and layer.out_features < NARROW
                assert layer.weight.is_mkldnn != narrow


def test_products_that_are_done_before_onednn_has_begun_are_left_to_torch(network):
    images = torch.zeros(2, 3, *network.config.image_size)
    linears = {id(layer.weight) for layer in network.modules() if isinstance(layer, nn.Linear)}
    pack(network)
    kept = [
        layer
        for stage in network.stages
        for layer in stage.modules()
        if isinstance(layer, nn.Linear) and id(layer.weight) in linears
    ]
    assert kept
    called = [str(node.target) for node in record(network, images).nodes]
    packed = [layer for layer in network.stages.modules() if isinstance(layer, nn.Linear)]
    assert sum("_linear_pointwise" in name for name in called) == len(packed) - len(kept)


def test_half_precision_is_packed_where_onednn_computes_it(network):
    images = torch.randn(1, 3, *network.config.image_size)
    for dtype, packed in ((torch.float16, False), (torch.bfloat16, has_bfloat16())):
        network.cast(dtype)
        with torch.inference_mode():
            expected = network(images.to(dtype))
            pack(network)
            torch.testing.assert_close(network(images.to(dtype)), expected)
        weights = [
            layer.weight
            for layer in network.stages.modules()
            if isinstance(layer, nn.Linear) and layer.out_features >= NARROW
        ]
        assert all(weight.is_mkldnn == packed for weight in weights)
