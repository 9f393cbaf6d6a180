"""Addresses, interfaces, connections, and the end of life."""

from itertools import combinations
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from service.machine import open_files
from service.settings.group import DAY_S, Group, form, one_or_more

_FILES_AT_REST = 40
_FEWEST_CONNECTIONS = 8
_MOST_CONNECTIONS = 4096

Origin = Annotated[
    str,
    form(
        r"\*|https?://[^/?#*\s]+",
        "as in https://example.com, without a path and with no * in it, or * for all",
    ),
]
Origins = Annotated[tuple[Origin, ...], BeforeValidator(one_or_more)]


class Server(Group):
    """Addresses and the end of life."""

    host: str = Field("0.0.0.0", description="Address of all three ports.")  # noqa: S104
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP; 0 picks a free port.")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC; 0 picks a free port.")
    metrics_port: int = Field(8002, ge=0, le=65535, description="Metrics; 0 picks a free port.")
    grpc_message_timeout_s: float = Field(
        30.0,
        gt=0,
        le=DAY_S,
        description="How long the message of a gRPC call may take to come, seconds; while others "
        "wait for its place in memory, 2 s.",
    )
    grpc_keepalive_s: float = Field(
        60.0,
        ge=1,
        le=DAY_S,
        description="How long a gRPC connection may be silent before its client is pinged, "
        "seconds; it is closed if no answer comes within 20 s.",
    )
    grpc_min_ping_interval_s: float = Field(
        5.0,
        ge=0,
        le=DAY_S,
        description="Shortest interval at which gRPC clients may ping the server, seconds; a "
        "connection that pings more often is closed.",
    )
    grpc_max_connection_age_s: float = Field(
        0.0,
        ge=0,
        le=DAY_S,
        description="Age at which the client of a gRPC connection is asked to connect anew, so "
        "that load balancers spread its calls again, seconds; 0: never.",
    )
    grpc_connection_grace_s: float = Field(
        30.0,
        gt=0,
        le=DAY_S,
        description="How long the calls of a connection that reached that age may go on, seconds.",
    )
    cors_origins: Origins = Field(
        (),
        description="Origins of the web pages whose scripts may use the HTTP interface, as a JSON "
        'list such as `["https://example.com"]`, or `*` for all.',
    )
    playground: bool = Field(
        True,
        description="The pages for browsers: the playground at `/`, and Swagger UI at `/docs`; "
        "`false`: neither is there.",
    )
    open_inference: bool = Field(
        True,
        description="The Open Inference Protocol, version 2, over HTTP under `/v2` and over gRPC; "
        "`false`: it is not there.",
    )
    front_ends: Annotated[int, Field(ge=0, le=64)] | Literal["auto"] = Field(
        0,
        description="Processes that receive requests, decode and answer, beside one for each "
        "device, so that the end of one does not take the others along; 0: one process for all; "
        "`auto`: one for each core that no device has, and none for a single such core.",
    )
    model_control: bool = Field(
        False,
        description="Whether every caller who may ask may also load and unload the models of the "
        "settings (Open Inference Protocol, `/v2/repository`); [reload.md](reload.md).",
    )
    header_timeout_s: float = Field(
        10.0,
        gt=0,
        le=DAY_S,
        description="Longest time from the start of an HTTP connection or request to the end of "
        "its headers, seconds; beyond it 408.",
    )
    body_timeout_s: float = Field(
        10.0,
        gt=0,
        le=DAY_S,
        description="Period over which the body of an HTTP request must come at 1 KiB a second "
        "at least, seconds; else 408.",
    )
    write_timeout_s: float = Field(
        10.0,
        gt=0,
        le=DAY_S,
        description="Longest time in which an HTTP client takes nothing of its answers, seconds; "
        "beyond it the connection is cut.",
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
        le=DAY_S,
        description="How long an HTTP connection may be idle between requests, seconds; above "
        "the 60 of common load balancers.",
    )
    max_connections: int = Field(
        0,
        ge=0,
        description="Most HTTP connections; beyond it those that idle give way, and a few more "
        "are left for probes. 0: what the limit on open files allows, at most 4096.",
    )
    drain_delay_s: float = Field(
        0.0,
        ge=0,
        le=DAY_S,
        description="How long after SIGTERM requests are still admitted, readiness already off, "
        "so that load balancers notice; seconds.",
    )
    drain_grace_s: float = Field(
        30.0,
        gt=0,
        le=DAY_S,
        description="How long requests in flight may take after the drain delay, seconds.",
    )

    @property
    def connections(self) -> int:
        """Most HTTP connections."""
        # Half of the files that neither engines nor loops keep open are for gRPC and metrics.
        spare = (open_files() - _FILES_AT_REST) // 2
        return self.max_connections or max(_FEWEST_CONNECTIONS, min(spare, _MOST_CONNECTIONS))

    @model_validator(mode="after")
    def _consistent(self) -> "Server":
        for one, other in combinations(("http_port", "grpc_port", "metrics_port"), 2):
            port = getattr(self, one)
            if port and port == getattr(self, other):
                raise ValueError(f"{one} and {other} are both {port}; each needs one of its own")
        if self.model_control and not self.open_inference:
            raise ValueError("model_control needs open_inference, whose calls it allows")
        return self
