"""The routes of the Open Inference Protocol for regions of shared memory."""

from dataclasses import asdict

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from service.transport.http.small_body import read_small
from service.transport.oip.shared_memory import Region, SharedMemory, no_cuda


class _RegionBody(BaseModel, strict=True):
    """What a region is registered with; what is not known is ignored.

    Attributes:
        key: of the shared memory.
        offset: of the region in it, bytes.
        byte_size: of the region.
    """

    key: str
    offset: int = 0
    byte_size: int


def add_shared_memory(app: FastAPI, memory: SharedMemory) -> None:
    """Serve the regions of callers, each to its own.

    Args:
        app: has the routes from now on.
        memory: the regions.
    """

    async def status(request: Request) -> JSONResponse:
        """A caller sees the regions that it registered."""
        regions = memory.regions(_owner(request), _region(request))
        return JSONResponse([asdict(region) for region in regions])

    async def register(request: Request) -> JSONResponse:
        """From then on requests of the same caller may name the region."""
        body = await read_small(request, _RegionBody)
        region = Region(_region(request), body.key, body.offset, body.byte_size)
        memory.register(_owner(request), region)
        return JSONResponse({})

    async def unregister(request: Request) -> JSONResponse:
        """The shared memory itself stays as it is."""
        memory.unregister(_owner(request), _region(request))
        return JSONResponse({})

    async def cuda_status() -> JSONResponse:
        """None can be registered."""
        return JSONResponse([])

    async def cuda_unregister() -> JSONResponse:
        """None is left."""
        return JSONResponse({})

    async def cuda_register() -> JSONResponse:
        """Refused."""
        raise no_cuda()

    for kind, asked, dropped, added in (
        ("system", status, unregister, register),
        ("cuda", cuda_status, cuda_unregister, cuda_register),
    ):
        base = f"/v2/{kind}sharedmemory"
        one = f"{base}/region/{{region}}"
        for path, methods, answer in (
            *((f"{place}/status", ["GET"], asked) for place in (base, one)),
            *((f"{place}/unregister", ["POST"], dropped) for place in (base, one)),
            (f"{one}/register", ["POST"], added),
        ):
            # For clients of the same machine alone, whose libraries know them.
            app.add_api_route(path, answer, methods=methods, include_in_schema=False)


def _owner(request: Request) -> str:
    return str(request.state.caller.name)


def _region(request: Request) -> str:
    """The region of the path; empty where it names none."""
    return str(request.path_params.get("region", ""))
