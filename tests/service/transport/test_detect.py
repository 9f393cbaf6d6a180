"""Detection over both transports, by a small detector with random weights."""

import asyncio
import base64
import io
import json
from collections import defaultdict

import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry
from pycocotools import mask as coco

from model import checkpoint as checkpoints
from model.detection import create_detector, load_detector
from model.detection.masks import paste_whole
from model.detection.normalise import Normalise
from model.detection.transforms import Resizing, to_model_pixels
from service.engine.device import Device
from service.metrics.replica import Metrics
from service.models.lineup import ModelEntry, ModelFileError
from service.open_core import open_core, open_decoders
from service.open_model import Shared, open_model
from service.pb import dat_pb2, dat_pb2_grpc
from service.settings.settings import Settings
from service.tasks.detection import DetectOptions
from service.transport.rpc.messages import RESIZE_MODES
from tests.clients import JPEG, channel, encoded
from tests.detection_clients import CLIENTS, over_grpc, over_http, over_json
from tests.server import start_server

CLASSES = [f"kind {n}" for n in range(12)]
MODELS = """
[[models]]
name = "shapes"
variant = "dat_nano"

[[models]]
name = "masks"
checkpoint = "masks.safetensors"
max_batch = 4

[[models]]
name = "boxes"
variant = "retinanet_dat_pp_tiny"
checkpoint = "boxes.pth"
max_batch = 1
sizes = [[64, 64]]

[[models]]
name = "boxed"
checkpoint = "masks.safetensors"
resize_mode = "letterbox"
letterbox_size = 192
max_batch = 1
"""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools, NumPy 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    torch.manual_seed(0)
    detector = create_detector("mask_rcnn_dat_nano")
    facts = {"variant": "mask_rcnn_dat_nano", "labels": json.dumps(CLASSES)}
    checkpoints.write(folder / "masks.safetensors", detector.state_dict(), facts)
    torch.save(create_detector("retinanet_dat_pp_tiny").state_dict(), folder / "boxes.pth")
    (folder / "models.toml").write_text(MODELS)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with start_server(DAT_MODEL__FILE=folder / "models.toml") as running:
        yield running


@pytest.fixture(scope="module")
def expected(folder):
    """What the detector finds when it is called directly: officially, and in two letterboxes."""
    loaded = load_detector(folder / "masks.safetensors").detector
    official = loaded.config.resizing((240, 320))
    letterboxes = {size: Resizing.letterbox((240, 320), size) for size in (192, 256)}
    ways = {None: official, **letterboxes}
    return {size: found_directly(loaded, resizing) for size, resizing in ways.items()}


def found_directly(loaded, resizing):
    """The detections, their masks, and how the image was resized."""
    with Image.open(io.BytesIO(JPEG)) as image:
        pixels = np.asarray(image.convert("RGB"))
    resized, scale = torch.tensor([resizing.resized]), torch.tensor([resizing.scale_xy])
    images = torch.from_numpy(to_model_pixels(pixels, resizing))[None]
    with torch.inference_mode():
        found, _ = loaded.forward_explained(Normalise()(images, resized), resized, scale)
    masks = paste_whole(found[0].mask_probabilities, found[0].boxes, resizing.image_size)
    return found[0], masks, resizing


@pytest.mark.parametrize("detect", CLIENTS)
@pytest.mark.parametrize(
    ("options", "letterbox_size"),
    [
        ({}, None),
        ({"model": "boxed", "resize_mode": "official"}, None),
        ({"resize_mode": "letterbox"}, 256),
        ({"model": "boxed"}, 192),
    ],
)
async def test_an_answer_is_what_the_detector_finds(
    server, expected, detect, options, letterbox_size
):
    detections, masks, resizing = expected[letterbox_size]
    answer = await detect(server, [JPEG], **options)
    assert (answer.error, answer.model) == (None, options.get("model", "masks"))
    (image,) = answer.images
    assert image.resize_mode == ("official" if letterbox_size is None else "letterbox")
    assert (image.size, image.input_size) == ((320, 240), resizing.resized[::-1])
    assert len(image.found) == len(detections.scores) > 10
    for row, found in enumerate(image.found):
        assert found.label == CLASSES[found.index] == CLASSES[int(detections.labels[row])]
        assert found.score == pytest.approx(float(detections.scores[row]), abs=1e-5)
        assert found.box == pytest.approx(detections.boxes[row].tolist(), abs=1e-2)
        ours = coco.decode(found.mask["rle"]).astype(bool)
        assert ours.shape == (240, 320)
        assert (ours != masks[row]).mean() < 1e-3


