"""Print every result file as Markdown: `python -m bench.report`."""

import json
from collections import Counter
from statistics import median
from typing import Any

from bench.findings import bound, verdict
from bench.machine import RESULTS


def engine_table(result: dict[str, Any]) -> str:
    """The table of one `engine-*.json`."""
    return _table(
        "batch|baseline img/s|engine img/s|engine / baseline (range)"
        "|engine / baseline that keeps its memory|share of a matrix product's rate"
        "|baseline p50 / p99 ms|engine p50 / p99 ms|time with points / without",
        [
            [
                str(row["batch"]),
                f"{row['baseline']['images_per_s']:.1f}",
                f"{row['engine']['images_per_s']:.1f}",
                _ratio(row),
                f"{row['ratio_to_keeping']:.2f}",
                f"{row['share_of_product_rate']:.0%}",
                f"{row['baseline']['p50_ms']:.1f} / {row['baseline']['p99_ms']:.1f}",
                f"{row['engine']['p50_ms']:.1f} / {row['engine']['p99_ms']:.1f}",
                f"{row['explained_over_plain_time']:.3f}",
            ]
            for row in result["batches"]
        ],
    )


def server_tables(result: dict[str, Any]) -> str:
    """The tables of one `server-*.json`."""
    tables = [_closed_loop_table(result)]
    if result["open_loop"]:
        tables.append(_open_loop_table(result))
    return "\n\n".join(tables)


_CLOSED_LOOP = (
    "protocol|in flight|server img/s|engine img/s|server / engine (range)|engine busy"
    "|mean batch|p50 / p90 / p99 ms|answers|server CPUs|client CPUs"
)


def _closed_loop_table(result: dict[str, Any]) -> str:
    """Throughput beside the engine's."""
    seconds = result["settings"]["seconds"]
    return _table(_CLOSED_LOOP, [_closed_loop(row, seconds) for row in result["closed_loop"]])


def _closed_loop(row: dict[str, Any], seconds: float) -> list[str]:
    """All rounds of one load together, each of so many seconds."""
    rounds = row["rounds"]
    images, statuses = Counter[str](), Counter[str]()
    for figures in rounds:
        images.update(figures["images_by_batch_size"])
        statuses.update(figures["statuses"])
    batches = sum(count / int(size) for size, count in images.items())
    total_s = len(rounds) * seconds
    return [
        row["protocol"],
        str(row["concurrency"]),
        _rate(row["images_per_s"]),
        _rate(row["engine_images_per_s"]),
        _ratio(row),
        f"{sum(f['engine_busy'] for f in rounds) / len(rounds):.0%}",
        f"{images.total() / batches:.1f}",
        _latency(row),
        _statuses(statuses),
        f"{sum(f['server_cpu_s'] for f in rounds) / total_s:.2f}",
        f"{sum(f['client_cpu_s'] for f in rounds) / total_s:.3f}",
    ]


def _open_loop_table(result: dict[str, Any]) -> str:
    """Latency under Poisson arrivals."""
    return _table(
        "protocol|of capacity|offered img/s|answered img/s|p50 / p90 / p99 ms|answers",
        [
            [
                row["protocol"],
                f"{row['fraction']:.0%}",
                f"{row['offered_per_s']:.1f}",
                f"{row['images_per_s']:.1f}",
                _latency(row),
                _statuses(row["statuses"]),
            ]
            for row in result["open_loop"]
        ],
    )


def detector_tables(result: dict[str, Any]) -> str:
    """The tables of one `detector-*.json`: stages of a forward pass, then the server."""
    stages = list(result["cases"][0]["stages_ms"])
    return "\n\n".join(
        (
            _table(
                f"input|forward ms|{'|'.join(f'{stage} ms' for stage in stages)}"
                "|post-processing / forward (range)|candidates|proposals|detections",
                [_stages(case) for case in result["cases"]],
            ),
            _table(
                f"input|{_CLOSED_LOOP}",
                [
                    [_size(case), *_closed_loop(row, case["seconds"])]
                    for case in result["cases"]
                    for row in case["closed_loop"]
                ],
            ),
        )
    )


def _stages(case: dict[str, Any]) -> list[str]:
    low, high = case["post_processing_share_range"]
    return [
        _size(case),
        f"{case['forward_ms']:.1f}",
        *(f"{milliseconds:.1f}" for milliseconds in case["stages_ms"].values()),
        f"**{case['post_processing_share']:.1%}** ({low:.1%}-{high:.1%})",
        *(_span(case["work"].get(key)) for key in ("candidates", "proposals", "detections")),
    ]


