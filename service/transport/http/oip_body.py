"""The bodies of the Open Inference Protocol: JSON, with tensors inside of it or behind it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import prod
from typing import Any

import numpy as np
from pydantic_core import from_json

from service.errors import InvalidRequest, quoted
from service.transport.oip.images import IMAGE
from service.transport.oip.inference import InferRequest, RequestedOutput
from service.transport.oip.placed import is_placed, unread
from service.transport.oip.tensors import (
    BYTES,
    DTYPES,
    Input,
    Tensor,
    Values,
    check_count,
    check_shape,
    of_elements,
    of_numbers,
    values_of,
    written,
)

HEADER_LENGTH = "inference-header-content-length"
# Each value of JSON takes up to 64 bytes in memory, and in the text two or three.
MOST_VALUES = 4_000_000
VALUE_BYTES = 64
# From so many numbers of a tensor in JSON on, its caller is told of a better way.
MANY_NUMBERS = 10_000
WARNING = (
    '299 dat-serve "a large tensor was carried as JSON; the binary tensor data extension carries '
    'it in a fraction of the bytes and of the time"'
)
_MOST_TENSORS = 1000  # of a request
_ONLY_BINARY = ("FP16", "BF16")
_DIGITS = 20


@dataclass(frozen=True)
class ReadBody:
    """A body that was read.

    Attributes:
        request: that it holds.
        has_many_numbers: whether a tensor in its JSON is large.
    """

    request: InferRequest
    has_many_numbers: bool


def read_header_length(given: str | None) -> int | None:
    """The bytes of JSON before the tensors, or none where all is JSON.

    Raises:
        InvalidRequest: it is no length.
    """
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) <= _DIGITS):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {quoted(given)}; expected the bytes of JSON "
            "before the tensors, from 0 on"
        )
    return int(given)


def count_values(body: bytearray, header_length: int | None) -> int:
    """How many values its JSON may have, at most.

    Raises:
        InvalidRequest: more than are read, or more JSON than the body has bytes.
    """
    end = len(body) if header_length is None else header_length
    if end > len(body):
        raise InvalidRequest(
            f"Inference-Header-Content-Length is {end}; expected at most the {len(body)} bytes of "
            "the body"
        )
    count = 1 + sum(body.count(mark, 0, end) for mark in (b",", b"[", b"{"))
    if count > MOST_VALUES:
        raise InvalidRequest(
            f"the JSON of the request has about {count} values; expected at most {MOST_VALUES}. "
            "The binary tensor data extension carries larger tensors"
        )
    return count


def read_body(body: bytearray, header_length: int | None) -> ReadBody:
    """Read a request.

    Args:
        body: all of it, after `count_values`.
        header_length: of its JSON; 0 means that the body is an image, `None` that all is JSON.

    Raises:
        InvalidRequest: it is not a request of the protocol; the message says what was expected.
    """
    if header_length == 0:
        return ReadBody(_raw_request(body), has_many_numbers=False)
    end = len(body) if header_length is None else header_length
    try:
        # The limit of depth is that of the library.
        parsed = from_json(body if end == len(body) else body[:end], allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the request is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise InvalidRequest("the request is not a JSON object")
    reader = _Reader(memoryview(body)[end:])
    request = InferRequest(
        id=_text(parsed, "id", "the request", default=""),
        parameters=_object(parsed, "parameters", "the request"),
        inputs=[reader.input(one) for one in _objects(parsed, "inputs", needed=True)],
        outputs=[
            RequestedOutput(
                _text(one, "name", "an output"), _object(one, "parameters", "an output")
            )
            for one in _objects(parsed, "outputs")
        ],
    )
    reader.finish()
    return ReadBody(request, has_many_numbers=reader.many_numbers)


def _raw_request(body: bytearray) -> InferRequest:
    """The request whose body is an image; its answer has no JSON but the head."""
    image = Input(IMAGE, BYTES, (1,), {}, lambda: of_elements([bytes(body)], (1,)))
    return InferRequest("", {"binary_data_output": True}, [image], ())


class _Reader:
    """Reads the inputs of a request, whose tensors are in the JSON or lie behind it in turn."""

    def __init__(self, tail: memoryview) -> None:
        self._tail = tail
        self._position = 0
        self.many_numbers = False

    def input(self, given: Mapping[str, Any]) -> Input:
        name = _text(given, "name", "an input")
        of = f"the input {quoted(name)}"
        datatype = _text(given, "datatype", of)
        shape = given.get("shape")
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise InvalidRequest(f"the shape of {of} is {_got(shape)}; expected a list of integers")
        shape = check_shape(name, datatype, shape)
        parameters = _object(given, "parameters", of)
        size, data = parameters.get("binary_data_size"), given.get("data")
        if size is not None:
            if data is not None:
                raise InvalidRequest(f"{of} has both data and binary_data_size; expected one")
            raw = self._take(of, size)
            is_placed(name, parameters, carried=True)
            return Input(
                name, datatype, shape, parameters, partial(values_of, name, datatype, shape, raw)
            )
        if is_placed(name, parameters, carried=data is not None):
            return Input(name, datatype, shape, parameters, unread)
        if not isinstance(data, list):
            raise InvalidRequest(
                f"{of} has {_got(data)} as data; expected a list, or the parameter binary_data_size"
            )
        self.many_numbers |= datatype != BYTES and prod(shape) > MANY_NUMBERS
        read = partial(_values_in_json, name, datatype, shape, data)
        return Input(name, datatype, shape, parameters, read, in_json=True)

    def _take(self, of: str, size: Any) -> memoryview:
        left = len(self._tail) - self._position
        if type(size) is not int or not 0 <= size <= left:
            raise InvalidRequest(
                f"binary_data_size of {of} is {_got(size)}; expected 0 to the {left} bytes that "
                "are left behind the JSON"
            )
        self._position += size
        return self._tail[self._position - size : self._position]

    def finish(self) -> None:
        left = len(self._tail) - self._position
        if left:
            raise InvalidRequest(
                f"{len(self._tail)} bytes lie behind the JSON; expected {self._position}, which is "
                "what binary_data_size of all inputs adds up to"
            )


def _values_in_json(
    name: str, datatype: str, shape: tuple[int, ...], data: Sequence[Any]
) -> Values:
    flat = _flattened(name, shape, data)
    check_count(name, shape, len(flat))
    kinds = set(map(type, flat))
    of = f"the input {quoted(name)}"
    if datatype in _ONLY_BINARY:
        raise InvalidRequest(
            f"{of} is {datatype}, which JSON does not carry; expected it as binary tensor data"
        )
    if datatype == BYTES:
        _check_kinds(of, kinds, {str}, "strings")
        return of_elements([one.encode("utf-8", "surrogatepass") for one in flat], shape)
    dtype = DTYPES[datatype]
    if dtype.kind == "b":
        _check_kinds(of, kinds, {bool}, "true and false")
    elif dtype.kind == "f":
        _check_kinds(of, kinds, {int, float}, "numbers")
    else:
        _check_kinds(of, kinds, {int}, "integers")
    try:
        values = of_numbers(flat, dtype, shape)
    except OverflowError:
        raise InvalidRequest(f"{of} has a value out of the range of {datatype}") from None
    if dtype.kind == "f" and not np.isfinite(values).all():
        raise InvalidRequest(f"{of} has a value out of the range of {datatype}")
    return values


def _check_kinds(of: str, kinds: set[type], expected: set[type], words: str) -> None:
    if strange := kinds - expected:
        names = ", ".join(sorted(one.__name__ for one in strange))
        raise InvalidRequest(f"the data of {of} has elements of type {names}; expected {words}")


def _flattened(name: str, shape: tuple[int, ...], data: Sequence[Any]) -> Sequence[Any]:
    """The elements of a tensor that is flat, or nested as its shape is."""
    flat, depth = data, 0
    while flat and isinstance(flat[0], list):
        same = depth < len(shape) - 1 and set(map(type, flat)) == {list}
        if (
            not same
            or len(flat) != prod(shape[: depth + 1])
            or (set(map(len, flat)) != {shape[depth + 1]})
        ):
            raise InvalidRequest(
                f"the data of the input {quoted(name)} is nested in another way than its shape "
                f"{written(shape)}; expected that, or a flat list"
            )
        flat = list(chain.from_iterable(flat))
        depth += 1
    return flat


def _objects(given: Mapping[str, Any], key: str, *, needed: bool = False) -> list[dict[str, Any]]:
    found = given.get(key)
    if found is None and not needed:
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise InvalidRequest(f"the request has {_got(found)} as {key}; expected a list of objects")
    if len(found) > _MOST_TENSORS:
        raise InvalidRequest(
            f"the request has {len(found)} {key}; expected at most {_MOST_TENSORS}"
        )
    return found


def _object(given: Mapping[str, Any], key: str, of: str) -> dict[str, Any]:
    found = given.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise InvalidRequest(f"{of} has {_got(found)} as {key}; expected an object")
    return found


def _text(given: Mapping[str, Any], key: str, of: str, default: str | None = None) -> str:
    found = given.get(key)
    if found is None and default is not None:
        return default
    if not isinstance(found, str):
        raise InvalidRequest(f"{of} has {_got(found)} as {key}; expected a string")
    return found


def _got(value: object) -> str:
    """What stands in JSON where something else was expected."""
    if value is None:
        return "nothing"
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return quoted(value)


@dataclass(frozen=True)
class WrittenBody:
    """The body of an answer.

    Attributes:
        content: JSON, and the tensors behind it.
        header_length: bytes of the JSON, where tensors lie behind it.
        has_many_numbers: whether a tensor in the JSON is large.
    """

    content: bytes
    header_length: int | None
    has_many_numbers: bool


def write_body(
    head: Mapping[str, Any], tensors: Sequence[Tensor], binary: Sequence[bool]
) -> WrittenBody:
    """Write an answer.

    Args:
        head: what it says beside its outputs.
        tensors: its outputs.
        binary: whether each of them lies behind the JSON.

    Raises:
        InvalidRequest: a tensor that JSON cannot carry was asked for in JSON.
    """
    outputs, tail, many = [], [], False
    for tensor, behind in zip(tensors, binary, strict=True):
        output: dict[str, Any] = {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": tensor.shape,
        }
        if tensor.placed:
            output["parameters"] = tensor.placed
        elif behind:
            raw = tensor.raw
            output["parameters"] = {"binary_data_size": len(raw)}
            tail.append(raw)
        else:
            output["data"] = _in_json(tensor)
            many |= tensor.datatype != BYTES and tensor.values.size > MANY_NUMBERS
        outputs.append(output)
    content = json.dumps(
        {**head, "outputs": outputs}, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    ).encode()
    if not tail:
        return WrittenBody(content, None, many)
    return WrittenBody(b"".join((content, *tail)), len(content), many)


def _in_json(tensor: Tensor) -> list[Any]:
    flat: list[Any] = tensor.values.ravel().tolist()
    if tensor.datatype == BYTES:
        return [one.decode("utf-8", "replace") for one in flat]
    if tensor.datatype in _ONLY_BINARY or (
        tensor.values.dtype.kind == "f" and not np.isfinite(tensor.values).all()
    ):
        raise InvalidRequest(
            f"the output {tensor.name} has values that JSON does not carry; ask for it as binary "
            "tensor data"
        )
    return flat
