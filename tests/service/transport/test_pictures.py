"""Pictures asked of running servers over both transports, in both shapes of the server."""

import asyncio
import base64
import json
from dataclasses import dataclass
from io import BytesIO
from typing import Any
from xml.etree import ElementTree as ET

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image

from service.pb import dat_pb2, dat_pb2_grpc
from service.pictures.colours import PALETTE, hexadecimal
from service.security.keys import add_key
from tests.clients import JPEG, channel, encoded, eventually, message
from tests.server import ROOT, RunningServer, start_server

SVG = "{http://www.w3.org/2000/svg}"
SCENE = (ROOT / "demo/detection/samples/many.jpg").read_bytes()
CLASSIFIER, DETECTOR = "dat_nano", "mask_rcnn_dat_nano"


@dataclass(frozen=True)
class Seen:
    """What a client sees of a request; `error` is the code of its failure."""

    error: str = ""
    message: str = ""
    picture: bytes = b""
    media_type: str = ""
    render_s: float = 0.0


async def over_http(server: RunningServer, images: list[bytes], **options: Any) -> Seen:
    """One image as the body with options in the query, several as multipart."""
    for name in ("show", "layers", "groups", "classes"):
        if name in options:
            options[name] = ",".join(map(str, options[name]))
    if isinstance(options.get("queries"), list):
        options["queries"] = ";".join(f"{x},{y}" for x, y in options["queries"])
    if len(images) == 1:
        sent: dict[str, Any] = {"content": images[0], "headers": {"content-type": "image/jpeg"}}
    else:
        sent = {"files": [("file", (f"{n}.jpg", image)) for n, image in enumerate(images)]}
    return await _posted(server, params=options, **sent)


async def over_json(server: RunningServer, images: list[bytes], **options: Any) -> Seen:
    texts = [base64.b64encode(image).decode() for image in images]
    return await _posted(server, json={"images": texts, **options})


async def _posted(server: RunningServer, **sent: Any) -> Seen:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        response = await client.post("/v1/visualize", **sent)
    media_type = response.headers["content-type"]
    if media_type == "application/json":
        error = response.json()["error"]
        return Seen(error["code"], error["message"])
    stages = dict(part.split(";", 1) for part in response.headers["server-timing"].split(", "))
    assert stages.keys() == {"decode", "queue", "compute", "render", "batch"}
    render_s = float(stages["render"].removeprefix("dur=")) / 1e3
    return Seen(picture=response.content, media_type=media_type, render_s=render_s)


async def over_grpc(server: RunningServer, images: list[bytes], **options: Any) -> Seen:
    enums = {
        "show": lambda names: [dat_pb2.Shown.Value(f"SHOWN_{name.upper()}") for name in names],
        "format": lambda name: dat_pb2.PictureFormat.Value(f"PICTURE_FORMAT_{name.upper()}"),
        "layout": lambda name: dat_pb2.PictureLayout.Value(f"PICTURE_LAYOUT_{name.upper()}"),
        "resize_mode": lambda name: dat_pb2.ResizeMode.Value(f"RESIZE_MODE_{name.upper()}"),
    }
    queries, layers = options.pop("queries", ()), options.pop("layers", ())
    asked = dat_pb2.AttentionOptions(
        queries=() if queries == "auto" else [dat_pb2.Position(x=x, y=y) for x, y in queries],
        auto=queries == "auto",
        layers=[
            dat_pb2.LayerName(stage=int(name.split(".")[0]), block=int(name.split(".")[1]))
            for name in layers
        ],
        top_n=options.pop("top_n", None),
    )
    fields = {name: enums.get(name, lambda value: value)(value) for name, value in options.items()}
    # As many as are given, though the message has a place for one.
    content = b"".join(
        dat_pb2.VisualizeRequest(image=image).SerializeToString() for image in images
    )
    rest = dat_pb2.VisualizeRequest(attention=asked, **fields).SerializeToString()
    async with channel(server) as open_channel:
        call: Any = open_channel.unary_unary(
            "/dat.v1.VisualizerService/Visualize",
            response_deserializer=dat_pb2.VisualizeResponse.FromString,
        )
        try:
            answer = await call(content + rest)
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata())
            return Seen(trailing["dat-error-code"], error.details() or "")
    if answer.media_type != "image/svg+xml":
        with Image.open(BytesIO(answer.picture)) as file:
            assert file.size == (answer.width, answer.height)
    assert answer.timing.batch_size >= 1
    assert answer.model in (CLASSIFIER, DETECTOR)
    return Seen(picture=answer.picture, media_type=answer.media_type, render_s=answer.render_s)


