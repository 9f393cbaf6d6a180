"""Models change while the server is asked: in one process, and in many."""

import asyncio
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any, NamedTuple

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.models.lineup import Lineup, ModelEntry
from service.reloading import Stamp, compare
from tests.clients import JPEG, Answer, eventually, over_http
from tests.faults import faulty
from tests.server import ROOT, RunningServer, start_server
from tests.versions import (
    ModelFolder,
    answered,
    crowd,
    descriptors,
    memory,
    processes,
    reload,
    until_reloaded,
)

SHAPES = (0, 2)  # front ends
SMALL: dict[str, Any] = {"DAT_ENGINE__THREADS": 1, "DAT_LIMITS__DECODE_THREADS": 1}


class Served(NamedTuple):
    server: RunningServer
    models: ModelFolder


@pytest.fixture(scope="module", params=SHAPES, ids=["one process", "many processes"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    models = ModelFolder(tmp_path_factory.mktemp("models"))
    models.serve({"m": "a0"})
    with start_server(
        DAT_MODEL__FILE=models.file, DAT_SERVER__FRONT_ENDS=request.param, **SMALL
    ) as server:
        yield Served(server, models)


def ready(server: RunningServer) -> bool:
    return httpx.get(f"{server.http_url}/health/ready").status_code == 200


def listed(server: RunningServer) -> dict[str, str]:
    """Versions of the models, by their names; the default is marked."""
    models = httpx.get(f"{server.http_url}/v1/models").json()["models"]
    return {one["name"]: one["version"] + "*" * one["default"] for one in models}


def reloads(server: RunningServer) -> dict[str, int]:
    start = "dat_model_reloads_total,outcome="
    shown = server.metrics()
    return {name.removeprefix(start): int(shown[name]) for name in shown if name.startswith(start)}


async def test_a_new_version_takes_over_without_a_failed_request(served):
    before = reloads(served.server)
    async with crowd(served.server, "m") as asked:
        for version in ("b1", "a2", "b3"):
            served.models.serve({"m": version})
            (said, _) = await reload(served.server)
            assert (said["model"], said["version"]) == ("m", version)
            assert listed(served.server) == {"m": f"{version}*"}
            await answered(asked, "m", version)
        assert (await reload(served.server))[0]["event"] == "model stays"
    assert not asked.failures
    assert asked.predictions["a"] != asked.predictions["b"]
    assert reloads(served.server) == before | {"reloaded": before["reloaded"] + 3}
    assert served.server.metrics()["dat_model_ready,model=m"] == 1

    def shown(version: str, value: str) -> bool:
        text = httpx.get(served.server.metrics_url).text
        return f'dat_model_ready{{model="m",version="{version}"}} {value}' in text

    assert await asyncio.to_thread(shown, "b3", "1.0")
    # In many processes a worker has both versions until nobody asks for the one before.
    await eventually(lambda: shown("a2", "0.0"))


async def test_what_cannot_be_loaded_leaves_the_version_before(served):
    models, server = served.models, served.server
    models.serve({"m": "a10"})
    await reload(server)
    before = reloads(server)

    def torn() -> None:
        models.put("m.safetensors", models.file.with_name("a.kept.safetensors").read_bytes()[:9999])

    faults = {
        "m.safetensors": torn,
        "SHA-256": lambda: models.serve({"m": "b11"}, sha256="0" * 64),
        "no variant": lambda: models.serve({"m": "b12"}, variant="resnet"),
        "dat_tiny_224": lambda: models.serve({"m": "b13"}, variant="dat_tiny_224"),
        "No such file": lambda: models.serve({"m": "b15"}, labels="none.txt"),
    }
    async with crowd(server, "m") as asked:
        for reason, fault in faults.items():
            fault()
            said = (await reload(server))[0]
            assert (said["event"], said["level"]) == ("model not reloaded", "error")
            assert reason in said["reason"]
            assert "dat-serve-metrics" not in said["reason"]
            assert ready(server)
            assert listed(server) == {"m": "a10*"}
        models.put("models.toml", "[[models]]\nname = 'm'\nname = 'm'")
        assert (await reload(server))[-1]["event"] == "reload failed"
        models.put("models.toml", "models = []")
        assert "models" in (await reload(server))[-1]["reason"]
    assert not asked.failures
    assert set(asked.versions) == {("m", "a10")}
    assert reloads(server)["failed"] == before["failed"] + len(faults) + 2
    models.serve({"m": "b14"})
    await reload(server)
    assert listed(server) == {"m": "b14*"}


@pytest.mark.slow
async def test_models_come_and_go(served):
    models, server = served.models, served.server
    async with crowd(server, "m") as asked:
        models.serve({"m": "a20"})
        await reload(server)
        models.serve({"m": "a20", "extra": "b21"}, default="extra")
        await reload(server)
        assert listed(server) == {"m": "a20", "extra": "b21*"}
        assert (await over_http(server, [JPEG])).version == "b21"
        async with crowd(server, "extra") as of_extra:
            await answered(of_extra, "extra", "b21")
            # Nothing goes where something fails.
            models.serve({"m": "a20", "other": "b22"}, variant="resnet", default="m")
            models.put("other.safetensors", b"no")
            await reload(server)
            assert listed(server) == {"m": "a20*", "extra": "b21"}
            models.serve({"m": "a20", "other": "b22"})
        assert not of_extra.failures
        large = asyncio.gather(*(over_http(server, [JPEG] * 32, model="extra") for _ in range(5)))
        await eventually(lambda: server.metrics()["dat_requests_waiting,model=extra"] > 8)
        said = await reload(server)
        for answer in await large:
            assert answer.error is None
            assert {one.error for one in answer.results} == {None}
        assert {line["model"]: line["event"] for line in said[:-1]} == {
            "m": "model stays", "extra": "model removed", "other": "model added",
        }  # fmt: skip
        assert (await over_http(server, [JPEG], model="extra")).error == "unknown_model"
        assert listed(server) == {"m": "a20*", "other": "b22"}

        def gauges() -> dict[str, float]:
            shown = server.metrics()
            counted = ("_total", "_count", "_sum", "_bucket", "_timestamp_seconds")
            names = {name: name.split(",")[0] for name in shown if "model=extra" in name}
            return {
                name: shown[name]
                for name, family in names.items()
                if not family.endswith(counted) and shown[name]
            }

        await eventually(lambda: not gauges())
        models.serve({"m": "a20"})
        await reload(server)
    assert not asked.failures


@pytest.mark.slow
async def test_nothing_is_left_of_versions_before(served):
    """A few reloads; `test_fifty_reloads` does many."""
    models, server = served.models, served.server
    models.serve({"m": "a30"})
    await reload(server)
    opened = descriptors(server)
    for version in ("b31", "a32"):
        models.serve({"m": version})
        await reload(server)
    await eventually(lambda: descriptors(server) <= opened)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("front_ends", SHAPES)
async def test_fifty_reloads(tmp_path, front_ends):
    models = ModelFolder(tmp_path)
    models.serve({"m": "a0"})
    used = []
    with start_server(
        DAT_MODEL__FILE=models.file, DAT_SERVER__FRONT_ENDS=front_ends, **SMALL
    ) as server:
        async with crowd(server, "m") as asked:
            for count in range(1, 51):
                version = "ab"[count % 2] + str(count)
                models.serve({"m": version})
                await reload(server)
                await answered(asked, "m", version)
                used.append(memory(server) / 2**20)
        print(f"MiB after each reload: {[round(one) for one in used]}")  # noqa: T201
        assert not asked.failures
        assert len(asked.versions) >= 50
    # Of a version 5 MiB at least are its own.
    assert median(used[40:]) - median(used[10:20]) < 32


async def answer_of_next_worker(server: RunningServer) -> Answer:
    async with asyncio.timeout(60):
        while (answer := await over_http(server, [JPEG])).error is not None:
            assert answer.error == "worker_lost"
            await asyncio.sleep(0.1)
    return answer


@pytest.mark.slow
async def test_a_worker_that_ends_while_it_loads_comes_back_with_what_serves(tmp_path):
    models = ModelFolder(tmp_path)
    models.serve({"m": "a0"})
    (tmp_path / "faults").mkdir()
    with faulty(
        tmp_path / "faults",
        DAT_MODEL__NAME="",
        DAT_MODEL__FILE=models.file,
        DAT_SERVER__FRONT_ENDS=1,
        **SMALL,
    ) as running:
        server = running.server
        worker = processes(server)[1]
        with running.fault("load"):
            models.serve({"m": "b1"})
            server.process.send_signal(signal.SIGHUP)
            while (line := server.log.get(timeout=30)) and line["event"] != "model":
                pass
            assert (await over_http(server, [JPEG])).version == "a0"
            models.put("m.safetensors", b"broken meanwhile")
            os.kill(worker, signal.SIGKILL)
            said = await until_reloaded(server)
            assert (said[0]["event"], said[0]["model"]) == ("model not reloaded", "m")
        answer = await answer_of_next_worker(server)
        assert answer.version == "a0"
        assert answer.results[0].predictions[0][0].startswith("a")
        models.serve({"m": "b2"})
        await reload(server)
        assert (await over_http(server, [JPEG])).version == "b2"
        # The next one loads the version that serves now.
        os.kill(processes(server)[-1], signal.SIGKILL)
        await asyncio.to_thread(server.wait_for_event, "process ended")
        assert (await answer_of_next_worker(server)).version == "b2"


@pytest.mark.slow
async def test_several_workers_change_together(tmp_path):
    """Or not at all: one of them ends while it loads, and the others unload what they have."""
    models = ModelFolder(tmp_path)
    models.serve({"m": "a0"})
    (tmp_path / "faults").mkdir()
    with faulty(
        tmp_path / "faults",
        DAT_MODEL__NAME="",
        DAT_MODEL__FILE=models.file,
        DAT_ENGINE__DEVICE="cpu,cpu",
        DAT_SERVER__FRONT_ENDS=2,
        **SMALL,
    ) as running:
        server = running.server
        async with crowd(server, "m") as asked:
            models.serve({"m": "b1"})
            await reload(server)
            await answered(asked, "m", "b1")
            with running.fault("load"):
                models.serve({"m": "a2"})
                server.process.send_signal(signal.SIGHUP)
                for _ in range(2):
                    while (line := server.log.get(timeout=30)) and line["event"] != "model":
                        pass
                os.kill(processes(server)[1], signal.SIGKILL)
                assert (await until_reloaded(server))[0]["event"] == "model not reloaded"
            assert set(asked.versions) == {("m", "a0"), ("m", "b1")}
            models.serve({"m": "a3"})
            await reload(server)
            await answered(asked, "m", "a3")
        # What was on the device of the worker that was killed.
        assert {failure.split(":")[0] for failure in asked.failures} <= {
            "worker_lost",
            "UNAVAILABLE",
        }
        assert len(asked.failures) <= 4


ENTRIES = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(1, 3)), min_size=1, unique_by=lambda one: one[0]
)


