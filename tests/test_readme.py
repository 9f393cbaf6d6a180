"""README and docs: their commands as a reader would paste them, their figures as measured."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.parser import text_string_to_metric_families
from torch import nn

from bench.findings import verdict
from bench.harness import RESULTS
from model import DAT, VARIANTS
from model.cost import cost
from service.errors import ServiceError, all_errors
from service.metrics.replica import Metrics
from service.processes.board import Board, Extent
from service.processes.merged_metrics import MergedMetrics
from tests.server import ROOT, RunningServer

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "bench/README.md", "deploy/README.md", "demo/**/*.md")
    for path in ROOT.glob(pattern)
)
LONGEST_README = 220  # lines


@cache
def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


README, API, GPU = page("README.md"), page("docs/api.md"), page("docs/gpu.md")
CURL = [line[2:] for line in (README + API).splitlines() if line.startswith("$ curl")]
(GRPC, GRPC_PRINTS) = re.findall(
    r"```python\n(import grpc\n.*?)```.*?```text\n(.*?)```", README, re.DOTALL
)[0]
(NETWORK,) = re.findall(r"```python\n(from pathlib import Path\n.*?)```", README, re.DOTALL)
(HTTP_ANSWER,) = re.findall(r"```http\n(.*?)```", README, re.DOTALL)


def run(command: list[str]) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def curl(command: str, server: RunningServer) -> str:
    here = command.replace("localhost:8000", server.http_url.removeprefix("http://"))
    return run(["bash", "-c", here.replace("curl ", "curl -sS ", 1)])


def parted(answer: str) -> tuple[dict[str, str], Any]:
    """The headers and the body of an answer as curl prints it."""
    head, _, body = answer.replace("\r", "").partition("\n\n")
    status, *lines = head.splitlines()
    assert status == "HTTP/1.1 200 OK"
    return dict(line.split(": ", 1) for line in lines), json.loads(body)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= LONGEST_README


PICTURES = [line for line in CURL if "/v1/visualize" in line]


@pytest.mark.parametrize(
    "command", [line for line in CURL if "-i " not in line and line not in PICTURES]
)
def test_curl(server, command):
    answer = json.loads(curl(command, server))
    assert all(result["status"] == "ok" for result in answer["results"])


@pytest.mark.parametrize("command", PICTURES)
def test_curl_for_a_picture(server, command, tmp_path):
    name = command.rpartition(" > ")[2]
    curl(command.replace(name, str(tmp_path / name)), server)
    with Image.open(tmp_path / name) as picture:
        picture.load()


def test_the_answer_that_is_shown_is_one_answer_and_looks_like_one(server):
    (command,) = [line for line in CURL if "-i " in line]
    shown_headers, shown = parted(HTTP_ANSWER)
    headers, answer = parted(curl(command, server))
    assert list(headers) == list(shown_headers)
    timing = shown["results"][0]["timing"]
    assert shown_headers["x-request-id"] == shown["request_id"]
    assert shown_headers["server-timing"] == (
        f"decode;dur={timing['decode_s'] * 1e3:.2f}, queue;dur={timing['queue_s'] * 1e3:.2f}, "
        f'compute;dur={timing["compute_s"] * 1e3:.2f}, batch;desc="{timing["batch_size"]}"'
    )
    del shown["request_id"], answer["request_id"]
    (was,), (now,) = shown.pop("results"), answer.pop("results")
    assert answer == shown
    assert now.pop("timing").keys() == was.pop("timing").keys()
    for predicted, shown_prediction in zip(now["predictions"], was["predictions"], strict=True):
        assert predicted.pop("score") == pytest.approx(shown_prediction.pop("score"), abs=1e-3)
    assert now == was


def test_grpc(server):
    printed = run([sys.executable, "-c", GRPC.replace("localhost:8001", server.grpc_target)])
    score = r"(score: 0\.\d{4})\d*"
    assert re.sub(score, r"\1", printed) == re.sub(score, r"\1", GRPC_PRINTS)


def test_the_network_without_the_server(tiny_checkpoint: Path):
    code = NETWORK.replace('"dat_tiny_in1k_224.pth"', repr(str(tiny_checkpoint)))
    run([sys.executable, "-c", f"import torch\nimages = torch.zeros(2, 3, 224, 224)\n{code}"])


SCRIPTS = re.findall(r"```python\n(.*?)```", page("docs/models.md"), re.DOTALL)


@pytest.mark.parametrize("script", range(len(SCRIPTS)))
def test_the_networks_of_the_page_on_models(script: int, tmp_path: Path):
    samples = ROOT / "demo" / "segmentation"
    files = {
        '"upn_tiny.pth"': samples / "semantic_fpn_dat_nano.safetensors",
        '"street.jpg"': samples / "samples" / "two.jpg",
        '"street.png"': tmp_path / "street.png",
    }
    code = SCRIPTS[script]
    for named, file in files.items():
        code = code.replace(named, repr(str(file)))
    run([sys.executable, "-c", code])


def anchors(path: Path) -> Iterator[str]:
    """The names that GitHub gives the headings of a page."""
    for heading in re.findall(r"^#+ (.*)$", path.read_text("utf-8"), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8")):
        if link.startswith("https://"):
            continue
        target, _, heading = link.partition("#")
        file = (path.parent / target).resolve() if target else path
        assert file.exists(), link
        assert not heading or heading in anchors(file), link


TEST_FILE = re.compile(r"`([\w/]*test_\w+\.py)(?:::(\w+))?`")


@pytest.mark.parametrize("name", ["docs/reliability.md", "docs/exactness.md", "CONTRIBUTING.md"])
def test_the_tests_that_a_page_names_exist(name: str):
    named = TEST_FILE.findall(page(name))
    assert named
    for file, function in named:
        path = ROOT / "tests" / file.removeprefix("tests/")
        assert path.is_file(), file
        if function:
            code = path.read_text("utf-8")
            assert re.search(rf"^(async )?def {function}\(", code, re.MULTILINE), function


SOURCE_FILE = re.compile(r"`((?:\w+/)+\w+\.(?:py|sh|proto))`")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_files_that_a_page_names_exist(path: Path):
    """Paths are from the root, from a room of the house that the page is about, or beside it."""
    homes = [ROOT, ROOT / "service", ROOT / "tests", path.parent]
    for file in SOURCE_FILE.findall(path.read_text("utf-8")):
        assert any((home / file).is_file() for home in homes), file


@pytest.mark.parametrize("error", list(all_errors()), ids=lambda e: e.__name__)
def test_every_error_is_in_the_table(error: type[ServiceError]):
    assert error.__doc__ is not None
    meaning = error.__doc__.splitlines()[0]
    row = f"| `{error.code}` | {int(error.http_status)} | {error.grpc_code.name} | {meaning} |"
    assert row in page("docs/errors.md").splitlines()


ONE_PROCESS, MANY_PROCESSES = page("docs/metrics.md").split("## Many processes")


def metric_row(family: Metric) -> str:
    labels = {label for sample in family.samples for label in sample.labels} - {"le"}
    name = family.name + ("_total" if family.type == "counter" else "")
    names = ", ".join(f"`{label}`" for label in sorted(labels))
    return f"| `{name}` | {family.type} | {names} | {family.documentation} |"


def test_every_metric_is_in_the_tables_and_no_other(server):
    httpx.get(f"{server.http_url}/v1/models")  # so that there is a response to be counted
    families = text_string_to_metric_families(httpx.get(server.metrics_url).text)
    rows = {metric_row(family) for family in families if family.name.startswith("dat_")}
    written = re.findall(r"^\| `dat_.*$", ONE_PROCESS, re.MULTILINE)
    assert set(written) == rows
    assert len(written) == len(rows)


@pytest.fixture
def merged(tmp_path: Path) -> MergedMetrics:
    board, restarts = Board.create(Extent(2, 1, 1)), {("worker-0", "killed"): 1}
    processes = [("supervisor", os.getpid())]
    return MergedMetrics(tmp_path, board, lambda: {"dat_nano": [0]}, lambda: processes, restarts)


def test_what_only_many_processes_show_is_in_their_table(merged: MergedMetrics):
    rows = {metric_row(family) for family in merged.collect()}
    own = {row for row in rows if "`process`" in row}
    assert set(re.findall(r"^\| `(?:dat|process)_.*$", MANY_PROCESSES, re.MULTILINE)) == own


def test_a_gauge_means_the_same_in_one_process_and_in_many(merged: MergedMetrics):
    registry = CollectorRegistry()
    Metrics(registry)
    meant = {family.name: family.documentation for family in registry.collect()}
    shared = [family for family in merged.collect() if family.name in meant]
    assert shared
    for family in shared:
        assert family.documentation == meant[family.name]


def test_what_gauges_of_many_processes_show_is_said(merged: MergedMetrics):
    gauges = {family.name for family in merged.collect() if family.type == "gauge"}
    on_board = {name for name in gauges if name.startswith("dat_")}
    modes: dict[str, set[str]] = {"livesum": set(), "livemax": set()}
    registry = CollectorRegistry()
    Metrics(registry)
    for gauge in registry._collector_to_names:
        if isinstance(gauge, Gauge) and gauge._name not in on_board:
            modes[gauge._multiprocess_mode].add(gauge._name)
    for label, names in {
        "the sum over processes that live": modes["livesum"],
        "one count for all, from the board": on_board,
        "the highest of any that lives": modes["livemax"],
    }.items():
        (cell,) = figures(label, MANY_PROCESSES)
        assert set(re.findall(r"`(\w+)`", cell)) == names, label


def test_the_table_of_variants_says_what_the_modules_cost(monkeypatch):
    for kind in (nn.Linear, nn.Conv2d):  # to draw weights would take seconds
        monkeypatch.setattr(kind, "reset_parameters", lambda _: None)
    rows = re.findall(
        r"`(dat_(?:pp_)?\w+_\d{3})` \| (\d+) \| ([\d.]+) M \| ([\d.]+) G", page("docs/models.md")
    )
    assert {name for name, *_ in rows} == {
        name for name in VARIANTS if name.endswith(("_224", "_384"))
    }
    for name, size, parameters, flops in rows:
        config = VARIANTS[name]
        assert config.image_size == (int(size), int(size))
        found = cost(DAT(config))
        assert f"{found.parameters / 1e6:.1f}" == parameters, name
        assert f"{found.flops / 1e9:.1f}" == flops, name


def figures(label: str, text: str = page("docs/speed.md")) -> list[str]:
    """The cells that are not empty of the one row of a page that begins with a label."""
    (row,) = re.findall(rf"^\| {re.escape(label)} \| (.*) \|$", text, re.MULTILINE)
    return [cell.strip() for cell in row.split("|") if cell.strip()]


def result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


@pytest.mark.parametrize("index", [0, 1])
def test_the_figures_of_engines_are_those_of_the_results(index: int):
    name = ("dat_tiny_224", "dat_pp_tiny_224")[index]
    rows = {row["batch"]: row for row in result(f"engine-{name}-cpu-float32")["batches"]}
    (ov,) = [model for model in result("openvino-cpu")["models"] if model["model"] == name]
    openvino = {row["batch"]: row for row in ov["batches"]}
    for batch in (1, 8):
        row, end = rows[batch], f", batch {batch}"
        for label, figure in {
            "engine / straightforward eager implementation": f"{row['ratio']:.2f}",
            "the same, if that one were told to keep its memory": f"{row['ratio_to_keeping']:.2f}",
            "engine / a matrix product of 4096x4096, FLOPs a second": (
                f"{100 * row['share_of_product_rate']:.0f} %"
            ),
            "engine with OpenVINO / engine in torch": f"{openvino[batch]['ratio']:.2f}",
        }.items():
            assert figures(label + end)[index] == figure, label + end
    explained = f"{rows[8]['explained_over_plain_time']:.2f}"
    assert figures("time with points / without, batch 8")[index] == explained


def test_the_figures_of_explanations_are_those_of_the_results():
    measured = result("explain-cpu")
    names = list(dict.fromkeys(row["model"] for row in measured["answers"]))
    ratios = {(row["model"], row["kind"]): row["ratio"] for row in measured["computed"]}
    for label, kind in {
        "time with points / without, CPU": "points",
        "time with attention / without": "attention",
        "time with attention of the first four layers / without": "most layers",
    }.items():
        assert figures(label) == [f"{ratios[name, kind]:.2f}" for name in names]
    sizes = {(row["model"], row["kind"]): row["json_kb"] for row in measured["answers"]}
    for label, kind in {
        "JSON of the points, KB": "points",
        "JSON of points and attention, KB": "attention",
    }.items():
        assert figures(label) == [f"{sizes[name, kind]:.0f}" for name in names]


def test_the_attention_that_is_shown_is_that_of_its_command(server):
    (command,) = [line for line in CURL if "explain=attention" in line]
    (shown,) = re.findall(r"```json\n(\{\"attention\".*?)```", API, re.DOTALL)
    (was,) = json.loads(shown)["attention"]
    (now,) = json.loads(curl(command, server))["results"][0]["attention"]
    assert was["received"][0][0] == pytest.approx(now["received"][0][0], abs=1e-3)
    (query,), (given,) = was.pop("queries"), now.pop("queries")
    assert (query.pop("row"), query.pop("column")) == (given.pop("row"), given.pop("column"))
    assert query.keys() == given.keys()
    assert np.ravel(query["centre"]) == pytest.approx(np.ravel(given["centre"]))
    for ours, theirs in zip(
        (*chain(*query["groups"]), *query["keys"]),
        (*chain(*given["groups"]), *given["keys"]),
        strict=True,
    ):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert np.ravel(value) == pytest.approx(np.ravel(theirs[name]), abs=0.02)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_the_figures_of_the_server_are_those_of_the_results(protocol: str):
    (row,) = [
        row
        for row in result("server-dat_tiny_224-cpu")["closed_loop"]
        if (row["protocol"], row["concurrency"]) == (protocol, 32)
    ]
    name = {"http": "HTTP", "grpc": "gRPC"}[protocol]
    label = f"server / its engine alone, 32 requests in flight, {name}"
    assert figures(label) == [f"{row['ratio']:.2f}"]


@pytest.mark.parametrize("index", [0, 1])
def test_the_figures_of_detectors_are_those_of_the_results(index: int):
    name = ("retinanet_dat_pp_tiny", "mask_rcnn_dat_pp_tiny")[index]
    (case,) = [
        case
        for case in result(f"detector-{name}-cpu-float32")["cases"]
        if case["upload"] == [800, 1333]
    ]
    (served,) = case["closed_loop"]
    for label, figure in {
        "forward pass, seconds": f"{case['forward_ms'] / 1000:.1f}",
        "post-processing / forward pass": f"{100 * case['post_processing_share']:.1f} %",
        "server / its engine alone, 2 requests in flight, HTTP": f"{served['ratio']:.2f}",
    }.items():
        assert figures(label)[index] == figure, label


def test_the_figures_of_segmenters_are_those_of_the_results():
    models = result("segmenter-cpu-float32")["models"]
    for label, cells in {
        "of an image, seconds": [f"{model['seconds']:.1f}" for model in models],
        "floor / time of an image": [f"{100 * model['ratio']:.0f} %" for model in models],
        "memory of an image, MB": [f"{model['memory_bytes'] / 1e6:.0f}" for model in models],
    }.items():
        assert figures(label) == cells, label


def test_the_figures_of_tensors_are_those_of_the_results():
    rows = [row for row in result("oip-cpu")["rows"] if row["client"] == "ours"]
    cpu_ms = {(row["form"], row["model"], row["protocol"]): row["cpu_ms"] for row in rows}
    for form in dict.fromkeys(row["form"] for row in rows):
        cells = [
            f"{cpu_ms[form, model, protocol]:.2f}"
            for model in ("null", "demo")
            for protocol in ("http", "grpc")
        ]
        assert figures(form) == cells, form


@pytest.mark.parametrize("name", ["dat_tiny_224", "dat_pp_tiny_224"])
def test_the_figures_of_growth_are_those_of_the_results(name: str):
    measured = result(f"growth-{name}-cpu-float32")
    batches, sizes, models = measured["batch"]["rows"], measured["size"], measured["models"]
    for label, cells in {
        f"`{name}`, ms an image": [f"{row['ms'] / row['batch']:.1f}" for row in batches],
        f"`{name}`, MB an image": [
            f"{row['memory_bytes'] / row['batch'] / 1e6:.1f}" for row in batches
        ],
        f"`{name}`, time / that of 224": [f"{row['ratio']:.2f}" for row in sizes],
        f"`{name}`, FLOPs / those of 224": [
            f"{row['flops'] / sizes[0]['flops']:.2f}" for row in sizes
        ],
        f"copies of `{name}`, MB": [f"{row['memory_bytes'] / 1e6:.0f}" for row in models],
    }.items():
        assert figures(label) == cells, label


def gpu_rows(run: str) -> list[dict[str, Any]]:
    return [row for step in result(f"gpu-{run}-nvidia-h200")["steps"] for row in step["rows"]]


def finding(model: str, what: str) -> float:
    (row,) = [
        row for row in gpu_rows("first") if (row.get("model"), row.get("what")) == (model, what)
    ]
    return float(row["figure"])


@pytest.mark.parametrize("name", [n for n in VARIANTS if n.endswith(("_224", "_384"))])
def test_the_errors_on_a_gpu_are_those_of_the_results(name: str):
    errors = [
        f"{finding(name, f'{dtype}, kernels: largest error of the logits'):.2g}"
        for dtype in ("float32", "float16", "bfloat16")
    ]
    graphs, seconds = finding(name, "all graphs, MB"), finding(name, "12 graphs: s to load")
    assert figures(f"`{name}`", GPU) == [*errors, f"{graphs:.0f}", f"{seconds:.1f}"]


def test_every_error_on_a_gpu_kept_its_bound():
    errors = [row for row in gpu_rows("first") if row.get("what", "").endswith("of the logits")]
    assert {verdict(row) for row in errors} == {"met"}


def test_the_objects_found_on_a_gpu_are_those_of_the_results():
    shares: dict[tuple[str, str], list[float]] = {}
    for row in gpu_rows("first"):
        if row.get("what", "").endswith("found of the CPU's objects"):
            dtype = row["what"].partition(",")[0]
            shares.setdefault((row["model"], dtype), []).append(row["figure"])
    least = {case: min(found) for case, found in shares.items()}
    assert all(found == 1 for (_, dtype), found in least.items() if dtype == "float32")
    demo = [f"{least['mask_rcnn_dat_nano', dtype]:.2f}" for dtype in ("float16", "bfloat16")]
    assert figures("`mask_rcnn_dat_nano`", GPU) == demo


def test_what_was_checked_again_on_a_gpu_kept_its_bounds():
    checks = [row for row in gpu_rows("tuned") if "what" in row and "engine" not in row["what"]]
    checked = [row for row in checks if not row["what"].startswith("graph, kernels: ")]
    assert {verdict(row) for row in checked} == {"met", ""}
    assert len({row["model"] for row in checked}) == 4  # as the page says


def gpu_times(run: str, model: str, way: str) -> dict[int, dict[str, float]]:
    return {
        row["batch"]: row
        for row in gpu_rows(run)
        if (row.get("model"), row.get("way")) == (model, way)
    }


@pytest.mark.parametrize("model", ["dat_tiny_224", "dat_pp_tiny_224"])
@pytest.mark.parametrize(
    ("run", "way"),
    [
        ("first", "graph, kernels"),
        ("first", "engine, overlapping"),
        ("first", "eager"),
        ("tuned", "graph, kernels"),
        ("tuned", "engine, overlapping"),
    ],
)
def test_the_times_on_a_gpu_are_those_of_the_results(run: str, model: str, way: str):
    cells = [
        f"{row['ms']:.2f} ms, {row['images_per_s']:.0f}/s"
        for row in gpu_times(run, model, way).values()
    ]
    assert figures(f"{run} | {way} | `{model}`", GPU) == cells


@pytest.mark.parametrize(
    ("run", "file", "protocol"),
    [
        ("first", "server-dat_tiny_224-cuda-first", "http"),
        ("first", "server-dat_tiny_224-cuda-first", "grpc"),
        ("tuned", "server-dat_tiny_224-cuda", "http"),
    ],
)
def test_the_figures_of_the_server_on_a_gpu_are_those_of_the_results(
    run: str, file: str, protocol: str
):
    (row,) = [row for row in result(file)["closed_loop"] if row["protocol"] == protocol]
    name = {"http": "HTTP", "grpc": "gRPC"}[protocol]
    assert figures(f"{run} | {name}, {row['concurrency']}", GPU) == [
        f"{row['images_per_s']:.0f}",
        f"{row['engine_images_per_s']:.0f}",
        f"{row['ratio']:.2f}",
        f"{row['p50_ms']:.0f} / {row['p99_ms']:.0f}",
    ]


def speed_up(model: str, batch: int) -> str:
    ways = [gpu_times("first", model, way)[batch]["ms"] for way in ("eager", "graph, kernels")]
    return f"{ways[0] / ways[1]:.1f}"


@pytest.mark.parametrize("batch", [1, 128])
def test_the_gain_of_graphs_is_that_of_the_results(batch: int):
    found = [speed_up(model, batch) for model in ("dat_tiny_224", "dat_pp_tiny_224")]
    assert figures(f"eager / graph, kernels, batch {batch}", GPU) == found


def test_the_rows_of_speed_in_the_readme_are_those_of_the_pages():
    on_cpu, on_gpu = "2 CPU cores, float32", "NVIDIA H200, bfloat16"
    crowded = [
        row["goodput"]
        for row in result("overload-cpu")["overload"]
        if row["times"] == 10 and not row.get("front_ends")
    ]
    for label, (where, *expected) in {
        "throughput of the engine / a straightforward eager implementation, batch 8": (
            on_cpu,
            *figures("engine / straightforward eager implementation, batch 8"),
        ),
        "throughput of the server over HTTP / its engine alone, 32 requests in flight": (
            on_cpu,
            *figures("server / its engine alone, 32 requests in flight, HTTP"),
        ),
        "time of our eager forward pass / captured graph with fused kernels, batch 1": (
            on_gpu,
            *figures("eager / graph, kernels, batch 1", GPU),
        ),
        "throughput of the detector server over HTTP / its engine alone, 2 requests in flight": (
            on_cpu,
            *figures("server / its engine alone, 2 requests in flight, HTTP"),
        ),
        "answered / capacity, asked for ten times the capacity (demo model)": (
            on_cpu,
            f"{min(crowded):.2f} to {max(crowded):.2f}",
        ),
        "requests/s of mosec, PyTriton, KServe, LitServe / ours, same engine, 32 in flight "
        "(demo model)": (on_cpu, peers_of_the_readme("32 in flight")),
        "the same, 8 in flight": (on_cpu, peers_of_the_readme("8 in flight")),
        "requests/s of mosec, KServe / ours, same engine, 8 in flight": (
            on_cpu,
            ", ".join(figures("`dat_tiny_224`, 8 in flight")[1:]),
        ),
    }.items():
        assert figures(label, README) == [where, *expected], label


PEERS = ("mosec", "PyTriton", "KServe", "LitServe", "BentoML", "Ray Serve")


def peers_of_the_readme(label: str) -> str:
    _, *ratios = figures(label)
    return ", ".join(ratio.strip("*") for ratio in ratios[:4])


@pytest.mark.parametrize("in_flight", [1, 8, 32])
def test_the_figures_of_peers_with_a_large_model_are_those_of_the_results(in_flight: int):
    measured = result("peers-dat_tiny_224-cpu")
    loads = {row["side"]: row for row in measured["loads"] if row["concurrency"] == in_flight}
    ratios = [f"{loads[peer]['ratio']:.2f}" for peer in ("mosec", "KServe")]
    cells = [f"**{ratio}**" if float(ratio) > 1 else ratio for ratio in ratios]
    ours = f"{loads['ours, one process']['requests_per_s']:.1f}"
    assert figures(f"`dat_tiny_224`, {in_flight} in flight") == [ours, *cells]


@pytest.mark.parametrize("in_flight", [1, 8, 32])
def test_the_figures_of_peers_are_those_of_the_results(in_flight: int):
    measured = result("peers-dat_nano-cpu")
    loads = {row["side"]: row for row in measured["loads"] if row["concurrency"] == in_flight}
    ours = loads["ours, one process"]
    ratios = [f"{loads[peer]['ratio']:.2f}" for peer in PEERS]
    cells = [f"**{ratio}**" if float(ratio) > 1 else ratio for ratio in ratios]
    assert figures(f"{in_flight} in flight") == [f"{ours['requests_per_s']:.0f}", *cells]
    if in_flight == 32:
        times = [f"{loads[side]['p99_ms']:.0f}" for side in ("ours, one process", *PEERS)]
        assert [cell.strip("*") for cell in figures("p99 at 32 in flight, ms")] == times
    memory = {row["side"]: f"{row['memory'] / 1e6:.0f}" for row in measured["servers"]}
    assert figures("memory of all its processes, MB") == [
        memory[side] for side in ("ours, one process", *PEERS)
    ]