TRANSPORTS = [over_http, over_json, over_grpc]
every_transport = pytest.mark.parametrize("ask", TRANSPORTS)


@pytest.fixture(scope="module")
def served_by_many():
    """The same from two front ends and a worker."""
    with start_server(DAT_SERVER__FRONT_ENDS=2) as running:
        yield running


@pytest.fixture(params=["one process", "front ends"])
def any_server(request):
    return request.getfixturevalue("server" if request.param == "one process" else "served_by_many")


async def answer(server: RunningServer, task: str, image: bytes, **options: Any) -> Any:
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        response = await client.post(f"/v1/{task}", content=image, params=options)
    (result,) = response.json()["results"]
    return result


def centres(document: ET.Element, colour: tuple[int, int, int]) -> np.ndarray:
    """`(N, 2)` of the circles of a colour, sorted."""
    found = [
        (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        for circle in document.iter(f"{SVG}circle")
        if circle.attrib["fill"] == hexadecimal(colour)
    ]
    return np.array(sorted(found))


@every_transport
async def test_a_picture_of_a_classifier_has_the_points_of_its_answer(any_server, ask):
    # The scale of the picture is two.
    drawn = await ask(any_server, [JPEG], format="svg", size=640, show=["points"], layers=["2.2"])
    assert drawn.error == ""
    assert drawn.media_type == "image/svg+xml"
    assert drawn.render_s > 0
    document = ET.fromstring(drawn.picture)
    assert (document.attrib["width"], document.attrib["height"]) == ("640", "480")
    result = await answer(any_server, "classify", JPEG, explain="points")
    (layer,) = [one for one in result["points"] if (one["stage"], one["block"]) == (2, 2)]
    locations = np.array(layer["sampling_locations"])
    for group, points in enumerate(locations):
        expected = np.array(sorted(map(tuple, 2 * points.reshape(-1, 2))))
        np.testing.assert_allclose(centres(document, PALETTE[group]), expected, atol=0.05)
    one_group = await ask(
        any_server, [JPEG], format="svg", size=640, show=["points"], layers=["2.2"], groups=[1]
    )
    document = ET.fromstring(one_group.picture)
    assert len(centres(document, PALETTE[0])) == 0
    assert len(centres(document, PALETTE[1])) == locations[1].size // 2


@every_transport
async def test_a_picture_of_a_detector_has_the_boxes_of_its_answer(any_server, ask):
    for mode in ("official", "letterbox"):
        drawn = await ask(
            any_server,
            [SCENE],
            model=DETECTOR,
            format="svg",
            resize_mode=mode,
            score_threshold=0.5,
        )
        document = ET.fromstring(drawn.picture)
        result = await answer(
            any_server, "detect", SCENE, score_threshold=0.5, masks="none", resize_mode=mode
        )
        found = result["detections"]
        assert found
        scale = float(document.attrib["width"]) / result["image"]["width"]
        texts = [text.text for text in document.iter(f"{SVG}text")]
        assert f"{found[0]['label']} {found[0]['score']:.2f}" in texts
        paths = [path.attrib["d"] for path in document.iter(f"{SVG}path")]
        for one in found:
            x1, y1, x2, y2 = np.multiply(one["box"], scale)
            assert any(_is_box(path, (x1, y1, x2, y2)) for path in paths)
        # Masks are filled, and each object has one.
        filled = [p for p in document.iter(f"{SVG}path") if "fill-opacity" in p.attrib]
        assert len(filled) == len(found)


def _is_box(path: str, box: tuple[float, float, float, float]) -> bool:
    numbers = path.replace("M", " ").replace("H", " ").replace("V", " ").replace("Z", " ").split()
    if "L" in path or len(numbers) != 5:
        return False
    x1, y1, x2, y2, _ = map(float, numbers)
    return np.allclose((x1, y1, x2, y2), box, atol=0.1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"format": "webp", "size": 200, "show": ["attention", "arrows"]},
        {"show": ["keys"], "queries": [[100.0, 50.0], [200.0, 200.0]], "top_n": 3},
        {"show": ["keys", "attention"], "queries": "auto", "layers": ["2.2", "3.1"]},
        {"layout": "beside", "opacity": 0.5, "size": 300},
        {"model": DETECTOR, "show": ["masks"]},
        {"model": DETECTOR, "show": ["points", "boxes"], "classes": ["star"], "size": 900},
        {"format": "svg", "layout": "beside"},
    ],
)
async def test_transports_and_shapes_of_the_server_draw_the_same(server, any_server, options):
    first = await over_http(server, [JPEG], **options)
    assert first.error == ""
    assert first.picture
    assert first.media_type == f"image/{options.get('format', 'png')}".replace("svg", "svg+xml")
    for ask in (over_json, over_grpc):
        assert (await ask(any_server, [JPEG], **options)).picture == first.picture


