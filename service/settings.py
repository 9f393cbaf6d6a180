"""Every setting of the server, read once from the environment.

A group is a nested model: `DAT_BATCHING__MAX_BATCH` is `Settings.batching.max_batch`.
"""

import difflib
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import from_json
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.machine import cores, memory_bytes, open_files

PREFIX = "DAT_"
_FILES_AT_REST = 40
_FEWEST_CONNECTIONS = 8
_MOST_CONNECTIONS = 4096


Dtype = Literal["auto", "float32", "bfloat16", "float16"]
ResizeMode = Literal["official", "letterbox"]
Decode = Literal["exact", "fast"]
Backend = Literal["torch", "openvino"]
Weights = Literal["model", "ema"]


_DAY_S = 86_400
_MOST_THREADS = 512
# What the options of gRPC can hold, less the framing of a message.
_LARGEST_BODY = 2**31 - 2**20
_LARGEST_SIDE = 4096


def _written_list(value: object) -> object:
    """The list that a variable holds: `1, 2` and `[1, 2]` are the same; a number stays one."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return from_json(value)
        except ValueError as fault:
            raise ValueError(f"a list is written as in [1, 2]: {fault}") from fault
    return value.split(",") if "," in value else value


def _one_or_more(value: object) -> object:
    listed = _written_list(value)
    return [listed] if isinstance(listed, str) else listed


Sizes = Annotated[
    tuple[Annotated[int, Field(ge=1, le=1024)], ...],
    Field(max_length=64),
    BeforeValidator(_one_or_more),
]
Origins = Annotated[
    tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/?#\s]+)$")], ...],
    BeforeValidator(_one_or_more),
]
Side = Annotated[int, Field(ge=1, le=_LARGEST_SIDE)]
# One less would leave one cell of the last map, which has no scale.
LEAST_INPUT_SIDE = 33
PaddedSide = Annotated[int, Field(ge=64, le=_LARGEST_SIDE, multiple_of=32)]
InputSide = Annotated[int, Field(ge=LEAST_INPUT_SIDE, le=_LARGEST_SIDE)]
InputSizes = Annotated[
    tuple[tuple[InputSide, InputSide], ...],
    Field(max_length=7),  # with the letterbox no more than a detector remembers
    BeforeValidator(_written_list),
]


class _Group(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings that belong together."""


class ModelChoice(_Group):
    """One model: which weights, and what answers call it."""

    name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
        description="Name of the model in requests and metrics; without it, its variant. Without "
        "any setting of the model the three demo models are served.",
    )
    variant: str | None = Field(
        None,
        description="`dat_nano`, or a published variant such as `dat_tiny_224`; without it the "
        "name if that is one, else what the checkpoint shows.",
    )
    version: str = Field("1", min_length=1, description="Version shown in every answer.")
    checkpoint: Path | None = Field(
        None,
        description="Weights: an official `.pth` or this repository's `.safetensors`; "
        "the demo models need none.",
    )
    sha256: str | None = Field(
        None,
        pattern=r"^[0-9a-fA-F]{64}$",
        description="SHA-256 that the checkpoint file must have, hexadecimal.",
    )
    weights: Weights = Field(
        "model",
        description="Which weights of a checkpoint that holds two sets: `model`, those that were "
        "trained, or `ema`, their moving average.",
    )
    labels: Path | None = Field(
        None,
        description="Class names in order of the class index: a JSON list, or a text file with "
        "one on each line; without it those stored in the checkpoint, or ImageNet's for 1000 "
        "classes.",
    )
    image_size: Annotated[Side | tuple[Side, Side] | None, BeforeValidator(_written_list)] = Field(
        None,
        description="Input size, pixels: a side, or `[height, width]`; without it that of the "
        "checkpoint or of the variant.",
    )
    resize_mode: ResizeMode | None = Field(
        None,
        description="How a detector resizes the images of requests that name no mode: `official`, "
        "or `letterbox`; without it `official`.",
    )
    letterbox_size: PaddedSide | None = Field(
        None,
        description="Side of a detector's letterbox, pixels, a multiple of 32; without it that "
        "of the variant.",
    )


