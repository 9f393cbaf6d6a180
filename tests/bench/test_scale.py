"""The figures of many processes are of the processes that they name."""

import os
import subprocess
import sys
import time

import httpx
import pytest

from bench.load import cpu_s
from bench.running_server import running_server
from bench.scale import summary, tables
from service.processes.birth import Birth
from tests.server import ROOT

JPEG = (ROOT / "demo" / "samples" / "star.jpg").read_bytes()


def test_cpu_time_is_told_by_process() -> None:
    assert cpu_s(os.getpid()) == {"server": pytest.approx(time.process_time(), abs=0.5)}
    birth = Birth("worker", 3, 0, (2, 4, 1), 0)
    busy = "sum(range(10**7)); print(flush=True); input()"
    for command, names in ((["child", "1", birth.text()], {"supervisor", "worker-3"}), ([], None)):
        with subprocess.Popen(
            [sys.executable, "-c", busy, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            child.stdout.readline()
            used = cpu_s(os.getpid())
            child.communicate(b"\n")
        assert used.keys() == (names or {"server"})
        assert used.get("worker-3", 1.0) > 0


def figures(rate: float, **cpu: float) -> dict[str, object]:
    by_process = {name.replace("_", "-"): used for name, used in cpu.items()}
    common = {"p50_ms": 1e3 / rate, "p99_ms": 2e3 / rate, "client_cpu_s": 0.5}
    return common | {"answered_per_s": rate, "cpu_s_by_process": by_process}


def test_an_answer_costs_what_each_process_spent_on_all_of_them() -> None:
    many = [
        figures(rate, supervisor=0.1, worker_0=4.0, front_end_0=1.0, front_end_1=2.0)
        for rate in (100, 200, 400)
    ]
    one = [figures(100, server=10.0)] * 3
    of_many, of_one = summary(many, one, seconds=5), summary(one, one, seconds=5)
    assert (of_many["answered_per_s"], of_many["ratio"], of_many["ratio_range"]) == (200, 2, [1, 4])
    expected = {"supervisor": 0.1, "worker-0": 4, "front-end-0": 1, "front-end-1": 2}
    assert of_many["cpu_ms"] == pytest.approx(expected)
    assert of_one["cpu_ms"] == pytest.approx({"server": 20})
    shape = {"model": "null", "wire": "HTTP", "in_flight": 8}
    rows = [shape | {"front_ends": 0, **of_one}, shape | {"front_ends": 2, **of_many}]
    *_, first, second = tables({"rows": rows}).splitlines()
    assert first.endswith("| - | - | - | **20.00** | 0.10 |")
    assert second.endswith("| 0.10 | 1.00 + 2.00 | 4.00 | **7.10** | 0.10 |")


@pytest.mark.slow
def test_the_null_server_answers_without_computing_in_its_worker() -> None:
    shape = {"DAT_MODEL__NAME": "dat_nano", "DAT_SERVER__FRONT_ENDS": 2}
    with running_server(None, "bench.null_server", **shape) as server:
        url = f"http://127.0.0.1:{server.ports['http']}/v1/classify"
        (result,) = httpx.post(url, content=JPEG).json()["results"]
        found = server.load("grpc", channels=3, concurrency=4, seconds=0.5, warmup=0.1)
    scores = [one["score"] for one in result["predictions"]]
    assert scores == pytest.approx([1 / 12] * len(scores))
    assert found["statuses"].keys() == {"OK"}
    names = {"supervisor", "worker-0", "front-end-0", "front-end-1"}
    assert found["cpu_s_by_process"].keys() == names
