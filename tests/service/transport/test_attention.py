"""What queries attend to, asked of running servers over both transports."""

import asyncio
import base64
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from demo.evaluate import bundled_model
from model.detection import DETECTORS, load_detector
from model.detection.normalise import Normalise as NormalisePadded
from model.detection.transforms import to_model_pixels as to_detector_pixels
from model.geometry import MOST_QUERIES
from model.normalise import Normalise
from model.transforms import Preprocessing, to_model_pixels
from service.models.load import BUNDLED
from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import JPEG, channel, encoded
from tests.server import ROOT, RunningServer, start_server

PIXELS = 0.006  # JSON rounds to hundredths
WEIGHTS = 2e-5
SCENE = (ROOT / "demo/detection/samples/many.jpg").read_bytes()


@dataclass(frozen=True)
class Query:
    cell: tuple[int, int]
    centre: NDArray[np.float64]
    group_keys: NDArray[np.int64]
    group_weights: NDArray[np.float64]
    group_points: NDArray[np.float64]
    keys: NDArray[np.int64]
    weights: NDArray[np.float64]
    points: NDArray[np.float64]


@dataclass(frozen=True)
class Layer:
    stage: int
    block: int
    received: NDArray[np.float64]
    queries: list[Query]


@dataclass(frozen=True)
class Seen:
    """One image as a client sees it: an error, or its answer without points, and attention."""

    error: str = ""
    message: str = ""
    answer: Any = None
    points: int = 0
    inside: int = 0  # points that lie in objects
    attention: list[Layer] | None = None


async def over_http(
    server: RunningServer, task: str, images: list[bytes], **options: Any
) -> list[Seen]:
    if "queries" in options and options["queries"] != "auto":
        options["queries"] = ";".join(f"{x},{y}" for x, y in options["queries"])
    if "layers" in options:
        options["layers"] = ",".join(options["layers"])
    files = [("file", (f"{n}.jpg", image)) for n, image in enumerate(images)]
    return await _posted(server, task, files=files, data=options)


async def over_json(
    server: RunningServer, task: str, images: list[bytes], **options: Any
) -> list[Seen]:
    body = {"images": [base64.b64encode(image).decode() for image in images], **options}
    return await _posted(server, task, json=body)


async def _posted(server: RunningServer, task: str, **sent: Any) -> list[Seen]:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        body = (await client.post(f"/v1/{task}", **sent)).json()
    if "error" in body:
        return [Seen(body["error"]["code"], body["error"]["message"])]
    return [_from_json(result) for result in body["results"]]


def _from_json(result: dict[str, Any]) -> Seen:
    if result["status"] == "error":
        return Seen(result["error"]["code"], result["error"]["message"])
    layers = result.get("attention")
    answer = result.get("predictions") or [one["box"] for one in result["detections"]]
    return Seen(
        answer=answer,
        points=len(result.get("points", ())),
        inside=sum(
            len(layer["indices"])
            for one in result.get("detections", ())
            for layer in one.get("points_inside") or ()
        ),
        attention=None
        if layers is None
        else [
            Layer(
                layer["stage"],
                layer["block"],
                np.array(layer["received"]),
                [
                    Query(
                        (query["row"], query["column"]),
                        np.array(query["centre"]),
                        *(
                            np.array([[key[name] for key in group] for group in query["groups"]])
                            for name in ("key", "weight", "point")
                        ),
                        *(
                            np.array([key[name] for key in query["keys"]])
                            for name in ("key", "weight", "points")
                        ),
                    )
                    for query in layer["queries"]
                ],
            )
            for layer in layers
        ],
    )