async def test_a_form_takes_its_options_as_fields(server):
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        response = await client.post(
            "/v1/visualize",
            files={"file": JPEG},
            data={"show": "points,arrows", "groups": "0,1", "size": "222", "format": "webp"},
        )
    with Image.open(BytesIO(response.content)) as picture:
        assert (picture.format, picture.size) == ("WEBP", (222, 166))


async def test_what_is_shown_changes_the_picture(server):
    pictures = {
        json.dumps(options): (await over_http(server, [JPEG], **options)).picture
        for options in (
            {"opacity": 0},
            {"show": ["points"]},
            {"show": ["arrows"]},
            {"show": ["attention"]},
            {"show": ["keys"]},
            {"show": ["points"], "layers": ["2.0"]},
            {"show": ["points"], "groups": [1]},
            {"show": ["points"], "opacity": 0.5},
            {"show": ["keys"], "queries": [[30, 30]]},
            {"show": ["keys"], "top_n": 1},
        )
    }
    assert len(set(pictures.values())) == len(pictures)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layers": ["7.0"]}, "dat_nano explains no layer 7.0; there are"),
    ({"layers": ["7.0"], "show": ["keys"]}, "dat_nano explains no layer 7.0; there are"),
    ({"layers": ["3.1", "3.1"]}, "a layer twice"),
    ({"groups": [9]}, "has 2 offset groups, counted from 0; there is no group 9"),
    ({"groups": [0, 0]}, "a group twice"),
    ({"show": ["points", "points"]}, "show names something twice"),
    ({"show": ["masks"]}, "dat_nano is a classifier, which finds no masks"),
    ({"show": ["boxes", "points"]}, "dat_nano is a classifier, which finds no boxes"),
    ({"score_threshold": 0.5}, "are for detectors; dat_nano is a classifier"),
    ({"resize_mode": "letterbox"}, "are for detectors; dat_nano is a classifier"),
    ({"show": ["keys"], "queries": [[999.0, 1.0]]}, "lies outside of the image, which has 320x240"),
    ({"show": ["points"], "queries": [[9.0, 1.0]]}, "queries and top_n are for keys"),
    ({"show": ["attention"], "top_n": 3}, "queries and top_n are for keys"),
    ({"show": ["keys"], "top_n": 33}, "top_n must be from 1 to 32"),
    ({"opacity": 1.5}, "opacity must be from 0 to 1, not 1.5"),
    ({"size": 31}, "size must be from 32 to 8000 pixels, not 31"),
    ({"size": 8001}, "size must be from 32 to 8000 pixels, not 8001"),
    ({"size": 8000}, "would have 8000x6000 pixels; the limit is 20000000 pixels in all"),
    ({"model": DETECTOR, "show": ["boxes"], "layers": ["3.1"]}, "layers and groups are for points"),
    ({"model": DETECTOR, "show": ["boxes"], "classes": ["x"]}, "has no class 'x'"),
    ({"model": DETECTOR, "score_threshold": 2.0}, "score_threshold must be from 0 to 1"),
]


@every_transport
async def test_bad_options_get_a_sentence(server, ask):
    for options, sentence in REFUSED:
        seen = await ask(server, [JPEG], **options)
        assert seen.error == "invalid_option", options
        assert sentence in seen.message


@every_transport
async def test_bad_requests_get_a_sentence(any_server, ask):
    seen = await ask(any_server, [JPEG, JPEG])
    assert (seen.error, "one image" in seen.message) == ("too_many_images", True)
    seen = await ask(any_server, [b"no image"])
    assert (seen.error, "not a JPEG" in seen.message) == ("invalid_image", True)
    seen = await ask(any_server, [JPEG], model="other")
    assert seen.error == "unknown_model"
    assert CLASSIFIER in seen.message
    assert DETECTOR in seen.message
    if ask is not over_http:
        assert (await ask(any_server, [])).error == "no_images"


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("show=heads", "show"),
        ("format=gif", "format"),
        ("groups=one", "groups"),
        ("layout=below", "layout"),
        ("layers=3", "a layer is named stage.block, such as 3.1, not '3'"),
        ("explain=points", "explain"),
        ("top_k=3", "top_k"),
    ],
)
async def test_http_says_how_an_option_is_written(server, query, sentence):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        response = await client.post(f"/v1/visualize?{query}", content=JPEG)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_option"
    assert sentence in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["show", "format", "layout"])
