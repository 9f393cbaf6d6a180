"""Tensors of requests and answers that lie in shared memory, by the parameters that say where."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from service.byte_budget import HeldBytes
from service.errors import InvalidOption, InvalidRequest, quoted
from service.transport.oip.inference import InferRequest, RequestedOutput
from service.transport.oip.parameters import Parameters
from service.transport.oip.shared_memory import Place, SharedMemory
from service.transport.oip.tensors import Input, Tensor, values_of

_REGION, _SIZE, _OFFSET = (
    "shared_memory_region",
    "shared_memory_byte_size",
    "shared_memory_offset",
)
# More bytes are copied where the event loop does not wait for it.
_LARGE_BYTES = 2**20


def place_of(parameters: Mapping[str, Any]) -> Place | None:
    """Where a tensor lies, if its parameters name a region.

    Raises:
        InvalidOption: they do not say how large it is, or something else than a place.
    """
    given = Parameters(parameters)
    region = given.text(_REGION)
    if region is None:
        return None
    size = given.count(_SIZE)
    if size is None:
        raise InvalidOption(f"the parameter {_REGION} needs {_SIZE}, the bytes of the tensor")
    return Place(region, given.count(_OFFSET) or 0, size)


def parameters_of(place: Place) -> dict[str, str | int]:
    """The parameters of a tensor that lies there."""
    said: dict[str, str | int] = {_REGION: place.region, _SIZE: place.byte_size}
    return said | {_OFFSET: place.offset} if place.offset else said


async def read_inputs(
    memory: SharedMemory, owner: str, request: InferRequest, held: HeldBytes
) -> InferRequest:
    """A request with copies of the inputs that lie in shared memory.

    Args:
        memory: the regions.
        owner: of those that the request may name.
        request: as it was read.
        held: of the budget; what is copied is held too.

    Raises:
        InvalidRequest: there is no such place.
        Overloaded: so many bytes are too many now.
    """
    if not any(_REGION in one.parameters for one in request.inputs):
        return request
    return replace(
        request, inputs=[await _read(memory, owner, one, held) for one in request.inputs]
    )


async def _read(memory: SharedMemory, owner: str, given: Input, held: HeldBytes) -> Input:
    place = place_of(given.parameters)
    if place is None:
        return given
    memory.check(owner, place)
    held.grow(place.byte_size)
    if place.byte_size > _LARGE_BYTES:
        raw = await asyncio.to_thread(memory.read, owner, place)
    else:
        raw = memory.read(owner, place)
    read = partial(values_of, given.name, given.datatype, given.shape, memoryview(raw))
    return replace(given, read=read)


def write_outputs(
    memory: SharedMemory,
    owner: str,
    requested: Sequence[RequestedOutput],
    tensors: Sequence[Tensor],
) -> list[Tensor]:
    """Put the outputs that are wanted in shared memory there, and say so of each.

    Raises:
        InvalidRequest: there is no such place, or an output does not fit in its own.
    """
    places = {one.name: place_of(one.parameters) for one in requested}
    return [_written(memory, owner, one, places.get(one.name)) for one in tensors]


def _written(memory: SharedMemory, owner: str, tensor: Tensor, place: Place | None) -> Tensor:
    if place is None:
        return tensor
    raw = tensor.raw
    memory.write(owner, place, raw)
    return replace(tensor, place=replace(place, byte_size=len(raw)))


def check_carried(name: str, parameters: Mapping[str, Any]) -> None:
    """Check that an input that carries its values names no shared memory.

    Raises:
        InvalidRequest: it does.
    """
    if _REGION in parameters:
        raise InvalidRequest(
            f"the input {quoted(name)} carries values and names a shared memory region; expected "
            "one or the other"
        )


def lies_in_memory(parameters: Mapping[str, Any]) -> bool:
    """Whether the values of an input lie in shared memory, and not in the request."""
    return _REGION in parameters
