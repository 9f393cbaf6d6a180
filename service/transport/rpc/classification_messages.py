"""The messages of classification."""

from service.pb import dat_pb2
from service.tasks.classification import Classification, ClassifyOptions
from service.transport.rpc.messages import of_every_task, options_of_every_task
from service.transport.rpc.task import RpcTask


def _options(request: dat_pb2.ClassifyRequest, remaining_s: float | None) -> ClassifyOptions:
    return ClassifyOptions(
        **options_of_every_task(request, remaining_s),
        top_k=request.top_k if request.HasField("top_k") else ClassifyOptions.top_k,
    )


def _show(answer: Classification) -> dict[str, dat_pb2.Classification]:
    return {
        "classification": dat_pb2.Classification(
            predictions=[dat_pb2.Prediction(**vars(found)) for found in answer.predictions],
            **of_every_task(answer),
        )
    }


RPC_CLASSIFY = RpcTask(
    "classify",
    "dat.v1.ClassifierService",
    "Classify",
    dat_pb2.ClassifyRequest,
    _options,
    dat_pb2.ClassifyResponse,
    dat_pb2.ImageResult,
    _show,
    dat_pb2.ClassifyStreamRequest,
    dat_pb2.ClassifyStreamResponse,
)
