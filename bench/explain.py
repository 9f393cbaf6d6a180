"""What explanations cost: a batch whose images ask for none, for points, or for attention.

CPU time of the process on one thread, which others on the machine change little. The kinds take
turns in every round; ratios are taken per round. `most layers` asks for as many as a request may,
the first of the network, which have the most queries. What an answer takes on top, from the output
of the device to JSON and to a gRPC message, is measured apart.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any

from bench.detector import SIZE, UPLOAD, make_inputs
from bench.harness import Row, alternate, options, publish, ratio, table
from bench.open_engine import OpenEngine
from bench.rival import make_pixels
from bench.weights import make_detector, recipe_checkpoint
from model import VARIANTS, DatConfig, load_model
from model.detection import DETECTORS
from model.transforms import Preprocessing
from service import process
from service.engine.device import Device
from service.engine.items import ClassificationInput, Wanted
from service.memory import keep_freed
from service.tasks import attention, points
from service.tasks.attention import MOST_LAYERS, AttentionOptions, Seen
from service.tasks.core import Answer
from service.tasks.passage import Timing
from service.transport.http.attention_schema import AttentionLayerBody
from service.transport.http.schema import LayerPointsBody
from service.transport.rpc.messages import of_every_task

THREADS = 1  # several wait for each other awake, which is CPU time too
PICTURE = (480, 640)  # `(H, W)` of an upload, pixels
# Queries that the model chooses are all that can be asked of the device.
KINDS = {
    "plain": None,
    "points": AttentionOptions(),
    "attention": AttentionOptions(queries="auto"),
    "most layers": AttentionOptions(queries="auto"),
}


@dataclass(frozen=True)
class Opened:
    """A model in its engine, with a batch that asks for nothing."""

    engine: OpenEngine
    batch: Sequence[Any]
    seen: Seen


def open_model(name: str, batch: int) -> Opened:
    """Load a classifier or a detector."""
    device = Device("cpu", THREADS)
    if name in DETECTORS:
        resizing = DETECTORS[name].resizing(UPLOAD)
        engine = OpenEngine(make_detector(name), device, "float32", sizes=[SIZE], max_batch=batch)
        seen = Seen(DETECTORS[name].backbone, SIZE, resizing.resized, UPLOAD, resizing)
        return Opened(engine, make_inputs()[:batch], seen)
    config = VARIANTS[name]
    engine = OpenEngine(
        load_model(recipe_checkpoint(name), name), device, "float32", max_batch=batch
    )
    pixel_map = Preprocessing.of(config).pixel_map(*PICTURE[::-1])
    seen = Seen(config, config.image_size, config.image_size, PICTURE, pixel_map)
    return Opened(engine, [ClassificationInput(one) for one in make_pixels(name, batch)], seen)


def asking(opened: Opened, kind: str) -> list[Any]:
    """The batch, whose images ask for an explanation of this kind."""
    asked = chosen_options(opened.seen, kind)
    if asked is None:
        return list(opened.batch)
    wanted, cells = attention.wanted(asked, opened.seen)
    if kind == "points":
        wanted, cells = Wanted(points=True), ()
    return [replace(item, wanted=wanted, cells=cells) for item in opened.batch]


def chosen_options(seen: Seen, kind: str) -> AttentionOptions | None:
    """What is asked for, with the first layers of the network where it is the most."""
    asked = KINDS[kind]
    if asked is None or kind != "most layers":
        return asked
    assert isinstance(seen.config, DatConfig)
    layers = points.point_layers(seen.config, seen.input_size)[:MOST_LAYERS]
    return replace(asked, layers=tuple((layer.stage, layer.block) for layer in layers))


def cpu_seconds(call: Callable[[], object], times: int) -> float:
    """CPU time of this process for one of several calls."""
    began = time.process_time()
    for _ in range(times):
        call()
    return (time.process_time() - began) / times


def measure(name: str, batch: int, chosen: Namespace) -> tuple[list[Row], list[Row]]:
    """The engine with each kind, and what their answers take on top."""
    opened = open_model(name, batch)
    with closing(opened.engine):
        return measure_opened(name, opened, chosen)


def measure_opened(name: str, opened: Opened, chosen: Namespace) -> tuple[list[Row], list[Row]]:
    """The same of a model in its engine."""
    batch = len(opened.batch)
    times = 1 if name in DETECTORS else chosen.times
    batches = {kind: asking(opened, kind) for kind in KINDS}
    taken = alternate(
        {
            kind: partial(cpu_seconds, partial(opened.engine.run, items), times)
            for kind, items in batches.items()
        },
        chosen.rounds,
        unmeasured=1,
    )
    computed = [
        {
            "model": name,
            "batch": batch,
            "kind": kind,
            "cpu_ms": 1e3 * median(taken[kind]) / batch,
            **ratio(taken[kind], taken["plain"]),
        }
        for kind in KINDS
    ]
    answers = [
        {"model": name, "kind": kind, **answer_cost(opened, kind, chosen.times)}
        for kind in KINDS
        if kind != "plain"
    ]
    return computed, answers


def answer_cost(opened: Opened, kind: str, times: int) -> Row:
    """What an explanation takes between the output of the device and the wire."""
    asked, seen = chosen_options(opened.seen, kind), opened.seen
    assert asked is not None
    config = seen.config
    assert isinstance(config, DatConfig)
    (output, *_) = opened.engine.run(asking(opened, kind))

    def answer() -> Answer:
        looked = points.explained(
            config, seen.input_size, output.sampling_locations, seen.pixel_map
        )
        attended = None
        if kind != "points":
            attended = attention.explained(asked, seen, output.attention, looked)
        return Answer(
            width=1, height=1, timing=Timing(0, 0, 0, 1), points=looked, attention=attended
        )

    def as_json() -> list[str]:
        of = answer()
        bodies = [LayerPointsBody.of(layer) for layer in of.points or ()]
        attended = [AttentionLayerBody.of(layer) for layer in of.attention or ()]
        return [body.model_dump_json() for body in (*bodies, *attended)]

    def as_message() -> list[bytes]:
        fields = of_every_task(answer())
        return [
            fields[name].SerializeToString() for name in ("points", "attention") if name in fields
        ]

    def milliseconds(call: Callable[[], object]) -> float:
        # The garbage collector is in some of the calls.
        return 1e3 * median(cpu_seconds(call, 1) for _ in range(4 * times))

    return {
        "json_kb": sum(map(len, as_json())) / 1e3,
        "json_ms": milliseconds(as_json),
        "grpc_kb": sum(map(len, as_message())) / 1e3,
        "grpc_ms": milliseconds(as_message),
    }


def tables(result: Row) -> str:
    """The tables of `explain-cpu.json`."""
    computed = {
        "model": "{model}",
        "batch": "{batch}",
        "asked for": "{kind}",
        "CPU ms an image": "{cpu_ms:.1f}",
        "time / plain (range)": "**{ratio:.3f}** ({ratio_range[0]:.3f}-{ratio_range[1]:.3f})",
    }
    answers = {
        "model": "{model}",
        "asked for": "{kind}",
        "JSON, KB": "{json_kb:.1f}",
        "JSON, ms": "{json_ms:.2f}",
        "gRPC, KB": "{grpc_kb:.1f}",
        "gRPC, ms": "{grpc_ms:.2f}",
    }
    return f"{table(computed, result['computed'])}\n\n{table(answers, result['answers'])}"


def main() -> None:
    """Measure the models of the command line, one after another."""
    chosen = options(
        "bench.explain",
        __doc__,
        {"models": [*VARIANTS, *DETECTORS]},
        models=["dat_nano", "dat_tiny_224", "dat_pp_tiny_224", "retinanet_dat_pp_tiny"],
        batches=[1, 8],
        rounds=5,
        times=5,
    )
    process.compute_alone()
    keep_freed()
    computed: list[Row] = []
    answers: list[Row] = []
    for name in chosen.models:
        batches = [1] if name in DETECTORS else chosen.batches
        for batch in batches:
            of_batch, answers_of_batch = measure(name, batch, chosen)
            computed += of_batch
            if batch == batches[0]:
                answers += answers_of_batch
    publish("explain-cpu", tables, chosen, computed=computed, answers=answers)


if __name__ == "__main__":
    main()
