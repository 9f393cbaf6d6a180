"""Load generator that sends tensors of the Open Inference Protocol, as `bench.load` sends JPEGs.

The path of a request is MODEL/INPUT: `dat_nano/image` sends JPEGs as BYTES, `dat_nano/pixels` their
pixels as UINT8, `dat_nano/normalised` what the network reads of those as FP32.
"""

import io
import json
import struct

import grpc
import numpy as np
from PIL import Image

from bench.load import PATIENCE_S, HttpClient, Reply, main
from model.transforms import MEAN, STD
from service.pb import inference_pb2

_LENGTH = "Inference-Header-Content-Length"
_METHOD = "/inference.GRPCInferenceService/ModelInfer"
_OUTPUT = "probabilities"


def tensor_of(name: str, jpeg: bytes) -> tuple[str, list[int], bytes]:
    """The datatype, the shape and the bytes of an image as an input of that name."""
    if name == "image":
        return "BYTES", [1, 1], struct.pack("<I", len(jpeg)) + jpeg
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)))[None]
    if name == "pixels":
        return "UINT8", list(pixels.shape), pixels.tobytes()
    scaled = (pixels / np.float32(255) - np.array(MEAN)) / np.array(STD)
    planes = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)
    return "FP32", list(planes.shape), planes.tobytes()


class TensorHttpClient(HttpClient):
    """Posts one image as a binary tensor, and asks for the probabilities as one."""

    def __init__(
        self, port: int, path: str, patience_s: float = PATIENCE_S, channels: int = 1
    ) -> None:
        model, _, self._name = path.partition("/")
        super().__init__(port, f"/v2/models/{model}/infer", patience_s, channels)

    def content(self, jpeg: bytes) -> tuple[dict[str, object], bytes]:  # noqa: D102
        datatype, shape, raw = tensor_of(self._name, jpeg)
        head = json.dumps(
            {
                "inputs": [
                    {
                        "name": self._name,
                        "datatype": datatype,
                        "shape": shape,
                        "parameters": {"binary_data_size": len(raw)},
                    }
                ],
                "outputs": [{"name": _OUTPUT, "parameters": {"binary_data": True}}],
            }
        ).encode()
        return {"Content-Type": "application/octet-stream", _LENGTH: len(head)}, head + raw

    def reply(self, body: bytes) -> Reply:  # noqa: D102
        del body  # the protocol has no word for the batch
        return Reply("200", 1)


class TensorGrpcClient:
    """Calls `ModelInfer` with one image as a raw tensor; the answer stays as it came."""

    def __init__(
        self, port: int, path: str, patience_s: float = PATIENCE_S, channels: int = 1
    ) -> None:
        del channels  # the one that it has is enough for a server of one process
        self._model, _, self._name = path.partition("/")
        self._patience_s = patience_s
        self._requests: dict[bytes, bytes] = {}
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._infer: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)

    async def send(self, jpeg: bytes) -> Reply:
        """Send one image; the status is the name of the gRPC code."""
        try:
            await self._infer(self._request(jpeg), timeout=self._patience_s)
        except grpc.aio.AioRpcError as failure:
            return Reply(failure.code().name)
        return Reply("OK", 1)

    def _request(self, jpeg: bytes) -> bytes:
        if jpeg not in self._requests:
            datatype, shape, raw = tensor_of(self._name, jpeg)
            tensor = inference_pb2.ModelInferRequest.InferInputTensor(
                name=self._name, datatype=datatype, shape=shape
            )
            wanted = inference_pb2.ModelInferRequest.InferRequestedOutputTensor(name=_OUTPUT)
            request = inference_pb2.ModelInferRequest(
                model_name=self._model, inputs=[tensor], outputs=[wanted], raw_input_contents=[raw]
            )
            self._requests[jpeg] = request.SerializeToString()
        return self._requests[jpeg]


if __name__ == "__main__":
    main("bench.oip_load", {"http": TensorHttpClient, "grpc": TensorGrpcClient})