class Model(ModelChoice):
    """What is served."""

    file: Path | None = Field(
        None,
        description="Several models: a model file (TOML); no other setting of the model may be "
        "given beside it.",
    )

    folder: Path | None = Field(
        None,
        description="Folder in which the models are found: its `models.toml`, or else its one "
        "checkpoint, with `labels.txt` or `labels.json` beside it. The name of the model counts "
        "where it has none of its own, other settings of the model for a checkpoint.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "Model":
        beside = self.model_fields_set - {"file"}
        if self.folder is not None:
            for other in ("file", "checkpoint"):
                if getattr(self, other) is not None:
                    raise ValueError(f"folder and {other} both say where the model is; leave one")
        if self.file is not None and beside:
            raise ValueError(f"a model file is given, so {', '.join(sorted(beside))} belongs there")
        return self


class Engine(_Group):
    """The device and how it computes."""

    device: str = Field(
        "auto",
        pattern=r"^(auto|cuda|cpu(,cpu){0,63}|cuda:[0-9]{1,2}(,cuda:[0-9]{1,2}){0,63})$",
        description="`cpu`, `cuda`, `cuda:N`, or `auto`: a GPU if there is one, else a CPU device "
        "on each NUMA node. Several, as in `cuda:0,cuda:1`, each run every model; a batch goes to "
        "the least loaded.",
    )
    dtype: Dtype = Field(
        "auto",
        description="Precision of the features; `auto`: float32 on CPU (the log says whether "
        "bfloat16 is faster), on CUDA bfloat16, or float16 where the GPU only emulates bfloat16.",
    )
    backend: Backend = Field(
        "torch",
        description="What computes classifiers: `torch`, or, on a CPU, `openvino`, an "
        "extra (`pip install -c constraints.txt '.[openvino]'`).",
    )
    kernels: bool = Field(
        True,
        description="Fused kernels on CUDA, where they can be built (a warning says why not); "
        "`false`: plain torch.",
    )
    compile: bool = Field(
        False,
        description="Let `torch.compile` fuse what the graphs of classifiers capture (CUDA): "
        "minutes at the first start.",
    )
    cache: Path | None = Field(
        None,
        description="Folder that keeps compiled code from start to start, so that only the server "
        "may write there; without it the folders of torch and Triton, and none for OpenVINO.",
    )
    threads: int = Field(
        0,
        ge=0,
        le=_MOST_THREADS,
        description="CPU threads of one forward pass; 0: one for each core (not for each "
        "hyper-thread), shared by several CPU devices.",
    )
    hang_timeout_s: float = Field(
        0.0,
        ge=0,
        allow_inf_nan=False,
        description="Time after which a batch that does not come back counts as hung and its "
        "device as lost, seconds; 0: twenty times what the slowest batch of the model took for as "
        "many pixels, and at least 30 s (60 s on CUDA).",
    )


class Batching(_Group):
    """The queue and the batches that leave it."""

    max_batch: int = Field(
        0,
        ge=0,
        le=1024,
        description="Most images in one batch; 0: 8 on CPU, on CUDA 64 of 224 pixels a side and "
        "fewer larger ones.",
    )
    buckets: Sizes = Field(
        (),
        description="Batch sizes the device runs, as in `1,2,4`; a batch is padded to the next "
        "one. Empty: every size on CPU, where padding costs; on CUDA powers of two and the halves "
        "between them: 1, 2, 3, 4, 6, 8, 12.",
    )
    sizes: InputSizes = Field(
        (),
        description="Input sizes of detectors (padded, so multiples of 32) and segmenters made "
        "ready at the start, as a JSON list of `[height, width]`: on CUDA a graph for each bucket, "
        "on CPU the geometry. Others run eagerly until they come again.",
    )
    queue_limit: int = Field(
        256,
        gt=0,
        le=65_536,
        description="Most images that are admitted and not yet on the device; beyond it 429.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Batching":
        if len(set(self.buckets)) < len(self.buckets):
            raise ValueError("buckets must be distinct sizes")
        if self.buckets and self.max_batch not in (0, max(self.buckets)):
            raise ValueError("max_batch must equal the largest of the buckets")
        return self


class Limits(_Group):
    """What one request may hold."""

    max_image_bytes: int = Field(
        16 * 2**20, gt=0, description="Largest encoded image, bytes; beyond it 413."
    )
    max_body_bytes: int = Field(
        64 * 2**20,
        gt=0,
        le=_LARGEST_BODY,
        description="Largest request body or gRPC message, bytes; beyond it 413.",
    )
    max_bytes_in_flight: int = Field(
        0,
        ge=0,
        description="Most bytes of requests that are received and not yet decoded, over HTTP and "
        "gRPC together; beyond it 429 before a body is read. As many bytes of answers may wait "
        "for clients that do not take them; beyond it the connection with the most is cut. 0: a "
        "quarter of the memory that the process may have.",
    )
    max_pixels: int = Field(
        25_000_000,
        gt=0,
        le=10**9,
        description="Most pixels of an image, read from its header before decoding.",
    )
    max_request_pixels: int = Field(
        100_000_000,
        gt=0,
        description="Most pixels of all images of one request together; beyond it 413.",
    )
    max_pixels_in_flight: int = Field(
        0,
        ge=0,
        description="Most pixels of images that wait to be decoded, of all requests together; "
        "beyond it 429. Those that are segmented count once more until they are answered. 0: four "
        "times those of one request.",
    )
    max_picture_pixels: int = Field(
        20_000_000,
        gt=0,
        le=10**8,
        description="Most pixels of a picture of `visualize`, with the plain image beside it; "
        "beyond it 400. Each counts as four of those that wait to be decoded.",
    )
    max_images: int = Field(32, gt=0, description="Most images in one request.")
    max_streams: int = Field(
        64,
        gt=0,
        description="Most calls of ClassifyStream, DetectStream and SegmentStream at a time; "
        "beyond it RESOURCE_EXHAUSTED. Each may be sending a message, whose bytes count when it is "
        "there.",
    )
    max_shared_memory_bytes: int = Field(
        0,
        ge=0,
        description="Most bytes of POSIX shared memory that clients on the same machine may "
        "register for tensors of the Open Inference Protocol; each client may register any object "
        "in `/dev/shm` that the server may open. 0: none. Needs `DAT_SERVER__FRONT_ENDS=0`.",
    )
    decode_threads: int = Field(
        0,
        ge=0,
        le=_MOST_THREADS,
        description="Threads that decode and resize images; 0: one for each core.",
    )
    decode: Decode = Field(
        "exact",
        description="How images of classifiers are decoded: `exact`, as in the official "
        "evaluation; or `fast`, JPEGs of at least twice the needed size at a half, a quarter or "
        "an eighth of theirs, which changes the pixels a little.",
    )
    default_timeout_s: float = Field(
        30.0, gt=0, le=_DAY_S, description="Deadline of a request that names none, seconds."
    )

    @property
    def decoders(self) -> int:
        """How many threads decode."""
        return self.decode_threads or cores()

    @property
    def pixels_in_flight(self) -> int:
        """Most pixels of images that wait to be decoded."""
        return self.max_pixels_in_flight or 4 * self.max_request_pixels

    @property
    def bytes_in_flight(self) -> int:
        """Most bytes of requests that are received and not yet decoded."""
        return self.max_bytes_in_flight or max(self.max_body_bytes, memory_bytes() // 4)


class Server(_Group):
    """Addresses and the end of life."""

    host: str = Field("0.0.0.0", description="Address of all three ports.")  # noqa: S104
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP; 0 picks a free port.")
    grpc_port: int = Field(8001, ge=0, le=65535, description="gRPC; 0 picks a free port.")
    metrics_port: int = Field(8002, ge=0, le=65535, description="Metrics; 0 picks a free port.")
    grpc_message_timeout_s: float = Field(
        30.0,
        gt=0,
        description="How long the message of a gRPC call may take to come, seconds; while others "
        "wait for its place in memory, 2 s.",
    )
    grpc_keepalive_s: float = Field(
        60.0,
        ge=1,
        description="How long a gRPC connection may be silent before its client is pinged, "
        "seconds; it is closed if no answer comes within 20 s.",
    )
    grpc_min_ping_interval_s: float = Field(
        5.0,
        ge=0,
        description="Shortest interval at which gRPC clients may ping the server, seconds; a "
        "connection that pings more often is closed.",
    )
    grpc_max_connection_age_s: float = Field(
        0.0,
        ge=0,
        description="Age at which the client of a gRPC connection is asked to connect anew, so "
        "that load balancers spread its calls again, seconds; 0: never.",
    )
    grpc_connection_grace_s: float = Field(
        30.0,
        gt=0,
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
        description="Longest time from the start of an HTTP connection or request to the end of "
        "its headers, seconds; beyond it 408.",
    )
    body_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Period over which the body of an HTTP request must come at 1 KiB a second "
        "at least, seconds; else 408.",
    )
    write_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Longest time in which an HTTP client takes nothing of its answers, seconds; "
        "beyond it the connection is cut.",
    )
    keep_alive_s: float = Field(
        75.0,
        gt=0,
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
        le=_DAY_S,
        description="How long after SIGTERM requests are still admitted, readiness already off, "
        "so that load balancers notice; seconds.",
    )
    drain_grace_s: float = Field(
        30.0,
        gt=0,
        le=_DAY_S,
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
        if self.model_control and not self.open_inference:
            raise ValueError("model_control needs open_inference, whose calls it allows")
        return self


class Security(_Group):
    """API keys and TLS; `docs/security.md` says how they work together."""

    api_keys: Path | None = Field(
        None,
        description="Key file (TOML) of `dat-serve key`: every request but those of probes needs "
        "one of its keys. Read again when it changes.",
    )
    tls_certificate: Path | None = Field(
        None,
        description="Certificate of the server and those between it and its authority (PEM): HTTP "
        "and gRPC over TLS, metrics not. Read again when it changes, as are the two below.",
    )
    tls_key: Path | None = Field(
        None,
        description="Private key of the certificate (PEM); without it, the file of the "
        "certificate holds it too.",
    )
    client_ca: Path | None = Field(
        None,
        description="Certificates of the authorities (PEM) that sign those of clients: clients "
        "have to show one (mTLS), but HTTP's probes need none.",
    )
    require_client_certificate: bool = Field(
        True,
        description="`false`: HTTP checks the certificate of a client that has one, and gRPC asks "
        "for none.",
    )

    @property
    def needs_client_certificate(self) -> bool:
        """Whether a client has to have a certificate."""
        return self.client_ca is not None and self.require_client_certificate

    @model_validator(mode="after")
    def _consistent(self) -> "Security":
        for field in ("tls_key", "client_ca"):
            if getattr(self, field) is not None and self.tls_certificate is None:
                raise ValueError(f"{field} needs tls_certificate")
        return self


class Log(_Group):
    """Log lines on standard output."""

    format: Literal["console", "json"] = Field(
        "console", description="`console` for people, `json` for machines."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )


class Settings(BaseSettings):
    """All settings; the environment is read when it is made.

    Raises:
        pydantic.ValidationError: a value is out of its range, a variable of the prefix is
            unknown, or two settings contradict each other.
    """

    # A list is read where its field is checked, so that its faults are shown as all others are.
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", enable_decoding=False, frozen=True
    )

    model: Model = Model()
    engine: Engine = Engine()
    batching: Batching = Batching()
    limits: Limits = Limits()
    server: Server = Server()
    security: Security = Security()
    log: Log = Log()

    @property
    def front_ends(self) -> int:
        """How many processes answer; 0 where one does all."""
        if self.server.front_ends == "auto":
            spare = cores() - len(self.engine.device.split(","))
            # On two cores one process answers more (`bench.scale`).
            return spare if spare > 1 else 0
        return self.server.front_ends

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: dict[str, Any]) -> dict[str, Any]:
        # pydantic-settings ignores variables that name no field, so a misspelt group would be.
        known = variables()
        unknown = sorted(
            name
            for name in os.environ
            if name.upper().startswith(PREFIX)
            and name.upper() not in known
            and not _of_a_service(name, os.environ[name])
        )
        if unknown:
            raise ValueError("; ".join(_unknown(name) for name in unknown[:_FEW]))
        return {name: _written(group) for name, group in values.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.limits.max_images > self.batching.queue_limit:
            raise ValueError(
                "DAT_LIMITS__MAX_IMAGES must not exceed DAT_BATCHING__QUEUE_LIMIT, or a full "
                "request could never be admitted"
            )
        if self.limits.max_image_bytes > self.limits.max_body_bytes:
            raise ValueError(
                "DAT_LIMITS__MAX_IMAGE_BYTES must not exceed DAT_LIMITS__MAX_BODY_BYTES"
            )
        if self.limits.max_pixels > self.limits.max_request_pixels:
            raise ValueError(
                "DAT_LIMITS__MAX_PIXELS must not exceed DAT_LIMITS__MAX_REQUEST_PIXELS"
            )
        if self.limits.max_shared_memory_bytes and not self.server.open_inference:
            raise ValueError(
                "DAT_LIMITS__MAX_SHARED_MEMORY_BYTES is for the Open Inference Protocol and needs "
                "DAT_SERVER__OPEN_INFERENCE=true"
            )
        if self.limits.max_shared_memory_bytes and self.front_ends:
            raise ValueError(
                "DAT_LIMITS__MAX_SHARED_MEMORY_BYTES needs DAT_SERVER__FRONT_ENDS=0: a region is "
                "registered with one process, and another one may get the request that names it"
            )
        if self.limits.bytes_in_flight < self.limits.max_body_bytes:
            raise ValueError(
                "DAT_LIMITS__MAX_BODY_BYTES must not exceed DAT_LIMITS__MAX_BYTES_IN_FLIGHT, or "
                "the largest request could never be admitted"
            )
        return self


_FEW = 3  # faults that are shown at a time

# Variables that Kubernetes sets in every container for each Service of the namespace, such as one
# that is called `dat-serve`.
_SERVICE = re.compile(
    rf"{PREFIX}[A-Z0-9]+(_[A-Z0-9]+)*?"
    r"_(SERVICE_(HOST|PORT(_[A-Z0-9]+)*)|PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_URL = re.compile(rf"{PREFIX}([A-Z0-9]+_)*PORT=(tcp|udp|sctp)://.*")


def _of_a_service(name: str, value: str) -> bool:
    return bool(_SERVICE.fullmatch(name) or _SERVICE_URL.fullmatch(f"{name}={value}"))


def _unknown(name: str) -> str:
    """What to do about a variable that sets nothing."""
    known = variables()
    group = [variable for variable in known if variable.startswith(f"{name.upper()}__")]
    near = difflib.get_close_matches(name.upper(), known, n=3, cutoff=0.75)
    if group:
        hint = f"it is the group of {', '.join(group)}"
    elif near:
        hint = f"did you mean {' or '.join(near)}?"
    else:
        hint = "`dat-serve settings` prints all there are"
    return f"unknown setting {name:.100}; {hint}"


def _written(group: Any) -> Any:
    """The values of a group as they were meant: without white space around, empty ones not set."""
    if not isinstance(group, dict):
        return group
    stripped = {name: v.strip() if isinstance(v, str) else v for name, v in group.items()}
    return {name: value for name, value in stripped.items() if value != ""}


def variables() -> dict[str, tuple[type[BaseModel], str]]:
    """Every environment variable with the group and the field that it sets."""
    groups = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {
        f"{PREFIX}{name}__{field}".upper(): (group, field)
        for name, group in groups.items()
        if isinstance(group, type) and issubclass(group, BaseModel)
        for field in group.model_fields
    }


def table() -> str:
    """The settings as a Markdown table for `docs/settings.md`."""
    rows = ["| variable | default | meaning |", "|---|---|---|"]
    for variable, (group, field) in variables().items():
        info = group.model_fields[field]
        default = info.default if info.default not in (None, "", ()) else ""
        rows.append(
            f"| `{variable}` | {f'`{default}`' if default != '' else ''} | {info.description} |"
        )
    return "\n".join(rows)


_TABLE_START, _TABLE_END = "<!-- settings -->", "<!-- /settings -->"


def write_table(path: Path) -> None:
    """Replace the table between the markers of a Markdown file."""
    before, rest = path.read_text("utf-8").split(_TABLE_START)
    _, after = rest.split(_TABLE_END)
    path.write_text(f"{before}{_TABLE_START}\n{table()}\n{_TABLE_END}{after}", "utf-8")


if __name__ == "__main__":
    write_table(Path(sys.argv[1]))
