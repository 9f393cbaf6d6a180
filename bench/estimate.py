"""Measure how well the server foretells at admission how long an answer will take.

Bursts come to a server that was idle, in several shapes, and the server's own metric
`dat_answer_time_ratio` says what each answer took of what was foretold. The error is the difference
of the two, of what it took; its quantiles are interpolated within the buckets of the metric, one of
which ends at the goal of 30 %. Then a call with a deadline is refused behind a burst, and is asked
again after the time that its refusal names, and after half of it.
"""

import asyncio
import urllib.request
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import grpc
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from bench.harness import Row, in_short, options, publish, table
from bench.load import PICTURES, HttpClient, make_jpeg
from bench.running_server import RunningServer, running_server
from service.pb.dat_pb2 import ClassifyRequest
from service.pb.dat_pb2_grpc import ClassifierServiceStub

MODEL = "dat_nano"
GOAL = 0.3
IDLE_S = 1.0
_BEHIND = 192  # requests that a call with a deadline comes behind


class Shape(NamedTuple):
    """What comes to a server.

    Attributes:
        sizes: of the bursts, in turn; requests of one image.
        singles: requests one after the other before each burst.
        side: of the images, pixels.
        neighbours: requests of a detector on the same device that are always in flight.
        device: of the server.
    """

    sizes: Sequence[int]
    singles: int = 0
    side: int = 256
    neighbours: int = 0
    device: str = "cpu"


SHAPES = {
    "64 at once": Shape([64]),
    "256 at once": Shape([256]),
    "8, 64, 24, 128 at once, singles between": Shape([8, 64, 24, 128], singles=8),
    "64 at once, beside a detector on the device": Shape([64], neighbours=4),
    "16 at once, of 12 megapixels": Shape([16], side=3464),
    "64 at once, two devices": Shape([64], device="cpu,cpu"),
    "256 at once, two devices": Shape([256], device="cpu,cpu"),
}


def samples(server: RunningServer, name: str) -> list[Sample]:
    """What the metrics of a server say under a name of the demo model, for the upper class."""
    url = f"http://127.0.0.1:{server.ports['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return [
        sample
        for family in families
        for sample in family.samples
        if sample.name == name
        and sample.labels["model"] == MODEL
        and sample.labels.get("priority", "high") == "high"
    ]


def buckets(server: RunningServer) -> dict[float, float]:
    """How many answers took at most so many times what was foretold, by that."""
    found = samples(server, "dat_answer_time_ratio_bucket")
    return {float(sample.labels["le"]): sample.value for sample in found}


def wait_estimate_s(server: RunningServer) -> float:
    """Time in which all that wait will have their answers, as the server says, seconds."""
    (sample,) = samples(server, "dat_queue_wait_estimate_seconds")
    return sample.value


def errors(before: dict[float, float], after: dict[float, float]) -> Row:
    """Quantiles of the error of what was foretold between two readings, and its direction."""
    edges = sorted(after)
    counts = np.diff([0.0, *(after[edge] - before[edge] for edge in edges)])
    lows, highs = [edges[0] / 2, *edges[:-1]], [*edges[:-1], 2 * edges[-2]]
    points = np.linspace(lows, highs, 102, axis=1)[:, 1:-1].ravel()
    weights = np.repeat(counts / 100, 100)
    error = np.abs(1 / points - 1)
    return {
        "answers": int(counts.sum()),
        "error_p50": _quantile(error, weights, 0.5),
        "error_p90": _quantile(error, weights, 0.9),
        "within": float(weights[error <= GOAL].sum() / counts.sum()),
        "ratio_p50": _quantile(points, weights, 0.5),
    }


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(reached, share * reached[-1])])


