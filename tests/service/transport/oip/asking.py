"""Requests of the Open Inference Protocol, with what becomes of them over either wire."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import numpy as np

from service.pb import inference_pb2, inference_pb2_grpc
from service.transport.oip.tensors import DTYPES, Tensor, values_of
from tests.server import RunningServer

MODEL = "dat_nano"
INFER = f"/v2/models/{MODEL}/infer"


@dataclass(frozen=True)
class Answer:
    """What a client sees of a request; `error` is the sentence of its failure."""

    status: int | str
    error: str | None = None
    outputs: Mapping[str, np.ndarray] = field(default_factory=dict)
    datatypes: Mapping[str, str] = field(default_factory=dict)
    id: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)


def tensor(name: str, datatype: str, values: Any) -> Tensor:
    """An input; of BYTES from a list of `bytes`."""
    if datatype == "BYTES":
        elements = np.empty(len(values), object)
        elements[:] = values
        return Tensor(name, datatype, elements)
    return Tensor(name, datatype, np.asarray(values, DTYPES[datatype]))


def pixels(images: Any) -> Tensor:
    return tensor("pixels", "UINT8", images)


def files(images: Sequence[bytes]) -> Tensor:
    return tensor("image", "BYTES", images)


def in_json(one: Tensor) -> dict[str, Any]:
    """An input inside of the JSON, whose files are base64."""
    flat = one.values.ravel().tolist()
    if one.datatype == "BYTES":
        flat = [base64.b64encode(value).decode() for value in flat]
    return {"name": one.name, "datatype": one.datatype, "shape": one.shape, "data": flat}


def in_binary(one: Tensor) -> dict[str, Any]:
    """An input that lies behind the JSON."""
    size = {"binary_data_size": len(one.raw)}
    return {"name": one.name, "datatype": one.datatype, "shape": one.shape, "parameters": size}


def over_rest(
    server: RunningServer,
    inputs: Sequence[Tensor],
    *,
    binary: bool = True,
    path: str = INFER,
    headers: Mapping[str, str] | None = None,
    **rest: Any,
) -> Answer:
    """Ask with JSON, or with the binary extension in both directions."""
    if not binary:
        content = json.dumps({"inputs": list(map(in_json, inputs)), **rest}).encode()
        return read_http(post(server, content, headers or {}, path))
    parameters = {"binary_data_output": True, **rest.pop("parameters", {})}
    head = {"inputs": list(map(in_binary, inputs)), "parameters": parameters, **rest}
    text = json.dumps(head).encode()
    content = text + b"".join(one.raw for one in inputs)
    given = {"Inference-Header-Content-Length": str(len(text)), **(headers or {})}
    return read_http(post(server, content, given, path))


def post(
    server: RunningServer, content: bytes, headers: Mapping[str, str], path: str = INFER
) -> httpx.Response:
    return httpx.post(f"{server.http_url}{path}", content=content, headers=headers, timeout=60)


def read_http(response: httpx.Response) -> Answer:
    """What became of a request; its error is in the form of the protocol."""
    if response.status_code != 200:
        body = response.json()
        assert list(body) == ["error"]
        assert isinstance(body["error"], str)
        assert body["error"]
        return Answer(response.status_code, body["error"], headers=response.headers)
    length = int(response.headers.get("inference-header-content-length", len(response.content)))
    body = json.loads(response.content[:length])
    tail, outputs = memoryview(response.content)[length:], {}
    for one in body["outputs"]:
        shape = tuple(one["shape"])
        size = one.get("parameters", {}).get("binary_data_size")
        if size is None:
            values = one["data"]
            if one["datatype"] == "BYTES":
                values = tensor("", "BYTES", [text.encode() for text in values]).values
            outputs[one["name"]] = np.asarray(values, DTYPES.get(one["datatype"])).reshape(shape)
        else:
            assert "data" not in one
            outputs[one["name"]] = values_of(one["name"], one["datatype"], shape, tail[:size])
            tail = tail[size:]
    assert not tail
    datatypes = {one["name"]: one["datatype"] for one in body["outputs"]}
    return Answer(200, None, outputs, datatypes, body["id"], response.headers, body)


def message(
    inputs: Sequence[Tensor], model: str = MODEL, *, typed: bool = False, **rest: Any
) -> inference_pb2.ModelInferRequest:
    """A message with raw contents, or with typed ones."""
    request = inference_pb2.ModelInferRequest(model_name=model, **rest)
    for one in inputs:
        given = request.inputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
        if typed:
            field_of(given.contents, one.datatype).extend(one.values.ravel().tolist())
        else:
            request.raw_input_contents.append(one.raw)
    return request


def field_of(contents: Any, datatype: str) -> Any:
    """The field of typed contents for a datatype, as the protocol names it."""
    if datatype in ("INT8", "INT16", "INT32"):
        return contents.int_contents
    if datatype in ("UINT8", "UINT16", "UINT32"):
        return contents.uint_contents
    return getattr(contents, f"{datatype.lower()}_contents")


def over_rpc(server: RunningServer, request: Any, **how: Any) -> Answer:
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(server.grpc_target, unlimited) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            response = stub.ModelInfer(request, **{"timeout": 60, **how})
        except grpc.RpcError as error:
            return Answer(error.code().name, error.details() or "")
        return read_rpc(response)


def read_rpc(response: Any) -> Answer:
    pairs = zip(response.outputs, response.raw_output_contents, strict=True)
    outputs = {
        one.name: values_of(one.name, one.datatype, tuple(one.shape), memoryview(raw))
        for one, raw in pairs
    }
    datatypes = {one.name: one.datatype for one in response.outputs}
    return Answer("OK", None, outputs, datatypes, response.id)


def parameters(**given: Any) -> dict[str, Any]:
    """Parameters of a message, each in the arm of its type."""
    kinds = {bool: "bool_param", int: "int64_param", str: "string_param", float: "double_param"}
    return {
        name: inference_pb2.InferParameter(**{kinds[type(value)]: value})
        for name, value in given.items()
    }
