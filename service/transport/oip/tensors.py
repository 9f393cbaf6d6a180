"""Tensors as the protocol has them, and their bytes: little-endian, row-major, without padding."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from service.errors import InvalidRequest, quoted

BYTES = "BYTES"
# numpy has no BF16, whose bits are carried.
DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
        "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "BF16": "<u2",
        "FP32": "<f4", "FP64": "<f8",
    }.items()
}  # fmt: skip
DATATYPES = (*DTYPES, BYTES)
_MOST_DIMENSIONS = 16
_LENGTH = struct.Struct("<I")  # of an element of BYTES, before it

# An element of BYTES is an object of Python.
Values = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor of an answer.

    Attributes:
        name: of the output.
        datatype: one of `DATATYPES`.
        values: in its shape; of BYTES an array of `bytes`.
        placed: the parameters that say where in shared memory it lies; without them it lies in the
            answer.
    """

    name: str
    datatype: str
    values: Values
    placed: Mapping[str, str | int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of its dimensions."""
        return self.values.shape

    @property
    def raw(self) -> bytes:
        """Its bytes."""
        if self.datatype == BYTES:
            return b"".join(
                part for one in self.values.flat for part in (_LENGTH.pack(len(one)), one)
            )
        return np.ascontiguousarray(self.values, DTYPES[self.datatype]).tobytes()


@dataclass(frozen=True)
class Input:
    """A tensor of a request, whose values are read when it is known to be wanted.

    Attributes:
        name: of the input.
        datatype: as the request says.
        shape: likewise.
        parameters: of the input, as the request says.
        read: its values, in the shape; raises `InvalidRequest` where they are not there.
        in_json: whether an element of BYTES is the text of a JSON string.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any]
    read: Callable[[], Values]
    in_json: bool = False


def check_shape(name: str, datatype: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of an input, if there can be such a tensor.

    Raises:
        InvalidRequest: no such datatype, a negative dimension, or too many of them.
    """
    if datatype not in DATATYPES:
        raise InvalidRequest(
            f"the input {quoted(name)} has the datatype {quoted(datatype)}; expected one of "
            f"{', '.join(DATATYPES)}"
        )
    if len(shape) > _MOST_DIMENSIONS:
        raise InvalidRequest(
            f"the input {quoted(name)} has {len(shape)} dimensions; expected at most "
            f"{_MOST_DIMENSIONS}"
        )
    if any(size < 0 for size in shape):
        raise InvalidRequest(
            f"the input {quoted(name)} has the shape {written(shape)}; expected no negative size"
        )
    return tuple(shape)


def values_of(name: str, datatype: str, shape: tuple[int, ...], raw: memoryview) -> Values:
    """The values of a tensor from its bytes, which are not copied unless they are BYTES.

    Args:
        name: of the tensor.
        datatype: one of `DATATYPES`.
        shape: none of its sizes is negative.
        raw: exactly its bytes.

    Raises:
        InvalidRequest: it has more bytes or fewer, or other elements.
    """
    count = prod(shape)
    if datatype == BYTES:
        return _elements_of(name, count, raw, shape)
    dtype = DTYPES[datatype]
    expected = count * dtype.itemsize
    if len(raw) != expected:
        raise InvalidRequest(
            f"the input {quoted(name)} has {len(raw)} bytes; expected {_shortly(expected)} for "
            f"{datatype} of the shape {written(shape)}"
        )
    if datatype == "BOOL" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        raise InvalidRequest(f"the input {quoted(name)} is BOOL; expected bytes of 0 and 1")
    return np.frombuffer(raw, dtype).reshape(shape)


def _elements_of(name: str, count: int, raw: memoryview, shape: tuple[int, ...]) -> Values:
    if count * _LENGTH.size > len(raw):
        raise InvalidRequest(
            f"the input {quoted(name)} has {len(raw)} bytes; expected at least "
            f"{_shortly(count * _LENGTH.size)} for {_shortly(count)} elements of BYTES, each with "
            "its length before it"
        )
    elements, position = [], 0
    for index in range(count):
        begin = position + _LENGTH.size
        length = _LENGTH.unpack_from(raw, position)[0] if begin <= len(raw) else 0
        if begin + length > len(raw):
            raise InvalidRequest(
                f"the input {quoted(name)} ends within its element {index}: expected "
                f"{_LENGTH.size + length} more bytes, got {len(raw) - position}"
            )
        position = begin + length
        elements.append(bytes(raw[begin:position]))
    if position != len(raw):
        raise InvalidRequest(
            f"the input {quoted(name)} has {len(raw)} bytes; expected {position} for its {count} "
            "elements"
        )
    return of_elements(elements, shape)


def of_elements(elements: Sequence[bytes], shape: tuple[int, ...]) -> Values:
    """An array of BYTES."""
    values = np.empty(len(elements), object)
    values[:] = elements
    return values.reshape(shape)


def of_numbers(values: Sequence[Any], dtype: DTypeLike, shape: tuple[int, ...]) -> Values:
    """An array of numbers that lie flat; as many as the shape has.

    Raises:
        OverflowError: one of them is out of the range of the type.
    """
    with np.errstate(over="ignore"):
        return np.array(values, dtype).reshape(shape)


def check_count(name: str, shape: tuple[int, ...], count: int) -> None:
    """Check that a tensor has as many elements as its shape.

    Raises:
        InvalidRequest: it has not.
    """
    if prod(shape) != count:
        raise InvalidRequest(
            f"the input {quoted(name)} has {count} elements; expected {_shortly(prod(shape))} for "
            f"the shape {written(shape)}"
        )


def written(shape: Sequence[int]) -> str:
    """A shape in a message."""
    return f"[{', '.join(map(_shortly, shape))}]"


def _shortly(number: int) -> str:
    # Python refuses to write integers of thousands of digits.
    return str(number) if abs(number) < 1 << 64 else "more than 2**64"
