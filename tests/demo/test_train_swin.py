import pytest
import torch

from demo import train_swin
from demo.train import Pool
from model.checkpoint import read
from model.swin import create_swin, load_swin, read_swin


@pytest.mark.slow
def test_a_trained_swin_is_kept_as_it_is_served(tmp_path):
    side, count = train_swin.CONFIG.image_size[0], 32
    random = torch.Generator().manual_seed(0)
    pool = Pool(
        torch.randint(256, (count, side, side, 3), dtype=torch.uint8, generator=random),
        torch.randint(12, (count,), generator=random),
        torch.zeros(count, 2),
        torch.ones(count),
        torch.randint(256, (count, side // 4, side // 4), dtype=torch.uint8, generator=random),
    )
    models = [create_swin(train_swin.CONFIG) for _ in range(2)]
    for model, steps in zip(models, (1, 2), strict=True):
        train_swin.train(model, pool, pool, steps)
    model = models[1]
    train_swin.keep(tmp_path / "swin.safetensors", model, {"steps": "2"})

    checkpoint = read(tmp_path / "swin.safetensors")
    assert checkpoint.metadata["steps"] == "2"
    assert read_swin(checkpoint).config == train_swin.CONFIG
    images = torch.randn(1, 3, side, side, generator=random)
    with torch.inference_mode():
        less, more = (one.eval()(images) for one in models)
        torch.testing.assert_close(load_swin(checkpoint)(images), more, rtol=0, atol=1e-6)
    assert not torch.equal(less, more)  # both began alike