def _size(case: dict[str, Any]) -> str:
    return "x".join(map(str, case["size"]))


def _span(counts: list[int] | None) -> str:
    if not counts:
        return "none"
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low}-{high}"


def attention_tables(result: dict[str, Any]) -> str:
    """The tables of one `attention_cost-*.json`: attentions by stage (from 0), then models."""
    layers = [
        [
            f"{layer['model']}, stage {layer['stage']}, {'x'.join(map(str, layer['map']))}",
            *_cost(row),
        ]
        for layer in result["layers"]
        for row in layer["rows"]
    ]
    figures = (
        "million parameters|GFLOPs|inference peak MB|training held MB|training peak MB|ms"
        "|time / DAT (range)"
    )
    return "\n\n".join(
        (
            _table(f"layer|attention|{figures}", layers),
            _table(f"model|{figures}", [_cost(row) for row in result["models"]]),
        )
    )


def _cost(row: dict[str, Any]) -> list[str]:
    return [
        row["name"],
        f"{row['parameters'] / 1e6:.2f}",
        f"{row['flops'] / 1e9:.3f}",
        *(
            f"{row[key] / 1e6:.1f}"
            for key in ("inference_peak_bytes", "training_held_bytes", "training_peak_bytes")
        ),
        f"{row['ms']:.2f}",
        _ratio(row),
    ]


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:.1f}" if images_per_s >= 10 else f"{images_per_s:.2f}"


def _ratio(row: dict[str, Any], digits: int = 2) -> str:
    low, high = row["ratio_range"]
    return f"**{row['ratio']:.{digits}f}** ({low:.{digits}f}-{high:.{digits}f})"


def _latency(figures: dict[str, Any]) -> str:
    return " / ".join(f"{figures[key]:.0f}" for key in ("p50_ms", "p90_ms", "p99_ms"))


def _statuses(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))


def kernels_table(result: dict[str, Any]) -> str:
    """The table of one `kernels-*.json`; stages count from 0."""
    return _table(
        "model|image|batch|stage|step|kernel us|plain torch us|plain / kernel|of the roofline"
        "|largest difference",
        [
            [
                row["model"],
                "x".join(map(str, row["image_size"])),
                str(row["batch"]),
                str(row["stage"]),
                row["step"],
                f"{row['fused_us']:.1f}",
                f"{row['plain_us']:.1f}",
                f"**{row['speedup']:.2f}**",
                f"{row['of_roofline']:.0%}",
                f"{row['max_abs_difference']:.1e}",
            ]
            for row in result["steps"]
        ],
    )


def decode_table(result: dict[str, Any]) -> str:
    """The table of `decode-cpu.json`."""
    return _table(
        "picture|model|way|one thread ms|time / official (range)|all cores ms"
        "|time / official (range)|largest error|mean error",
        [
            [
                case["picture"],
                case["variant"],
                row["way"],
                f"{row['one_thread']['ms']:.2f}",
                _ratio(row["one_thread"]),
                f"{row['all_cores']['ms']:.2f}",
                _ratio(row["all_cores"]),
                str(row["error"]["max"]),
                f"{row['error']['mean']:.3f}",
            ]
            for case in result["cases"]
            for row in case["rows"]
        ],
    )


def openvino_table(result: dict[str, Any]) -> str:
    """The table of `openvino-cpu.json`."""
    return _table(
        "model|batch|torch img/s|OpenVINO img/s|OpenVINO / torch (range)|largest difference"
        "|load s: torch / OpenVINO / from its cache",
        [
            [
                model["model"],
                str(row["batch"]),
                _rate(row["torch_images_per_s"]),
                _rate(row["openvino_images_per_s"]),
                _ratio(row),
                f"{row['max_abs_difference']:.1e}",
                " / ".join(f"{seconds:.1f}" for seconds in model["load_s"].values()),
            ]
            for model in result["models"]
            for row in model["batches"]
        ],
    )


