"""The calls of the Open Inference Protocol for regions of shared memory."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from google.protobuf.message import Message

from service.pb import inference_pb2 as pb
from service.security.access import Access
from service.transport.oip.shared_memory import Region, SharedMemory, no_cuda
from service.transport.rpc import wire
from service.transport.rpc.calls import Answer, caller_of
from service.transport.rpc.reading import Context, Reading


def shared_memory_calls(
    memory: SharedMemory, access: Access, reading: Reading
) -> Mapping[str, Answer]:
    """What answers the calls, by their names; each caller has regions of its own.

    Args:
        memory: the regions.
        access: who asks.
        reading: of messages without tensors.
    """

    def status(request: pb.SystemSharedMemoryStatusRequest, owner: str) -> Message:
        response = pb.SystemSharedMemoryStatusResponse()
        for region in memory.regions(owner, request.name):
            told = response.RegionStatus(**asdict(region))
            response.regions[region.name].CopyFrom(told)
        return response

    def register(request: pb.SystemSharedMemoryRegisterRequest, owner: str) -> Message:
        region = Region(request.name, request.key, request.offset, request.byte_size)
        memory.register(owner, region)
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister(request: pb.SystemSharedMemoryUnregisterRequest, owner: str) -> Message:
        memory.unregister(owner, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_register(_: Message, _owner: str) -> Message:
        raise no_cuda()

    def call(kind: type[Any], work: Callable[[Any, str], Message]) -> Answer:
        async def answer(context: Context) -> bytes:
            request = wire.parse(kind, await reading.read_only(context))
            return work(request, caller_of(access, context).name).SerializeToString()

        return answer

    return {
        "SystemSharedMemoryStatus": call(pb.SystemSharedMemoryStatusRequest, status),
        "SystemSharedMemoryRegister": call(pb.SystemSharedMemoryRegisterRequest, register),
        "SystemSharedMemoryUnregister": call(pb.SystemSharedMemoryUnregisterRequest, unregister),
        "CudaSharedMemoryStatus": call(
            pb.CudaSharedMemoryStatusRequest, lambda *_: pb.CudaSharedMemoryStatusResponse()
        ),
        "CudaSharedMemoryRegister": call(pb.CudaSharedMemoryRegisterRequest, cuda_register),
        "CudaSharedMemoryUnregister": call(
            pb.CudaSharedMemoryUnregisterRequest, lambda *_: pb.CudaSharedMemoryUnregisterResponse()
        ),
    }
