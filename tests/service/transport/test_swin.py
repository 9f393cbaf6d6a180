"""A Swin beside a DAT in one server: what both attend to for the same query."""

import asyncio
import re
from io import BytesIO
from typing import Any
from xml.etree import ElementTree as ET

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from demo import samples
from model.checkpoint import read
from model.geometry import MOST_QUERIES
from model.normalise import Normalise
from model.swin import load_swin
from model.transforms import Preprocessing, to_model_pixels
from service.models.load import BUNDLED
from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import channel
from tests.faults import SHAPES
from tests.server import ROOT, RunningServer, start_server

STAR = (samples.FOLDER / "star.jpg").read_bytes()
PIXELS, WEIGHTS = 0.006, 2e-5
SVG = "{http://www.w3.org/2000/svg}"

# Servers that start with two libraries.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=SHAPES)
def beside(request):
    """Both of them, as `demo/beside_swin.toml` says."""
    models = ROOT / "demo" / "beside_swin.toml"
    with start_server(DAT_MODEL__FILE=models, **SHAPES[request.param]) as server:
        yield server


async def ask(server: RunningServer, model: str, **options: Any) -> dict[str, Any]:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        response = await client.post(
            "/v1/classify", params={"model": model, **options}, content=STAR
        )
    body = response.json()
    answer: dict[str, Any] = body["results"][0] if "results" in body else body["error"]
    return answer


def by_the_network(x: float, y: float, stage: int) -> tuple[Any, Any, tuple[int, int]]:
    """Weights `(heads, Ns)` of the query at a place of `STAR`, received, and its cell."""
    model = load_swin(read(BUNDLED["swin_nano"]))
    preprocessing = Preprocessing.of(model.config)
    with Image.open(BytesIO(STAR)) as image:
        pixels = to_model_pixels(image.convert("RGB"), preprocessing)
        pixel_map = preprocessing.pixel_map(*image.size)
    columns = model.config.map_size(stage)[1]
    column, row = (pixel_map.to_input((x, y)) // (4 << stage)).astype(int)
    cells = torch.full((1, 1, MOST_QUERIES), int(row * columns + column))
    with torch.inference_mode():
        images = Normalise()(torch.from_numpy(pixels)[None])
        (weights,) = model.forward_explained(images, (stage,), cells).attention
    return weights.weights[0, 0].numpy(), weights.received[0].numpy(), (int(row), int(column))


async def test_one_query_has_its_points_and_its_window(beside):
    dat, swin = await asyncio.gather(
        *(
            ask(beside, name, explain="attention", queries="350,230", top_n=16)
            for name in ("dat_nano", "swin_nano")
        )
    )
    assert [answer["status"] for answer in (dat, swin)] == ["ok", "ok"]
    assert [answer["predictions"][0]["label"] for answer in (dat, swin)] == ["star", "star"]
    assert "points" in dat
    assert "points" not in swin
    assert [(one["stage"], one["block"]) for one in dat["attention"]] == [(2, 2), (3, 1)]
    assert [(one["stage"], one["block"]) for one in swin["attention"]] == [(2, 1), (3, 1)]
    # The same cell of maps of the same size, but for half a pixel of the input.
    for ours, theirs in zip(dat["attention"], swin["attention"], strict=True):
        (query,), (windowed,) = ours["queries"], theirs["queries"]
        assert "window" not in query
        x1, y1, x2, y2 = windowed["window"]
        assert x1 < 350 < x2
        assert y1 < 230 < y2
        for key in windowed["keys"]:
            for x, y in key["points"]:
                assert x1 < x < x2
                assert y1 < y < y2
        weights, received, cell = by_the_network(350, 230, theirs["stage"])
        assert (windowed["row"], windowed["column"]) == cell
        np.testing.assert_allclose(
            np.array(theirs["received"]).reshape(received.shape), received, atol=100 * WEIGHTS
        )
        for head, of_head in zip(windowed["groups"], weights, strict=True):
            assert len(head) == min(16, (of_head > 1e-30).sum())
            assert sum(key["weight"] for key in head) == pytest.approx(1, abs=1e-4)
            for key in head:
                assert key["weight"] == pytest.approx(of_head[key["key"]], abs=WEIGHTS)


async def test_models_name_the_layers_that_they_explain(beside):
    async with httpx.AsyncClient(base_url=beside.http_url) as client:
        models = (await client.get("/v1/models")).json()["models"]
    named = {model["name"]: model["explained_layers"] for model in models}
    assert named["swin_nano"] == ["0.1", "1.1", "2.1", "3.1"]
    assert named["dat_nano"] == ["0.0", "1.0", "2.0", "2.1", "2.2", "3.0", "3.1"]
    async with channel(beside) as open_channel:
        stub = dat_pb2_grpc.ModelServiceStub(open_channel)
        listed = (await stub.ListModels(dat_pb2.ListModelsRequest())).models
    assert {
        model.name: [f"{layer.stage}.{layer.block}" for layer in model.explained_layers]
        for model in listed
    } == named
    for layer in named["swin_nano"]:
        answer = await ask(beside, "swin_nano", explain="attention", layers=layer)
        assert answer["status"] == "ok"


async def test_plain_and_explained_requests_give_the_same(beside):
    answers = await asyncio.gather(
        *(ask(beside, "swin_nano", **({"explain": "attention"} if n % 2 else {})) for n in range(8))
    )
    for answer in answers:
        for ours, theirs in zip(answer["predictions"], answers[0]["predictions"], strict=True):
            assert ours["label"] == theirs["label"]
            assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)
    assert ["attention" in answer for answer in answers] == [False, True] * 4


