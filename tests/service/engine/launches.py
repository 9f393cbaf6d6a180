"""Count what a forward pass launches on a GPU, on a machine that needs none.

The pass runs on fake tensors: shapes and types without values, which say that they are on `cuda`.
Every operation that makes a tensor and every Triton kernel is one launch, each said to read its
inputs and to write its outputs once. A pass that waits for a value of the device fails.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import VARIANTS, create_model
from service.engine.classify import Classify

_CONVOLUTION = torch.ops.aten.convolution.default
_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
}


class Launch(NamedTuple):
    """One launch of a kernel.

    Attributes:
        name: of the operation or the Triton kernel.
        moved: bytes of its inputs and outputs.
        parameters: bytes of those inputs that are there before a call of the module: its
            parameters, its buffers, and what it makes of them once.
    """

    name: str
    moved: int
    parameters: int


def launches(module: nn.Module, *shape: int, dtype: torch.dtype) -> tuple[list[Launch], Any]:
    """What a call of a module launches, and what it returns, as fake tensors.

    Args:
        module: is moved to a fake device; it cannot be used after.
        shape: of the input.
        dtype: of the input.

    Raises:
        torch._subclasses.fake_tensor.DataDependentOutputException: the call waits for a value.
        torch._subclasses.fake_tensor.DynamicOutputShapeException: a shape depends on values.
    """
    with FakeTensorMode(), torch.no_grad(), warnings.catch_warnings():
        # A module may look whether weights are where they were; fakes are at one address.
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        _move(module)
        example = torch.empty(shape, dtype=dtype, device="cuda")
        for _ in range(2):  # the first time a module may make what it keeps
            with _Counting(example) as counting, _triton(counting.launch):
                output = module(example)
    return counting.launches, output


def _move(module: nn.Module) -> None:
    """Put fakes on `cuda` in the place of all parameters and buffers, laid out as these are."""
    module._apply(
        lambda tensor: torch.empty_strided(
            tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda"
        )
    )


class _Counting(TorchDispatchMode):
    """Counts the operations that reach the device."""

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self._of_call = {_storage(example)}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is _CONVOLUTION:
            # As cuDNN does with maps that are; the fake is of a torch without it.
            result = torch.empty_like(result, memory_format=torch.channels_last)
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        owned = {_storage(tensor) for tensor in inputs}
        self._of_call.update({_storage(tensor) for tensor in outputs} - owned)
        is_view = not func._schema.is_mutable and all(_storage(made) in owned for made in outputs)
        if not is_view and func not in _ALLOCATIONS:
            self.launch(func._schema.name, [*inputs, *outputs])
        if func is _CONVOLUTION and args[2] is not None:
            self.launch("bias of a convolution", [result, result, args[2]])
        return result

    def launch(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Count one launch."""
        moved = sum(tensor.nbytes for tensor in tensors)
        parameters = sum(
            tensor.nbytes for tensor in tensors if _storage(tensor) not in self._of_call
        )
        self.launches.append(Launch(name, moved, parameters))


@contextmanager
def _triton(launch: Callable[[str, Sequence[Tensor]], None]) -> Iterator[None]:
    """Tell of the launches of Triton kernels instead of making them."""
    from triton.runtime.jit import KernelInterface  # noqa: PLC0415

    def instead(kernel: Any, _: Any) -> Callable[..., None]:
        return lambda *args, **options: launch(kernel.__name__, _tensors((args, options)))

    given, KernelInterface.__getitem__ = KernelInterface.__getitem__, instead
    try:
        yield
    finally:
        KernelInterface.__getitem__ = given


def _tensors(arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def main() -> None:
    """Print launches and bytes of the classifiers, bytes of an image to ranked classes."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.service.engine.launches", description=__doc__
    )
    parser.add_argument("models", nargs="*", default=["dat_tiny_224", "dat_pp_tiny_224"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--by-name", action="store_true", help="every kernel in a line")
    arguments = parser.parse_args()
    for name in arguments.models:
        size = VARIANTS[name].image_size
        made, _ = launches(
            Classify(create_model(name), torch.bfloat16),
            *(arguments.batch, *size, 3),
            dtype=torch.uint8,
        )
        moved = sum(launch.moved - launch.parameters for launch in made) / arguments.batch
        parameters = sum(launch.parameters for launch in made)
        print(
            f"{name}: {len(made)} launches, {moved / 1e6:.0f} MB an image and "
            f"{parameters / 1e6:.0f} MB of parameters"
        )
        if arguments.by_name:
            bytes_of: Counter[str] = Counter()
            for launch in made:
                bytes_of[launch.name] += launch.moved - launch.parameters
            times = Counter(launch.name for launch in made)
            for kernel, moved in bytes_of.most_common():
                print(f"  {times[kernel]:4} {moved / arguments.batch / 1e6:7.1f} MB  {kernel}")


if __name__ == "__main__":
    main()
