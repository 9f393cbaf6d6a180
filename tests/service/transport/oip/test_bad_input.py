"""Generated requests that are wrong in one place: refused in words, never a fault of the server."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.pb import inference_pb2, inference_pb2_grpc
from service.transport.oip.tensors import DATATYPES
from tests.clients import encoded
from tests.server import RunningServer
from tests.service.transport.oip.asking import INFER, MODEL, files, message, over_rest, pixels

MIB = 1 << 20
PNG = encoded("PNG", size=(8, 9))
SHAPE, COUNT = [2, 3, 4, 3], 72
# A size that no dimension can have, or that makes the tensor another one than its elements are.
SIZES = st.sampled_from([-1, -(2**63), 0, 1, 5, 2**31, 2**32, 2**62, 2**63 - 1])
SEEN: Counter[str] = Counter()
EXAMPLES = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http_url, timeout=60) as opened:
        yield opened


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[Any]:
    with grpc.insecure_channel(server.grpc_target) as channel:
        yield inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def other_shapes() -> st.SearchStrategy[list[int]]:
    """Shapes that are not that of the tensor, nor of as many images."""
    one_other = st.tuples(st.integers(0, 3), SIZES).map(
        lambda change: [*SHAPE[: change[0]], change[1], *SHAPE[change[0] + 1 :]]
    )
    any_other = st.lists(SIZES, max_size=20)
    return (one_other | any_other).filter(lambda shape: shape != SHAPE)


# Each makes a request wrong in one place, or gives another body in its place.
Break = Callable[[st.DataObject, dict[str, Any]], bytes | None]


def wrong_name(data: st.DataObject, request: dict[str, Any]) -> None:
    names = st.text(max_size=300).filter(lambda name: name not in ("image", "pixels", "normalised"))
    request["inputs"][0]["name"] = data.draw(names)


def wrong_datatype(data: st.DataObject, request: dict[str, Any]) -> None:
    others = st.sampled_from(DATATYPES) | st.text(max_size=9)
    request["inputs"][0]["datatype"] = data.draw(others.filter(lambda one: one != "UINT8"))


def wrong_shape(data: st.DataObject, request: dict[str, Any]) -> None:
    request["inputs"][0]["shape"] = data.draw(other_shapes())


def wrong_count(data: st.DataObject, request: dict[str, Any]) -> None:
    elements = st.lists(st.integers(0, 255), max_size=2 * COUNT)
    off_by_one = st.sampled_from([[0] * (COUNT - 1), [0] * (COUNT + 1)])
    request["inputs"][0]["data"] = data.draw(
        (off_by_one | elements).filter(lambda one: len(one) != COUNT)
    )


def wrong_element(data: st.DataObject, request: dict[str, Any]) -> None:
    strange: list[Any] = [-1, 256, 2**70, 1.5, True, "1", None, [1], {}, 1e300]
    place = data.draw(st.integers(0, COUNT - 1))
    request["inputs"][0]["data"][place] = data.draw(st.sampled_from(strange))


def wrong_inputs(data: st.DataObject, request: dict[str, Any]) -> None:
    one = request["inputs"][0]
    other = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["AAAA"]}
    strange: list[Any] = [None, [], {}, "x", 5, [1], [[]], [{}], [None]]
    strange += [[one, one], [one, other], [one] * 1001]
    request["inputs"] = data.draw(st.sampled_from(strange))


def wrong_key(data: st.DataObject, request: dict[str, Any]) -> None:
    one = request["inputs"][0]
    key = data.draw(st.sampled_from(["name", "datatype", "shape", "data"]))
    strange = data.draw(st.sampled_from([None, 7, 1.5, True, {}, {"a": [1]}, "x" * 300]))
    if data.draw(st.booleans()):
        del one[key]
    else:
        one[key] = strange


def wrong_outputs(data: st.DataObject, request: dict[str, Any]) -> None:
    request["outputs"] = data.draw(
        st.sampled_from(
            [{}, "x", [1], [{}], [{"name": 1}], [{"name": "x"}], [{"name": "labels"}] * 2]
        )
    )


def wrong_binary_size(data: st.DataObject, request: dict[str, Any]) -> None:
    del request["inputs"][0]["data"]
    size = data.draw(st.sampled_from([-1, 1, 2**63, 2**64, 1.0, True, "1", [], {}]) | st.integers())
    request["inputs"][0]["parameters"] = {"binary_data_size": size}


def both_data_and_size(_: st.DataObject, request: dict[str, Any]) -> None:
    request["inputs"][0]["parameters"] = {"binary_data_size": 0}


def wrong_text(data: st.DataObject, request: dict[str, Any]) -> bytes:
    text = json.dumps(request).encode()
    if data.draw(st.booleans()):
        return text[: data.draw(st.integers(0, len(text) - 1))]
    return data.draw(
        st.sampled_from(
            [b"[]", b"null", b"7", b"\xff\xfe", b"{" * 9999, b"[" * 9999, b'{"inputs":[NaN]}',
             b'{"inputs":[{"data":[Infinity]}]}', b'{"id":"\\ud800","inputs":[]}', b"{}{}",
             b'{"inputs":[{"shape":[' + b"9" * 5000 + b"]}]}"]
        )
    )  # fmt: skip


BREAKS: list[Break] = [
    wrong_name, wrong_datatype, wrong_shape, wrong_count, wrong_element, wrong_inputs, wrong_key,
    wrong_outputs, wrong_binary_size, both_data_and_size, wrong_text,
]  # fmt: skip


def assert_refused(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    body = response.json()
    assert list(body) == ["error"]
    return str(body["error"])


def test_a_request_that_is_wrong_in_one_place_is_refused_in_words(client):
    @given(st.sampled_from(BREAKS), st.data())
    @EXAMPLES
    def refused(breaking, data):
        one = {"name": "pixels", "datatype": "UINT8", "shape": SHAPE, "data": [7] * COUNT}
        request: dict[str, Any] = {"inputs": [one]}
        sent = breaking(data, request)
        sentence = assert_refused(
            client.post(INFER, content=json.dumps(request).encode() if sent is None else sent)
        )
        SEEN[f"rest: {breaking.__name__}"] += 1
        said = ("expected", "out of the range", "is not JSON", "not a JSON object")
        said += ("asked for twice", "holds no image", "the limit is", "the image has")
        assert any(words in sentence for words in said), sentence

    refused()


HEADER_LENGTHS = st.sampled_from(
    ["-1", "+1", "1.5", "", "x", "1e3", "0x10", "9" * 30, "9" * 300, "99999999", "\u0663", "1,1"]
) | st.integers(1, 10**20).map(str)


def test_lengths_that_are_absurd_or_past_the_body_are_refused(client):
    sent = pixels([[[[1, 2, 3]]]])
    size = {"binary_data_size": 3}
    one = {"name": sent.name, "datatype": "UINT8", "shape": [1, 1, 1, 3], "parameters": size}
    head = json.dumps({"inputs": [one]}).encode()

    @given(HEADER_LENGTHS, st.integers(-2, 2))
    @settings(EXAMPLES, max_examples=100)
    def refused(length, more):
        body = head + sent.raw[: 3 + more] + bytes(max(0, more))
        if length == str(len(head)) and more == 0:
            return
        headers = {b"Inference-Header-Content-Length": length.encode()}
        assert_refused(client.post(INFER, content=body, headers=headers))
        SEEN["rest: header length"] += 1

    refused()


def rpc_name(data: st.DataObject, request: Any) -> None:
    names = st.text(max_size=300).filter(lambda name: name not in ("image", "pixels", "normalised"))
    request.inputs[0].name = data.draw(names)


def rpc_datatype(data: st.DataObject, request: Any) -> None:
    others = st.sampled_from(DATATYPES) | st.text(max_size=9)
    request.inputs[0].datatype = data.draw(others.filter(lambda kind: kind != "UINT8"))


def rpc_shape(data: st.DataObject, request: Any) -> None:
    request.inputs[0].shape[:] = data.draw(other_shapes())


def rpc_raw_size(data: st.DataObject, request: Any) -> None:
    sizes = st.sampled_from([COUNT - 1, COUNT + 1]) | st.integers(0, 200)
    request.raw_input_contents[0] = bytes(data.draw(sizes.filter(lambda size: size != COUNT)))


def rpc_raw_count(data: st.DataObject, request: Any) -> None:
    request.raw_input_contents.extend([b""] * data.draw(st.integers(1, 3)))


def rpc_mixed(data: st.DataObject, request: Any) -> None:
    contents = request.inputs[0].contents
    contents.uint_contents.extend([1] * data.draw(st.sampled_from([1, COUNT])))


def rpc_typed_count(data: st.DataObject, request: Any) -> None:
    del request.raw_input_contents[:]
    counts = st.sampled_from([COUNT - 1, COUNT + 1]) | st.integers(0, 200)
    elements = [1] * data.draw(counts.filter(lambda count: count != COUNT))
    request.inputs[0].contents.uint_contents.extend(elements)


def rpc_field(data: st.DataObject, request: Any) -> None:
    del request.raw_input_contents[:]
    contents = request.inputs[0].contents
    if data.draw(st.booleans()):
        contents.uint_contents.extend([1] * COUNT)
    names = ["bool", "int", "int64", "uint64", "fp32", "fp64", "bytes"]
    name = data.draw(st.sampled_from(names))
    getattr(contents, f"{name}_contents").append({"bytes": b"", "bool": True}.get(name, 1))


def rpc_range(data: st.DataObject, request: Any) -> None:
    del request.raw_input_contents[:]
    contents = request.inputs[0].contents
    contents.uint_contents.extend([1] * (COUNT - 1))
    contents.uint_contents.append(data.draw(st.integers(256, 2**32 - 1)))


def rpc_inputs(data: st.DataObject, request: Any) -> None:
    if data.draw(st.booleans()):
        del request.inputs[:]
    else:
        request.inputs.append(request.inputs[0])
        request.inputs[1].name = data.draw(st.sampled_from(["pixels", "image"]))
        request.raw_input_contents.append(request.raw_input_contents[0])


def rpc_outputs(data: st.DataObject, request: Any) -> None:
    known = ("labels", "logits", "probabilities")
    request.outputs.add(
        name=data.draw(st.text(max_size=300).filter(lambda name: name not in known))
    )


def rpc_elements(data: st.DataObject, request: Any) -> None:
    """Lengths of elements of BYTES that run past the end, or leave something."""
    one = request.inputs[0]
    one.name, one.datatype, one.shape[:] = "image", "BYTES", [1]
    length = data.draw(st.sampled_from([0, 1, 4, 100, 2**31, 2**32 - 1]))
    tail = bytes(data.draw(st.sampled_from([0, 3, 5])))
    request.raw_input_contents[0] = length.to_bytes(4, "little") + tail


RPC_BREAKS = [
    rpc_name, rpc_datatype, rpc_shape, rpc_raw_size, rpc_raw_count, rpc_mixed, rpc_typed_count,
    rpc_field, rpc_range, rpc_inputs, rpc_outputs, rpc_elements,
]  # fmt: skip


def test_a_message_that_is_wrong_in_one_place_is_refused_in_words(stub):
    @given(st.sampled_from(RPC_BREAKS), st.data())
    @EXAMPLES
    def refused(breaking, data):
        request = message([pixels([[[[1, 2, 3]] * 4] * 3] * 2)])
        breaking(data, request)
        with pytest.raises(grpc.RpcError) as failure:
            stub.ModelInfer(request, timeout=60)
        SEEN[f"rpc: {breaking.__name__}"] += 1
        assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        sentence = failure.value.details()
        said = ("expected", "out of the range", "holds no image", "the limit is", "the image has")
        assert any(words in sentence for words in said), sentence

    refused()


def test_malformed_bytes_in_place_of_a_message_are_refused(server):
    sent = message([pixels([[[[1, 2, 3]]]])]).SerializeToString()

    with grpc.insecure_channel(server.grpc_target) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

        @given(st.data())
        @settings(EXAMPLES, max_examples=150)
        def refused(data):
            changed = bytearray(sent)
            for _ in range(data.draw(st.integers(1, 3))):
                place = data.draw(st.integers(0, len(changed) - 1))
                changed[place] = data.draw(st.integers(0, 255))
            try:
                code = call.with_call(bytes(changed), timeout=60)[1].code().name
            except grpc.RpcError as error:
                code = error.code().name
            SEEN[f"rpc bytes: {code}"] += 1
            assert code in ("OK", "INVALID_ARGUMENT", "NOT_FOUND"), bytes(changed)

        refused()


def resident(server: RunningServer, what: str) -> int:
    """Of the process of a server, bytes."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith(what)]
    return int(line.split()[1]) * 1024