async def test_grpc_refuses_values_that_do_not_exist(server, field):
    request = dat_pb2.VisualizeRequest(image=JPEG, **{field: [77] if field == "show" else 77})
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.VisualizerServiceStub(open_channel)
        with pytest.raises(grpc.aio.AioRpcError, match=f"{field} has no value 77"):
            await stub.Visualize(request)


async def test_requests_are_counted_as_those_of_tasks(any_server):
    before = any_server.metrics()
    assert (await over_http(any_server, [JPEG])).error == ""
    assert (await over_grpc(any_server, [JPEG])).error == ""
    assert (await over_http(any_server, [b"no image"])).error == "invalid_image"
    assert (await over_http(any_server, [JPEG], size=8000)).error == "invalid_option"
    assert (await over_grpc(any_server, [JPEG], model="other")).error == "unknown_model"

    def grew(name: str) -> Any:
        return any_server.metrics()[name] - before[name]

    def requests(model: str, outcome: str, protocol: str) -> str:
        labels = f"model={model},outcome={outcome},protocol={protocol},task=visualize"
        return f"dat_requests_total,{labels}"

    assert grew(requests(CLASSIFIER, "ok", "http")) == 1
    assert grew(requests(CLASSIFIER, "ok", "grpc")) == 1
    assert grew(requests(CLASSIFIER, "client_error", "http")) == 2
    assert grew(requests("_unknown", "client_error", "grpc")) == 1
    stage = f"dat_stage_duration_seconds_count,model={CLASSIFIER},stage=render"
    assert grew(stage) == 2
    assert grew(f"dat_explain_requests_total,kind=points,model={CLASSIFIER}") == 4
    ok = f"dat_image_outcomes_total,code=ok,model={CLASSIFIER},outcome=ok,task=visualize"
    assert grew(ok) == 2
    # Nothing that was held for a picture stays held.
    after = any_server.metrics()
    assert after["dat_image_pixels_in_flight"] == 0
    assert after["dat_request_bytes_in_flight"] == 0


async def test_a_deadline_holds_for_pictures(server):
    seen = await over_http(server, [encoded(size=(1000, 1000))], timeout=0.001)
    assert seen.error == "deadline_exceeded"
    await eventually(lambda: server.metrics()["dat_image_pixels_in_flight"] == 0)


async def test_a_deadline_holds_while_a_picture_is_drawn(server):
    """An image of 15 megapixels takes longer to draw than the answer that it shows."""
    seen = await over_http(server, [JPEG], timeout=0.2, size=4400)
    assert seen.error == "deadline_exceeded"


async def test_a_full_queue_refuses_pictures_as_it_does_classes(slow_server):
    server = slow_server.server

    def waiting() -> Any:
        return server.metrics()["dat_requests_waiting,model=dat_nano"]

    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        with slow_server.fault("wait"):
            crowd = [stub.Classify(message([JPEG]))]
            while await asyncio.to_thread(waiting) < 8:
                crowd.append(stub.Classify(message([JPEG])))
            refused = [await ask(server, [JPEG]) for ask in TRANSPORTS]
        await asyncio.gather(*(call.code() for call in crowd))
    assert [seen.error for seen in refused] == ["overloaded"] * 3
    assert (await over_grpc(server, [JPEG])).error == ""


@pytest.mark.slow
async def test_those_without_a_key_get_no_picture(tmp_path):
    key = add_key(tmp_path / "keys.toml", "mine", images_per_s=0.001, burst=2)
    with start_server(
        DAT_MODEL__NAME=CLASSIFIER, DAT_SECURITY__API_KEYS=tmp_path / "keys.toml"
    ) as server:
        async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
            assert (await client.post("/v1/visualize", content=JPEG)).status_code == 401
            mine = {"x-api-key": key}
            drawn = await client.post("/v1/visualize", content=JPEG, headers=mine)
            assert drawn.status_code == 200
            async with channel(server) as open_channel:
                stub = dat_pb2_grpc.VisualizerServiceStub(open_channel)
                request = dat_pb2.VisualizeRequest(image=JPEG)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.Visualize(request)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
                await stub.Visualize(request, metadata=[("x-api-key", key)])
            # Its limit counts pictures as it does all images.
            again = await client.post("/v1/visualize", content=JPEG, headers=mine)
            assert again.status_code == 429
            assert again.json()["error"]["code"] == "rate_limited"