def gpu_tables(result: dict[str, Any]) -> str:
    """The tables of one `gpu-*.json`: what was found, times, and where the time goes."""
    machine, steps = result["machine"], result["steps"]
    ended = (f"{step['name']} {step['ended']} ({step['seconds']:.0f} s)" for step in steps)
    rows = [row for step in steps for row in step["rows"]]
    tables = (
        ("model|what|figure|bound|kept", [_finding(row) for row in rows if "what" in row]),
        ("model|way|batch|ms|img/s|TFLOP/s", [_way(row) for row in rows if "way" in row]),
        ("model|kernel|us|of the pass", [_kernel(row) for row in rows if "kernel" in row]),
        (
            "model|case that failed|error",
            [[row["model"], row["failed"], row["error"]] for row in rows if "failed" in row],
        ),
    )
    versions = ", ".join(f"{key} {machine[key]}" for key in ("driver", "cuda", "cudnn", "triton"))
    return "\n\n".join(
        (
            f"Versions: {versions}; kernels {machine['kernels']}. Steps: {', '.join(ended)}.",
            *(_table(header, lines) for header, lines in tables if lines),
        )
    )


def _finding(row: dict[str, Any]) -> list[str]:
    return [row["model"], row["what"], f"{row['figure']:.4g}", bound(row), verdict(row)]


def _way(row: dict[str, Any]) -> list[str]:
    rates = f"{row['ms']:.3f}", _rate(row["images_per_s"]), f"{row['tflops']:.1f}"
    return [row["model"], row["way"], str(row["batch"]), *rates]


def _kernel(row: dict[str, Any]) -> list[str]:
    return [row["model"], f"`{row['kernel']}`", f"{row['us']:.1f}", f"{row['share']:.1%}"]


def neighbour_table(result: dict[str, Any]) -> str:
    """The table of `neighbour-cpu.json`."""
    return _table(
        "model|in flight|code|in quiet, answers/s|beside a busy neighbour|of the fair share"
        "|in quiet / first code (range)",
        [
            [
                row["model"],
                str(row["in_flight"]),
                row["code"],
                _rate(row["quiet_per_s"]),
                _rate(row["crowded_per_s"]),
                f"**{row['share_of_fair']:.0%}**",
                _ratio(row),
            ]
            for row in result["rows"]
        ],
    )


def overload_tables(result: dict[str, Any]) -> str:
    """The tables of `overload-cpu.json`."""
    rows: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in result["overload"]:
        rows.setdefault((row["clients"], row["times"]), []).append(row)
    return "\n\n".join(
        (
            _table(
                "clients have|asked for, of capacity|capacity, answers/s"
                "|answered / capacity (range)|refused p50 / p99 ms|probes p50 / p99 ms"
                "|two seconds later, of capacity"
                "|server CPUs|clients' CPUs",
                [[clients, f"{times:g}", *_overload(of)] for (clients, times), of in rows.items()],
            ),
            _table(
                "callers who leave after 50 ms|requests/s|answers/s|computed for nobody"
                "|probes p50 / p99 ms|answers",
                [
                    [
                        f"`{row['path']}`",
                        f"{sum(row['statuses'].values()) / result['storm_seconds']:.0f}",
                        _rate(row["answered_per_s"]),
                        f"**{row['wasted']:.1%}**",
                        _median_and_worst([row], "probes_ms"),
                        _statuses(row["statuses"]),
                    ]
                    for row in result["storms"]
                ],
            ),
        )
    )


def _overload(rounds: list[dict[str, Any]]) -> list[str]:
    goodput = [row["goodput"] for row in rounds]
    return [
        _rate(median(row["capacity_per_s"] for row in rounds)),
        f"**{median(goodput):.2f}** ({min(goodput):.2f}-{max(goodput):.2f})",
        _median_and_worst(rounds, "refused_ms"),
        _median_and_worst(rounds, "probes_ms"),
        f"{median(row['recovered'] for row in rounds):.2f}",
        f"{median(row['server_cpus'] for row in rounds):.2f}",
        f"{median(row['client_cpus'] for row in rounds):.2f}",
    ]


def _median_and_worst(rounds: list[dict[str, Any]], key: str) -> str:
    latencies = [row[key] for row in rounds if row[key]]
    if not latencies:
        return "none"
    p50, p99 = (median(one[name] for one in latencies) for name in ("p50", "p99"))
    return f"{p50:.1f} / {p99:.1f}"