async def burst_after_burst(server: RunningServer, shape: Shape, rounds: int) -> Row:
    """Bursts of one shape, the first of which tells the server how fast it is."""
    jpegs = [make_jpeg(shape.side, shape.side, 90, seed) for seed in range(PICTURES)]
    client = HttpClient(server.ports["http"], f"/v1/classify?model={MODEL}")
    statuses: Counter[str] = Counter()
    known: dict[float, float] = {}
    async with asyncio.TaskGroup() as group:
        neighbours = [
            group.create_task(_always(HttpClient(server.ports["http"], "/v1/detect"), jpegs[0]))
            for _ in range(shape.neighbours)
        ]
        for number in range(1 + rounds):
            for size in shape.sizes:
                await asyncio.sleep(IDLE_S)
                for _ in range(shape.singles):
                    await client.send(jpegs[0])
                sent = [client.send(jpegs[n % PICTURES]) for n in range(size)]
                statuses.update(reply.status for reply in await asyncio.gather(*sent))
            if not number:
                known = await asyncio.to_thread(buckets, server)
                statuses.clear()
        for neighbour in neighbours:
            neighbour.cancel()
    client.close()
    return errors(known, await asyncio.to_thread(buckets, server)) | {"statuses": statuses}


async def _always(client: HttpClient, jpeg: bytes) -> None:
    while True:
        await client.send(jpeg)


async def asked_again(server: RunningServer, share: float, rounds: int) -> Row:
    """What becomes of calls with a deadline that come again after a share of the named time."""
    jpeg = make_jpeg(256, 256, 90, 0)
    client = HttpClient(server.ports["http"], "/v1/classify")
    ends: Counter[str] = Counter()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        call = ClassifierServiceStub(channel).Classify
        for _ in range(rounds):
            burst = [asyncio.create_task(client.send(jpeg)) for _ in range(_BEHIND)]
            await asyncio.wait(burst, return_when=asyncio.FIRST_COMPLETED)
            patience_s = await asyncio.to_thread(wait_estimate_s, server) / 2
            request = ClassifyRequest(images=[jpeg])
            try:
                await call(request, timeout=patience_s)
                ends["not refused"] += 1
            except grpc.aio.AioRpcError as refused:
                trailing = dict(refused.trailing_metadata() or ())
                await asyncio.sleep(share * int(trailing.get("grpc-retry-pushback-ms", 0)) / 1e3)
                try:
                    await call(request, timeout=patience_s)
                    ends["answered in time"] += 1
                except grpc.aio.AioRpcError as failure:
                    ends[failure.code().name] += 1
            await asyncio.gather(*burst)
            await asyncio.sleep(IDLE_S)
    client.close()
    return {"share": share, "ends": ends}


def measure(shapes: Sequence[str], rounds: int) -> tuple[list[Row], list[Row]]:
    """Servers one after the other, and what came of each shape."""
    rows: list[Row] = []
    for name in shapes:
        shape = SHAPES[name]
        # Without a name both demo models are served.
        named = {} if shape.neighbours else {"DAT_MODEL__NAME": MODEL}
        with running_server(None, **named, DAT_ENGINE__DEVICE=shape.device) as server:
            row = asyncio.run(burst_after_burst(server, shape, rounds))
        rows.append({"shape": name, **row})
    with running_server(None, DAT_MODEL__NAME=MODEL) as server:
        again = [asyncio.run(asked_again(server, share, rounds)) for share in (1.0, 0.5)]
    return rows, again


def tables(result: Row) -> str:
    """The tables of `estimate-cpu.json`."""
    columns = {
        "what came": "{shape}",
        "answers": "{answers}",
        "error p50": "**{error_p50:.0%}**",
        "error p90": "{error_p90:.0%}",
        f"within {GOAL:.0%}": "{within:.0%}",
        "took / foretold, median": "{ratio_p50:.2f}",
        "statuses": "{in_short}",
    }
    rows = [row | {"in_short": in_short(row["statuses"])} for row in result["bursts"]]
    ends = {"asked again after, of the named time": "{share:g}", "outcomes": "{in_short}"}
    again = [row | {"in_short": in_short(row["ends"])} for row in result["asked_again"]]
    return f"{table(columns, rows)}\n\n{table(ends, again)}"


def main() -> None:
    """Measure, write the result file and print its tables."""
    chosen = options("bench.estimate", __doc__, {"shapes": SHAPES}, shapes=[*SHAPES], rounds=20)
    bursts, again = measure(chosen.shapes, chosen.rounds)
    publish("estimate-cpu", tables, chosen, bursts=bursts, asked_again=again)


if __name__ == "__main__":
    main()
