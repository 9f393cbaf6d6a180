"""A forward pass as a flat graph: its operations one after the other, without the modules.

For inference on a CPU, where a single image is hundreds of operations of some microseconds and
what Python does between them is a tenth of the time. The numbers are the same to the last bit.
"""

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

T = TypeVar("T")

_BY_VALUE = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Untraceable(Exception):
    """The pass does what a graph cannot repeat."""


def trace(work: Callable[[Tensor], Any], example: Tensor) -> Callable[[Tensor], Any]:
    """Run `work` once and make a function of the operations that depend on its input.

    The function is for inputs of the shape, strides and type of the example; everything else is a
    constant in it. It holds no state: several threads can call it at once.

    Args:
        work: a tensor to a tensor, or to (named) tuples of tensors; gradients are not recorded.
        example: any values.

    Raises:
        Untraceable: what `work` does depends on values, or it writes to a constant, or reads a
            part of its input that does not start where the input does.
    """
    return _compile(record(work, example))


def record(work: Callable[[Tensor], Any], example: Tensor) -> fx.Graph:
    """The graph of `trace`: calls of functions, with the constants among their arguments."""
    with torch.no_grad(), _Recorder(example) as recorder:
        outputs = work(example)
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
    """Makes a node of every operation on what depends on the input.

    Views have no nodes of their own: an operation that reads a view gets it by one `as_strided`
    of the tensor that was computed, however many views lie between the two.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To skip it, torch would import it, which takes a second.
        return False

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self._computed: dict[int, _Computed] = {}
        self._input = self.graph.placeholder("input")
        self._add(example, self._input)

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
                if whole is self._input:
                    raise Untraceable("reads from the middle of the input")
                where += (layout.offset,)
            nodes[layout] = self.graph.call_function(torch.as_strided, (whole, *where))
        return nodes[layout]


class _Source:
    """Python source of a graph, in as few local variables as values are needed at a time.

    A variable for each node, as of `fx.GraphModule`, makes a frame of ten kilobytes. Python keeps
    frames in chunks of 16, and where the next one begins a new chunk, every call gets that from
    the system and gives it back. For the same reason operations are called without the Python
    function around them.

    Attributes:
        lines: of the body.
        constants: by the names that they have in the lines.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, Any] = {}
        self._variables: dict[fx.Node, str] = {}
        self._free: list[str] = []
        last_used_by = {used: node for node in graph.nodes for used in node.all_input_nodes}
        self._last_used_by = defaultdict[fx.Node, list[fx.Node]](list)
        for used, node in last_used_by.items():
            self._last_used_by[node].append(used)
        for node in graph.nodes:
            self._write(node)

    def _write(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self._variables[node] = "given"
        elif node.op == "output":
            self.lines.append(f"return {self._written(node.args[0])}")
        else:
            call = self._call(node)
            dead = [self._variables[used] for used in self._last_used_by[node]]
            self._free += dead
            variable = self._free.pop() if self._free else f"v{len(self._variables)}"
            self._variables[node] = variable
            self.lines.append(f"{variable} = {call}")
            self.lines += [f"{other} = None" for other in dead if other != variable]
            if not node.users:  # it was called for what it writes
                self._free.append(variable)

    def _call(self, node: fx.Node) -> str:
        assert callable(node.target)
        positional = [self._written(argument) for argument in node.args]
        if node.target is operator.getitem:
            return "{}[{}]".format(*positional)
        named = [f"{name}={self._written(argument)}" for name, argument in node.kwargs.items()]
        function = getattr(node.target, "_op", node.target)
        return f"{self._constant(function)}({', '.join(positional + named)})"

    def _written(self, argument: Any) -> str:
        if isinstance(argument, fx.Node):
            return self._variables[argument]
        if not _leaves(argument, fx.Node):
            return self._constant(argument)
        elements = ", ".join(map(self._written, argument))
        if isinstance(argument, list):
            return f"[{elements}]"
        kind = "" if type(argument) is tuple else self._constant(type(argument))
        return f"{kind}({elements},)"

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name


def _compile(graph: fx.Graph) -> Callable[[Tensor], Any]:
    source = _Source(graph)
    body = "\n    ".join(source.lines)
    namespace = source.constants
    # Nothing is in the source but the names made above.
    exec(f"def traced(given):\n    {body}\n", namespace)  # noqa: S102
    function: Callable[[Tensor], Any] = namespace["traced"]
    return function


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
