"""Models are listed, described, counted, loaded and unloaded over both transports."""

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from google.protobuf.json_format import ParseDict

from service.models.load import BUNDLED
from service.pb import inference_pb2
from tests.clients import JPEG, eventually, over_grpc, over_http, over_json
from tests.control_clients import OPERATORS, Operator, Refused
from tests.server import RunningServer, start_server
from tests.versions import ModelFolder, answered, crowd, descriptors, processes, reload

SHAPES = (0, 2)  # front ends
SMALL: dict[str, Any] = {"DAT_ENGINE__THREADS": 1, "DAT_LIMITS__DECODE_THREADS": 1}
# The same failure over REST and over gRPC.
FORBIDDEN = (403, "PERMISSION_DENIED")
UNKNOWN = (404, "NOT_FOUND")
REFUSED = (400, "INVALID_ARGUMENT")
NOT_LOADED = (400, "FAILED_PRECONDITION")


class Served(NamedTuple):
    server: RunningServer
    models: ModelFolder
    rest: Operator
    grpc: Operator


@pytest.fixture(scope="module", params=SHAPES, ids=["one process", "many processes"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    models = ModelFolder(tmp_path_factory.mktemp("models"))
    models.serve({"m": "a0", "n": "b0"})
    with start_server(
        DAT_MODEL__FILE=models.file,
        DAT_SERVER__FRONT_ENDS=request.param,
        DAT_SERVER__MODEL_CONTROL="true",
        **SMALL,
    ) as server:
        yield Served(server, models, OPERATORS["rest"](server), OPERATORS["grpc"](server))


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest, served: Served) -> Operator:
    return OPERATORS[request.param](served.server)


def states(index: list[dict[str, str]]) -> dict[str, tuple[str, str]]:
    """Of each model the version that serves, or that was the last to."""
    found: dict[str, tuple[str, str]] = {}
    for one in index:
        found.setdefault(one["name"], (one["version"], one["state"]))
    return found


def listed(server: RunningServer) -> list[dict[str, str]]:
    found: list[dict[str, str]] = httpx.post(f"{server.http_url}/v2/repository/index").json()
    return found


def cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


async def get(server: RunningServer, path: str) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        return await client.get(path)


async def refusal(call: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        await call
    return refused.value


async def test_a_load_swaps_versions_without_a_failed_request(served):
    models, server = served.models, served.server
    async with crowd(server, "m") as asked:
        for operator, version in ((served.rest, "b1"), (served.grpc, "a2")):
            models.serve({"m": version, "n": "b0"})
            await operator.load("m")
            # Whichever process answers, it has the new version by now.
            for _ in range(4):
                assert (await over_http(server, [JPEG], model="m")).version == version
            await answered(asked, "m", version)
            assert states(await operator.index())["m"] == (version, "READY")
        before = server.metrics()["dat_model_reloads_total,outcome=reloaded"]
        await served.rest.load("m")  # nothing changed, so nothing is loaded
        assert server.metrics()["dat_model_reloads_total,outcome=reloaded"] == before
    assert not asked.failures
    assert set(asked.predictions) == {"a", "b"}


@pytest.mark.slow
async def test_a_load_waits_until_every_front_end_has_the_new_version(served):
    models, server = served.models, served.server
    still = [pid for pid in processes(server) if b'"front-end"' in cmdline(pid)][1:]
    for pid in still:  # none in one process
        os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(1.5)  # from then on it gets no connections
        models.serve({"m": "b5", "n": "b0"})
        load = asyncio.create_task(served.rest.load("m"))
        await eventually(lambda: listed(server)[0]["version"] == "b5")
        await asyncio.sleep(1)
        assert not still or not load.done()
    finally:
        for pid in still:
            os.kill(pid, signal.SIGCONT)
    await load
    for _ in range(4):
        assert (await over_http(server, [JPEG], model="m")).version == "b5"


@pytest.mark.slow
async def test_a_load_touches_no_other_model(served):
    models = served.models
    models.serve({"m": "a10", "n": "a11", "new": "b12"}, default="new")
    await served.rest.load("m")
    assert states(await served.grpc.index()) == {
        "m": ("a10", "READY"), "n": ("b0", "READY"), "new": ("b12", "UNAVAILABLE"),
    }  # fmt: skip
    assert (await over_http(served.server, [JPEG], model="n")).version == "b0"
    assert (await over_http(served.server, [JPEG])).model == "m"
    await served.grpc.load("new")
    assert (await over_http(served.server, [JPEG], model="new")).version == "b12"
    models.serve({"m": "a10", "n": "b0"})
    await reload(served.server)
    assert set(states(await served.rest.index(ready=True))) == {"m", "n"}


async def test_what_cannot_be_loaded_leaves_the_version_before(served):
    models, server = served.models, served.server
    models.serve({"m": "a20", "n": "b0"})
    await served.rest.load("m")
    faults = {
        "SHA-256": lambda: models.serve({"m": "b21", "n": "b0"}, sha256="0" * 64),
        "m.safetensors": lambda: models.put("m.safetensors", b"torn"),
        "models.toml": lambda: models.put("models.toml", "[[models"),
    }
    async with crowd(server, "m") as asked:
        for reason, fault in faults.items():
            models.serve({"m": "a20", "n": "b0"})
            fault()
            for operator in (served.rest, served.grpc):
                refused = await refusal(operator.load("m"))
                assert refused.status in NOT_LOADED
                assert reason in refused.message
            assert states(await served.rest.index(ready=True)) == {
                "m": ("a20", "READY"), "n": ("b0", "READY"),
            }  # fmt: skip
        assert (await get(server, "/v2/health/ready")).status_code == 200
    assert not asked.failures
    assert set(asked.versions) == {("m", "a20")}
    models.put("models.toml", "")
    models.serve({"m": "b22", "n": "b0"})
    await served.grpc.load("m")
    assert (await over_http(server, [JPEG], model="m")).version == "b22"


async def test_the_index_says_why_a_newer_version_is_not_there(served):
    models = served.models
    models.serve({"m": "a30", "n": "b0"})
    await served.rest.load("m")
    models.serve({"m": "a30", "n": "b31"}, sha256="0" * 64)  # the first, m
    await refusal(served.rest.load("m"))
    of_m = next(one for one in await served.grpc.index() if one["name"] == "m")
    assert (of_m["version"], of_m["state"]) == ("a30", "READY")
    assert "SHA-256" in of_m["reason"]
    models.serve({"m": "a32", "n": "b0"})
    await served.rest.load("m")
    of_m = next(one for one in await served.grpc.index() if one["name"] == "m")
    assert (of_m["version"], of_m["reason"]) == ("a32", "")


async def test_an_unload_answers_what_was_asked_and_nothing_after(served):
    models, server = served.models, served.server
    models.serve({"m": "a40", "n": "b0"})
    await served.rest.load("m")
    async with crowd(server, "n") as others:
        large = asyncio.gather(*(over_http(server, [JPEG] * 16, model="m") for _ in range(2)))
        await eventually(lambda: server.metrics()["dat_requests_waiting,model=m"] > 4)
        await served.grpc.unload("m")
        # It came back when all of these had their answers.
        for answer in await asyncio.wait_for(large, 30):
            assert answer.error is None
            assert {one.error for one in answer.results} == {None}
        for ask in (over_http, over_grpc):
            assert (await ask(server, [JPEG], model="m")).error == "unknown_model"
        for operator in (served.rest, served.grpc):
            for call in (operator.config("m"), operator.statistics("m")):
                assert (await refusal(call)).status in UNKNOWN
        assert states(await served.grpc.index()) == {
            "m": ("a40", "UNAVAILABLE"), "n": ("b0", "READY"),
        }  # fmt: skip
        assert states(await served.rest.index(ready=True)) == {"n": ("b0", "READY")}
        assert (await get(server, "/v2/health/ready")).status_code == 200
        await served.rest.unload("m")  # it is unloaded already
        await served.grpc.load("m")
        assert (await over_http(server, [JPEG], model="m")).version == "a40"
    assert not others.failures


@pytest.mark.slow
async def test_the_last_model_may_be_unloaded_and_a_reload_brings_all_back(served):
    models, server = served.models, served.server
    models.serve({"m": "a50", "n": "b0"})
    await served.rest.load("m")
    for model in ("m", "n"):
        await served.grpc.unload(model)
    assert {state for _, state in states(await served.rest.index()).values()} == {"UNAVAILABLE"}
    assert (await served.rest.statistics())["model_stats"] == []
    for path in ("/health/ready", "/v2/health/ready"):
        await eventually(lambda at=path: httpx.get(server.http_url + at).status_code == 503)
    assert (await get(server, "/health/live")).status_code == 200
    assert (await get(server, "/v1/models")).json() == {"models": []}
    assert (await over_http(server, [JPEG])).error == "unknown_model"
    assert (await over_grpc(server, [JPEG])).error == "unknown_model"
    await served.rest.load("n")
    assert (await over_http(server, [JPEG])).model == "n"
    await reload(server)
    assert (await over_http(server, [JPEG])).model == "m"


@pytest.mark.slow
async def test_nothing_is_left_of_what_was_unloaded(served):
    models, server = served.models, served.server
    models.serve({"m": "a55", "n": "b0"})
    await served.rest.load("m")
    await served.rest.load("n")
    await eventually(lambda: [one["state"] for one in listed(server)] == ["READY", "READY"])
    opened = descriptors(server)
    for _ in range(2):
        await served.grpc.unload("n")
        await served.grpc.load("n")
    await eventually(lambda: descriptors(server) <= opened)


@pytest.mark.slow
async def test_a_process_that_begins_anew_loads_only_what_is_loaded(served):
    server = served.server
    children = processes(server)[1:]  # none in one process
    await served.rest.load("m")
    await served.rest.unload("n")
    for pid in children:
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(server.wait_for_event, "process ended")
    async with asyncio.timeout(60):
        while (await over_http(server, [JPEG], model="m")).error is not None:
            await asyncio.sleep(0.1)
    assert (await over_http(server, [JPEG], model="n")).error == "unknown_model"
    assert set(states(await served.rest.index(ready=True))) == {"m"}
    await served.grpc.load("n")
    assert (await over_http(server, [JPEG], model="n")).error is None


@pytest.mark.parametrize("name", ["x", "..", "m.safetensors", "a" * 300, "%2e%2e%2fm"])
async def test_only_models_of_the_settings_are_loaded(served, operator, name):
    for change in (operator.load, operator.unload):
        assert (await refusal(change(name))).status in UNKNOWN


@pytest.mark.parametrize("parameter", ["config", "file:1/model.pth"])
async def test_no_client_brings_a_model_of_its_own(served, operator, parameter):
    refused = await refusal(operator.load("m", {parameter: "eA=="}))
    assert refused.status in REFUSED
    assert parameter in refused.message


@pytest.mark.slow
async def test_what_is_asked_all_at_once_is_done_one_after_the_other(served):
    models, server = served.models, served.server
    models.serve({"m": "b60", "n": "b0"})
    changes = [served.rest.load("m"), served.grpc.unload("n"), served.grpc.load("n")]
    await asyncio.gather(*changes, *(served.rest.index() for _ in range(20)))
    assert (await over_http(server, [JPEG], model="m")).version == "b60"
    await served.rest.load("n")
    assert (await over_http(server, [JPEG], model="n")).version == "b0"


def counted(metrics: dict[str, float], model: str) -> dict[str, Any]:
    """The statistics of a model as its metrics have them."""

    def total(name: str, **labels: str) -> float:
        asked = {f"{key}={value}" for key, value in {"model": model, **labels}.items()}
        return sum(
            value
            for key, value in metrics.items()
            if key.split(",")[0] == name and asked <= set(key.split(",")[1:])
        )

    def spent(count: float, seconds: float) -> dict[str, int]:
        return {"count": round(count), "ns": round(seconds * 1e9)}

    def stage(name: str) -> dict[str, int]:
        return spent(images, total("dat_stage_duration_seconds_sum", stage=name))

    images = total("dat_images_total")
    computed = sum(
        size * total("dat_batch_duration_seconds_sum", size=str(size)) for size in range(1, 33)
    )

    ok = [total(f"dat_{name}_total", outcome="ok") for name in ("requests", "request_seconds")]
    every = [total(f"dat_{name}_total") for name in ("requests", "request_seconds")]
    return {
        "inference_count": images,
        "execution_count": total("dat_batch_size_count"),
        "success": spent(*ok),
        "fail": spent(every[0] - ok[0], every[1] - ok[1]),
        "queue": stage("queue"),
        "compute_input": stage("decode"),
        "compute_infer": spent(images, computed),
        "compute_output": stage("postprocess"),
        "cache_hit": spent(0, 0),
        "cache_miss": spent(0, 0),
    }


async def test_statistics_equal_the_metrics(served):
    server, models = served.server, served.models
    models.serve({"m": "a70", "n": "b0"})
    await served.rest.load("m")
    (before,) = (await served.rest.statistics("n"))["model_stats"]
    await asyncio.gather(
        *(over_http(server, [JPEG], model="n") for _ in range(5)),
        *(over_json(server, [JPEG, b"x", JPEG], model="n") for _ in range(2)),
        *(over_grpc(server, [JPEG], model="n") for _ in range(3)),
        *(over_http(server, [b"x"], model="n") for _ in range(2)),
    )
    metrics = server.metrics()
    (of_rest,) = (await served.rest.statistics("n"))["model_stats"]
    (of_grpc,) = (await served.grpc.statistics("n", "b0"))["model_stats"]
    every = await served.rest.statistics()
    assert [one["name"] for one in every["model_stats"]] == ["m", "n"]
    assert every["model_stats"][1] == of_rest

    assert (of_rest["name"], of_rest["version"]) == ("n", "b0")
    assert of_rest["inference_count"] - before["inference_count"] == 5 + 4 + 3
    success, failed = of_rest["inference_stats"]["success"], of_rest["inference_stats"]["fail"]
    assert success["count"] - before["inference_stats"]["success"]["count"] == 5 + 2 + 3
    assert failed["count"] - before["inference_stats"]["fail"]["count"] == 2
    expected = counted(metrics, "n")
    for name in ("inference_count", "execution_count"):
        assert of_rest[name] == expected.pop(name)
    assert set(of_rest["inference_stats"]) == set(expected)
    for name, spent in of_rest["inference_stats"].items():
        assert spent["count"] == expected[name]["count"], name
        assert spent["ns"] == pytest.approx(expected[name]["ns"], rel=1e-9, abs=100), name
    # Batches of each size make up the images and the times.
    batches = of_rest["batch_stats"]
    assert sum(one["compute_infer"]["count"] for one in batches) == of_rest["execution_count"]
    images = sum(one["batch_size"] * one["compute_infer"]["count"] for one in batches)
    assert images == of_rest["inference_count"]
    times = sum(one["batch_size"] * one["compute_infer"]["ns"] for one in batches)
    assert times == pytest.approx(of_rest["inference_stats"]["compute_infer"]["ns"], abs=100)
    assert of_rest["last_inference"] > before["last_inference"]
    # gRPC says the same; its JSON writes numbers of 64 bits as strings.
    message = inference_pb2.ModelStatistics
    assert ParseDict(of_grpc, message()) == ParseDict(of_rest, message())


async def test_statistics_of_another_version_are_not_there(served, operator):
    for call in (operator.statistics("n", "none"), operator.config("n", "none")):
        assert (await refusal(call)).status in UNKNOWN


@pytest.mark.slow
@pytest.mark.parametrize("front_ends", SHAPES)
async def test_a_model_without_a_name_is_called_by_its_variant(tmp_path, front_ends):
    shutil.copy(BUNDLED["dat_nano"], tmp_path / "model.safetensors")
    with start_server(
        DAT_MODEL__FOLDER=tmp_path,
        DAT_SERVER__FRONT_ENDS=front_ends,
        DAT_SERVER__MODEL_CONTROL="true",
        **SMALL,
    ) as server:
        operator = OPERATORS["rest"](server)
        await operator.unload("dat_nano")
        assert states(await operator.index()) == {"dat_nano": ("1", "UNAVAILABLE")}
        (tmp_path / "model.safetensors").rename(tmp_path / "away")
        refused = await refusal(operator.load("dat_nano"))
        assert "holds no model" in refused.message
        (tmp_path / "away").rename(tmp_path / "model.safetensors")
        await operator.load("dat_nano")
        assert states(await operator.index()) == {"dat_nano": ("1", "READY")}
        shutil.copy(BUNDLED["swin_nano"], tmp_path / "new")
        (tmp_path / "new").replace(tmp_path / "model.safetensors")
        await operator.load("dat_nano")  # what there is now in its place
        assert states(await operator.index(ready=True)) == {"swin_nano": ("1", "READY")}
        assert (await over_http(server, [JPEG], model="swin_nano")).error is None
        assert (await refusal(operator.unload("dat_nano"))).status in UNKNOWN


async def test_callers_may_not_load_unless_a_setting_allows_it(server):
    for kind in OPERATORS.values():
        operator: Operator = kind(server)
        for change in (operator.load, operator.unload):
            for model in ("dat_nano", "none"):
                refused = await refusal(change(model))
                assert refused.status in FORBIDDEN
                assert "DAT_SERVER__MODEL_CONTROL=true" in refused.message
        assert states(await operator.index())["dat_nano"][1] == "READY"
    assert (await over_http(server, [JPEG])).error is None


@pytest.mark.parametrize("model", ["dat_nano", "mask_rcnn_dat_nano"])
async def test_a_config_fits_the_metadata_of_its_model(server, model):
    rest, over_rpc = (kind(server) for kind in OPERATORS.values())
    config = await rest.config(model)
    message = inference_pb2.ModelConfig
    assert ParseDict(await over_rpc.config(model), message()) == ParseDict(config, message())
    metadata = (await get(server, f"/v2/models/{model}")).json()
    assert (config["name"], config["platform"]) == (model, metadata["platform"])
    for key in ("input", "output"):
        described = {one["name"]: one for one in metadata[f"{key}s"]}
        assert {one["name"] for one in config[key]} == set(described)
        for one in config[key]:
            facts = described[one["name"]]
            assert one["dims"] == facts["shape"][1:]
            kind = {"BYTES": "STRING"}.get(facts["datatype"], facts["datatype"])
            assert one["data_type"] == f"TYPE_{kind}"
    assert all(one["optional"] for one in config["input"])
    sizes = config["dynamic_batching"]["preferred_batch_size"]
    assert sizes == sorted(sizes)
    assert max(sizes) == config["max_batch_size"]
    listed = (await get(server, "/v1/models")).json()["models"]
    (card,) = [one for one in listed if one["name"] == model]
    assert config["max_batch_size"] == min(card["max_batch"], 32)


def test_the_server_says_which_extensions_it_has(served, server):
    def extensions(of: RunningServer) -> set[str]:
        return set(httpx.get(f"{of.http_url}/v2").json()["extensions"])

    assert {"model_configuration", "statistics"} <= extensions(server)
    assert "model_repository" not in extensions(server)
    assert "model_repository" in extensions(served.server)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"ready": "perhaps"}', b'{"ready": true}x'])
def test_a_body_that_makes_no_sense_is_refused(server, body):
    answer = httpx.post(f"{server.http_url}/v2/repository/index", content=body)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_a_body_that_is_too_large_is_refused(server):
    url = f"{server.http_url}/v2/repository/models/dat_nano/load"
    answer = httpx.post(url, content=b" " * 100_000)
    assert (answer.status_code, list(answer.json())) == (413, ["error"])
