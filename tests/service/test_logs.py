"""A log line is one line with its own fields, whatever they hold, and nobody waits for it."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from fcntl import F_SETPIPE_SZ, fcntl

import grpc
import httpx
import pytest
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from service import logs
from service.metrics.replica import Metrics
from service.settings.log import Log
from tests.server import ROOT

PRINTABLE = re.compile(r"[\x20-\x7e]+")
HEAD = re.compile(
    r'\S+Z \[(\w+) *\] ("(?:[^"\\]|\\.)*"|[^ ="]+(?: (?![a-z_]+=)[^ ="]+)*) *(?= [a-z_]+=|$)'
)
FIELD = re.compile(r' ([a-z_]+)=("(?:[^"\\]|\\.)*"|[^ ="]+)')

ANYTHING = st.text(st.characters(), max_size=100) | st.sampled_from(
    [
        "a status=200",
        "two words",
        " [error    ] ",
        "/x\n2026-01-01T00:00:00.000000Z [info     ] ready",
        "\x1b[2J\x1b[31mred",
        "\u202egnp.exe",
        "\udcff half \ud800",
        "\x9b31m\x7f\u2028\u0085\r",
        "'\"\\",
        "",
    ]
)
FIELDS = st.dictionaries(
    st.sampled_from(["path", "method", "request_id", "status", "source"]), ANYTHING | st.integers()
)


class Pipe:
    """What a log is written to, with the other end in hand."""

    def __init__(self):
        self.reading, writing = os.pipe()
        fcntl(writing, F_SETPIPE_SZ, 4096)
        self.stream = os.fdopen(writing, "w")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()
        os.close(self.reading)

    def read(self):
        return os.read(self.reading, 1 << 20)

    def read_until(self, event):
        """Every event up to the last of that name."""
        seen, rest = [], b""
        while not seen or seen[-1]["event"] != event:
            *lines, rest = (rest + self.read()).split(b"\n")
            seen += map(json.loads, lines)
        return seen


@contextmanager
def configured(form):
    """The log of this process in a pipe, and its writer."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    with Pipe() as pipe:
        try:
            yield pipe, logs.configure(Log(format=form), pipe.stream)
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
            logging.captureWarnings(capture=False)
            structlog.reset_defaults()


def parsed(line):
    """The event and the fields of a line for people."""
    head = HEAD.match(line)
    assert head, line
    rest = line[head.end() :]
    fields = FIELD.findall(rest)
    assert "".join(f" {name}={text}" for name, text in fields) == rest
    return value_of(head[2]), {name: value_of(text) for name, text in fields}


def value_of(text):
    return json.loads(text) if text.startswith('"') else text


def test_a_line_for_people_reads_back_into_exactly_its_fields():
    with configured("console") as (pipe, writer):

        @given(event=ANYTHING, fields=FIELDS)
        def check(event, fields):
            structlog.get_logger().info(event, **fields)
            writer.flush()
            text = pipe.read().decode("ascii")
            assert text.endswith("\n")
            line = text[:-1]
            assert PRINTABLE.fullmatch(line)
            shown = {name: json.loads(json.dumps(str(value))) for name, value in fields.items()}
            assert parsed(line) == (json.loads(json.dumps(event)), shown)
            # Nor does a search for a field find anything else.
            assert re.findall(r"(\w+)=", line) == sorted(fields)

        check()


def test_a_line_for_machines_is_json_of_exactly_its_fields():
    with configured("json") as (pipe, writer):

        @given(event=ANYTHING, fields=FIELDS)
        def check(event, fields):
            structlog.get_logger().info(event, **fields)
            writer.flush()
            text = pipe.read().decode("ascii")
            assert text.endswith("\n")
            assert PRINTABLE.fullmatch(text[:-1])
            line = json.loads(text)
            assert line.pop("timestamp")
            assert line.pop("level") == "info"
            # Half a surrogate pair is no character.
            assert line == {
                name: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
                for name, value in ({"event": event} | fields).items()
            }

        check()


def test_long_values_are_cut_and_numbers_that_json_has_not_are_words():
    with configured("json") as (pipe, writer):
        structlog.get_logger().info("x" * 5000, path="y" * 60_000, a=float("inf"), b=float("nan"))
        writer.flush()
        line = json.loads(pipe.read(), parse_constant=pytest.fail)
    assert len(line["event"]) == len(line["path"]) == 1003
    assert (line["a"], line["b"]) == ("Infinity", "NaN")


