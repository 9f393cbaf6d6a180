"""Segmentation over both transports, by a small segmenter with recipe weights, in both shapes."""

import asyncio
import io
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import grpc
import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from prometheus_client import CollectorRegistry
from pycocotools import mask as coco

from model.attention_weights import AttentionWeights
from model.geometry import MOST_QUERIES
from model.normalise import Normalise
from model.segmentation import load_segmenter
from model.segmentation.classes import overlay
from model.segmentation.config import SEGMENTERS
from model.segmentation.transforms import to_model_pixels
from service.engine.device import Device
from service.errors import InvalidOption
from service.metrics.replica import Metrics
from service.models import convert, load
from service.models.lineup import ModelEntry
from service.models.segmentation import SEGMENTATION
from service.open_core import open_core, open_decoders
from service.open_model import Shared, open_model
from service.pb import dat_pb2, dat_pb2_grpc
from service.settings.model import ModelChoice
from service.settings.settings import Settings
from service.tasks import segmentation
from service.tasks.segments import parts
from tests.clients import JPEG, channel, encoded
from tests.model.segmentation.conftest import segmenter_state
from tests.segmentation_clients import CLIENTS, over_grpc, over_http, over_json, pixels
from tests.server import start_server

NAME = "semantic_fpn_dat_nano"
CLASSES = [f"kind {n}" for n in range(7)]
PALETTE = [[31 * n, 255 - 31 * n, 7 * n] for n in range(7)]
MODELS = """
default = "segments"

[[models]]
name = "shapes"
variant = "dat_nano"

[[models]]
name = "segments"
checkpoint = "segments.pth"
max_batch = 4
"""
SVG = "{http://www.w3.org/2000/svg}"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools, NumPy 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("segmenters")
    state = segmenter_state(replace(SEGMENTERS[NAME], num_classes=len(CLASSES)))
    meta = {"CLASSES": CLASSES, "PALETTE": PALETTE}
    torch.save({"meta": meta, "state_dict": state}, folder / "segments.pth")
    (folder / "models.toml").write_text(MODELS)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with start_server(DAT_MODEL__FILE=folder / "models.toml") as running:
        yield running


@pytest.fixture(scope="module")
def served_by_many(folder):
    settings = {"DAT_MODEL__FILE": folder / "models.toml", "DAT_SERVER__FRONT_ENDS": 1}
    with start_server(**settings) as running:
        yield running


@pytest.fixture(params=["one process", "front ends"])
def any_server(request):
    return request.getfixturevalue("server" if request.param == "one process" else "served_by_many")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_segmenter(folder / "segments.pth")


def decoded(image: bytes):
    with Image.open(io.BytesIO(image)) as opened:
        return np.asarray(opened.convert("RGB"))


@pytest.fixture(scope="module")
def expected(loaded):
    """What the segmenter says of `JPEG` when it is called directly, by the way it is tested."""
    return {
        test_time: loaded.segment(
            decoded(JPEG), multi_scale=test_time == "official_ms", confidence=True
        )
        for test_time in ("official", "official_ms")
    }


@pytest.mark.parametrize("segment", CLIENTS)
async def test_an_answer_is_what_the_segmenter_says(any_server, expected, segment):
    labels = expected["official"].labels.numpy()
    answer = await segment(any_server, [JPEG])
    assert (answer.error, answer.model) == (None, "segments")
    (image,) = answer.images
    assert (image.size, image.input_size) == ((320, 240), (256, 192))
    np.testing.assert_array_equal(image.labels, labels)
    with Image.open(io.BytesIO(image.label_map)) as file:
        assert file.mode == "P"
        assert file.getpalette()[: 3 * len(PALETTE)] == np.ravel(PALETTE).tolist()
    counts = np.bincount(labels.ravel(), minlength=len(CLASSES))
    assert len(image.segments) == np.count_nonzero(counts) > 3
    assert [one.index for one in image.segments] == np.argsort(-counts, kind="stable")[
        : len(image.segments)
    ].tolist()
    for one in image.segments:
        rows, columns = np.nonzero(labels == one.index)
        assert (one.label, one.colour) == (CLASSES[one.index], PALETTE[one.index])
        assert one.share == pytest.approx(counts[one.index] / labels.size)
        assert one.box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert (one.probability, one.mask) == (None, None)
    assert (image.points, image.attention, image.confidence) == (None, None, b"")


