"""The heads of two stages in fixed shapes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.detection.dense import Candidates
from model.detection.detections import MOST_DETECTIONS
from model.detection.roi_heads import TwoStageHead
from tests.model.detection.conftest import small_config

STRIDES = (4, 8, 16, 32, 64)
TWO_STAGES = ("mask_rcnn", "cascade_mask_rcnn")


class OnDevice(TorchDispatchMode):
    """Raises where something is read from the host, or comes to it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        output = operation(*args, **(kwargs or {}))
        for part in tree_leaves((args, kwargs, output)):
            assert not isinstance(part, torch.Tensor) or part.is_cuda, operation
        return output


@contextmanager
def launches() -> Iterator[list[str]]:
    """The kernels that are launched, without a device to run them."""
    runtime = pytest.importorskip("triton.runtime.jit")
    names: list[str] = []

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: names.append(kernel.__name__)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.KernelInterface, "__getitem__", launch)
        yield names


@pytest.mark.parametrize("kind", TWO_STAGES)
def test_nothing_waits_for_the_device(kind):
    """On a device that is not there, whatever depends on a value raises."""
    head = TwoStageHead(small_config(kind)).to(torch.bfloat16)
    with FakeTensorMode(), torch.no_grad():
        head._apply(lambda part: torch.empty(part.shape, dtype=part.dtype, device="cuda"))
        levels = [
            torch.empty(2, 96 // stride, 128 // stride, 16, dtype=torch.bfloat16, device="cuda")
            for stride in STRIDES
        ]
        of_levels = [min(3 * level.shape[1] * level.shape[2], 1000) for level in levels]
        boxes = torch.empty(2, sum(of_levels), 4, device="cuda")
        candidates = Candidates(boxes, boxes[..., 0], boxes[..., 0].long(), tuple(of_levels))
        limits, scales = torch.empty(2, 2, 2, device="cuda")
        with launches() as launched, OnDevice():
            found = head.find(levels, candidates, limits, scales)
    assert launched.count("_roi_align") == len(head.box_heads) + 1
    assert found.boxes.shape == (2, MOST_DETECTIONS, 4)
    assert found.mask_probabilities.shape == (2, MOST_DETECTIONS, 28, 28)
    assert found.mask_probabilities.dtype == torch.float32
