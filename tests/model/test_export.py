import pytest
import torch

from model import DAT, VARIANTS
from tests.conftest import SMALL_DAT, recipe_state


@pytest.mark.slow
@pytest.mark.parametrize("config", [VARIANTS["dat_nano"], SMALL_DAT], ids=lambda c: c.name)
def test_an_exported_model_has_plain_operations_and_the_same_logits(config):
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config))
    images = torch.randn(1, 3, *config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exported = torch.export.export(model, (images,))
        logits = exported.module()(images)
        torch.testing.assert_close(logits, model(images), rtol=0, atol=1e-5)
    # Runtimes know those of torch's core only, and have no efficient way to cut a map into windows.
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if not name.startswith(("aten.", "<built-in"))]
    assert not [name for name in called if "embedding_bag" in name or "unfold" in name]