@pytest.mark.parametrize("segment", CLIENTS)
async def test_confidence_is_that_of_the_segmenter(server, expected, segment):
    said = expected["official"]
    labels, probabilities = said.labels.numpy(), said.probabilities.numpy()
    (summary,) = (await segment(server, [JPEG], format="summary")).images
    (sure,) = (await segment(server, [JPEG], confidence=True)).images
    assert (summary.label_map, summary.confidence) == (b"", b"")
    np.testing.assert_array_equal(sure.labels, labels)
    margins = np.round(said.margins.numpy() * 255)
    assert np.abs(pixels(sure.confidence) - margins).max() <= 1
    assert margins.std() > 10
    assert len(summary.segments) == len(sure.segments) == len(np.unique(labels))
    for one, other in zip(summary.segments, sure.segments, strict=True):
        mean = probabilities[labels == one.index].mean()
        assert one.probability == other.probability == pytest.approx(mean, abs=1e-4)


async def test_several_scales_are_the_official_test_at_several_scales(any_server, expected):
    said = expected["official_ms"]
    asked = {"test_time": "official_ms", "explain": "points", "confidence": True}
    (seen,) = (await over_http(any_server, [JPEG], **asked)).images
    assert (seen.labels != said.labels.numpy()).mean() < 1e-3  # ties of rounding
    assert (said.labels != expected["official"].labels).float().mean() > 0.05
    np.testing.assert_allclose(pixels(seen.confidence), said.margins.numpy() * 255, atol=1.01)
    # Points are those of the official scale.
    (plain,) = (await over_http(any_server, [JPEG], explain="points")).images
    assert plain.input_size == seen.input_size
    assert len(seen.points) == len(plain.points) == 7
    for ours, theirs in zip(seen.points, plain.points, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02)


@pytest.mark.parametrize("segment", CLIENTS)
async def test_every_form_says_the_same(any_server, segment):
    plain, runs, outlines = [
        (await segment(any_server, [JPEG], format=form)).images[0]
        for form in ("png", "rle", "polygon")
    ]
    labels = plain.labels
    assert (runs.label_map, outlines.label_map) == (b"", b"")
    assert len(plain.segments) == len(runs.segments) == len(outlines.segments)
    for one, run, outline in zip(plain.segments, runs.segments, outlines.segments, strict=True):
        assert (run.index, outline.index) == (one.index, one.index)
        own = labels == one.index
        np.testing.assert_array_equal(coco.decode(run.mask["rle"]).astype(bool), own)
        filled = np.zeros(own.shape, bool)
        for ring in outline.mask["polygon"]:
            for (x, y), (_, next_y) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
                filled[min(y, next_y) : max(y, next_y), x:] ^= True
        np.testing.assert_array_equal(filled, own)


@pytest.mark.parametrize("segment", CLIENTS)
async def test_options_choose_among_the_classes(server, segment):
    (everything,) = (await segment(server, [JPEG])).images
    first, second, third, *_ = everything.segments
    (named,) = (await segment(server, [JPEG], classes=[third.label, first.label])).images
    assert named.segments == (first, third)
    (large,) = (await segment(server, [JPEG], min_share=second.share)).images
    assert large.segments == (first, second)
    for image, kept in ((named, [first, third]), (large, [first, second])):
        indices = [one.index for one in kept]
        others = ~np.isin(everything.labels, indices)
        expected = np.where(others, len(CLASSES), everything.labels)
        np.testing.assert_array_equal(image.labels, expected)
        with Image.open(io.BytesIO(image.label_map)) as file:
            alpha = np.asarray(file.convert("RGBA"))[..., 3]
        np.testing.assert_array_equal(alpha == 0, others)
    (none,) = (await segment(server, [JPEG], min_share=1.0)).images
    assert none.segments == ()
    assert (none.labels == len(CLASSES)).all()


@pytest.mark.parametrize("segment", CLIENTS)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ["unicorn"]}, "segments has no class 'unicorn'"),
        ({"min_share": 1.5}, "min_share must be from 0 to 1, not 1.5"),
        ({"min_share": -0.1}, "min_share"),
        ({"top_n": 3}, "are for explain=attention"),
        ({"queries": [[999.0, 1.0]], "explain": "attention"}, "999, 1 lies outside of the image"),
    ],
)
async def test_options_that_cannot_be_followed_are_refused(server, segment, options, message):
    answer = await segment(server, [JPEG], **options)
    assert answer.error == "invalid_option"
    assert message in answer.message


