"""A graph of operations as a program of torch's own interpreter, which needs no Python to run it.

Called from Python, each operation gives the interpreter lock up and takes it back. One thread that
is busy in Python, such as the event loop of a server, then makes a pass of 300 operations wait 300
times: a pass of 3 ms took 1.9 s beside it, and takes 16 ms as a program.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

_TENSOR = torch._C.TensorType.get()
# Of c10::MemoryFormat, which programs know as numbers.
_MEMORY_FORMATS = {
    torch.contiguous_format: 0,
    torch.preserve_format: 1,
    torch.channels_last: 2,
    torch.channels_last_3d: 3,
}


class Program:
    """Runs a graph; several threads can call it at once.

    The graph is run as it is: nothing is fused, folded or put in another order, so its bits are
    those of the operations called one by one.

    Args:
        graph: of calls of functions, with constants among their arguments (`model.tracing`).
    """

    def __init__(self, graph: fx.Graph) -> None:
        writer = _Writer(graph)
        self._constants = tuple(writer.constants)
        # The last reference but that of a Python object is given back with Python's lock held,
        # so a program may never hold it: one more is kept outside of Python.
        self._kept = torch._C.Graph()
        for constant in self._constants:
            node = self._kept.create("prim::Constant", [], 1)
            node.t_("value", constant)
            self._kept.appendNode(node)
        self._run = torch._C._create_function_from_graph("program", writer.program)
        self._form = map_aggregate(
            writer.output, lambda leaf: _RESULT if isinstance(leaf, fx.Node) else leaf
        )

    def __call__(self, *given: Tensor) -> Any:
        """What the graph gives for its inputs."""
        # A setting of the calling thread; by default torch would rewrite the program first.
        torch._C._set_graph_executor_optimize(False)
        results = iter(self._run(*given, *self._constants))
        return map_aggregate(self._form, lambda leaf: next(results) if leaf is _RESULT else leaf)


class _Result:
    """Stands in the structure of an output for a tensor."""


_RESULT: Any = _Result()


class _Writer:
    """Writes the program of a graph.

    Attributes:
        program: takes the inputs and the constants, gives a tuple of tensors.
        constants: tensors, in the order in which the program takes them.
        output: of the graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.program: Any = torch._C.Graph()
        self.constants: list[Tensor] = []
        self.output: Any = None
        self._inputs: dict[int, tuple[Tensor, torch._C.Value]] = {}
        self._values: dict[fx.Node, torch._C.Value] = {}
        for node in graph.nodes:
            if node.op == "placeholder":
                self._values[node] = self._input(node.name)
            elif node.op == "output":
                self.output = node.args[0]
                self._return(list(_nodes(self.output)))
            elif node.target is not operator.getitem:  # a name for one output of an operation
                self._call(node)

    def _input(self, name: str) -> torch._C.Value:
        value = self.program.addInput(name)
        value.setType(_TENSOR)
        return value

    def _return(self, nodes: Sequence[fx.Node]) -> None:
        results = self._append("prim::TupleConstruct", [self._values[node] for node in nodes])
        results.setType(torch._C.TupleType([_TENSOR] * len(nodes)))
        self.program.registerOutput(results)

    def _call(self, node: fx.Node) -> None:
        operation: Any = node.target
        if operation is torch.as_strided:
            operation = torch.ops.aten.as_strided.default
        schema = operation._schema
        given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False))
        given |= node.kwargs
        arguments = [
            self._value(given.get(argument.name, argument.default_value), argument.type)
            for argument in schema.arguments
        ]
        call = self.program.create(schema.name, arguments, len(schema.returns))
        self.program.appendNode(call)
        outputs = list(call.outputs())
        for output, returned in zip(outputs, schema.returns, strict=True):
            output.setType(returned.type)
        if len(outputs) == 1:
            self._values[node] = outputs[0]
        else:
            for user in node.users:  # each takes one of them
                _, index = user.args
                self._values[user] = outputs[cast("int", index)]

    def _value(self, argument: Any, kind: Any) -> torch._C.Value:
        """An argument of an operation, of the kind that it expects."""
        if isinstance(argument, fx.Node):
            return self._values[argument]
        if isinstance(argument, Tensor):
            return self._constant(argument)
        while kind.kind() == "OptionalType":
            kind = kind.getElementType()
        if isinstance(argument, list | tuple) and _is_plain(argument) and argument:
            return self.program.insertConstant([_number(one, kind) for one in argument])
        if isinstance(argument, list | tuple):
            element = kind.getElementType()
            listed = self._append(
                "prim::ListConstruct", [self._value(one, element) for one in argument]
            )
            listed.setType(torch._C.ListType(element))
            return listed
        return self.program.insertConstant(_number(argument, kind))

    def _constant(self, tensor: Tensor) -> torch._C.Value:
        if id(tensor) not in self._inputs:
            self._inputs[id(tensor)] = tensor, self._input(f"constant_{len(self.constants)}")
            self.constants.append(tensor.detach())
        return self._inputs[id(tensor)][1]

    def _append(self, kind: str, inputs: Sequence[torch._C.Value]) -> torch._C.Value:
        node = self.program.create(kind, list(inputs), 1)
        self.program.appendNode(node)
        return node.output()


def _is_plain(listed: Sequence[Any]) -> bool:
    return all(isinstance(one, bool | int | float) for one in listed)


def _number(value: Any, kind: Any) -> Any:
    """A value as a constant of the kind that is expected."""
    if isinstance(value, torch.memory_format):
        return _MEMORY_FORMATS[value]
    if kind.kind() == "ListType":
        kind = kind.getElementType()
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and kind.kind() == "FloatType" else value


def _nodes(output: Any) -> Iterator[fx.Node]:
    found: list[fx.Node] = []

    def look_at(leaf: Any) -> None:
        if isinstance(leaf, fx.Node):
            found.append(leaf)

    map_aggregate(output, look_at)
    yield from found