async def test_grpc_gives_the_same(beside):
    request = dat_pb2.ClassifyRequest(
        images=[STAR],
        model="swin_nano",
        explain=dat_pb2.EXPLAIN_ATTENTION,
        attention=dat_pb2.AttentionOptions(auto=True, top_n=5),
    )
    async with channel(beside) as open_channel:
        response = await dat_pb2_grpc.ClassifierServiceStub(open_channel).Classify(request)
    image = response.results[0].classification
    assert not image.HasField("points")
    over_http = await ask(beside, "swin_nano", explain="attention", queries="auto", top_n=5)
    for ours, theirs in zip(image.attention.layers, over_http["attention"], strict=True):
        assert (ours.rows, ours.columns) == np.shape(theirs["received"])[1:]
        assert len(ours.queries) == 4
        for query, same in zip(ours.queries, theirs["queries"], strict=True):
            box = query.window
            assert [box.x1, box.y1, box.x2, box.y2] == pytest.approx(same["window"], abs=PIXELS)
            assert list(query.keys) == [key["key"] for key in same["keys"]]
            points = np.array(query.points).reshape(5, ours.groups, 2)
            np.testing.assert_allclose(points, [k["points"] for k in same["keys"]], atol=PIXELS)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"explain": "points"}, "swin_nano has no sampling points; explain=attention shows"),
        ({"explain": "attention", "layers": "2.0"}, "swin_nano explains no layer 2.0; there are"),
        ({"explain": "attention", "queries": "-1,3"}, "lies outside of the image"),
    ],
)
async def test_what_it_cannot_show_is_refused_with_a_sentence(beside, options, sentence):
    error = await ask(beside, "swin_nano", **options)
    assert error["code"] == "invalid_option"
    assert sentence in error["message"]


def box_of(path: str) -> list[float]:
    """Around a path of an SVG whose corners are rectangular."""
    xs = [float(x) for x in re.findall(r"[MLH]([-\d.]+)", path)]
    ys = [float(y) for y in re.findall(r"(?:[ML][-\d.]+ |V)([-\d.]+)", path)]
    return [min(xs), min(ys), max(xs), max(ys)]


async def picture(server: RunningServer, **options: Any) -> httpx.Response:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        return await client.post(
            "/v1/visualize", params={"model": "swin_nano", "size": 700, **options}, content=STAR
        )


@pytest.mark.parametrize("groups", [None, (0,), (1, 3)])
async def test_a_picture_of_it_has_the_window_and_its_cells(beside, groups):
    """A tile in each cell, whose area is its weight over the heads that are asked for."""
    asked = {"queries": "350,230", "layers": "2.1"}
    answer = await ask(beside, "swin_nano", explain="attention", top_n=16, **asked)
    (query,) = answer["attention"][0]["queries"]
    options = {} if groups is None else {"groups": ",".join(map(str, groups))}
    drawn = await picture(beside, format="svg", **asked, **options)
    assert drawn.status_code == 200, drawn.text
    weights = {}
    for head in groups or range(len(query["groups"])):
        for key in query["groups"][head]:
            place = tuple(key["point"])
            weights[place] = weights.get(place, 0) + key["weight"]
    x1, y1, x2, y2 = query["window"]
    cell = (x2 - x1) / 4, (y2 - y1) / 4
    boxes = [box_of(path.attrib["d"]) for path in ET.fromstring(drawn.text).iter(f"{SVG}path")]
    assert [x1, y1, x2, y2] in [pytest.approx(box, abs=0.1) for box in boxes]
    for (x, y), weight in weights.items():
        half = 0.43 * np.sqrt(weight / max(weights.values()))
        tile = [x - half * cell[0], y - half * cell[1], x + half * cell[0], y + half * cell[1]]
        assert any(box == pytest.approx(tile, abs=0.15) for box in boxes), (x, y)


async def test_a_picture_of_it_is_the_same_over_grpc(beside):
    asked = dat_pb2.AttentionOptions(queries=[dat_pb2.Position(x=350, y=230)])
    request = dat_pb2.VisualizeRequest(image=STAR, model="swin_nano", attention=asked, size=700)
    async with channel(beside) as open_channel:
        drawn = await dat_pb2_grpc.VisualizerServiceStub(open_channel).Visualize(request)
    assert drawn.picture == (await picture(beside, queries="350,230")).content
    assert drawn.picture != (await picture(beside, queries="100,100")).content


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"show": "points,keys"}, "swin_nano attends to windows and has no points"),
        ({"show": "keys", "groups": "9"}, "heads, counted from 0; there is no group 9"),
        ({"show": "keys", "layers": "2.0"}, "swin_nano explains no layer 2.0; there are"),
        ({"show": "masks"}, "finds no masks"),
    ],
)
async def test_a_picture_that_it_cannot_have_is_refused(beside, options, sentence):
    answer = await picture(beside, **options)
    assert answer.status_code == 400
    assert sentence in answer.json()["error"]["message"]


async def test_with_openvino_pytorch_computes_it():
    with start_server(DAT_MODEL__NAME="swin_nano", DAT_ENGINE__BACKEND="openvino") as server:
        plain, explained = [
            await ask(server, "swin_nano", explain=explain) for explain in ("none", "attention")
        ]
    assert plain["predictions"][0]["label"] == explained["predictions"][0]["label"] == "star"
    assert len(explained["attention"]) == 2
