"""The servers that are compared, and how each may be set up.

Of several settings of a server the best is found before the rounds (`bench.peers`).
"""

import json
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.peers.setting import Setting
from service.settings.server import Server

# The best class first: each has a `label` and a `score`.
Predictions = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Side:
    """One server.

    Attributes:
        name: in the table.
        arguments: of its Python interpreter.
        settings: from words to variables of its environment.
        environment: whose packages it needs, see `bench.environments`; `None` means ours.
        path: of a request.
        header: that a request has beside the usual ones.
        variables: of its environment in any setting; `{port}` is that of HTTP, `{folder}` one for
            whatever it writes.
        predictions: from the body of its answer.
    """

    name: str
    arguments: Sequence[str]
    settings: Mapping[str, Mapping[str, str]]
    environment: str | None = None
    path: str = "/"
    header: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    predictions: Callable[[bytes], Predictions] = lambda body: json.loads(body)["predictions"]


def ours(name: str, **variables: str) -> Side:
    """Our server with some settings."""
    return Side(
        name,
        ["-m", "service"],
        {"as it is": variables},
        path="/v1/classify",
        variables={
            "DAT_SERVER__HOST": "127.0.0.1",
            "DAT_SERVER__HTTP_PORT": "{port}",
            "DAT_SERVER__GRPC_PORT": "0",
            "DAT_SERVER__METRICS_PORT": "0",
        },
        predictions=lambda body: json.loads(body)["results"][0]["predictions"],
    )


def _peer(name: str, module: str, *settings: Setting, **more: Any) -> Side:
    """A peer whose app is the module of that name in this folder."""
    return Side(
        name,
        more.pop("arguments", ["-m", f"bench.peers.{module}"]),
        {str(setting): setting.environment for setting in settings},
        environment=more.pop("environment", module),
        variables={"PEER_PORT": "{port}", **more.pop("variables", {})},
        **more,
    )


def in_a_tensor(body: bytes) -> Predictions:
    """From an answer of Triton to raw bytes: JSON, the length of the text in four bytes, the text.

    What is not ASCII would be two characters here, and in the text of a JSON there is none.
    """
    _, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    predictions: Predictions = json.loads(body[end + 4 :])["predictions"]
    return predictions


ALONE = Setting(workers=2, threads=1, batch=1)
SHARED = Setting(workers=1, threads=2, batch=8)

OURS = (
    ours("ours, one process"),
    ours("ours again (A/A)"),
    ours("ours, cpu,cpu", DAT_ENGINE__DEVICE="cpu,cpu"),
)
FRONT_ENDS = ours("ours, 2 front ends", DAT_SERVER__FRONT_ENDS="2")

PEERS = (
    _peer(
        "mosec",
        "mosec",
        ALONE,
        SHARED,
        path="/inference",
        variables={"MOSEC_PORT": "{port}", "MOSEC_TIMEOUT": "60000"},
    ),
    _peer("LitServe", "litserve", ALONE, SHARED, path="/predict"),
    _peer(
        "PyTriton",
        "pytriton",
        SHARED,
        Setting(workers=2, threads=1, batch=8),
        path="/v2/models/classify/infer",
        header="Inference-Header-Content-Length: 0",
        # Triton embeds a Python, which has to be the one whose standard library it finds.
        variables={"LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR")},
        predictions=in_a_tensor,
    ),
    _peer(
        "Ray Serve",
        "ray_serve",
        ALONE,
        SHARED,
        environment="ray",
        variables={"RAY_USAGE_STATS_ENABLED": "0"},
    ),
    _peer(
        "BentoML",
        "bentoml",
        ALONE,
        SHARED,
        arguments=[
            *("-m", "bentoml", "serve", "bench.peers.bentoml:Classify"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ],
        path="/classify",
        variables={"BENTOML_DO_NOT_TRACK": "True", "BENTOML_HOME": "{folder}"},
    ),
    _peer("KServe", "kserve", SHARED, ALONE, path="/v1/models/classify:predict"),
)


def sides() -> list[Side]:
    """All servers; a way to run ours that this version does not have is left out, with a line."""
    known = "front_ends" in Server.model_fields
    if not known:
        print(f"{FRONT_ENDS.name}: skipped, as this version has no DAT_SERVER__FRONT_ENDS")
    return [*OURS, *([FRONT_ENDS] if known else []), *PEERS]
