"""What clients of the Open Inference Protocol call beside inference, over both transports."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
import httpx
from google.protobuf.json_format import MessageToDict

from service.pb import inference_pb2 as pb
from service.pb import inference_pb2_grpc
from tests.clients import channel
from tests.server import RunningServer


@dataclass
class Refused(Exception):
    """A call that failed, with its status on the wire."""

    status: int | str
    message: str


class Operator(Protocol):
    """Somebody who runs models; answers are documents as the protocol's JSON has them."""

    async def config(self, model: str, version: str = "") -> Any: ...
    async def statistics(self, model: str = "", version: str = "") -> Any: ...
    async def index(self, *, ready: bool = False) -> Any: ...
    async def load(self, model: str, parameters: Mapping[str, str] | None = None) -> None: ...
    async def unload(self, model: str) -> None: ...


class OverRest:
    """An operator over HTTP."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    async def config(self, model: str, version: str = "") -> Any:
        return await self._ask("GET", f"/v2/models/{model}{_of(version)}/config")

    async def statistics(self, model: str = "", version: str = "") -> Any:
        named = f"/{model}{_of(version)}" if model else ""
        return await self._ask("GET", f"/v2/models{named}/stats")

    async def index(self, *, ready: bool = False) -> Any:
        body = {"json": {"ready": True}} if ready else {}
        return await self._ask("POST", "/v2/repository/index", **body)

    async def load(self, model: str, parameters: Mapping[str, str] | None = None) -> None:
        body = {} if parameters is None else {"json": {"parameters": parameters}}
        await self._ask("POST", f"/v2/repository/models/{model}/load", **body)

    async def unload(self, model: str) -> None:
        body = {"parameters": {"unload_dependents": False}}
        await self._ask("POST", f"/v2/repository/models/{model}/unload", json=body)

    async def _ask(self, method: str, path: str, **body: Any) -> Any:
        async with httpx.AsyncClient(base_url=self._server.http_url, timeout=120) as client:
            response = await client.request(method, path, **body)
        if response.status_code != 200:
            assert list(response.json()) == ["error"]
            raise Refused(response.status_code, response.json()["error"])
        return response.json()


class OverGrpc:
    """An operator over gRPC."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server

    async def config(self, model: str, version: str = "") -> Any:
        answer = await self._ask("ModelConfig", pb.ModelConfigRequest(name=model, version=version))
        return answer["config"]

    async def statistics(self, model: str = "", version: str = "") -> Any:
        request = pb.ModelStatisticsRequest(name=model, version=version)
        return await self._ask("ModelStatistics", request)

    async def index(self, *, ready: bool = False) -> Any:
        answer = await self._ask("RepositoryIndex", pb.RepositoryIndexRequest(ready=ready))
        return answer.get("models", [])

    async def load(self, model: str, parameters: Mapping[str, str] | None = None) -> None:
        given = {
            key: pb.ModelRepositoryParameter(string_param=value)
            for key, value in (parameters or {}).items()
        }
        request = pb.RepositoryModelLoadRequest(model_name=model, parameters=given)
        await self._ask("RepositoryModelLoad", request)

    async def unload(self, model: str) -> None:
        request = pb.RepositoryModelUnloadRequest(model_name=model)
        await self._ask("RepositoryModelUnload", request)

    async def _ask(self, method: str, request: Any) -> Any:
        async with channel(self._server) as open_channel:
            stub = inference_pb2_grpc.GRPCInferenceServiceStub(open_channel)
            try:
                answer = await getattr(stub, method)(request, timeout=120)
            except grpc.aio.AioRpcError as error:
                raise Refused(error.code().name, error.details() or "") from None
        return MessageToDict(
            answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
        )


def _of(version: str) -> str:
    return f"/versions/{version}" if version else ""


OPERATORS: Mapping[str, Callable[[RunningServer], Operator]] = {"rest": OverRest, "grpc": OverGrpc}