async def test_values_that_there_are_not_are_refused(server):
    for option, value in (
        ("format", "jpeg"),
        ("test_time", "twice"),
        ("explain", "objects"),
        ("confidence", "very"),
        ("masks", "rle"),
    ):
        for segment in (over_http, over_json):
            answer = await segment(server, [JPEG], **{option: value})
            assert answer.error in ("invalid_option", "invalid_request")
            assert option in answer.message
    objects = await over_grpc(server, [JPEG], explain="objects")
    assert (objects.error, objects.message) == (
        "invalid_option",
        "explain=objects is for detectors",
    )
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.SegmenterServiceStub(open_channel)
        for option in ("format", "test_time"):
            request = dat_pb2.SegmentRequest(images=[JPEG], **{option: 9})
            with pytest.raises(grpc.aio.AioRpcError, match=f"{option} has no value 9"):
                await stub.Segment(request)


def test_outlines_that_turn_too_often_are_refused():
    noise = np.random.default_rng(0).integers(0, 7, (600, 600), np.uint8)
    options = segmentation.SegmentOptions(format="polygon")
    with pytest.raises(InvalidOption, match="at most 250000 are traced, so ask for format rle"):
        segmentation._masks(noise, parts(noise, 7), options)


@pytest.mark.parametrize("segment", CLIENTS)
async def test_attention_is_that_of_the_network(any_server, loaded, segment):
    (seen,) = (
        await segment(any_server, [JPEG], explain="attention", queries=[[300.0, 30.0]], top_n=3)
    ).images
    segmenter = loaded.segmenter
    resizing = segmenter.config.resizing((240, 320))
    images = Normalise()(torch.from_numpy(to_model_pixels(decoded(JPEG), resizing))[None])
    assert len(seen.points) == 7
    assert [(one.stage, one.block) for one in seen.attention] == [(2, 2), (3, 1)]
    for index, one in zip((4, 6), seen.attention, strict=True):
        stride = 4 << one.stage
        x, y = np.array([300, 30]) * resizing.scale_xy
        row, column = round((y - 0.5) / stride), round((x - 0.5) / stride)
        columns = -(-resizing.resized[1] // stride)
        row, column = max(row, 0), min(column, columns - 1)
        assert one.cell == (row, column)
        centre = (0.5 + stride * np.array([column, row])) / resizing.scale_xy
        assert one.centre == pytest.approx(centre.tolist(), abs=0.006)
        cells = torch.full((1, 1, MOST_QUERIES), row * columns + column)
        with torch.inference_mode():
            attention: AttentionWeights
            (attention,) = segmenter.forward_explained(images, (index,), cells).attention
        of_all = attention.weights[0, 0].sum(0).numpy()
        assert one.weights == pytest.approx(np.sort(of_all)[::-1][:3].tolist(), abs=4e-5)
        assert of_all[one.keys].tolist() == pytest.approx(one.weights, abs=4e-5)


@pytest.mark.parametrize("segment", CLIENTS)
async def test_every_image_has_its_own_status(any_server, segment):
    strip = encoded("PNG", size=(4, 400))
    answer = await segment(any_server, [JPEG, b"no image", strip])
    first, second, third = answer.images
    assert (first.error, second.error, third.error) == (None, "invalid_image", "invalid_image")
    assert "an image of 400x4 pixels becomes an input of 320x3" in third.message
    assert "crop the image" in third.message


async def test_several_scales_need_a_wider_image(server):
    strip = encoded("PNG", size=(40, 240))  # becomes 53x320, and 27x160 at half the scale
    assert (await over_http(server, [strip])).error is None
    refused = await over_http(server, [strip], test_time="official_ms")
    assert refused.error == "invalid_image"
    assert "becomes an input of 160x27" in refused.message


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (700, 900), (33, 31)])
async def test_images_of_any_size(any_server, loaded, size):
    image = encoded("PNG", size=size)
    (seen,) = (await over_http(any_server, [image], confidence=True)).images
    assert seen.error is None
    assert seen.size == size[::-1]
    labels = loaded.segment(decoded(image)).labels.numpy()
    np.testing.assert_array_equal(seen.labels, labels)
    assert pixels(seen.confidence).shape == size


