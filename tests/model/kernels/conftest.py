"""The kernels run in Triton's interpreter (see `tests/conftest.py`); on a GPU they are compiled."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, is_hypothesis_test, settings
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# What float32 positions cost, relative to the largest value: they are off by some 1e-7, times a
# hundred cells of a map or table, times several units from one cell to the next.
POSITIONS = 1e-4

# The interpreter takes minutes to shrink an example.
some_examples = settings(max_examples=12, deadline=None, phases=[Phase.reuse, Phase.generate])

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a GPU they are tests of it; in the interpreter, where a case takes long, many are slow."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            if DEVICE == "cuda":
                item.add_marker(pytest.mark.gpu)
            elif is_hypothesis_test(getattr(item, "obj", None)):
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def products_as_on_a_device() -> None:
    """The interpreter multiplies the bits of bfloat16, and rounds the product in an FMA."""
    if DEVICE == "cuda":
        return
    import triton.language as tl  # noqa: PLC0415
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: PLC0415

    multiply = InterpreterBuilder.create_dot

    def create_dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        widened = [
            builder.create_fp_ext(factor, tl.float32) if factor.dtype.scalar.is_bf16() else factor
            for factor in (a, b)
        ]
        return multiply(builder, *widened, *rest)

    def create_fma(_: Any, x: Any, y: Any, z: Any) -> Any:
        wide = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.create_fma = create_fma


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_close(actual: Tensor, exact: Tensor) -> None:
    """Compare with float64, as closely as the type of `actual` and its largest value allow."""
    tolerance = 4 * torch.finfo(actual.dtype).eps + POSITIONS
    atol = tolerance * exact.nan_to_num().abs().max().item()
    torch.testing.assert_close(actual.double(), exact, rtol=0, atol=atol, equal_nan=True)
