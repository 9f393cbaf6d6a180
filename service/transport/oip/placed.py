"""Tensors of requests and answers that lie in shared memory, by the parameters that say where."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.errors import InvalidOption, InvalidRequest, quoted
from service.transport.oip.parameters import Parameters
from service.transport.oip.shared_memory import Place, SharedMemory
from service.transport.oip.tensors import Input, Tensor, Values, values_of

_REGION, _SIZE, _OFFSET = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)


def is_placed(name: str, parameters: Mapping[str, Any], *, carried: bool) -> bool:
    """Whether an input lies in shared memory, and not in its request.

    Args:
        name: of the input.
        parameters: of it.
        carried: whether the request holds its values.

    Raises:
        InvalidRequest: it is in both.
    """
    if parameters.get(_REGION) is None:
        return False
    if carried:
        raise InvalidRequest(
            f"the input {quoted(name)} holds its values and names a shared memory region; "
            "expected one of them"
        )
    return True


def unread() -> Values:
    """The values of an input that lies in shared memory, before they were read there."""
    raise AssertionError("an input in shared memory was not read: this is a bug")


def read_inputs(
    memory: SharedMemory, owner: str, inputs: Sequence[Input]
) -> tuple[list[Input], int]:
    """The inputs of a request, those that lie in shared memory with a copy of their bytes.

    Args:
        memory: the regions.
        owner: of those that the request may name.
        inputs: as the request has them.

    Returns:
        The inputs, and how many bytes were copied.

    Raises:
        InvalidRequest: there is no such place.
    """
    read, copied = [], 0
    for given in inputs:
        place = _place_of(given.parameters)
        if place is None:
            read.append(given)
        else:
            raw = memory.read(owner, place)
            copied += len(raw)
            read.append(_with_bytes(given, raw))
    return read, copied


def _with_bytes(given: Input, raw: bytes) -> Input:
    def read() -> Values:
        return values_of(given.name, given.datatype, given.shape, memoryview(raw))

    return replace(given, read=read)


def write_outputs(
    memory: SharedMemory,
    owner: str,
    parameters: Mapping[str, Mapping[str, Any]],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """Put the outputs that are wanted in shared memory there, which they then say.

    Args:
        memory: the regions.
        owner: of those that the request may name.
        parameters: of the outputs that the request names.
        tensors: the outputs.

    Raises:
        InvalidRequest: there is no such place, or an output does not fit into its own.
    """
    return [
        _written(memory, owner, tensor, _place_of(parameters.get(tensor.name, {})))
        for tensor in tensors
    ]


def _written(memory: SharedMemory, owner: str, tensor: Tensor, place: Place | None) -> Tensor:
    if place is None:
        return tensor
    raw = tensor.raw
    memory.write(owner, place, raw)
    said: dict[str, str | int] = {_REGION: place.region, _SIZE: len(raw)}
    if place.offset:
        said[_OFFSET] = place.offset
    return replace(tensor, placed=said)


def _place_of(parameters: Mapping[str, Any]) -> Place | None:
    """Where a tensor lies, if its parameters name a region.

    Raises:
        InvalidOption: they say something else than a place.
    """
    given = Parameters(parameters)
    region, size = given.text(_REGION), given.count(_SIZE)
    if region is None:
        return None
    if size is None:
        raise InvalidOption(f"the parameter {_REGION} needs {_SIZE}, the bytes of the tensor")
    return Place(region, given.count(_OFFSET) or 0, size)
