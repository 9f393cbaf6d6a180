"""What is off by default, and tritonclient: tensors in shared memory, loading and unloading."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.pb import inference_pb2, inference_pb2_grpc
from service.transport.oip.shared_memory import OBJECTS
from tests.foreign.client import ForeignClient, Refused
from tests.foreign.tensors import (
    DETECTOR,
    GRPC,
    KINDS,
    MODEL,
    image,
    pixels,
    probabilities,
    small_pixels,
)
from tests.server import RunningServer, start_server

pytestmark = pytest.mark.slow

CLASSES = 12
ANSWER_BYTES = 4 * CLASSES


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server whose optional parts of the protocol are on."""
    with start_server(
        DAT_LIMITS__MAX_SHARED_MEMORY_BYTES=2**24, DAT_SERVER__MODEL_CONTROL="true"
    ) as running:
        yield running


@contextmanager
def region(triton: ForeignClient, kind: str, name: str, *arrays: np.ndarray) -> Iterator[int]:
    """A region that is made and registered; its size in bytes."""
    key = f"/{name}-{os.getpid()}"
    size = triton.call("make_region", name, key, arrays, ANSWER_BYTES if not arrays else 0)
    try:
        triton.call("ask", kind, "register_system_shared_memory", name, key, size)
        yield size
    finally:
        triton.call("ask", kind, "unregister_system_shared_memory", name)
        triton.call("end_region", name)


def regions(triton: ForeignClient, kind: str, of: str) -> dict[str, int]:
    """The sizes of the regions that the server knows, by name."""
    status = triton.call("ask", kind, f"get_{of}_shared_memory_status")
    if "grpc" in kind:
        status = status.get("regions", {}).values()
    return {one["name"]: int(one["byte_size"]) for one in status}


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_and_an_output_lie_there(triton: ForeignClient, kind: str) -> None:
    array = small_pixels(2)
    expected = probabilities(triton.call("infer", kind, MODEL, [pixels(array)]))
    given = {"name": "pixels", "datatype": "UINT8", "shape": [1, *array.shape[1:]]}
    each = array[0].nbytes
    with region(triton, kind, "given", array) as size, region(triton, kind, "answer") as room:
        assert size == 2 * each
        assert regions(triton, kind, "system") == {"given": size, "answer": room}
        for index in range(2):
            place = {"region": "given", "size": each, "offset": index * each}
            wanted = [
                {"name": "probabilities", "region": "answer", "size": room},
                {"name": "labels"},
            ]
            answer = triton.call("infer", kind, MODEL, [given | place], wanted)
            found = triton.call("read_region", "answer", "float32", [1, CLASSES])
            np.testing.assert_allclose(found[0], expected[index], atol=1e-6)
            best = answer["outputs"]["labels"][0, 0].split(b":")[1]
            assert int(best) == expected[index].argmax()
            (said, _) = answer["response"]["outputs"]
            assert said["shape"] in ([1, CLASSES], ["1", f"{CLASSES}"])
            assert "data" not in said


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_registered_is_not_read(triton: ForeignClient, kind: str) -> None:
    array = small_pixels()
    given = {"name": "pixels", "datatype": "UINT8", "shape": list(array.shape), "region": "gone"}
    with region(triton, kind, "gone", array) as size:
        triton.call("infer", kind, MODEL, [given | {"size": size}])
        for wrong in ({"size": size, "offset": 1}, {"size": size + 1}, {"size": size - 1}):
            with pytest.raises(Refused, match="bytes"):
                triton.call("infer", kind, MODEL, [given | wrong])
    with pytest.raises(Refused, match="register it first"):
        triton.call("infer", kind, MODEL, [given | {"size": size}])
    wanted = [{"name": "probabilities", "region": "gone", "size": ANSWER_BYTES}]
    with pytest.raises(Refused, match="register it first"):
        triton.call("infer", kind, MODEL, [pixels(array)], wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_output_that_does_not_fit(triton: ForeignClient, kind: str) -> None:
    with region(triton, kind, "answer") as room:
        wanted = [{"name": "probabilities", "region": "answer", "size": room - 1}]
        with pytest.raises(Refused, match=f"takes {room} bytes"):
            triton.call("infer", kind, MODEL, [pixels(small_pixels())], wanted)
        assert not triton.call("read_region", "answer", "uint8", [room]).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("key", ["/../etc/passwd", "/etc/passwd", "../shm/other", "/", "sem.x"])
def test_a_path_is_no_key(triton: ForeignClient, kind: str, key: str) -> None:
    with pytest.raises(Refused, match=r"name of shm_open"):
        triton.call("ask", kind, "register_system_shared_memory", "r", key, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_that_its_owner_shortens_harms_nobody(triton: ForeignClient, kind: str) -> None:
    array = small_pixels()
    given = {"name": "pixels", "datatype": "UINT8", "shape": list(array.shape), "region": "short"}
    with region(triton, kind, "short", array) as size:
        os.truncate(OBJECTS / f"short-{os.getpid()}", 100)
        with pytest.raises(Refused, match="shorter"):
            triton.call("infer", kind, MODEL, [given | {"size": size}])
    assert triton.call("ask", kind, "is_server_ready") is True


@pytest.mark.parametrize("kind", KINDS)
def test_all_are_unregistered_at_once(triton: ForeignClient, kind: str) -> None:
    """As perf_analyzer begins; of CUDA's there are none."""
    for name in ("system", "cuda"):
        triton.call("ask", kind, f"unregister_{name}_shared_memory")
        assert not regions(triton, kind, name)
    with pytest.raises(Refused, match="CUDA"):
        triton.call("ask", kind, "register_cuda_shared_memory", "r", b"aGFuZGxl", 0, 16)


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http_url, timeout=30) as client:
        yield client


anything = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20)
    | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=60, deadline=None)
