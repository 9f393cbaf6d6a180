"""A tensor is the same however it is carried: in JSON, as bytes behind it, raw or typed in gRPC."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from service.errors import InvalidRequest
from service.pb import inference_pb2
from service.transport.http.oip_body import count_values, read_body, write_body
from service.transport.oip.tensors import BYTES, DATATYPES, DTYPES, Tensor, values_of
from service.transport.rpc.oip_messages import NESTED, RAW_INPUTS, read_request
from service.transport.rpc.wire import Received
from tests.service.transport.oip.asking import in_binary, message

ONLY_RAW = ("FP16", "BF16")
SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any tensor: also without elements, with what is no number, and with NUL in BYTES."""
    datatype, shape = draw(st.sampled_from(DATATYPES)), draw(SHAPES)
    if datatype == BYTES:
        count = int(np.prod(shape))
        elements = np.empty(count, object)
        elements[:] = draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
        return Tensor("x", datatype, elements.reshape(shape))
    return Tensor("x", datatype, draw(npst.arrays(DTYPES[datatype], shape)))


def same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two tensors are one; what is no number is not told apart from another such."""
    if one.dtype == object:
        return one.shape == other.shape and bool((one == other).all())
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def through_json(sent: Tensor, *, nested: bool) -> np.ndarray:
    """Into the JSON of a request; a text stands for an element of BYTES."""
    values = sent.values
    if sent.datatype == BYTES:
        values = np.vectorize(bytes.decode, otypes=[object])(values)
    data = values.tolist() if nested and values.ndim else values.ravel().tolist()
    one = {"name": "x", "datatype": sent.datatype, "shape": values.shape, "data": data}
    body = bytearray(json.dumps({"inputs": [one]}).encode())
    count_values(body, None)
    (read,) = read_body(body, None).request.inputs
    return read.read()


def through_binary(sent: Tensor) -> np.ndarray:
    head = json.dumps({"inputs": [in_binary(sent)]}).encode()
    body = bytearray(head + sent.raw)
    count_values(body, len(head))
    (read,) = read_body(body, len(head)).request.inputs
    return read.read()


def through_rpc(request: inference_pb2.ModelInferRequest) -> np.ndarray:
    received = Received(request.SerializeToString())
    rest, raw = received.take_tensors(RAW_INPUTS, NESTED, inference_pb2.ModelInferRequest)
    (read,) = read_request(rest, raw).inputs
    return read.read()


def through_answer(sent: Tensor, *, binary: bool) -> np.ndarray:
    """Into an answer over REST, as its client reads it."""
    written = write_body({"id": "1"}, [sent], [binary])
    body = json.loads(written.content[: written.header_length])
    (one,) = body["outputs"]
    shape = tuple(one["shape"])
    if binary:
        raw = memoryview(written.content)[written.header_length :]
        assert one["parameters"]["binary_data_size"] == len(raw)
        return values_of("x", sent.datatype, shape, raw)
    assert written.header_length is None
    if sent.datatype != BYTES:
        return np.array(one["data"], DTYPES[sent.datatype]).reshape(shape)
    elements = np.empty(len(one["data"]), object)
    elements[:] = [text.encode() for text in one["data"]]
    return elements.reshape(shape)


def in_words(sent: Tensor) -> bool:
    """Whether JSON can carry a tensor."""
    if sent.datatype in ONLY_RAW:
        return False
    if sent.datatype != BYTES:
        return bool(np.isfinite(sent.values).all())
    try:
        for one in sent.values.flat:
            one.decode()
    except ValueError:
        return False
    return True


@given(tensors(), st.booleans())
@settings(max_examples=400, deadline=None)
def test_a_tensor_is_the_same_however_it_is_carried(sent, nested):
    assert same(through_binary(sent), sent.values)
    assert same(through_rpc(message([sent])), sent.values)
    assert same(through_answer(sent, binary=True), sent.values)
    if sent.datatype in ONLY_RAW:
        bare = message([])
        bare.inputs.add(name="x", datatype=sent.datatype, shape=sent.shape)
        with pytest.raises(InvalidRequest, match="expected it in raw_input_contents"):
            through_rpc(bare)
    else:
        assert same(through_rpc(message([sent], typed=True)), sent.values)
    if in_words(sent):
        # A tensor without elements has no nested form but an empty list.
        assert same(through_json(sent, nested=nested and sent.values.size > 0), sent.values)
        assert same(through_answer(sent, binary=False), sent.values)
    elif sent.datatype != BYTES:
        with pytest.raises(InvalidRequest, match="JSON does not carry"):
            through_answer(sent, binary=False)


@given(tensors(), st.data())
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_not_exactly_a_tensor_are_refused(sent, data):
    """One byte or one dimension too many or too few, lengths past the end."""
    raw = bytearray(sent.raw)
    shape = list(sent.shape)
    how = data.draw(st.sampled_from(["longer", "shorter", "larger", "length"]))
    if how == "longer":
        raw += bytes(data.draw(st.integers(1, 9)))
    elif how == "shorter" and raw:
        del raw[-data.draw(st.integers(1, len(raw))) :]
    elif how == "larger" and sent.values.size:
        index = data.draw(st.integers(0, len(shape))) if shape else 0
        shape.insert(index, data.draw(st.sampled_from([2, 3, 2**31, 2**62, 2**64, 10**400])))
    elif how == "length" and sent.datatype == BYTES and raw:
        raw[:4] = struct.pack("<I", data.draw(st.integers(len(raw) - 3, 2**32 - 1)))
    else:
        return
    with pytest.raises(InvalidRequest, match="expected"):
        values_of("x", sent.datatype, tuple(shape), memoryview(bytes(raw)))


@pytest.mark.parametrize(
    ("datatype", "data", "words"),
    [
        ("UINT8", [1, 256], "out of the range of UINT8"),
        ("UINT8", [1, -1], "out of the range of UINT8"),
        ("INT8", [-129, 1], "out of the range of INT8"),
        ("UINT64", [2**64, 1], "out of the range of UINT64"),
        ("INT64", [2**63, 1], "out of the range of INT64"),
        ("UINT8", [1, 1.0], "elements of type float; expected integers"),
        ("UINT8", [True, 1], "elements of type bool; expected integers"),
        ("UINT8", ["1", 1], "elements of type str; expected integers"),
        ("BOOL", [True, 1], "elements of type int; expected true and false"),
        ("FP32", [1e39, 1], "out of the range of FP32"),
        ("FP32", [10**400, 1], "out of the range of FP32"),
        ("FP32", [None, 1], "elements of type NoneType; expected numbers"),
        ("BYTES", ["a", 1], "elements of type int; expected strings"),
        ("FP16", [1.0, 1.0], "which JSON does not carry"),
        ("UINT8", [1], "has 1 elements; expected 2"),
        ("UINT8", [1, 2, 3], "has 3 elements; expected 2"),
        ("UINT8", [[1, 2]], "nested in another way"),
        ("UINT8", [[1], 2], "nested in another way"),
        ("UINT8", {"a": 1}, "an object as data; expected a list"),
        ("UINT8", None, "nothing as data; expected a list"),
    ],
)
def test_what_is_no_such_tensor_in_json_is_refused(datatype, data, words):
    one = {"name": "x", "datatype": datatype, "shape": [2], "data": data}
    body = bytearray(json.dumps({"inputs": [one]}).encode())
    with pytest.raises(InvalidRequest, match=words):
        read_body(body, None).request.inputs[0].read()


def test_a_raw_bool_is_zero_or_one():
    with pytest.raises(InvalidRequest, match="expected bytes of 0 and 1"):
        values_of("x", "BOOL", (2,), memoryview(b"\x00\x02"))