@settings(deadline=None)
@given(ENTRIES, ENTRIES)
def test_each_model_is_compared_by_name_and_all_that_it_is_made_of(before, after):
    def lineup(models: list[tuple[str, int]]) -> Lineup:
        return Lineup(models=tuple(ModelEntry(name=n, version=str(v)) for n, v in models))

    serving = {Stamp.of(entry): entry.name for entry in lineup(before).models}
    changes = compare(serving, lineup(after))
    assert [(one.stamp.entry.name, one.before) for one in changes.changed] == [
        (name, name if name in dict(before) else None)
        for name, version in after
        if dict(before).get(name) != version
    ]
    assert changes.same == [name for name, version in after if (name, version) in before]
    assert changes.gone == [name for name, _ in before if name not in dict(after)]


@settings(deadline=None)
@given(ENTRIES, ENTRIES, st.data())
def test_where_one_model_is_loaded_all_others_stay(before, after, data):
    entries = [ModelEntry(name=n, version=str(v)) for n, v in after]
    serving = {Stamp.of(ModelEntry(name=n, version=str(v))): (n, v) for n, v in before}
    only = data.draw(st.sampled_from(entries))
    changes = compare(serving, Lineup(models=tuple(entries)), only)
    had = dict(before).get(only.name)
    if had is not None and str(had) == only.version:
        assert (changes.changed, changes.same) == ([], [(only.name, had)])
    else:
        (change,) = changes.changed
        assert change.stamp == Stamp.of(only)
        assert change.before == (None if had is None else (only.name, had))
        assert changes.same == []
    assert changes.gone == []


