"""A forward pass as a flat graph: its operations one after the other, without the modules.

For inference on a CPU, where a single image is hundreds of operations of some microseconds and
what Python does between them is a tenth of the time. The numbers are the same to the last bit.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from model.interpreter import Program

T = TypeVar("T")

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Untraceable(Exception):
    """The pass does what a graph cannot repeat."""


def trace(work: Callable[..., Any], *examples: Tensor) -> Callable[..., Any]:
    """Run `work` once and make a function of the operations that depend on its inputs.

    The function is for inputs of the shapes, strides and types of the examples; everything else is
    a constant in it. It holds no state: several threads can call it at once.

    Args:
        work: tensors to a tensor, or to (named) tuples of tensors; gradients are not recorded.
        *examples: any values, each in memory of its own.

    Raises:
        Untraceable: what `work` does depends on values, or it writes to a constant, or reads a
            part of an input that does not start where the input does.
    """
    return Program(record(work, *examples))


def record(work: Callable[..., Any], *examples: Tensor) -> fx.Graph:
    """The graph of `trace`: calls of functions, with the constants among their arguments."""
    with torch.no_grad(), _Recorder(examples) as recorder:
        outputs = work(*examples)
    recorder.graph.output(map_aggregate(outputs, recorder.value_of))
    recorder.graph.eliminate_dead_code()
    return recorder.graph


class _Layout(NamedTuple):
    """How a tensor lies in its storage; all it takes to tell views of a storage apart."""

    shape: tuple[int | torch.SymInt, ...]
    strides: tuple[int, ...]
    offset: int | torch.SymInt
    dtype: torch.dtype


def _layout(tensor: Tensor) -> _Layout:
    return _Layout(tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype)


class _Computed:
    """A storage that depends on the input, with the tensors in it that have nodes.

    Attributes:
        storage: keeps its address from being used again, but not its memory.
        nodes: by layout; the first is that of the operation.
    """

    def __init__(self, tensor: Tensor, node: fx.Node) -> None:
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.nodes = {_layout(tensor): node}


class _Recorder(TorchDispatchMode):
    """Makes a node of every operation on what depends on the inputs.

    Views have no nodes of their own: an operation that reads a view gets it by one `as_strided`
    of the tensor that was computed, however many views lie between the two.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To skip it, torch would import it, which takes a second.
        return False

    def __init__(self, examples: Sequence[Tensor]) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._computed: dict[int, _Computed] = {}
        self._inputs = [self.graph.placeholder(f"input_{n}") for n in range(len(examples))]
        for example, node in zip(examples, self._inputs, strict=True):
            self._add(example, node)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = _leaves((args, kwargs), Tensor)
        if any(map(self._is_computed, inputs)):
            if _depends_on_values(func, inputs):
                raise Untraceable(f"{func} depends on the values of a tensor")
            self._record(func, args, kwargs or {}, result)
        return result

    def _record(
        self,
        func: torch._ops.OpOverload[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        result: Any,
    ) -> None:
        known = all(map(self._is_computed, _leaves(result, Tensor)))
        if func._schema.is_mutable and not known:
            raise Untraceable(f"{func} writes to a constant")
        if known and not func._schema.is_mutable:
            return  # a view
        inputs = map_aggregate((tuple(args), dict(kwargs)), self.value_of)
        node = self.graph.call_function(func, *inputs)
        if isinstance(result, Tensor):
            self._add(result, node)
        else:
            for index, output in enumerate(result):
                self._add(output, self.graph.call_function(operator.getitem, (node, index)))

    def _add(self, tensor: Tensor, node: fx.Node) -> None:
        if not self._is_computed(tensor):
            self._computed[_address(tensor)] = _Computed(tensor, node)

    def _is_computed(self, tensor: Tensor) -> bool:
        return not tensor.is_mkldnn and _address(tensor) in self._computed

    def value_of(self, tensor: Any) -> Any:
        """The node of a tensor; a view gets one where it is first used, a constant has none."""
        if not isinstance(tensor, Tensor) or not self._is_computed(tensor):
            return tensor
        nodes = self._computed[_address(tensor)].nodes
        layout = _layout(tensor)
        if layout not in nodes:
            base, whole = next(iter(nodes.items()))
            if base.dtype != layout.dtype:
                raise Untraceable(f"{base.dtype} read as {layout.dtype}")
            where: tuple[Any, ...] = (layout.shape, layout.strides)
            if layout.offset != base.offset:
                if whole in self._inputs:
                    raise Untraceable("reads from the middle of an input")
                where += (layout.offset,)
            nodes[layout] = self.graph.call_function(torch.as_strided, (whole, *where))
        return nodes[layout]


def _depends_on_values(func: torch._ops.OpOverload[..., Any], inputs: Sequence[Tensor]) -> bool:
    if func is torch.ops.aten.index.Tensor:
        return any(tensor.dtype == torch.bool for tensor in inputs)
    return bool(_BY_VALUE.intersection(func.tags))


def _leaves(arguments: Any, kind: type[T]) -> list[T]:
    found: list[T] = []

    def look_at(leaf: Any) -> None:
        if isinstance(leaf, kind):
            found.append(leaf)

    map_aggregate(arguments, look_at)
    return found


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