async def test_images_share_a_batch_only_with_their_own_input_size(any_server, loaded):
    # Of three sizes, of which two become the same input.
    sizes = [(96, 128), (192, 256), (128, 96)]
    images = [encoded("PNG", n, size) for n, size in enumerate(sizes)]
    alone = [loaded.segment(decoded(image)).labels.numpy() for image in images]
    answer = await over_http(any_server, images * 5)
    assert max(image.batch_size for image in answer.images) > 1
    for number, image in enumerate(answer.images):
        expected = alone[number % 3]
        assert image.labels.shape == expected.shape
        # A batch is summed in another order.
        assert (image.labels != expected).mean() < 2e-3
    assert len({image.input_size for image in answer.images}) == 2


async def test_those_who_ask_and_those_who_do_not_get_their_own(any_server, loaded):
    images = [encoded(index=n, size=(100 + 10 * n, 140)) for n in range(4)]
    options = [
        {"explain": "attention"},
        {"format": "summary"},
        {"confidence": True, "test_time": "official_ms"},
        {"explain": "points", "confidence": True},
    ]
    answers = await asyncio.gather(
        *(
            over_json(any_server, [image], **asked)
            for image, asked in zip(images, options, strict=True)
        )
    )
    for answer, image, asked in zip(answers, images, options, strict=True):
        (seen,) = answer.images
        assert (seen.points is not None) == ("explain" in asked)
        assert (seen.attention is not None) == (asked.get("explain") == "attention")
        assert bool(seen.confidence) == ("confidence" in asked)
        assert (seen.segments[0].probability is not None) == (
            "confidence" in asked or "format" in asked
        )
        if seen.label_map and "test_time" not in asked:
            labels = loaded.segment(decoded(image)).labels.numpy()
            assert (seen.labels != labels).mean() < 2e-3