@pytest.mark.parametrize("written", ["replaced", "written to", "touched", "gone", "linked"])
def test_a_file_that_was_written_or_replaced_is_another_version(tmp_path, written):
    path, other = tmp_path / "labels.txt", tmp_path / "other.txt"
    path.write_text("a\nb")
    entry = ModelEntry(name="m", labels=path)
    before = Stamp.of(entry)
    assert Stamp.of(entry) == before
    match written:
        case "replaced":
            other.write_text("a\nb")
            os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
            other.replace(path)
        case "written to":
            path.write_text("a\nbc")
        case "touched":
            os.utime(path, (1, 1))
        case "gone":
            path.unlink()
        case "linked":
            path.rename(other)
            path.symlink_to(tmp_path / "new.txt")
            (tmp_path / "new.txt").write_text("a\nb")
    assert Stamp.of(entry) != before


@pytest.mark.slow
def test_the_end_of_its_terminal_ends_the_server():
    ours, theirs = pty.openpty()
    name = os.ttyname(theirs)

    def enter() -> None:
        os.setsid()
        os.close(os.open(name, os.O_RDWR))  # of a new session it is the terminal now

    log, written = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "service"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
        | {f"DAT_SERVER__{port}_PORT": "0" for port in ("HTTP", "GRPC", "METRICS")}
        | {"DAT_MODEL__NAME": "dat_nano"},
        stdin=theirs,
        stdout=written,
        preexec_fn=enter,  # noqa: PLW1509
    )
    os.close(theirs)
    os.close(written)
    with os.fdopen(log) as lines:
        assert any(" ready" in line for line in lines)
        os.close(ours)
        assert process.wait(30) == 0
        assert any("stopped" in line for line in lines)