@pytest.mark.parametrize("form", ["console", "json"])
def test_messages_and_tracebacks_of_libraries_are_escaped_and_show_no_variables(form):
    def fail(upload):
        raise ValueError(
            f"cannot read\n2026-01-01T00:00:00Z [info     ] ready\x1b[31m {len(upload)}"
        )

    with configured(form) as (pipe, writer):
        try:
            fail(b"bytes of a caller")
        except ValueError:
            logging.getLogger("grpc").exception("it\nfailed\x1b[2J %s", "status=200")
        logging.getLogger("grpc").info("chatter")
        writer.flush()
        lines = pipe.read().decode().splitlines()
    assert all(line.isprintable() for line in lines)
    assert "test_logs.py" in "".join(lines)
    assert "cannot read" in "".join(lines)
    assert "bytes of a caller" not in "".join(lines)
    if form == "json":
        assert json.loads(lines[0])["event"] == "it\nfailed\x1b[2J status=200"
        assert len(lines) == 1
    else:
        assert parsed(lines[0]) == ("it\nfailed\x1b[2J status=200", {"logger": "grpc"})
        assert all(line.startswith("  ") for line in lines[1:])


def test_lines_that_nobody_reads_are_dropped_counted_and_told_in_their_place():
    metrics = Metrics(CollectorRegistry())
    with configured("json") as (pipe, writer):
        log = structlog.get_logger()
        for number in range(6000):
            log.info("line", number=number)
        writer.on_dropped(metrics.log_lines_dropped.inc)
        for number in range(6000, 10_000):
            log.info("line", number=number)
        writer.flush(0.1)
        dropped = metrics.registry.get_sample_value("dat_log_lines_dropped_total")
        kept = pipe.read_until("log lines dropped")
        assert dropped == writer.dropped > 4000
        assert kept.pop()["lines"] == dropped
        assert [line["number"] for line in kept] == list(range(10_000 - int(dropped)))
        log.info("line", number=-1)
        assert pipe.read_until("line")[-1]["number"] == -1


def test_a_reader_that_left_costs_its_lines_alone(tmp_path):
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    with fifo.open("w") as stream:
        writer = logs.LineWriter(stream.fileno(), json.dumps)
        os.close(first)
        for number in range(3):
            writer.put({"event": "lost", "number": number})
        writer.flush()
        assert writer.dropped == 3
        with fifo.open() as reader:
            writer.put({"event": "back"})
            told = json.loads(reader.readline())
            assert (told["event"], told["lines"]) == ("log lines dropped", 3)
            assert json.loads(reader.readline()) == {"event": "back"}


def test_an_event_that_cannot_be_shown_does_not_end_the_log():
    with configured("json") as (pipe, writer):
        structlog.get_logger().info("numbers", values=[{(): 1}])
        structlog.get_logger().info("next")
        writer.flush()
        lines = [json.loads(line)["event"] for line in pipe.read().splitlines()]
    assert lines == ["a log line could not be written", "next"]


async def test_what_comes_often_is_said_once_and_then_once_a_second_with_its_number():
    said = asyncio.Queue()
    refused = logs.Summed(lambda event, **fields: said.put_nowait((event, fields)), "refused")
    for _ in range(1000):
        refused.add(status=429)
    refused.add(status=503)
    assert [said.get_nowait() for _ in range(said.qsize())] == [
        ("refused", {"status": 429}),
        ("refused", {"status": 503}),
    ]
    assert await asyncio.wait_for(said.get(), 10) == ("refused", {"status": 429, "times": 999})
    assert said.empty()


def test_libraries_do_not_wait_for_who_reads_standard_error():
    fill = """
import os
from service import logs
logs.never_wait_for_errors()
try:
    while True:
        os.write(2, bytes(4096))
except BlockingIOError:
    print("went on")
"""
    with Pipe() as pipe:
        ended = subprocess.run(
            [sys.executable, "-c", fill],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=pipe.stream,
            text=True,
            timeout=60,
        )
        assert ended.stdout == "went on\n"
        assert os.get_blocking(pipe.stream.fileno())  # others that write there still wait


def test_a_server_whose_output_nobody_reads_answers_and_ends():
    """Standard output and standard error are one full pipe."""
    with Pipe() as pipe:
        process = subprocess.Popen(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("DAT_")}
            | dict.fromkeys(
                (f"DAT_SERVER__{name}_PORT" for name in ("HTTP", "GRPC", "METRICS")), "0"
            )
            | {"DAT_SERVER__HOST": "127.0.0.1", "DAT_LOG__FORMAT": "json"}
            | {"DAT_MODEL__NAME": "dat_nano", "DAT_BATCHING__MAX_BATCH": "1"},
            stdout=pipe.stream,
            stderr=pipe.stream,
        )
        try:
            ready = pipe.read_until("ready")[-1]
            with httpx.Client(base_url=f"http://127.0.0.1:{ready['http_port']}") as client:
                for _ in range(600):
                    assert client.get("/v1/models").status_code == 200
                assert client.get("/health/ready").status_code == 200
                assert client.get("/health/live").status_code == 200
            with grpc.insecure_channel(f"127.0.0.1:{ready['grpc_port']}") as channel:
                ask = health_pb2_grpc.HealthStub(channel).Check
                answer = ask(health_pb2.HealthCheckRequest(), timeout=10)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
            metrics = httpx.get(f"http://127.0.0.1:{ready['metrics_port']}/metrics").text
            assert "dat_log_lines_dropped_total 0.0" in metrics
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
            process.wait()