@pytest.mark.parametrize("detect", CLIENTS)
async def test_masks_have_the_form_that_was_asked_for(server, expected, detect):
    _, masks, _ = expected[None]
    plain, polygon, png = [
        (await detect(server, [JPEG], masks=form)).images[0].found
        for form in ("none", "polygon", "png")
    ]
    assert all(found.mask is None for found in plain)
    for row, (outline, picture) in enumerate(zip(polygon, png, strict=True)):
        rings = [np.ravel(ring).tolist() for ring in outline.mask["polygon"]]
        if len(rings) == 1:  # pycocotools knows no holes
            drawn = coco.decode(coco.merge(coco.frPyObjects(rings, 240, 320)))
            assert (drawn.astype(bool) != masks[row]).mean() < 0.02
        part = picture.mask["png"]
        with Image.open(io.BytesIO(base64.b64decode(part["png"]))) as decoded:
            pixels = np.asarray(decoded)
        whole = np.zeros((240, 320), bool)
        height, width = pixels.shape
        whole[part["top"] : part["top"] + height, part["left"] : part["left"] + width] = pixels
        assert (whole != masks[row]).mean() < 1e-3


@pytest.mark.parametrize("detect", CLIENTS)
async def test_options_choose_among_the_detections(server, detect):
    everything = (await detect(server, [JPEG])).images[0].found
    threshold = everything[len(everything) // 2].score
    surer = (await detect(server, [JPEG], score_threshold=threshold)).images[0].found
    assert [found.score for found in surer] == [
        found.score for found in everything if found.score >= threshold - 1e-9
    ]
    few = (await detect(server, [JPEG], max_detections=3)).images[0].found
    assert [found.box for found in few] == [found.box for found in everything[:3]]
    wanted = sorted({found.label for found in everything})[:2]
    chosen = (await detect(server, [JPEG], classes=wanted)).images[0].found
    assert [found.box for found in chosen] == [
        found.box for found in everything if found.label in wanted
    ]
    none = await detect(server, [JPEG], score_threshold=1.0)
    assert (none.error, none.images[0].error, none.images[0].found) == (None, None, ())


@pytest.mark.parametrize("detect", CLIENTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score_threshold": 1.5}, "score_threshold"),
        ({"score_threshold": -0.1}, "score_threshold"),
        ({"score_threshold": float("nan")}, "score_threshold"),
        ({"max_detections": 0}, "max_detections"),
        ({"max_detections": 101}, "max_detections"),
        ({"classes": ["unicorn"]}, "unicorn"),
        ({"model": "boxes", "masks": "rle"}, "boxes gives no masks"),
    ],
)
async def test_options_that_cannot_be_followed_are_refused(server, detect, options, message):
    if detect is over_json and options.get("score_threshold") != options.get("score_threshold"):
        pytest.skip("JSON has no NaN")
    answer = await detect(server, [JPEG], **options)
    assert answer.error == "invalid_option"
    assert message in answer.message


async def test_an_unknown_resize_mode_is_refused(server):
    for detect in (over_http, over_json):
        answer = await detect(server, [JPEG], resize_mode="stretched")
        assert answer.error in ("invalid_option", "invalid_request")
        assert "resize_mode" in answer.message
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.DetectorServiceStub(open_channel)
        request = dat_pb2.DetectRequest(images=[JPEG], resize_mode=9)
        with pytest.raises(grpc.aio.AioRpcError, match="resize_mode has no value 9"):
            await stub.Detect(request)