async def over_grpc(
    server: RunningServer, task: str, images: list[bytes], **options: Any
) -> list[Seen]:
    queries = options.get("queries", ())
    auto = queries == "auto"
    named = [layer.split(".") for layer in options.get("layers", ())]
    asked = dat_pb2.AttentionOptions(
        queries=() if auto else [dat_pb2.Position(x=x, y=y) for x, y in queries],
        auto=auto,
        layers=[dat_pb2.LayerName(stage=int(s), block=int(b)) for s, b in named],
        top_n=options.get("top_n"),
    )
    explain = dat_pb2.Explain.Value(f"EXPLAIN_{options.get('explain', 'none').upper()}")
    async with channel(server) as open_channel:
        call, request, field = {
            "classify": (
                dat_pb2_grpc.ClassifierServiceStub(open_channel).Classify,
                dat_pb2.ClassifyRequest,
                "classification",
            ),
            "detect": (
                dat_pb2_grpc.DetectorServiceStub(open_channel).Detect,
                dat_pb2.DetectRequest,
                "image",
            ),
        }[task]
        try:
            response = await call(request(images=images, explain=explain, attention=asked))
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata())
            return [Seen(trailing["dat-error-code"], error.details() or "")]
    return [_from_grpc(result, field) for result in response.results]


def _from_grpc(result: Any, field: str) -> Seen:
    if result.HasField("error"):
        return Seen(result.error.code, result.error.message)
    image = getattr(result, field)
    answer: list[Any]
    if field == "image":
        answer = [[one.box.x1, one.box.y1, one.box.x2, one.box.y2] for one in image.detections]
    else:
        answer = [
            {"label": one.label, "index": one.index, "score": one.score}
            for one in image.predictions
        ]
    layers = None
    if image.HasField("attention"):
        layers = [
            Layer(
                layer.stage,
                layer.block,
                np.array(layer.received).reshape(layer.groups, layer.rows, layer.columns),
                [_query(query, layer.groups) for query in layer.queries],
            )
            for layer in image.attention.layers
        ]
    found = image.detections if field == "image" else ()
    inside = sum(len(layer.indices) for one in found for layer in one.points_inside)
    return Seen(answer=answer, points=len(image.points.layers), inside=inside, attention=layers)


def _query(query: Any, groups: int) -> Query:
    count = len(query.keys)
    return Query(
        (query.row, query.column),
        np.array([query.centre.x, query.centre.y]),
        np.array(query.group_keys).reshape(groups, count),
        np.array(query.group_weights).reshape(groups, count),
        np.array(query.group_points).reshape(groups, count, 2),
        np.array(query.keys),
        np.array(query.weights),
        np.array(query.points).reshape(count, groups, 2),
    )


every_transport = pytest.mark.parametrize("ask", [over_http, over_json, over_grpc])


@pytest.fixture(scope="module")
def served_by_many():
    """The same from two front ends and a worker."""
    with start_server(DAT_SERVER__FRONT_ENDS=2) as running:
        yield running


@pytest.fixture(params=["one process", "front ends"])
def any_server(request):
    return request.getfixturevalue("server" if request.param == "one process" else "served_by_many")


def expected(task: str, layer_index: int, cell: int) -> tuple[Any, Any]:
    """Weights `(G, Ns)` of a query, and received, of `JPEG`, from the network itself."""
    with Image.open(BytesIO(JPEG)) as image:
        picture = image.convert("RGB")
    cells = torch.full((1, 1, MOST_QUERIES), cell)
    with torch.inference_mode():
        if task == "classify":
            model = bundled_model()
            pixels = to_model_pixels(picture, Preprocessing.of(model.config))
            images = Normalise()(torch.from_numpy(pixels)[None])
            (weights,) = model.forward_explained(images, (layer_index,), cells).attention
        else:
            detector = load_detector(BUNDLED["mask_rcnn_dat_nano"]).detector
            resizing = detector.config.resizing(picture.size[::-1])
            resized = torch.tensor([resizing.resized])
            pixels = to_detector_pixels(np.asarray(picture), resizing)
            images = NormalisePadded()(torch.from_numpy(pixels)[None], resized)
            scale = torch.tensor([resizing.scale_xy])
            (weights,) = detector.find(images, resized, scale, (layer_index,), cells).attention
    return weights.weights[0, 0].numpy(), weights.received[0].numpy()


