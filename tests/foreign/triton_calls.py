"""Calls of tritonclient: `python -m tests.foreign.triton_calls HTTP_ADDRESS GRPC_ADDRESS`."""

import asyncio
import queue
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from tritonclient.utils import np_to_triton_dtype, shared_memory

from tests.foreign.calls import answer_calls

HTTP, GRPC = sys.argv[1:]
# By kind: the client, its address, and what makes its tensors.
KINDS: dict[str, tuple[Any, str, Any]] = {
    "http": (tritonclient.http.InferenceServerClient, HTTP, tritonclient.http),
    "http-aio": (tritonclient.http.aio.InferenceServerClient, HTTP, tritonclient.http),
    "grpc": (tritonclient.grpc.InferenceServerClient, GRPC, tritonclient.grpc),
    "grpc-aio": (tritonclient.grpc.aio.InferenceServerClient, GRPC, tritonclient.grpc),
}
PATIENCE_S = 30.0
_handles: dict[str, Any] = {}  # of shared memory, by region


def _with_client(kind: str, use: Callable[[Any], Any]) -> Any:
    """What is made of a call with a new client of that kind, awaited where it has to be."""
    client_class, address, _ = KINDS[kind]
    if not kind.endswith("aio"):
        client = client_class(address)
        try:
            return use(client)
        finally:
            client.close()

    async def asked() -> Any:
        client = client_class(address)
        try:
            return await use(client)
        finally:
            await client.close()

    return asyncio.run(asked())


def ask(kind: str, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method that needs no tensors; messages of gRPC come as JSON."""
    if "grpc" in kind and method.startswith("get_"):
        options["as_json"] = True
    return _with_client(kind, lambda client: getattr(client, method)(*arguments, **options))


def _input(kind: str, tensor: dict[str, Any]) -> Any:
    made = KINDS[kind][2]
    if "region" in tensor:
        one = made.InferInput(tensor["name"], tensor["shape"], tensor["datatype"])
        one.set_shared_memory(tensor["region"], tensor["size"], tensor.get("offset", 0))
        return one
    array = tensor["array"]
    datatype = tensor.get("datatype") or np_to_triton_dtype(array.dtype)
    one = made.InferInput(tensor["name"], tensor.get("shape", list(array.shape)), datatype)
    options = {"binary_data": tensor["binary"]} if "http" in kind and "binary" in tensor else {}
    return one.set_data_from_numpy(array, **options)


def _output(kind: str, wanted: dict[str, Any]) -> Any:
    options = {"class_count": wanted.get("classes", 0)}
    if "http" in kind:
        options["binary_data"] = wanted.get("binary", True)
    one = KINDS[kind][2].InferRequestedOutput(wanted["name"], **options)
    if "region" in wanted:
        one.set_shared_memory(wanted["region"], wanted["size"], wanted.get("offset", 0))
    return one


def _read(result: Any, names: Sequence[str] | None = None) -> dict[str, Any]:
    response = result.get_response()
    if not isinstance(response, dict):
        response = result.get_response(as_json=True)
    found = [one["name"] for one in response.get("outputs", [])] if names is None else names
    return {"response": response, "outputs": {name: result.as_numpy(name) for name in found}}


def infer(
    kind: str,
    model: str,
    inputs: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, Any]] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The response and the outputs of one inference, as arrays where the response carries them."""
    tensors = [_input(kind, tensor) for tensor in inputs]
    wanted = None if outputs is None else [_output(kind, one) for one in outputs]
    result = _with_client(
        kind, lambda client: client.infer(model, tensors, outputs=wanted, **options)
    )
    carried = None
    if outputs is not None:
        carried = [one["name"] for one in outputs if "region" not in one]
    return _read(result, carried)


def infer_many(
    kind: str, model: str, requests: Sequence[Sequence[dict[str, Any]]], **options: Any
) -> list[dict[str, Any]]:
    """Results of `async_infer` of the clients that have it, in order of the requests."""
    client_class, address, _ = KINDS[kind]
    client = client_class(address, **({"concurrency": 4} if kind == "http" else {}))
    try:
        if kind == "http":
            begun = [
                client.async_infer(model, [_input(kind, one) for one in request], **options)
                for request in requests
            ]
            return [_read(one.get_result()) for one in begun]
        results: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for index, request in enumerate(requests):
            tensors = [_input(kind, one) for one in request]

            def done(result: Any, error: Any, index: int = index) -> None:
                results.put((index, result, error))

            client.async_infer(model, tensors, done, **options)
        return _in_order(results, len(requests))
    finally:
        client.close()


def stream(
    kind: str, model: str, requests: Sequence[Sequence[dict[str, Any]]], **options: Any
) -> list[Any]:
    """What a stream answers, in its order: what `infer` gives, or the text of a failure."""
    if kind == "grpc-aio":
        return asyncio.run(_stream_aio(model, requests, **options))
    results: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client = tritonclient.grpc.InferenceServerClient(GRPC)
    try:
        client.start_stream(lambda result, error: results.put((result, error)))
        for index, request in enumerate(requests):
            tensors = [_input(kind, one) for one in request]
            client.async_stream_infer(model, tensors, request_id=f"{index}", **options)
        answers = [results.get(timeout=PATIENCE_S) for _ in requests]
        client.stop_stream()
    finally:
        client.close()
    return [str(error) if error else _read(result) for result, error in answers]


async def _stream_aio(
    model: str, requests: Sequence[Sequence[dict[str, Any]]], **options: Any
) -> list[Any]:
    async def asked() -> Any:
        for index, request in enumerate(requests):
            tensors = [_input("grpc-aio", one) for one in request]
            yield {"model_name": model, "inputs": tensors, "request_id": f"{index}", **options}

    client = tritonclient.grpc.aio.InferenceServerClient(GRPC)
    try:
        answers = client.stream_infer(asked())
        return [str(error) if error else _read(result) async for result, error in answers]
    finally:
        await client.close()


def _in_order(results: "queue.SimpleQueue[Any]", count: int) -> list[dict[str, Any]]:
    answers = sorted(
        (results.get(timeout=PATIENCE_S) for _ in range(count)), key=lambda one: one[0]
    )
    for _, _, error in answers:
        if error:
            raise error
    return [_read(result) for _, result, _ in answers]


def make_region(region: str, key: str, arrays: Sequence[np.ndarray], size: int = 0) -> int:
    """Create shared memory that holds these arrays, or as many bytes; its size."""
    size = size or sum(array.nbytes for array in arrays)
    _handles[region] = shared_memory.create_shared_memory_region(region, key, size)
    if arrays:
        shared_memory.set_shared_memory_region(_handles[region], list(arrays))
    return size


def read_region(region: str, dtype: str, shape: Sequence[int], offset: int = 0) -> np.ndarray:
    """What lies in shared memory."""
    held = shared_memory.get_contents_as_numpy(_handles[region], np.dtype(dtype), shape, offset)
    return np.array(held)


def end_region(region: str) -> None:
    """Destroy shared memory."""
    shared_memory.destroy_shared_memory_region(_handles.pop(region))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    one.__name__: one
    for one in (ask, infer, infer_many, stream, make_region, read_region, end_region)
}

if __name__ == "__main__":
    answer_calls(FUNCTIONS)