@pytest.mark.parametrize("detect", CLIENTS)
@pytest.mark.parametrize(
    ("resize_mode", "input_end"), [("official", (320, 240)), ("letterbox", (320, 320))]
)
async def test_points_lie_in_the_input_and_objects_name_those_inside(
    server, detect, resize_mode, input_end
):
    asked = {"explain": "objects", "resize_mode": resize_mode}
    (image,) = (await detect(server, [JPEG], **asked)).images
    assert [(layer["stage"], layer["block"]) for layer in image.layers] == [
        (0, 0), (1, 0), (2, 0), (2, 1), (2, 2), (3, 0), (3, 1),
    ]  # fmt: skip
    points = [np.array(layer["sampling_locations"]).reshape(-1, 2) for layer in image.layers]
    for layer in points:
        assert (layer > -40).all()
        assert (layer < np.array(input_end) + 40).all()
    assert (np.concatenate(points).max(0) > np.array(input_end) - 40).all()
    for found in image.found[:10]:
        mask = coco.decode(found.mask["rle"]).astype(bool)
        for layer, inside in zip(points, found.inside, strict=True):
            column, row = np.floor(layer).astype(int).T
            within = (column >= 0) & (column < 320) & (row >= 0) & (row < 240)
            expected = [i for i in np.flatnonzero(within) if mask[row[i], column[i]]]
            # A point within rounding of a pixel's edge may fall on either side.
            assert len(set(expected) ^ set(inside["indices"])) <= 1
    (plain,) = (await detect(server, [JPEG], explain="points")).images
    assert all(found.inside is None for found in plain.found)
    assert (await detect(server, [JPEG])).images[0].layers is None


@pytest.mark.parametrize("detect", CLIENTS)
async def test_every_image_has_its_own_status(server, detect):
    strip = encoded("PNG", size=(4, 400))
    answer = await detect(server, [JPEG, b"no picture", strip, encoded("WEBP", 3, (90, 70))])
    assert [image.error for image in answer.images] == [
        None, "invalid_image", "invalid_image", None,
    ]  # fmt: skip
    assert answer.images[3].size == (70, 90)
    alone = await detect(server, [strip])
    assert alone.error == "invalid_image"
    assert "too long and narrow" in alone.message


async def test_a_letterbox_takes_images_of_which_a_row_is_left(server):
    (thin,) = (await over_http(server, [encoded("PNG", size=(4, 400))], model="boxed")).images
    assert (thin.error, thin.size, thin.input_size) == (None, (400, 4), (192, 2))
    answer = await over_http(server, [encoded("PNG", size=(1, 400))], model="boxed")
    assert answer.error == "invalid_image"
    assert "400x1 pixels is too long and narrow to be resized to 192x0" in answer.message


@pytest.mark.parametrize("resize_mode", ["official", "letterbox"])
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (1200, 900), (33, 31)])
async def test_images_of_any_size(server, size, resize_mode):
    image = encoded("PNG", size=size)
    (seen,) = (await over_http(server, [image], resize_mode=resize_mode)).images
    assert seen.error is None
    assert seen.size == size[::-1]


async def test_images_share_a_batch_only_with_their_own_padded_size(server):
    wide, tall = encoded("PNG", 1, (100, 160)), encoded("PNG", 2, (160, 100))
    alone = [(await over_http(server, [image])).images[0] for image in (wide, tall)]
    answer = await over_http(server, [wide, tall] * 4)
    assert max(image.batch_size for image in answer.images) > 1
    for number, image in enumerate(answer.images):
        expected = alone[number % 2]
        assert image.input_size == expected.input_size
        assert len(image.found) == len(expected.found)
        for ours, theirs in zip(image.found, expected.found, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)


async def test_letterboxed_images_share_batches_whatever_their_sizes(server):
    sides = range(96, 161, 32)  # officially of distinct padded sizes
    images = [encoded("PNG", side, (96, side)) for side in sides]
    official = await over_http(server, images, resize_mode="official")
    assert {image.batch_size for image in official.images} == {1}
    asked = {"resize_mode": "letterbox"}
    alone = [(await over_http(server, [image], **asked)).images[0] for image in images]
    together = await over_http(server, images * 2, **asked)
    assert max(image.batch_size for image in together.images) > 1
    for seen, expected in zip(together.images, alone * 2, strict=True):
        assert seen.input_size == expected.input_size
        assert len(seen.found) == len(expected.found)
        for ours, theirs in zip(seen.found, expected.found, strict=True):
            assert ours.score == pytest.approx(theirs.score, abs=1e-4)