@every_transport
@pytest.mark.parametrize("task", ["classify", "detect"])
async def test_an_answer_has_the_attention_of_the_network(any_server, ask, task):
    # Of an image of 320x240 pixels: a cell off the diagonal.
    (seen,) = await ask(
        any_server, task, [JPEG], explain="attention", queries=[[300.0, 30.0]], top_n=3
    )
    assert seen.error == ""
    assert seen.points == 7
    assert seen.attention is not None
    assert [(layer.stage, layer.block) for layer in seen.attention] == [(2, 2), (3, 1)]
    for index, layer in zip((4, 6), seen.attention, strict=True):
        stride = 4 << layer.stage
        if task == "classify":
            columns = 128 // stride
            # The image is squeezed to 146x146, and its centre cut out.
            x, y = np.array([300, 30]) * [146 / 320, 146 / 240] - 9
            back = (np.array([0.5, 0.5]) + 9) * [320 / 146, 240 / 146]
            step = stride * np.array([320 / 146, 240 / 146])
        else:
            resizing = DETECTORS["mask_rcnn_dat_nano"].resizing((240, 320))
            columns = -(-resizing.padded[1] // stride)
            x, y = np.array([300, 30]) * resizing.scale_xy
            back = 0.5 / np.array(resizing.scale_xy)
            step = stride / np.array(resizing.scale_xy)
        row, column = round((y - 0.5) / stride), round((x - 0.5) / stride)
        row, column = max(row, 0), min(column, columns - 1)
        (query,) = layer.queries
        assert query.cell == (row, column)
        np.testing.assert_allclose(query.centre, back + step * [column, row], atol=PIXELS)
        weights, received = expected(task, index, row * columns + column)
        np.testing.assert_allclose(
            layer.received.reshape(received.shape), received, atol=100 * WEIGHTS
        )
        for group, of_group in enumerate(weights):
            best = np.argsort(-of_group)[:3]
            np.testing.assert_allclose(query.group_weights[group], of_group[best], atol=WEIGHTS)
            np.testing.assert_allclose(
                of_group[query.group_keys[group]], of_group[best], atol=WEIGHTS
            )
        total = weights.sum(0)
        np.testing.assert_allclose(query.weights, np.sort(total)[::-1][:3], atol=2 * WEIGHTS)
        np.testing.assert_allclose(total[query.keys], query.weights, atol=2 * WEIGHTS)


@every_transport
async def test_objects_and_attention_come_together(server, ask):
    asked = {"queries": [[300.0, 30.0]], "layers": ["2.2"]}
    seen = [
        (await ask(server, "detect", [SCENE], explain=explain, **asked))[0]
        for explain in ("attention", "objects")
    ]
    assert [one.error for one in seen] == ["", ""]
    assert [one.points for one in seen] == [7, 7]
    assert [one.inside > 0 for one in seen] == [False, True]
    (alone,), (beside,) = [one.attention for one in seen]
    assert (beside.stage, beside.block) == (2, 2)
    np.testing.assert_allclose(beside.received, alone.received, atol=100 * WEIGHTS)
    np.testing.assert_array_equal(beside.queries[0].keys, alone.queries[0].keys)
    (without,) = await ask(server, "detect", [SCENE], explain="objects")
    assert without.attention is None
    assert without.inside > 0


async def test_transports_give_the_same(server):
    for options in (
        {},
        {"queries": "auto", "layers": ["0.0", "3.1"], "top_n": 32},
        {"queries": [[0, 0], [320, 240], [12.5, 200]], "layers": ["2.1"]},
    ):
        (first,), *others = [
            await ask(server, "classify", [JPEG], explain="attention", **options)
            for ask in (over_http, over_json, over_grpc)
        ]
        assert first.attention is not None
        assert first.attention[0].queries
        for (other,) in others:
            assert other.attention is not None
            for ours, theirs in zip(other.attention, first.attention, strict=True):
                np.testing.assert_allclose(ours.received, theirs.received, atol=1e-3)
                for mine, yours in zip(ours.queries, theirs.queries, strict=True):
                    assert mine.cell == yours.cell
                    np.testing.assert_allclose(mine.centre, yours.centre, atol=PIXELS)
                    np.testing.assert_array_equal(mine.keys, yours.keys)
                    np.testing.assert_array_equal(mine.group_keys, yours.group_keys)
                    np.testing.assert_allclose(mine.weights, yours.weights, atol=WEIGHTS)
                    np.testing.assert_allclose(
                        mine.group_weights, yours.group_weights, atol=WEIGHTS
                    )
                    np.testing.assert_allclose(mine.points, yours.points, atol=PIXELS)
                    np.testing.assert_allclose(mine.group_points, yours.group_points, atol=PIXELS)


@pytest.mark.parametrize("task", ["classify", pytest.param("detect", marks=pytest.mark.slow)])
async def test_those_who_ask_and_those_who_do_not_get_their_own(any_server, task):
    images = [encoded(index=n, size=(90 + 7 * n, 140)) for n in range(6)]
    options: list[dict[str, Any]] = [
        {},
        {"explain": "attention"},
        {"explain": "points"},
        {"explain": "attention", "layers": ["0.0", "2.0"], "queries": "auto"},
        {},
        {"explain": "attention", "queries": [[1, 1]] * 8},
    ]
    alone = [(await over_json(any_server, task, [image]))[0] for image in images]
    together = await asyncio.gather(
        *(
            over_json(any_server, task, [image], **asked)
            for image, asked in zip(images, options, strict=True)
        )
    )
    for (seen,), plain, asked in zip(together, alone, options, strict=True):
        explains = asked.get("explain") == "attention"
        assert (seen.attention is not None) == explains
        if explains:
            assert seen.attention is not None
            assert len(seen.attention) == 2
            count = {"auto": 4}.get(str(asked.get("queries")), len(asked.get("queries", [0])))
            assert all(len(layer.queries) <= count for layer in seen.attention)
        assert len(seen.answer) == len(plain.answer)
        if task == "classify":
            for ours, theirs in zip(seen.answer, plain.answer, strict=True):
                assert ours["index"] == theirs["index"]
                assert ours["score"] == pytest.approx(theirs["score"], abs=1e-6)


@every_transport
@pytest.mark.parametrize("task", ["classify", "detect"])
async def test_a_query_outside_fails_for_its_image_alone(server, ask, task):
    images = [encoded(size=(100, 200)), encoded(size=(200, 100))]
    wide, high = await ask(server, task, images, explain="attention", queries=[[150.0, 50.0]])
    assert (wide.error, high.error) == ("", "invalid_option")
    assert "the query at 150, 50 lies outside of the image, which has 100x200 pixels" in (
        high.message
    )


@every_transport
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"queries": [[-0.5, 3.0]]}, "lies outside of the image"),
        ({"layers": ["7.0"]}, "explains no layer 7.0"),
        ({"top_n": 0}, "top_n must be from 1 to 32"),
        ({"top_n": 33}, "top_n must be from 1 to 32"),
        ({"queries": [[1.0, 1.0]] * 9}, "there are 9"),
        ({"explain": "points", "queries": "auto"}, "are for explain=attention"),
        ({"explain": "none", "layers": ["3.1"]}, "are for explain=attention"),
        ({"explain": "points", "top_n": 4}, "are for explain=attention"),
    ],
)
async def test_a_bad_option_gets_a_sentence(server, ask, options, sentence):
    for task in ("classify", "detect"):
        (seen,) = await ask(server, task, [JPEG], **{"explain": "attention", **options})
        assert seen.error == "invalid_option"
        assert sentence in seen.message


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("queries=12", "queries is auto, or positions such as 80,64;120.5,30, not '12'"),
        ("queries=1,2,3", "not '1,2,3'"),
        ("queries=", "not ''"),
        ("queries=a,b", "not 'a,b'"),
        ("queries=nan,1", "not a number"),
        ("layers=3", "a layer is named stage.block, such as 3.1, not '3'"),
        ("layers=3.-1", "not '3.-1'"),
        ("layers=3.1,", "not ''"),
        ("top_n=many", "top_n"),
    ],
)
async def test_http_says_how_an_option_is_written(server, query, sentence):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        response = await client.post(f"/v1/classify?explain=attention&{query}", content=JPEG)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_option"
    assert sentence in response.json()["error"]["message"]


async def test_grpc_takes_either_queries_or_auto(server):
    asked = dat_pb2.AttentionOptions(queries=[dat_pb2.Position(x=1, y=1)], auto=True)
    request = dat_pb2.ClassifyRequest(
        images=[JPEG], explain=dat_pb2.EXPLAIN_ATTENTION, attention=asked
    )
    async with channel(server) as open_channel:
        with pytest.raises(grpc.aio.AioRpcError, match="both auto and queries"):
            await dat_pb2_grpc.ClassifierServiceStub(open_channel).Classify(request)