async def test_both_transports_describe_the_classes(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        listed = (await client.get("/v1/models")).json()["models"]
        labels = (await client.get("/v1/models/segments")).json()["labels"]
        plain = (await client.get("/v1/models/shapes")).json()["labels"]
    assert [(m["name"], m["task"], m["default"]) for m in listed] == [
        ("shapes", "classify", True), ("segments", "segment", True),
    ]  # fmt: skip
    assert {"flops", "image_size", "resize_mode", "letterbox_size"}.isdisjoint(listed[1])
    assert [(one["label"], one["colour"]) for one in labels] == [
        *zip(CLASSES, PALETTE, strict=True)
    ]
    assert all("colour" not in one for one in plain)
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ModelServiceStub(open_channel)
        over_rpc = await stub.GetModel(dat_pb2.GetModelRequest(name="segments"))
        shapes = await stub.GetModel(dat_pb2.GetModelRequest(name="shapes"))
    assert over_rpc.model.task == "segment"
    colours = [[one.colour.red, one.colour.green, one.colour.blue] for one in over_rpc.labels]
    assert colours == PALETTE
    assert not any(one.HasField("colour") for one in shapes.labels)


async def test_tasks_do_not_answer_for_each_other(server):
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        wrong = await client.post("/v1/classify?model=segments", content=JPEG)
        none = await client.post("/v1/detect", content=JPEG)
    assert (wrong.status_code, none.status_code) == (404, 404)
    assert (await over_grpc(server, [JPEG], model="shapes")).error == "unknown_model"


async def test_a_deadline_holds(server):
    late = await over_http(server, [JPEG], timeout=1e-4)
    assert late.error == "deadline_exceeded"


async def test_requests_are_counted_by_task(server):
    before = server.metrics()
    await asyncio.gather(
        over_http(server, [JPEG, b"x"], explain="points"), over_grpc(server, [JPEG])
    )
    after = server.metrics()

    def change(name):
        return after[name] - before[name]

    for protocol in ("http", "grpc"):
        labels = f"model=segments,outcome=ok,protocol={protocol},task=segment"
        assert change(f"dat_requests_total,{labels}") == 1
    assert change("dat_images_total,model=segments,task=segment") == 2
    assert change("dat_explain_requests_total,kind=points,model=segments") == 1


async def test_what_an_answer_holds_counts_until_it_is_there(folder):
    """Of an image that is decoded, and waits for a device that takes none."""
    shared = Shared(Settings(), [Device("cpu", threads=1)], Metrics(CollectorRegistry()))
    opened = open_model(ModelEntry(checkpoint=folder / "segments.pth"), shared)
    opened.batcher.open()
    limits, held = Settings().limits, shared.metrics.pixels_in_flight._value
    with open_decoders(limits, shared.metrics) as decoders:
        core = open_core(opened.facts, opened.batcher, decoders, limits, opened.metrics)
        asking = asyncio.create_task(core.answer([JPEG], segmentation.SegmentOptions()))
        while held.get() != 320 * 240:  # twice as many until it is decoded
            assert not asking.done()
            await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.wait([asking])
        assert held.get() == 0
    shared.devices[0].close()


async def visualized(server, **options):
    async with httpx.AsyncClient(base_url=server.http_url, timeout=60) as client:
        return await client.post("/v1/visualize", params=options, content=JPEG)


async def test_a_picture_has_the_colours_over_the_image(any_server, expected):
    labels = expected["official"].labels.numpy()
    answer = await visualized(any_server)
    assert answer.headers["content-type"] == "image/png"
    drawn = decoded(answer.content)
    official = overlay(decoded(JPEG), labels, tuple(map(tuple, PALETTE)))
    # Plates with names cover the rest.
    assert 0.85 < (drawn == official).all(-1).mean() < 1
    whole = decoded((await visualized(any_server, opacity=1)).content)
    assert (whole == np.array(PALETTE)[labels]).all(-1).mean() > 0.85
    bare = decoded((await visualized(any_server, opacity=0, show="segments")).content)
    assert (bare == decoded(JPEG)).all(-1).mean() > 0.85


async def test_a_picture_shows_the_classes_that_are_wanted(server, expected):
    labels = expected["official"].labels.numpy()
    largest = int(np.bincount(labels.ravel()).argmax())
    drawn = decoded((await visualized(server, classes=CLASSES[largest], opacity=1)).content)
    own = labels == largest
    assert (drawn[own] == PALETTE[largest]).all(-1).mean() > 0.9
    assert (drawn[~own] == decoded(JPEG)[~own]).all(-1).mean() > 0.9


async def test_a_picture_as_svg_and_beside_other_things(server, expected):
    answer = await visualized(server, format="svg", show="segments,points", size=640)
    document = ET.fromstring(answer.content)
    photo, colours = document.iter(f"{SVG}image")
    assert colours.attrib["opacity"] == "0.5"
    assert photo.attrib["width"] == colours.attrib["width"] == "640"
    assert len(list(document.iter(f"{SVG}circle"))) > 50
    names = [element.text for element in document.iter(f"{SVG}text")]
    counts = np.bincount(expected["official"].labels.numpy().ravel())
    assert f"{CLASSES[counts.argmax()]} {counts.max() / counts.sum():.0%}" in names


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"show": "boxes"}, "segments is a segmenter, which finds no boxes"),
        ({"score_threshold": 0.5}, "are for detectors; segments is a segmenter"),
        ({"resize_mode": "letterbox"}, "are for detectors; segments is a segmenter"),
        ({"classes": "unicorn"}, "has no class 'unicorn'"),
        ({"model": "shapes", "show": "segments"}, "shapes is a classifier, which finds no segm"),
    ],
)
async def test_what_is_no_picture_of_the_model_is_refused(server, options, sentence):
    answer = await visualized(server, **options)
    assert answer.json()["error"]["code"] == "invalid_option"
    assert sentence in answer.json()["error"]["message"]


async def test_grpc_draws_the_same_picture(server):
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.VisualizerServiceStub(open_channel)
        request = dat_pb2.VisualizeRequest(image=JPEG, show=[dat_pb2.SHOWN_SEGMENTS], opacity=0.25)
        picture = (await stub.Visualize(request)).picture
    answer = await visualized(server, show="segments", opacity=0.25)
    np.testing.assert_array_equal(decoded(picture), decoded(answer.content))


def test_a_converted_segmenter_is_served_from_its_file_alone(folder: Path, tmp_path: Path):
    """With the names and the colours that were in the official file."""
    out = tmp_path / "segments.safetensors"
    convert.convert(ModelChoice(checkpoint=folder / "segments.pth"), out, [SEGMENTATION])
    labels = load.load(ModelChoice(checkpoint=out), [SEGMENTATION]).labels
    assert [(label.name, list(label.colour or ())) for label in labels] == [
        *zip(CLASSES, PALETTE, strict=True)
    ]