def test_letterboxed_inputs_have_one_size():
    device = Device("cpu", threads=1)
    shared = Shared(Settings(), [device], Metrics(CollectorRegistry()))
    opened, limits = open_model(ModelEntry(name="mask_rcnn_dat_nano"), shared), Settings().limits
    with open_decoders(limits, shared.metrics) as decoders:
        core = open_core(opened.facts, opened.batcher, decoders, limits, opened.metrics)
    device.close()
    padded = defaultdict(set)
    for resize_mode in ("official", "letterbox"):
        options = DetectOptions(resize_mode=resize_mode)
        for size in ((96, 96), (96, 128), (160, 96), (700, 500)):
            prepared = core._prepare(encoded("PNG", size=size), options, np.empty)
            padded[resize_mode].add(prepared.pixels.shape)
    assert padded["letterbox"] == {(256, 256, 3)}
    assert len(padded["official"]) == 4


async def test_the_letterbox_is_made_ready_where_it_is_the_mode_of_the_model():
    entry = ModelEntry(
        name="mask_rcnn_dat_nano", resize_mode="letterbox", letterbox_size=96, sizes=((64, 96),)
    )
    device = Device("cpu", threads=1)
    opened = open_model(entry, Shared(Settings(), [device], Metrics(CollectorRegistry())))
    await opened.load()
    device.close()
    (engine,) = opened.engines
    assert engine._network._sizes.keys() == {(64, 96), (96, 96)}


@pytest.mark.parametrize("size", [(96, 100), (97, 96), (96, 48)])
def test_sizes_of_a_detector_are_those_of_padded_images(size):
    entry, device = ModelEntry(name="mask_rcnn_dat_nano", sizes=(size,)), Device("cpu", threads=1)
    with pytest.raises(ModelFileError, match=r"sizes has .* multiples of 32, from 64 on"):
        open_model(entry, Shared(Settings(), [device], Metrics(CollectorRegistry())))
    device.close()


async def test_both_transports_describe_the_resizing(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        listed = (await client.get("/v1/models")).json()["models"]
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ModelServiceStub(open_channel)
        over_rpc = (await stub.ListModels(dat_pb2.ListModelsRequest())).models
    described = [(m.get("resize_mode"), m.get("letterbox_size")) for m in listed]
    assert described == [
        (None, None), ("official", 256), ("official", 1024), ("letterbox", 192),
    ]  # fmt: skip
    assert [
        (model.resize_mode, model.letterbox_size if model.HasField("letterbox_size") else None)
        for model in over_rpc
    ] == [(RESIZE_MODES[mode], size) for mode, size in described]


async def test_tasks_do_not_answer_for_each_other(server):
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        wrong = await client.post("/v1/classify?model=masks", content=JPEG)
        objects = await client.post("/v1/classify?explain=objects", content=JPEG)
        default = await client.post("/v1/classify", content=JPEG)
        listed = (await client.get("/v1/models")).json()["models"]
    assert (wrong.status_code, objects.status_code, default.status_code) == (404, 400, 200)
    assert default.json()["model"] == "shapes"
    assert (await over_grpc(server, [JPEG], model="shapes")).error == "unknown_model"
    assert [(m["name"], m["task"], m["default"]) for m in listed] == [
        ("shapes", "classify", True), ("masks", "detect", True), ("boxes", "detect", False),
        ("boxed", "detect", False),
    ]  # fmt: skip
    assert "flops" not in listed[1]
    assert "image_size" not in listed[1]


async def test_a_server_without_a_detector_says_so(slow_server):
    answer = await over_http(slow_server.server, [JPEG])
    assert answer.error == "unknown_model"


async def test_requests_are_counted_by_task(server):
    before = server.metrics()
    await asyncio.gather(
        over_http(server, [JPEG, b"x"], explain="points"), over_grpc(server, [JPEG])
    )
    after = server.metrics()

    def change(name):
        return after[name] - before[name]

    for protocol in ("http", "grpc"):
        labels = f"model=masks,outcome=ok,protocol={protocol},task=detect"
        assert change(f"dat_requests_total,{labels}") == 1
    assert change("dat_images_total,model=masks,task=detect") == 2
    assert change("dat_explain_requests_total,kind=points,model=masks") == 1
