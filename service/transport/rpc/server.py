"""The gRPC interface, put together."""

from collections.abc import Sequence
from math import ceil
from typing import Any

import grpc

from service.byte_budget import ByteBudget
from service.machine import open_files
from service.metrics.replica import Metrics
from service.security.access import Access
from service.settings.limits import Limits
from service.settings.server import Server
from service.tasks.catalogue import Catalogue
from service.transport.oip.control import Control
from service.transport.oip.inference import Inference
from service.transport.rpc.calls import Calls, many_answers, one_answer
from service.transport.rpc.last_calls import LastCalls
from service.transport.rpc.oip import InferCalls, add_open_inference
from service.transport.rpc.oip_control import control_calls
from service.transport.rpc.oip_shared_memory import shared_memory_calls
from service.transport.rpc.picture_messages import RPC_VISUALIZE
from service.transport.rpc.reading import Reading
from service.transport.rpc.streams import Streams
from service.transport.rpc.task import RpcTask
from service.transport.rpc.v1 import UNREAD_BYTES, OneCall, TaskCalls, add_models
from service.transport.rpc.watching import Health, add_health, add_reflection
from service.transport.unread import UnreadAnswers

# gRPC refuses a message that is too large in its own words. To refuse it in ours, gRPC is told
# a limit that is larger by this factor.
_RECEIVED = 2
# While others wait, a message may take this long to come, seconds.
_PATIENCE_S = 2.0
# The share of the open files that gRPC may use; HTTP, metrics and models need the others.
_CONNECTIONS_OF_FILES = 1 / 4
_MOST_CONNECTIONS = 1000
_HANDSHAKE_TIMEOUT_S = 10.0
_IDLE_S = 300.0
_STREAMS_OF_A_CONNECTION = 128
_METADATA_BYTES = 16 * 1024
_KEEPALIVE_TIMEOUT_S = 20.0
# Calls without images; their messages come with their headers.
_SMALL_MESSAGES = 8
_SMALL_PATIENCE_S = 0.1


def create_server(  # noqa: PLR0917
    tasks: Sequence[RpcTask[Any, Any]],
    catalogue: Catalogue,
    health: Health,
    metrics: Metrics,
    budget: ByteBudget,
    unread: UnreadAnswers,
    *,
    inference: Inference | None,
    control: Control | None,
    last_calls: LastCalls,
    access: Access,
    limits: Limits,
    server: Server,
    version: str,
    shared: bool = False,
) -> grpc.aio.Server:
    """The gRPC interface over the cores, with health and reflection.

    Args:
        tasks: that are served.
        catalogue: of the cores.
        health: what is said of it.
        metrics: of the replica.
        budget: of the bytes of requests.
        unread: bounds the answers that clients have not taken.
        inference: the models as the Open Inference Protocol sees them, if it is served.
        control: what that protocol's clients call beside inference.
        last_calls: what calls pass that come before this server stops.
        access: who may ask.
        limits: of the settings.
        server: settings of connections.
        version: of the server.
        shared: whether other processes of this server listen to the same port.
    """
    rpc_server = grpc.aio.server(options=_options(limits, server, shared=shared))
    calls = Calls(metrics, access, last_calls, unread)
    timeout_s = server.grpc_message_timeout_s
    small = Reading(_SMALL_MESSAGES, patience_s=_SMALL_PATIENCE_S, timeout_s=timeout_s)
    places = max(1, budget.limit // (_RECEIVED * limits.max_body_bytes))
    large = Reading(places, patience_s=_PATIENCE_S, timeout_s=timeout_s)
    for task in tasks:
        requests = TaskCalls(
            task,
            catalogue,
            metrics,
            budget,
            access=access,
            limits=limits,
            reading=large,
            streams=Streams(budget, limits, unread),
        )
        stream = f"{task.method}Stream"
        methods = {
            task.method: one_answer(calls.counted(task.method, requests.one)),
            stream: many_answers(calls.counted(stream, requests.many, stream=True)),
        }
        rpc_server.add_registered_method_handlers(task.service, methods)
    pictures = OneCall(
        RPC_VISUALIZE, catalogue, metrics, budget, access=access, limits=limits, reading=large
    )
    method = RPC_VISUALIZE.method
    rpc_server.add_registered_method_handlers(
        RPC_VISUALIZE.service, {method: one_answer(calls.counted(method, pictures.one))}
    )
    if inference is not None:
        infer = InferCalls(
            inference,
            metrics,
            budget,
            access=access,
            limits=limits,
            reading=large,
            streams=Streams(budget, limits, unread),
        )
        beside = dict(shared_memory_calls(inference.memory, access, small))
        if control is not None:
            beside |= control_calls(control, small)
        add_open_inference(
            rpc_server, inference, calls, infer, reading=small, version=version, beside=beside
        )
    add_models(rpc_server, catalogue, calls, small)
    add_health(rpc_server, health, small)
    add_reflection(rpc_server, health.services, small, access)
    return rpc_server


def _options(limits: Limits, server: Server, *, shared: bool) -> list[tuple[str, int]]:
    def milliseconds(seconds: float) -> int:
        return ceil(seconds * 1e3)

    options = {
        "grpc.max_receive_message_length": _RECEIVED * limits.max_body_bytes,
        # Points of many images outgrow the default of 4 MiB.
        "grpc.max_send_message_length": -1,
        # Two servers on one port would share its connections silently.
        "grpc.so_reuseport": int(shared),
        "grpc.max_allowed_incoming_connections": min(
            _MOST_CONNECTIONS, max(1, int(open_files() * _CONNECTIONS_OF_FILES))
        ),
        # Connections that say nothing, or have no calls for long, leave their place to others.
        "grpc.server_handshake_timeout_ms": milliseconds(_HANDSHAKE_TIMEOUT_S),
        "grpc.max_connection_idle_ms": milliseconds(_IDLE_S),
        "grpc.max_concurrent_streams": _STREAMS_OF_A_CONNECTION,
        # Between a soft limit and a hard one requests would be refused by chance.
        "grpc.max_metadata_size": _METADATA_BYTES,
        "grpc.absolute_max_metadata_size": _METADATA_BYTES,
        # Measured bandwidth would let megabytes in that nobody reads yet.
        "grpc.http2.bdp_probe": 0,
        "grpc.http2.lookahead_bytes": UNREAD_BYTES,
        "grpc.keepalive_time_ms": milliseconds(server.grpc_keepalive_s),
        "grpc.keepalive_timeout_ms": milliseconds(_KEEPALIVE_TIMEOUT_S),
        "grpc.keepalive_permit_without_calls": 1,
        "grpc.http2.min_ping_interval_without_data_ms": milliseconds(
            server.grpc_min_ping_interval_s
        ),
    }
    if server.grpc_max_connection_age_s:
        options["grpc.max_connection_age_ms"] = milliseconds(server.grpc_max_connection_age_s)
        options["grpc.max_connection_age_grace_ms"] = milliseconds(server.grpc_connection_grace_s)
    return list(options.items())