def thread_split_table(result: dict[str, Any]) -> str:
    """The table of one `thread_split-*.json`."""
    return _table(
        "in flight|decode threads|compute threads|img/s|img/s / all threads (range)"
        "|p50 / p90 / p99 ms|engine busy|server CPUs",
        [
            [
                str(row["concurrency"]),
                str(row["decode_threads"]),
                str(row["compute_threads"]),
                _rate(row["images_per_s"]),
                _ratio(row),
                _latency(row),
                f"{row['engine_busy']:.0%}",
                f"{row['server_cpu_s'] / row['seconds']:.2f}",
            ]
            for row in result["rows"]
        ],
    )


def growth_tables(result: dict[str, Any]) -> str:
    """The tables of one `growth-*.json`."""
    by_batch, by_size, explained = result["batch"], result["size"], result["explained"]
    plain, alone = by_size[0], result["models"][0]
    return "\n\n".join(
        (
            _table(
                "batch|ms|ms an image|memory MB|MB an image",
                [
                    [
                        str(row["batch"]),
                        f"{row['ms']:.1f}",
                        f"{row['ms'] / row['batch']:.1f}",
                        _mb(row["memory_bytes"]),
                        _mb(row["memory_bytes"] / row["batch"]),
                    ]
                    for row in by_batch["rows"]
                ],
            ),
            f"Time: {_line(by_batch['time_line'], 1, 'ms')}.",
            f"Memory: {_line(by_batch['memory_line'], 1e6, 'MB')}.",
            _table(
                "input, batch 1|GFLOPs|ms|time / first (range)|FLOPs / first|memory MB",
                [
                    [
                        f"{row['size']}x{row['size']}",
                        f"{row['flops'] / 1e9:.2f}",
                        f"{row['ms']:.1f}",
                        _ratio(row),
                        f"{row['flops'] / plain['flops']:.2f}",
                        _mb(row["memory_bytes"]),
                    ]
                    for row in by_size
                ],
            ),
            _table(
                "explained|ms|time / none explained (range)",
                [
                    [f"{row['explained']} of {row['batch']}", f"{row['ms']:.1f}", _ratio(row, 3)]
                    for row in explained["rows"]
                ],
            ),
            f"To make the points of one image from them: {explained['points_ms']:.2f} ms.",
            _table(
                "models|memory MB|MB for each model more|s to load one|ms, batch 1, in turn"
                "|time / one model (range)",
                [
                    [
                        str(row["models"]),
                        _mb(row["memory_bytes"]),
                        _mb(
                            (row["memory_bytes"] - alone["memory_bytes"])
                            / max(1, row["models"] - 1)
                        ),
                        f"{row['load_s']:.1f}",
                        f"{row['ms']:.1f}",
                        _ratio(row),
                    ]
                    for row in result["models"]
                ],
            ),
            *(
                _table(f"{whose}|MB", [[row["when"], _mb(row["bytes"])] for row in result[key]])
                for whose, key in (("engine", "engine_memory"), ("server", "server_memory"))
            ),
        )
    )


def _line(line: dict[str, Any], unit: float, name: str) -> str:
    return (
        f"from batch {line['from_batch']} on {line['of_an_image'] / unit:.1f} {name} an image and "
        f"{line['of_a_batch'] / unit:.1f} {name} a batch, at most {line['largest_deviation']:.1%} "
        f"off that line (R² {line['r2']:.4f})"
    )


def _mb(count: float) -> str:
    return f"{count / 1e6:.1f}"


def _table(header: str, rows: list[list[str]]) -> str:
    columns = header.split("|")
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


_TABLES = {
    "attention_cost": attention_tables,
    "decode": decode_table,
    "detector": detector_tables,
    "engine": engine_table,
    "gpu": gpu_tables,
    "growth": growth_tables,
    "kernels": kernels_table,
    "neighbour": neighbour_table,
    "openvino": openvino_table,
    "overload": overload_tables,
    "server": server_tables,
    "thread_split": thread_split_table,
}


def main() -> None:
    """Print the tables of all result files, each with its machine and its command."""
    print("# Results\n\nMade by `python -m bench.report`; see `bench/README.md`.")
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        machine = result["machine"]
        table = _TABLES[path.stem.partition("-")[0]](result)
        print(f"\n## {path.stem}\n\n`{machine['command']}`\n")
        print(
            f"{machine['cpu']}, {machine['cores']} cores, GPU: {machine['gpu']}, "
            f"torch {machine['torch']}, {machine['threads']} threads, {machine['date']}, "
            f"commit {machine['commit']}\n\n{table}"
        )


if __name__ == "__main__":
    main()
