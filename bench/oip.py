"""Measure what an image costs the server by the form in which it comes: encoded, or as pixels.

JPEGs over our own API, and over the Open Inference Protocol as BYTES, as pixels of the same size
and as what the network reads, over HTTP and gRPC. With a model that answers at once
(`bench.null_server`), which shows what transports and decoders can do, and with the demo model.
`perf_analyzer` is an independent second client of the same.
"""

import tempfile
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from bench.harness import RATIO, Row, alternate, in_short, options, publish, ratio, table
from bench.load import cpu_s, make_jpeg
from bench.oip_load import tensor_of
from bench.perf_analyzer import perf_analyzer, write_inputs
from bench.running_server import RunningServer, running_server
from model import VARIANTS
from model.transforms import Preprocessing

MODEL = "dat_nano"
PROGRAMS = {"null": "bench.null_server", "demo": "service"}
PROTOCOLS = ("http", "grpc")
UPLOAD = 256  # pixels a side
# Pixels a side of what the network reads, and of the image that it is the middle of.
INPUT, WHOLE = (
    sides[0] for sides in (VARIANTS[MODEL].image_size, Preprocessing.of(VARIANTS[MODEL]).resize_to)
)
# perf_analyzer measures three windows, and takes as stable whatever came of them.
_WINDOWS = 3
_STABLE_PERCENT = 999
_INPUTS = 4  # that it sends in turn


class Form(NamedTuple):
    """How an image is sent.

    Attributes:
        name: in the table.
        tensor: the input; empty for our own API.
        side: of the image, pixels.
    """

    name: str
    tensor: str
    side: int


OWN = Form("JPEG, our own API", "", UPLOAD)
FORMS = (
    OWN,
    Form("JPEG as BYTES", "image", UPLOAD),
    Form("pixels as UINT8", "pixels", UPLOAD),
    Form("UINT8 that need no resizing", "pixels", WHOLE),
    Form("FP32, normalised", "normalised", INPUT),
)
PERF_FORMS = (FORMS[1], FORMS[3])
Side = tuple[str, str, Form, str]  # model, protocol, form, client
OURS, PERF = "ours", "perf_analyzer"


def contents(form: Form, count: int) -> list[bytes]:
    """What is sent of each of so many images, as it is on the wire."""
    jpegs = [make_jpeg(form.side, form.side, seed=seed) for seed in range(count)]
    return [tensor_of(form.tensor, jpeg)[2] for jpeg in jpegs] if form.tensor else jpegs


def load(server: RunningServer, protocol: str, form: Form, shape: Row) -> Row:
    """One round of our own load generator."""
    own = {"path": "/v1/classify"} if form is OWN else {"path": f"{MODEL}/{form.tensor}"}
    module = "bench.load" if form is OWN else "bench.oip_load"
    size = {"height": form.side, "width": form.side}
    figures = server.load(protocol, module, **own, **size, **shape, warmup=0.5)
    rate = figures["answered_per_s"]
    return {
        **{key: figures[key] for key in ("answered_per_s", "p50_ms", "p99_ms", "statuses")},
        "cpu_ms": 1e3 * figures["server_cpu_s"] / (shape["seconds"] * rate),
        "client_cpus": figures["client_cpu_s"] / shape["seconds"],
    }


def load_by_perf_analyzer(server: RunningServer, protocol: str, form: Form, shape: Row) -> Row:
    """One round of `perf_analyzer`."""
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.json"
        pixels = contents(form, _INPUTS)
        dimensions = tensor_of(form.tensor, make_jpeg(form.side, form.side))[1][1:]
        write_inputs(inputs, form.tensor, pixels, dimensions)
        before, answered_before = sum(cpu_s(server.pid).values()), answered(server)
        perf = perf_analyzer(
            protocol,
            f"127.0.0.1:{server.ports[protocol]}",
            MODEL,
            *("--input-data", inputs, "--concurrency-range", shape["concurrency"]),
            *("--measurement-interval", round(1e3 * shape["seconds"] / _WINDOWS)),
            *("--max-trials", _WINDOWS, "--stability-percentage", _STABLE_PERCENT),
        )
        used, count = sum(cpu_s(server.pid).values()) - before, answered(server) - answered_before
    return {
        "answered_per_s": perf.requests_per_s,
        "p50_ms": perf.p50_ms,
        "p99_ms": perf.p99_ms,
        "statuses": {"answered": round(count)},
        "cpu_ms": 1e3 * used / count,
    }


def answered(server: RunningServer) -> float:
    """How many requests the server has answered, as its metrics say."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.ports['metrics']}/metrics") as page:
        families = text_string_to_metric_families(page.read().decode())
        return sum(
            sample.value
            for family in families
            for sample in family.samples
            if sample.name == "dat_requests_total" and sample.labels["outcome"] == "ok"
        )


def summary(rounds: Sequence[Row], firsts: Sequence[Row]) -> Row:
    """The medians of one side, beside JPEGs over our own API and the same wire."""
    keys = ("answered_per_s", "cpu_ms", "p50_ms", "p99_ms")
    return {
        **{key: median(one[key] for one in rounds) for key in keys},
        **ratio((one["cpu_ms"] for one in rounds), (one["cpu_ms"] for one in firsts)),
        "rounds": rounds,
    }


def tables(result: Row) -> str:
    """The table of `oip-cpu.json`."""
    columns = {
        "model": "{model}",
        "wire": "{protocol}",
        "image": "{form}",
        "client": "{client}",
        "KB": "{kb:.1f}",
        "answers/s": "{answered_per_s:rate}",
        "ms of CPU for an answer": "**{cpu_ms:.2f}**",
        "to JPEG, our own API (range)": RATIO,
        "p50 / p99 ms": "{p50_ms:.1f} / {p99_ms:.1f}",
        "answers": "{answers}",
    }
    return table(columns, result["rows"])


def main() -> None:
    """Measure all forms over both wires, in turn."""
    chosen = options(
        "bench.oip",
        __doc__,
        {"models": PROGRAMS},
        models=list(PROGRAMS),
        concurrency=8,
        rounds=3,
        seconds=2.4,
    )
    shape = {"concurrency": chosen.concurrency, "seconds": chosen.seconds}
    with ExitStack() as stack:
        sides: dict[Side, Callable[[], Row]] = {}
        for model in chosen.models:
            server = stack.enter_context(
                running_server(None, PROGRAMS[model], DAT_MODEL__NAME=MODEL)
            )
            for protocol, form in product(PROTOCOLS, FORMS):
                sides[model, protocol, form, OURS] = partial(load, server, protocol, form, shape)
            for protocol, form in product(PROTOCOLS, PERF_FORMS):
                call = partial(load_by_perf_analyzer, server, protocol, form, shape)
                sides[model, protocol, form, PERF] = call
        taken = alternate(sides, chosen.rounds)
    rows = [
        {
            "model": model,
            "protocol": protocol,
            "form": form.name,
            "client": client,
            "kb": float(np.mean([len(one) for one in contents(form, _INPUTS)])) / 1e3,
            **summary(rounds, taken[model, protocol, OWN, OURS]),
            "answers": in_short(sum((Counter(one["statuses"]) for one in rounds), Counter())),
        }
        for (model, protocol, form, client), rounds in taken.items()
    ]
    publish("oip-cpu", tables, chosen, rows=rows)


if __name__ == "__main__":
    main()
