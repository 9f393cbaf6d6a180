"""The calls of operators and tools: health and reflection."""

from collections.abc import AsyncIterator, Sequence

from grpc import aio
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from service.security.access import Access
from service.transport.rpc import wire
from service.transport.rpc.calls import admitted, heard_out, many_answers, one_answer, uncounted
from service.transport.rpc.reading import Context, Reading

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name


class Health(health_aio.HealthServicer):  # type: ignore[misc]
    """grpc.health.v1 of the whole server and of its services, which share their state.

    Args:
        services: their names.
    """

    def __init__(self, services: Sequence[str]) -> None:
        super().__init__()
        self.services = services

    async def show(self, serving: bool) -> None:
        """Answer every check and watch with this state from now on."""
        status = (
            health_pb2.HealthCheckResponse.SERVING
            if serving
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        for service in ("", *self.services):
            await self.set(service, status)


def add_health(server: aio.Server, health: Health, reading: Reading) -> None:
    """Answer the probes of grpc.health.v1."""

    async def request(context: Context) -> health_pb2.HealthCheckRequest:
        return wire.parse(health_pb2.HealthCheckRequest, await reading.read_only(context))

    async def check(context: Context) -> bytes:
        response = await health.Check(await request(context), context)
        return bytes(response.SerializeToString())

    async def watch(context: Context) -> None:
        await health.Watch(await request(context), context)

    methods = {
        "Check": one_answer(uncounted(check)),
        "Watch": many_answers(uncounted(watch), health_pb2.HealthCheckResponse.SerializeToString),
    }
    server.add_registered_method_handlers(_HEALTH, methods)


def add_reflection(
    server: aio.Server, services: Sequence[str], reading: Reading, access: Access
) -> None:
    """Describe the services to those who may ask, and ask for them by name."""
    servicer = reflection.aio.ReflectionServicer((*services, _HEALTH, reflection.SERVICE_NAME))

    async def requests(
        context: Context,
    ) -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        while (message := await reading.read(context)) is not None:
            yield wire.parse(reflection_pb2.ServerReflectionRequest, message)

    async def reflect(context: Context) -> None:
        async for response in servicer.ServerReflectionInfo(requests(context), context):
            await context.write(response)

    serializer = reflection_pb2.ServerReflectionResponse.SerializeToString
    methods = {
        "ServerReflectionInfo": many_answers(
            uncounted(heard_out(admitted(access, reflect))), serializer
        )
    }
    server.add_registered_method_handlers(reflection.SERVICE_NAME, methods)
