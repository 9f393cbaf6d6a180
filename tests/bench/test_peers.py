"""The comparison with other servers measures ours, and what it says of a window is what came."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import environments
from bench.peers import __main__ as peers
from bench.peers import processes, tables
from bench.peers.load import Answer, summarize
from bench.peers.running import WrongAnswer, check
from bench.peers.setting import Setting
from bench.peers.sides import PEERS, Side, in_a_tensor, ours, sides
from service.settings.server import Server

FOLDER = Path(peers.__file__).parent
DEMO = {"DAT_MODEL__NAME": "dat_nano"}


@pytest.mark.slow
def test_our_server_is_compared_with_itself() -> None:
    twice = [ours("ours"), ours("again")]
    failing = Side("broken", ["-c", "raise SystemExit('no such model')"], {"any": {}})
    comparison = peers.Comparison(DEMO, seconds=0.5, warmup=0.1)
    result = peers.compare(comparison, [*twice, failing], [2], rounds=1)

    assert [row["side"] for row in result["servers"]] == ["ours", "again"]
    for row in result["servers"]:
        assert row["start_s"] > 0
        assert row["memory"] > 100e6  # torch alone is more
    assert [(row["side"], row["concurrency"]) for row in result["loads"]] == [
        ("ours", 2),
        ("again", 2),
    ]
    first, second = result["loads"]
    assert first["ratio"] == 1
    assert second["ratio"] == pytest.approx(second["requests_per_s"] / first["requests_per_s"])
    for row in result["loads"]:
        assert set(row["statuses"]) == {"200"}
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["server_cpus"] > row["client_cpus"] > 0
    assert [one["side"] for one in result["failed"]] == ["broken"]
    shown = tables(result)
    assert "| 2 | again |" in shown
    assert "no such model" in shown


def test_a_server_that_says_something_else_is_found_out() -> None:
    expected = [{"label": "star", "score": 0.9}, {"label": "ring", "score": 0.1}]
    check([{"label": "star", "score": 0.900001}, {"label": "ring", "score": 0.1}], expected)
    for wrong in (
        [{"label": "star", "score": 0.9001}, {"label": "ring", "score": 0.1}],
        [{"label": "ring", "score": 0.9}, {"label": "star", "score": 0.1}],
    ):
        with pytest.raises(WrongAnswer):
            check(wrong, expected)


def test_the_rate_counts_answers_and_latencies_are_of_what_was_sent_in_the_window() -> None:
    answers = [
        Answer(0.0, 0.9, "200"),  # the last before the window
        Answer(0.9, 1.4, "200"),
        Answer(1.4, 1.9, "200"),
        Answer(1.5, 1.6, "503"),
        Answer(1.9, 2.5, "200"),  # sent in the window, answered after it
        Answer(2.5, 3.0, "200"),
    ]
    figures = summarize(answers, 1.0, 2.0)
    assert figures["requests_per_s"] == pytest.approx(2 / (1.9 - 0.9))
    assert figures["statuses"] == {"200": 2, "503": 1}
    assert figures["p50_ms"] == pytest.approx(550)
    assert summarize([], 1.0, 2.0) == {"requests_per_s": 0.0, "statuses": {}}


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    """A process with a child in another session, both of which end after a minute."""
    child = "import time; time.sleep(60)"
    program = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], start_new_session=True)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=os.environ | {processes.MARK: "of-this-test"},
        stdout=subprocess.PIPE,
        text=True,
    )
    yield process
    process.kill()
    process.communicate()


def test_all_processes_of_a_server_are_known_and_ended(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    both = {parent.pid, int(parent.stdout.readline())}
    found = processes.marked("of-this-test")
    assert set(found) == both
    assert processes.memory(found) > processes.memory([parent.pid]) > 0
    assert processes.cpu_s(found) >= processes.cpu_s([parent.pid]) >= 0
    began = time.monotonic()
    processes.end("of-this-test", patience_s=0.1)
    assert parent.wait() == -9
    assert time.monotonic() - began < 30
    while processes.marked("of-this-test"):
        time.sleep(0.01)


def test_a_setting_reaches_the_app_of_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(workers=2, threads=1, batch=4, wait_ms=3)
    for name, value in setting.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PEER_PORT", "8123")
    assert Setting.read() == Setting(workers=2, threads=1, batch=4, wait_ms=3, port=8123)


def test_an_answerin_a_tensor_is_read() -> None:
    text = b'{"predictions": [{"label": "star", "score": 0.5}]}'
    body = b'{"outputs": [{"name": "answer"}]}' + len(text).to_bytes(4, "little") + text
    assert in_a_tensor(body) == [{"label": "star", "score": 0.5}]


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_each_peer_has_its_app_and_exact_versions(peer: Side) -> None:
    assert peer.environment is not None
    pins = (environments.PINS / f"{peer.environment}.txt").read_text().splitlines()
    assert all("==" in pin for pin in pins)
    words = " ".join(peer.arguments)
    (app,) = [path for path in FOLDER.glob("*.py") if f"bench.peers.{path.stem}" in words]
    compile(app.read_text(), app, "exec")  # the peer itself is in an environment of its own
    assert len(peer.settings) == 2


def test_a_way_to_run_ours_that_there_is_not_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = {name: field for name, field in Server.model_fields.items() if name != "front_ends"}
    monkeypatch.setattr(Server, "__pydantic_fields__", without)
    names = [side.name for side in sides()]
    assert "ours, one process" in names
    assert not any("front ends" in name for name in names)
    assert "skipped" in capsys.readouterr().out
