"""Where kernels are used, whole models compute what they compute without them."""

import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch

from model import DAT, DatConfig, kernels
from model.config import StageConfig
from tests.conftest import SMALL_DAT, recipe_state
from tests.model.kernels.conftest import DEVICE, DTYPES, assert_close
from tests.server import ROOT

pytestmark = pytest.mark.slow

# Neighbourhoods in several tiles and in one, on maps that are no multiple of anything.
SMALL_DAT_PP = DatConfig(
    "small_dat_pp",
    "dat_pp",
    (
        StageConfig("N", 16, 1),
        StageConfig("ND", 32, 2, 1, 4, 7),
        StageConfig("ND", 64, 4, 2, 2, 5),
        StageConfig("D", 128, 8, 4, 1, 3),
    ),
    (72, 100),
    72,
    num_classes=12,
    window=5,
)


@pytest.fixture
def used(monkeypatch):
    """Kernels are used wherever the device lets them be, interpreted ones too."""
    if DEVICE == "cpu":
        for layers in ("model.attention", "model.dat", "model.fused", "model.local_attention"):
            monkeypatch.setattr(
                f"{layers}.usable",
                lambda tokens, dtypes=kernels.DTYPES: tokens.dtype in dtypes,
            )


def asked(model):
    """All deformable layers, and queries of the first image of each."""
    layers = range(len(model.deformable_layers))
    cells = torch.tensor([[0, 1, 2, 3, 5, 7, 9, 11]], device=DEVICE)
    return layers, cells.expand(1, len(layers), -1).contiguous()


@pytest.mark.usefixtures("used")
@pytest.mark.parametrize("config", [SMALL_DAT, SMALL_DAT_PP], ids=lambda config: config.name)
def test_models_give_the_same_answers(config):
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config))
    model.to(DEVICE)
    images = torch.randn(1, 3, *config.image_size, generator=torch.Generator().manual_seed(0))
    images = images.to(DEVICE)
    layers, cells = asked(model)
    with torch.inference_mode():
        answers = model.forward_explained(images, layers, cells)
        exact = deepcopy(model).double().forward_explained(images.double(), layers, cells)
        plain = model.forward_explained(images)
    assert torch.equal(answers.logits, plain.logits)
    assert_close(answers.logits, exact.logits)
    for weights, expected in zip(answers.attention, exact.attention, strict=True):
        assert torch.equal(weights.cells, expected.cells)
        assert weights.weights.dtype == weights.received.dtype == torch.float32
        assert_close(weights.weights, expected.weights)
        assert_close(weights.received, expected.received)
    for ours, theirs in zip(answers.sampling_locations, exact.sampling_locations, strict=True):
        assert ours.dtype == torch.float32
        assert_close(ours, theirs)


def test_kernels_are_for_cuda_without_gradients():
    tokens = torch.zeros(1, device=DEVICE)
    assert not kernels.usable(tokens)
    with torch.inference_mode():
        for dtype in DTYPES:
            assert kernels.usable(tokens.to(dtype)) == (DEVICE == "cuda")
        assert not kernels.usable(tokens.double())


def test_triton_is_imported_by_the_first_kernel_alone():
    """A machine for which it is not made has none."""
    seen = subprocess.run(
        [sys.executable, "-c", "import sys, model.dat; print('triton' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert seen.stdout == "False\n"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [SMALL_DAT, SMALL_DAT_PP], ids=lambda config: config.name)
def test_a_captured_model_answers_for_new_images(config, dtype):
    model = DAT(config).eval()
    model.load_state_dict(recipe_state(config))
    model.cast(dtype).to(DEVICE)
    images = torch.randn(2, 3, *config.image_size, device=DEVICE, dtype=dtype)
    layers, cells = asked(model)
    cells = cells.repeat(2, 1, 1)
    with torch.inference_mode():
        model.forward_explained(images, layers, cells)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model.forward_explained(images, layers, cells)
        images.copy_(torch.randn_like(images))
        cells[..., -1] = -1
        graph.replay()
        expected = model.forward_explained(images, layers, cells)
        assert_close(captured.logits, model(images).double())
        for weights, of_layer in zip(captured.attention, expected.attention, strict=True):
            assert torch.equal(weights.cells, of_layer.cells)
            assert_close(weights.weights, of_layer.weights.double())
            assert_close(weights.received, of_layer.received.double())


def test_kernels_can_be_switched_off_for_the_process(monkeypatch):
    monkeypatch.setattr(kernels, "INSTALLED", True)
    device = torch.device("cuda", 0)
    tokens = SimpleNamespace(is_cuda=True, dtype=torch.bfloat16, device=device)
    with torch.inference_mode():
        assert kernels.usable(tokens)
        monkeypatch.setattr(kernels, "enabled", False)
        assert not kernels.usable(tokens)
