"""Calls of KServe's clients: `python -m tests.foreign.kserve_calls HTTP_URL GRPC_ADDRESS`."""

import asyncio
import sys
from collections.abc import Callable, Sequence
from typing import Any

from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig
from kserve.protocol.infer_type import RequestedOutput

from tests.foreign.calls import answer_calls

HTTP, GRPC = sys.argv[1:]


def _with_client(kind: str, use: Callable[[Any, list[str]], Any]) -> Any:
    """What is made of a call with a new client; over HTTP its first argument is the URL."""

    async def asked() -> Any:
        if kind == "http":
            client, first = InferenceRESTClient(RESTConfig(protocol="v2", retries=0)), [HTTP]
        else:
            client, first = InferenceGRPCClient(GRPC, retries=0), []
        async with client:
            return await use(client, first)

    return asyncio.run(asked())


def ask(kind: str, method: str, *arguments: Any) -> Any:
    """Call a method that needs no tensors."""
    return _with_client(kind, lambda client, first: getattr(client, method)(*first, *arguments))


def infer(
    kind: str,
    model: str,
    inputs: Sequence[dict[str, Any]],
    outputs: Sequence[dict[str, Any]] = (),
    request_id: str | None = None,
) -> dict[str, Any]:
    """What one inference gives."""
    tensors = []
    for given in inputs:
        one = InferInput(given["name"], given["shape"], given["datatype"], given.get("data"))
        if "array" in given:
            one.set_data_from_numpy(given["array"], given.get("binary", True))
        tensors.append(one)
    wanted = [RequestedOutput(one["name"], one.get("parameters")) for one in outputs]
    request = InferRequest(model, tensors, request_id, request_outputs=wanted or None)

    def use(client: Any, first: list[str]) -> Any:
        if kind == "http":
            return client.infer(*first, request, model_name=model)
        return client.infer(request)

    response = _with_client(kind, use)
    return {
        "id": response.id,
        "model": response.model_name,
        "outputs": {one.name: one.as_numpy() for one in response.outputs},
    }


if __name__ == "__main__":
    answer_calls({"ask": ask, "infer": infer})
