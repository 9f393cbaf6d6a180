import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model.segmentation import Segmenter, SegmenterConfig, create_segmenter, semantic_fpn, upernet
from model.segmentation.config import Kind
from model.segmentation.official import official_shapes
from tests.conftest import GOLDEN
from tests.model.detection import recipe
from tests.model.detection.conftest import SMALL_BACKBONE

KINDS: tuple[Kind, ...] = ("semantic_fpn", "upernet")
NAMES = {"fpn": "semantic_fpn", "upn": "upernet"}  # of the cases

# Spread the logits, as the golden cases do for the published sizes.
LIVELY = [
    ["decode_head.*conv.weight", "centre"],
    ["decode_head.*conv.weight", "scale", 2],
    ["decode_head.conv_seg.weight", "centre"],
    ["decode_head.conv_seg.weight", "scale", 4],
]


def small_config(kind: Kind) -> SegmenterConfig:
    return SegmenterConfig(
        f"small_{kind}", kind, SMALL_BACKBONE, 16, 24, num_classes=7, scale=(400, 100)
    )


def segmenter_state(config: SegmenterConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Recipe weights under the official names."""
    return {
        key: torch.from_numpy(recipe.tensor(key, shape, seed, LIVELY, {}))
        for key, shape in official_shapes(config).items()
    }


def small_segmenter(kind: Kind) -> Segmenter:
    """A segmenter with recipe weights at a size that costs a test little."""
    segmenter = Segmenter(small_config(kind)).eval()
    segmenter.load_state_dict(segmenter_state(segmenter.config))
    return segmenter


@pytest.fixture(params=KINDS, scope="module")
def segmenter(request: pytest.FixtureRequest) -> Segmenter:
    """A small segmenter of each kind with recipe weights."""
    return small_segmenter(request.param)


@pytest.fixture(scope="session")
def operators() -> Any:
    """Single operators as the official stack computes them."""
    return np.load(GOLDEN / "seg" / "ops.npz")


@dataclass
class Case:
    """A golden case with a segmenter that has its weights.

    Attributes:
        golden: the arrays.
        meta: its facts.
        segmenter: ours.
        state: the weights under their official names.
        pixels: of the picture.
    """

    golden: Any
    meta: dict[str, Any]
    segmenter: Segmenter
    state: dict[str, NDArray[np.float32]]
    pixels: NDArray[np.uint8]


def read_case(file: Path) -> Case:
    golden = np.load(file)
    meta = json.loads(str(golden["meta"]))
    kind, size = meta["variant"].split("_")
    long_side, short_side = meta["img_scale"]
    segmenter = create_segmenter(f"{NAMES[kind]}_dat_pp_{size}", scale=(long_side, short_side))
    state = {
        key: recipe.tensor(key, shape, meta["seed"], meta["overrides"], golden)
        for key, shape in official_shapes(segmenter.config).items()
    }
    segmenter.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    pixels = recipe.picture(*(meta["image"][part] for part in ("seed", "height", "width")))
    return Case(golden, meta, segmenter, state, pixels)


@dataclass
class Recorder:
    """What single layers of a head return while they are watched.

    They are called through functions, which no hook of a module sees.
    """

    outputs: dict[int, torch.Tensor] = field(default_factory=dict)

    def of(self, layer: torch.nn.Module) -> torch.Tensor:
        return self.outputs[id(layer)]

    def watched(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watch(layer: torch.nn.Module, *given: Any) -> torch.Tensor:
            self.outputs[id(layer)] = function(layer, *given)
            return self.outputs[id(layer)]

        return watch


@contextmanager
def recorded_layers() -> Iterator[Recorder]:
    """Keep what the convolutions and linear layers of the heads return."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in (
            (semantic_fpn, "convolve"),
            (upernet, "convolve"),
            (upernet, "linear"),
        ):
            patch.setattr(module, name, recorder.watched(getattr(module, name)))
        yield recorder


def auxiliary_state(config: SegmenterConfig, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """The auxiliary head of UPerNet, which serves training alone, with recipe weights."""
    shapes = {
        "auxiliary_head.conv_seg.weight": (config.num_classes, 256, 1, 1),
        "auxiliary_head.conv_seg.bias": (config.num_classes,),
        "auxiliary_head.convs.0.conv.weight": (256, config.dims[2], 3, 3),
        **{
            f"auxiliary_head.convs.0.bn.{name}": (256,)
            for name in ("weight", "bias", "running_mean", "running_var")
        },
    }
    return {key: recipe.tensor(key, shape, seed, [], {}) for key, shape in shapes.items()}
