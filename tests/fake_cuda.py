"""A CUDA device that is not there: shapes and types are computed, values do not exist.

What asks for a value, or whose shape depends on one, raises. Kernels in Triton are noted down
where they would be launched.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


@contextmanager
def fake_cuda() -> Iterator[list[str]]:
    """Tensors made on `cuda` are fakes; gives the names of the kernels in Triton, as launched."""
    runtime = pytest.importorskip("triton.runtime.jit")
    launched: list[str] = []

    def launch(kernel: Any, grid: Any) -> Any:
        return lambda *args, **options: launched.append(kernel.__name__)

    with FakeTensorMode(), torch.no_grad(), _Indexing(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.KernelInterface, "__getitem__", launch)
        yield launched


def move(module: nn.Module) -> None:
    """Put fakes on `cuda` in the place of all parameters and buffers, laid out as these are."""
    module._apply(
        lambda part: torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device="cuda")
    )


class OnDevice(TorchDispatchMode):
    """Raises where a tensor is read that is not on `cuda`, or one is made elsewhere."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        output = operation(*args, **(kwargs or {}))
        for part in tree_leaves((args, kwargs, output)):
            assert not isinstance(part, Tensor) or part.device.type == "cuda", operation
        return output


class _Indexing(TorchFunctionMode):
    """Indexing, which a build of torch without CUDA refuses to a tensor that says it is there."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__getitem__:
            return _index(*args)
        if function is Tensor.__setitem__:
            tensor, index, value = args
            return torch.ops.aten.copy_.default(_index(tensor, index), value)
        if function is Tensor.__invert__:
            return torch.bitwise_not(*args)
        return function(*args, **(kwargs or {}))


def _index(tensor: Tensor, index: Any) -> Tensor:
    if isinstance(index, Tensor):
        indexed: Tensor = torch.ops.aten.index.Tensor(tensor, [index])
        return indexed
    # A view is in the same place on a device where indexing is possible.
    with _disable_current_modes():
        like = torch.empty_strided(tensor.shape, tensor.stride(), device="meta")[index]
    offset = tensor.storage_offset() + like.storage_offset()
    return tensor.as_strided(like.shape, like.stride(), offset)
