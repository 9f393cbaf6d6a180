"""Measure the real server under load, beside its engine alone.

The server runs as `python -m service` in its own process and the load generator in another.
Rounds alternate: engine alone, server under load, engine alone, and so on; while one works the
others are idle. Each server round is compared with the engine rounds before and after it, at the
batch sizes that the server formed in that round.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch

from bench.baseline import CONFIGS
from bench.engine import RESULTS, Run, make_pixels, open_engine, time_calls
from bench.load import CLIENTS
from bench.machine import describe
from bench.report import server_tables
from bench.weights import recipe_state

START_TIMEOUT_S = 300.0
SIZES_TIMED = 4  # of the batch sizes that the server forms, those with the most images


@dataclass(frozen=True)
class RunningServer:
    """Where a started server listens."""

    pid: int
    ports: dict[str, int]

    def load(self, protocol: str, arguments: argparse.Namespace, **options: float) -> Any:
        """Run the load generator in its own process and return its figures."""
        options |= {
            "port": self.ports[protocol],
            "server_pid": self.pid,
            "seconds": arguments.seconds,
            "warmup": arguments.warmup,
            "image_size": arguments.image_size,
            "quality": arguments.quality,
        }
        command = [sys.executable, "-m", "bench.load", "--protocol", protocol]
        for name, value in options.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


@contextmanager
def running_server(name: str, arguments: argparse.Namespace) -> Iterator[RunningServer]:
    """Start the server with random weights, wait until it is ready, and stop it at the end.

    Raises:
        RuntimeError: it did not become ready; its log is in the message.
    """
    ports = dict(zip(("http", "grpc", "metrics"), _free_ports(3), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, log = Path(folder) / "weights.pth", Path(folder) / "server.log"
        torch.save({"model": recipe_state(name)}, checkpoint)
        environment = os.environ | {
            "DAT_MODEL__NAME": name,
            "DAT_MODEL__CHECKPOINT": str(checkpoint),
            "DAT_ENGINE__DEVICE": arguments.device,
            "DAT_ENGINE__THREADS": str(arguments.threads),
            "DAT_BATCHING__MAX_BATCH": str(arguments.max_batch),
            "DAT_SERVER__HOST": "127.0.0.1",
            "DAT_SERVER__HTTP_PORT": str(ports["http"]),
            "DAT_SERVER__GRPC_PORT": str(ports["grpc"]),
            "DAT_SERVER__METRICS_PORT": str(ports["metrics"]),
        }
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "service"],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait_until_ready(server, ports["http"], log)
            yield RunningServer(server.pid, ports)
        finally:
            server.terminate()
            server.wait(timeout=60)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError(f"the server did not become ready:\n{log.read_text()}")


class EngineAlone:
    """The same engine in this process, timed at the batch sizes that a server forms."""

    def __init__(self, name: str, run: Run, seconds: float) -> None:
        self._name, self._run, self._seconds = name, run, seconds

    def time(self, sizes: list[int]) -> dict[int, float]:
        """Seconds per image at each batch size."""
        return {
            size: mean(
                time_calls(self._run, make_pixels(self._name, size), self._seconds / len(sizes))
            )
            / size
            for size in sizes
        }


def seconds_per_image(images_by_size: dict[str, int], timed: dict[int, float]) -> float:
    """Engine time per image of a mix of batch sizes; sizes not timed are interpolated."""
    sizes = sorted(timed)
    weights = list(images_by_size.values())
    times = np.interp([int(size) for size in images_by_size], sizes, [timed[s] for s in sizes])
    return float(np.average(times, weights=weights))


def measure_closed_loop(
    server: RunningServer,
    engine: EngineAlone,
    protocol: str,
    concurrency: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Alternate engine rounds and server rounds at one concurrency."""
    first = server.load(protocol, arguments, concurrency=concurrency)
    by_share = sorted(first["images_by_batch_size"].items(), key=lambda item: -item[1])
    sizes = sorted(int(size) for size, _ in by_share[:SIZES_TIMED])
    engine_rounds = [engine.time(sizes)]
    server_rounds = []
    for _ in range(arguments.rounds):
        server_rounds.append(server.load(protocol, arguments, concurrency=concurrency))
        engine_rounds.append(engine.time(sizes))
    engine_rates = [
        1 / mean(seconds_per_image(figures["images_by_batch_size"], timed) for timed in around)
        for figures, *around in zip(
            server_rounds, engine_rounds[:-1], engine_rounds[1:], strict=True
        )
    ]
    ratios = [
        figures["images_per_s"] / rate
        for figures, rate in zip(server_rounds, engine_rates, strict=True)
    ]
    return {
        "protocol": protocol,
        "concurrency": concurrency,
        "images_per_s": median(figures["images_per_s"] for figures in server_rounds),
        "engine_images_per_s": median(engine_rates),
        "ratio": median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        **{key: median(f[key] for f in server_rounds) for key in ("p50_ms", "p90_ms", "p99_ms")},
        "rounds": server_rounds,
    }


def measure_open_loop(
    server: RunningServer, protocol: str, capacity: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One run for each fraction of the measured capacity."""
    return [
        {
            "protocol": protocol,
            "fraction": fraction,
            "offered_per_s": fraction * capacity,
            **server.load(protocol, arguments, rate=fraction * capacity),
        }
        for fraction in arguments.fractions
    ]


def main() -> None:
    """Measure one model, write the result file and print its tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.server", description=__doc__)
    parser.add_argument("--model", choices=CONFIGS, default="dat_tiny_224")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--max-batch", type=int, default=8)
    parser.add_argument("--protocols", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.5, 0.8, 1.2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=12.0, help="of a server round")
    parser.add_argument("--warmup", type=float, default=2.0, help="before each server round")
    parser.add_argument("--engine-seconds", type=float, default=4.0, help="of an engine round")
    parser.add_argument("--image-size", type=int, default=256, help="pixels of each side")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    arguments = parser.parse_args()
    name = arguments.model
    run, _ = open_engine(
        name,
        device=arguments.device,
        dtype="auto",
        threads=arguments.threads,
        max_batch=arguments.max_batch,
    )
    engine = EngineAlone(name, run, arguments.engine_seconds)
    closed: list[dict[str, Any]] = []
    opened: list[dict[str, Any]] = []
    with running_server(name, arguments) as server:
        for protocol in arguments.protocols:
            rows = [
                measure_closed_loop(server, engine, protocol, concurrency, arguments)
                for concurrency in arguments.concurrency
            ]
            closed += rows
            opened += measure_open_loop(
                server, protocol, max(row["images_per_s"] for row in rows), arguments
            )
    result = {
        "model": name,
        "device": arguments.device,
        "machine": describe("bench.server", arguments.device),
        "settings": vars(arguments),
        "closed_loop": closed,
        "open_loop": opened,
    }
    path = RESULTS / f"server-{name}-{arguments.device}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}, {arguments.device}\n\n{server_tables(result)}")


if __name__ == "__main__":
    main()