@given(
    region=anything | st.just("known"), size=anything | st.just(48), offset=anything | st.just(0)
)
def test_places_that_are_none_are_refused(
    client: httpx.Client, region: Any, size: Any, offset: Any
) -> None:
    given = {
        "shared_memory_region": region,
        "shared_memory_byte_size": size,
        "shared_memory_offset": offset,
    }
    tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, 4, 4, 3], "parameters": given}
    answer = client.post(f"/v2/models/{MODEL}/infer", json={"inputs": [tensor]})
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize("choice", ["none", "bool_param", "int64_param", "double_param"])
def test_a_region_that_is_no_text_is_refused_over_grpc(server: RunningServer, choice: str) -> None:
    request = inference_pb2.ModelInferRequest(model_name=MODEL)
    tensor = request.inputs.add(name="pixels", datatype="UINT8", shape=[1, 1, 1, 3])
    region = tensor.parameters["shared_memory_region"]
    if choice != "none":
        setattr(region, choice, 1)
    tensor.parameters["shared_memory_byte_size"].int64_param = 3
    with grpc.insecure_channel(server.grpc_target) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.ModelInfer(request)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=60, deadline=None)
@given(key=anything, size=anything, offset=anything)
def test_objects_that_are_none_are_refused(
    client: httpx.Client, key: Any, size: Any, offset: Any
) -> None:
    body = {"key": key, "byte_size": size, "offset": offset}
    answer = client.post("/v2/systemsharedmemory/region/r/register", json=body)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


def test_no_name_is_left_behind() -> None:
    """Of the objects of these tests."""
    assert not list(Path(OBJECTS).glob(f"*-{os.getpid()}"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_unloaded_and_loaded(triton: ForeignClient, kind: str) -> None:
    def state(name: str) -> Any:
        index = triton.call("ask", kind, "get_model_repository_index")
        models = index["models"] if kind in GRPC else index
        return {one["name"]: one["state"] for one in models}[name]

    assert state(DETECTOR) == state(MODEL) == "READY"
    triton.call("ask", kind, "unload_model", DETECTOR)
    try:
        assert (state(DETECTOR), state(MODEL)) == ("UNAVAILABLE", "READY")
        with pytest.raises(Refused, match=r"400|404|NOT_FOUND|FAILED_PRECONDITION"):
            triton.call("infer", kind, DETECTOR, [image(b"jpeg")])
    finally:
        triton.call("ask", kind, "load_model", DETECTOR)
    assert triton.call("ask", kind, "is_model_ready", DETECTOR) is True
    assert state(DETECTOR) == "READY"
    with pytest.raises(Refused, match="no_such_model"):
        triton.call("ask", kind, "load_model", "no_such_model")
