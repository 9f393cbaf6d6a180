"""The messages of the Open Inference Protocol."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from service.errors import InvalidRequest, quoted
from service.pb import inference_pb2
from service.transport.oip.inference import InferRequest, ModelMetadata, RequestedOutput
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
    values_of,
)

_Message = inference_pb2.ModelInferRequest
# In the message of a request: the raw tensors; and the parts whose fields are many where the
# request is malicious, the inputs, which hold contents, and the outputs.
RAW_INPUTS = _Message.RAW_INPUT_CONTENTS_FIELD_NUMBER
_CONTENTS = _Message.InferInputTensor.CONTENTS_FIELD_NUMBER
NESTED: Mapping[int, int | None] = {
    _Message.INPUTS_FIELD_NUMBER: _CONTENTS,
    _Message.OUTPUTS_FIELD_NUMBER: None,
}
# The field of `InferTensorContents` for each datatype, and the one whose values it has; FP16 and
# BF16 have none.
_CONTENTS_OF = {
    "BOOL": ("bool_contents", "BOOL"), "INT8": ("int_contents", "INT32"),
    "INT16": ("int_contents", "INT32"), "INT32": ("int_contents", "INT32"),
    "INT64": ("int64_contents", "INT64"), "UINT8": ("uint_contents", "UINT32"),
    "UINT16": ("uint_contents", "UINT32"), "UINT32": ("uint_contents", "UINT32"),
    "UINT64": ("uint64_contents", "UINT64"), "FP32": ("fp32_contents", "FP32"),
    "FP64": ("fp64_contents", "FP64"), BYTES: ("bytes_contents", BYTES),
}  # fmt: skip


def read_request(message: _Message, raw: Sequence[memoryview]) -> InferRequest:
    """A request from its message without the raw tensors, and those.

    Raises:
        InvalidRequest: it is not a request of the protocol; the message says what was expected.
    """
    inputs = message.inputs
    with_contents = [one for one in inputs if one.HasField("contents")]
    if raw and with_contents:
        raise InvalidRequest(
            f"the request has raw_input_contents, and the input {quoted(with_contents[0].name)} "
            "has contents; expected one or the other for all inputs"
        )
    parameters = [_parameters(one.parameters) for one in inputs]
    placed = [
        is_placed(one.name, said, carried=one.HasField("contents"))
        for one, said in zip(inputs, parameters, strict=True)
    ]
    if raw and len(raw) != placed.count(False):
        raise InvalidRequest(
            f"the request has {len(raw)} raw_input_contents; expected {placed.count(False)}, one "
            "for each input that does not lie in shared memory"
        )
    contents = iter(raw)
    return InferRequest(
        id=message.id,
        parameters=_parameters(message.parameters),
        inputs=[
            _input(one, said, next(contents) if raw and not elsewhere else None, placed=elsewhere)
            for one, said, elsewhere in zip(inputs, parameters, placed, strict=True)
        ],
        outputs=[RequestedOutput(one.name, _parameters(one.parameters)) for one in message.outputs],
    )


def _input(
    given: Any, parameters: Mapping[str, Any], raw: memoryview | None, *, placed: bool
) -> Input:
    name, datatype = given.name, given.datatype
    shape = check_shape(name, datatype, given.shape)
    read: Callable[[], Values]
    if placed:
        read = unread
    elif raw is not None:
        read = partial(values_of, name, datatype, shape, raw)
    else:
        read = partial(_values_in_message, name, datatype, shape, given)
    return Input(name, datatype, shape, parameters, read)


def _values_in_message(name: str, datatype: str, shape: tuple[int, ...], given: Any) -> Values:
    if datatype not in _CONTENTS_OF:
        raise InvalidRequest(
            f"the input {quoted(name)} is {datatype}; expected it in raw_input_contents"
        )
    field, carried = _CONTENTS_OF[datatype]
    for other, elements in given.contents.ListFields():
        if other.name != field:
            raise InvalidRequest(
                f"the input {quoted(name)} is {datatype} and has {len(elements)} elements in "
                f"{other.name}; expected them in {field}"
            )
    elements = getattr(given.contents, field)
    check_count(name, shape, len(elements))
    if datatype == BYTES:
        return of_elements(elements, shape)
    dtype = DTYPES[datatype]
    found = np.array(elements, DTYPES[carried])
    if dtype.kind in "iu" and found.size:
        limits = np.iinfo(dtype)
        if found.min() < limits.min or found.max() > limits.max:
            raise InvalidRequest(
                f"the input {quoted(name)} has a value out of the range of {datatype}"
            )
    return found.astype(dtype, copy=False).reshape(shape)


def _parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for name, parameter in given.items():
        choice = parameter.WhichOneof("parameter_choice")
        if choice is not None:
            values[name] = getattr(parameter, choice)
    return values


def write_response(
    name: str, version: str, identity: str, tensors: Sequence[Tensor]
) -> inference_pb2.ModelInferResponse:
    """The message of an answer, whose tensors are raw."""
    response = inference_pb2.ModelInferResponse(model_name=name, model_version=version, id=identity)
    for tensor in tensors:
        output = response.outputs.add(
            name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
        )
        for key, value in (tensor.placed or {}).items():
            if isinstance(value, str):
                output.parameters[key].string_param = value
            else:
                output.parameters[key].int64_param = value
        # Clients count them with the outputs, so that one in shared memory has an empty one.
        response.raw_output_contents.append(b"" if tensor.placed else tensor.raw)
    return response


def metadata_message(metadata: ModelMetadata) -> inference_pb2.ModelMetadataResponse:
    """The message of the metadata of a model."""
    kind = inference_pb2.ModelMetadataResponse.TensorMetadata
    inputs, outputs = (
        [kind(name=one.name, datatype=one.datatype, shape=one.shape) for one in facts]
        for facts in (metadata.inputs, metadata.outputs)
    )
    return inference_pb2.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=inputs,
        outputs=outputs,
        properties=metadata.properties,
    )