def test_what_a_request_takes_of_memory_is_bounded_by_its_body(server, client):
    """Bodies that would be many times larger as objects of Python, or as messages."""
    over_rest(server, [files([PNG])])
    Path(f"/proc/{server.process.pid}/clear_refs").write_text("5")  # the peak begins anew
    before, size = resident(server, "VmRSS"), 24 * MIB
    for filling in (b"[],", b"{},", b"1,", b'"ab",', b"1.5,"):
        body = b'{"inputs":[{"name":"pixels","datatype":"UINT8","shape":[1,1,1,3],"data":['
        body += filling * (size // len(filling)) + b"1]}]}"
        assert "expected at most" in assert_refused(client.post(INFER, content=body))
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_target, options) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        name = inference_pb2.ModelInferRequest(model_name=MODEL).SerializeToString()

        def nested(*fields: int, inner: bytes) -> bytes:
            for number in reversed(fields):
                length, size_ = b"", len(inner)
                while size_ > 0x7F:
                    length += bytes([size_ & 0x7F | 0x80])
                    size_ >>= 7
                inner = bytes([number << 3 | 2]) + length + bytes([size_]) + inner
            return inner

        empty = size // 2
        for sent in (
            b"\x2a\x00" * empty,  # inputs
            b"\x3a\x00" * empty,  # raw tensors
            nested(5, 5, inner=b"\x42\x00" * empty),  # elements of BYTES
            nested(5, inner=b"\x22\x00" * empty),  # parameters of an input
            nested(6, inner=b"\x12\x00" * empty),  # parameters of an output
        ):
            with pytest.raises(grpc.RpcError) as failure:
                call(name + sent, timeout=60)
            assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert "more than 10000 fields" in failure.value.details()
    print(dict(SEEN))  # noqa: T201
    # What was received, a copy while it is read, and what others took meanwhile.
    assert resident(server, "VmHWM") - before < 6 * size
