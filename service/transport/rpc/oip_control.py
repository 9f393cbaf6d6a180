"""The calls of the Open Inference Protocol beside inference: how models are run and loaded."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from service.pb import inference_pb2
from service.transport.oip.control import Control
from service.transport.rpc import wire
from service.transport.rpc.calls import Answer
from service.transport.rpc.reading import Context, Reading


def control_calls(control: Control, reading: Reading) -> Mapping[str, Answer]:
    """What answers the calls, by their names.

    Args:
        control: answers.
        reading: of messages without tensors.
    """

    async def config(request: inference_pb2.ModelConfigRequest) -> Message:
        document = {"config": control.config(request.name, request.version)}
        return ParseDict(document, inference_pb2.ModelConfigResponse())

    async def statistics(request: inference_pb2.ModelStatisticsRequest) -> Message:
        document = await control.statistics(request.name, request.version)
        return ParseDict(document, inference_pb2.ModelStatisticsResponse())

    async def index(request: inference_pb2.RepositoryIndexRequest) -> Message:
        document = {"models": await control.index(ready=request.ready)}
        return ParseDict(document, inference_pb2.RepositoryIndexResponse())

    async def load(request: inference_pb2.RepositoryModelLoadRequest) -> Message:
        await control.load(request.model_name, list(request.parameters))
        return inference_pb2.RepositoryModelLoadResponse()

    async def unload(request: inference_pb2.RepositoryModelUnloadRequest) -> Message:
        await control.unload(request.model_name)
        return inference_pb2.RepositoryModelUnloadResponse()

    def call(kind: type[Any], work: Callable[[Any], Awaitable[Message]]) -> Answer:
        async def answer(context: Context) -> bytes:
            request = wire.parse(kind, await reading.read_only(context))
            return (await work(request)).SerializeToString()

        return answer

    return {
        "ModelConfig": call(inference_pb2.ModelConfigRequest, config),
        "ModelStatistics": call(inference_pb2.ModelStatisticsRequest, statistics),
        "RepositoryIndex": call(inference_pb2.RepositoryIndexRequest, index),
        "RepositoryModelLoad": call(inference_pb2.RepositoryModelLoadRequest, load),
        "RepositoryModelUnload": call(inference_pb2.RepositoryModelUnloadRequest, unload),
    }
