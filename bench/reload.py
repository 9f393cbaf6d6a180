"""Measure what callers notice of a reload: the longest gap between two answers.

A server of one process, and one of several, is asked over HTTP all the time; then a new version of
its model is loaded again and again. Between the reloads as much time passes without one.
"""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from bench.harness import Row, options, publish, table
from bench.running_server import RunningServer, running_server
from service.models.load import BUNDLED
from tests.clients import JPEG

MODEL = "dat_nano"
IN_FLIGHT = 8
WARM_S = 3.0


class Crowd:
    """Clients that ask one after another, and when each was answered."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._answers: list[tuple[float, float]] = []  # end and duration, seconds
        self.failed = 0

    async def ask(self) -> None:
        """Ask until cancelled."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as client:
            while True:
                began = time.perf_counter()
                response = await client.post("/v1/classify", content=JPEG)
                self.failed += response.status_code != httpx.codes.OK
                now = time.perf_counter()
                self._answers.append((now, now - began))

    async def during(self, work: Callable[[], Awaitable[object]]) -> Row:
        """What was answered while something was done."""
        start = time.perf_counter()
        await work()
        end = time.perf_counter()
        ends, durations = zip(*(one for one in self._answers if one[0] >= start), strict=True)
        return {
            "seconds": end - start,
            "answered_per_s": len(ends) / (end - start),
            "gap_ms": 1e3 * max(b - a for a, b in pairwise((start, *ends, end))),
            "p50_ms": 1e3 * median(durations),
            "max_ms": 1e3 * max(durations),
        }


def write(folder: Path, checkpoint: Path, version: int) -> Path:
    """A model file with a version of the model, at once."""
    file, new = folder / "models.toml", folder / "models.toml.new"
    lines = ["[[models]]", 'name = "m"', f'checkpoint = "{checkpoint}"', f'version = "{version}"']
    new.write_text("\n".join(lines))
    new.replace(file)
    return file


async def _measure(server: RunningServer, folder: Path, checkpoint: Path, rounds: int) -> list[Row]:
    url = f"http://127.0.0.1:{server.ports['http']}"
    crowd = Crowd(url)
    asking = [asyncio.create_task(crowd.ask()) for _ in range(IN_FLIGHT)]
    await asyncio.sleep(WARM_S)
    rows = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def reload(version: int) -> None:
            write(folder, checkpoint, version)
            os.kill(server.pid, signal.SIGHUP)
            shown = ""
            while shown != str(version):
                await asyncio.sleep(0.05)
                shown = (await client.get("/v1/models/m")).json()["version"]

        for number in range(1, rounds + 1):
            loaded = await crowd.during(lambda: reload(number))  # noqa: B023
            quiet = await crowd.during(lambda: asyncio.sleep(loaded["seconds"]))  # noqa: B023
            rows += [{"what": "reload"} | loaded, {"what": "quiet"} | quiet]
    for one in asking:
        one.cancel()
    return [row | {"failed": crowd.failed} for row in rows]


def tables(result: Row) -> str:
    """The table of `reload.json`."""
    columns = {
        "front ends": "{front_ends}",
        "meanwhile": "{what}",
        "seconds": "{seconds:.1f}",
        "answers/s": "{answered_per_s:rate}",
        "longest gap, ms": "{gap_ms:.0f}",
        "latency p50 / longest, ms": "{p50_ms:.0f} / {max_ms:.0f}",
        "failed": "{failed}",
    }
    return table(columns, result["rows"])


def main() -> None:
    """Measure, write the result file and print its table."""
    chosen = options("bench.reload", __doc__, front_ends=[0, 1], rounds=5, checkpoint="")
    checkpoint = Path(chosen.checkpoint) if chosen.checkpoint else BUNDLED[MODEL]
    rows: list[Row] = []
    for front_ends in chosen.front_ends:
        with TemporaryDirectory() as name:
            file = write(Path(name), checkpoint.resolve(), 0)
            chosen_settings = {"DAT_MODEL__FILE": file, "DAT_SERVER__FRONT_ENDS": front_ends}
            with running_server(None, **chosen_settings) as server:
                measured = asyncio.run(
                    _measure(server, Path(name), checkpoint.resolve(), chosen.rounds)
                )
        rows += [{"front_ends": front_ends} | row for row in measured]
    publish("reload", tables, chosen, rows=rows)


if __name__ == "__main__":
    main()
