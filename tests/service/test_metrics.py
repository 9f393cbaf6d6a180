import asyncio
import os
import shutil
import subprocess

import httpx
import pytest

from tests.clients import JPEG, over_grpc, over_http, over_json, over_stream
from tests.server import RunningServer


def change(before: dict[str, float], after: dict[str, float], name: str) -> float:
    return after[name] - before[name]


def requests(protocol: str, outcome: str, model: str = "dat_nano") -> str:
    return f"dat_requests_total,model={model},outcome={outcome},protocol={protocol},task=classify"


async def test_counters_equal_the_traffic(server):
    before = server.metrics()
    await asyncio.gather(
        *(over_http(server, [JPEG]) for _ in range(5)),
        *(over_json(server, [JPEG, b"x", JPEG]) for _ in range(2)),
        *(over_grpc(server, [JPEG], explain="points") for _ in range(4)),
        *(over_stream(server, [JPEG]) for _ in range(3)),
        *(over_http(server, [b"x"]) for _ in range(2)),
        over_grpc(server, [JPEG], model="other"),
    )
    after = server.metrics()
    assert change(before, after, requests("http", "ok")) == 7
    assert change(before, after, requests("http", "client_error")) == 2
    assert change(before, after, requests("grpc", "ok")) == 4
    assert change(before, after, requests("grpc", "client_error", "_unknown")) == 1
    assert change(before, after, requests("stream", "ok")) == 3
    images = 5 + 2 * 2 + 4 + 3
    assert change(before, after, "dat_images_total,model=dat_nano,task=classify") == images
    for name in (
        "dat_batch_images_total,kind=real,model=dat_nano",
        "dat_batch_size_sum,model=dat_nano",
    ):
        assert change(before, after, name) == images
    for stage in ("decode", "queue", "postprocess"):
        name = f"dat_stage_duration_seconds_count,model=dat_nano,stage={stage}"
        assert change(before, after, name) == images
    assert change(before, after, "dat_explain_requests_total,kind=points,model=dat_nano") == 4
    assert change(before, after, "dat_image_decode_errors_total,reason=unsupported") == 4
    batches = [name for name in after if name.startswith("dat_batches_total")]
    assert sum(change(before, after, name) for name in batches) == change(
        before, after, "dat_graph_replays_total,mode=eager,model=dat_nano"
    )
    for gauge in ("waiting", "running"):
        assert after[f"dat_requests_{gauge},model=dat_nano"] == 0
    for protocol in ("http", "grpc", "stream"):
        assert after[f"dat_requests_in_flight,protocol={protocol}"] == 0
    assert after["dat_model_ready,model=dat_nano"] == 1


def test_what_computes_is_shown(server):
    shown = server.metrics()
    models = httpx.get(f"{server.http_url}/v1/models").json()["models"]
    parameters = {model["name"]: model["parameters"] for model in models}
    assert len(parameters) == 3
    for model, count in parameters.items():
        labels = f"device=cpu:0,dtype=float32,hardware=cpu,kernels=off: cpu,model={model},tf32=off"
        assert shown[f"dat_model_engine_info,backend=torch,{labels}"] == 1
        # Those of its parameters, less what was folded, and its geometry.
        weights = shown[f"dat_model_memory_bytes,device=cpu:0,model={model},part=weights"]
        assert 0.95 < weights / (4 * count) < 1.5
        assert shown[f"dat_model_memory_bytes,device=cpu:0,model={model},part=graphs"] == 0


async def test_what_clients_send_adds_no_series(server):
    async def ask(n: int) -> None:
        async with httpx.AsyncClient(base_url=server.http_url) as client:
            await client.get(f"/path/{n}")
            await client.post(f"/v1/classify?model=m{n}", content=JPEG)
        await over_grpc(server, [JPEG], model=f"m{n}")

    await ask(0)
    before = len(server.metrics())
    for n in range(1, 20):
        await ask(n)
    assert len(server.metrics()) == before < 1600


def test_names_and_types_are_clean(server: RunningServer):
    promtool = shutil.which("promtool")
    if promtool is None and "CI" not in os.environ:
        pytest.skip("promtool is not installed (Debian: prometheus)")
    assert promtool
    text = httpx.get(server.metrics_url).content
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert not checked.stdout
    assert not checked.stderr
