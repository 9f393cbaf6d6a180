"""A segmenter in the page: the labels over the picture, their legend, and where it looked."""

import json
import subprocess
import sys
from dataclasses import replace

import httpx
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_masks

from model.segmentation.config import SEGMENTERS
from tests.browser.page import Page
from tests.browser.test_access import PHONE, violations
from tests.browser.test_playground import PIXEL
from tests.model.segmentation.conftest import segmenter_state
from tests.server import ROOT, start_server

MANY = ROOT / "demo" / "detection" / "samples" / "many.jpg"
NAME = "semantic_fpn_dat_nano"
CLASSES = [f"kind {n}" for n in range(7)]
PALETTE = [[31 * n, 255 - 31 * n, 7 * n] for n in range(7)]
MODELS = """
[[models]]
name = "dat_nano"

[[models]]
name = "segments"
checkpoint = "segments.pth"
"""
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # pycocotools, NumPy 2


@pytest.fixture(scope="module")
def segmenting(tmp_path_factory):
    """A server with a small segmenter whose labels mean nothing, but are many."""
    folder = tmp_path_factory.mktemp("segmenters")
    state = segmenter_state(replace(SEGMENTERS[NAME], num_classes=len(CLASSES)))
    meta = {"CLASSES": CLASSES, "PALETTE": PALETTE}
    torch.save({"meta": meta, "state_dict": state}, folder / "segments.pth")
    (folder / "models.toml").write_text(MODELS)
    with start_server(DAT_MODEL__FILE=folder / "models.toml") as server:
        yield server


@pytest.fixture(scope="module")
def segments(segmenting):
    answer = httpx.post(
        f"{segmenting.http_url}/v1/segment",
        params={"model": "segments", "format": "rle"},
        content=MANY.read_bytes(),
    )
    found = answer.json()["results"][0]["segments"]
    assert len(found) > 2
    return found


@pytest.fixture
def page(browser, segmenting):
    with Page.opened(browser, segmenting.http_url) as page:
        yield page
        page.check()


@pytest.fixture
def labelled(page):
    """The page with a picture that is labelled, and no points over it."""
    page.sample("many")
    assert page.find("#model").get_attribute("value") == "segments"
    page.wait(lambda: page.all(".object"))
    for group in page.all("#group-choices label"):
        group.click()
    page.wait_drawn(points=0)
    return page


def mask_of(segment):
    decoded = coco_masks.decode(
        {
            "size": segment["mask"]["rle"]["size"],
            "counts": segment["mask"]["rle"]["counts"].encode(),
        }
    )
    return decoded.astype(bool)


def inner(mask):
    """A pixel `(x, y)` with nothing but its own class for 6 pixels around."""
    away = mask.copy()
    for axis in (0, 1):
        for shift in range(-6, 7):
            away &= np.roll(mask, shift, axis)
    away[:8], away[-8:], away[:, :8], away[:, -8:] = False, False, False, False
    rows, columns = np.nonzero(away)
    return None if not len(rows) else (int(columns[0]) + 0.5, int(rows[0]) + 0.5)


def drawn(page, place, width):
    return np.array(page.script(PIXEL, *place, width))


def test_every_class_has_its_colour_where_it_is_and_its_share_in_the_legend(labelled, segments):
    page = labelled
    entries = [entry.text.split("\n") for entry in page.all("#results .object")]
    assert [name for name, _ in entries] == [one["label"] for one in segments]
    shares = [float(share.removesuffix(" %")) / 100 for _, share in entries]
    assert shares == pytest.approx([one["share"] for one in segments], abs=0.006)
    assert page.stage("segments") == str(len(segments))
    width = segments[0]["mask"]["rle"]["size"][1]
    page.slide("#opacity", 100)
    page.wait_drawn(opacity="1")
    tried = 0
    for one in segments:
        if (place := inner(mask_of(one))) is None:
            continue
        tried += 1
        *colour, opacity = drawn(page, place, width)
        assert colour == pytest.approx(one["colour"], abs=2)
        assert opacity == 255
    assert tried >= 2
    page.slide("#opacity", 0)
    page.wait_drawn(opacity="0")
    assert drawn(page, inner(mask_of(segments[0])), width)[3] < 60


def test_labels_are_those_of_the_server(page, segments):
    height, width = segments[0]["mask"]["rle"]["size"]
    found = page.module(
        "const { Labels } = await load('segments.js');"
        "const [segments, width, height] = given;"
        "const labels = new Labels({ segments, image: { width, height } });"
        "const at = [[-0.1, 3], [width, 3], [0.2, 0.9]].map((place) => labels.at(place));"
        "return [[...labels.map], ...at]",
        segments, width, height,
    )  # fmt: skip
    expected = np.full((height, width), 255)
    for index, one in enumerate(segments):
        expected[mask_of(one)] = index
    assert (np.array(found[0]).reshape(height, width) == expected).all()
    assert found[1:] == [None, None, expected[0, 0]]


def test_hover_and_focus_name_a_class_and_light_its_points(page, segments):
    page.sample("many")
    page.wait(lambda: page.all(".object"))
    height, width = segments[0]["mask"]["rle"]["size"]
    for index, one in enumerate(segments[:2]):
        page.script("document.querySelector(`[data-index='${arguments[0]}']`).focus()", index)
        page.wait(lambda one=one: page.text("#under-name").startswith(one["label"]))
        assert page.find("#under").is_displayed()
        assert len(page.all(".object.is-lit")) == 1
    lit = int(page.stage("lit") or 0)
    page.script("document.activeElement.blur()")
    page.wait(lambda: not page.find("#under").is_displayed())
    x, y = inner(mask_of(segments[1]))
    hover(page, x / width, y / height)
    page.wait(lambda: page.text("#under-name").startswith(segments[1]["label"]))
    page.wait_drawn(lit=lit)


def hover(page, x, y):
    place = page.script(
        "const s = document.getElementById('stage'); s.scrollIntoView({block: 'center'});"
        "const b = s.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
    )
    at = {"x": place[0] + x * place[2], "y": place[1] + y * place[3]}
    page.driver.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", **at})


def test_a_place_has_its_class_and_its_keys(page, segments):
    page.sample("many")
    page.click_at(0.3, 0.6)
    page.wait(lambda: page.stage("query"))
    assert int(page.stage("keys")) > 0
    asked = httpx.URL(page.requested("/v1/segment")[-1]).params
    answer = httpx.post(f"{page.url}/v1/segment", params=asked, content=MANY.read_bytes())
    (layer,) = answer.json()["results"][0]["attention"]
    x, y = layer["queries"][0]["centre"]
    (label,) = [one["label"] for one in segments if mask_of(one)[int(y), int(x)]]
    assert f"which is labelled {label}," in page.text("#attention-said")


@pytest.mark.parametrize("form", ["curl", "gRPC"])
def test_the_call_and_what_is_shown_are_taken_along(page, segments, downloads, form):
    page.sample("many")
    page.wait(lambda: page.all(".object"))
    page.choose("copy-forms", form)
    text = page.text("#call")
    python = [sys.executable, "-c", f"import sys; sys.path.append({str(ROOT)!r})\n{text}"]
    command = ["bash", "-c", text] if form == "curl" else python
    done = subprocess.run(command, cwd=MANY.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    found = result["image"]["segments"] if form == "gRPC" else result["segments"]
    assert [one["label"] for one in found] == [one["label"] for one in segments]
    page.find("#save-png").click()
    picture = downloads / "many-points.png"
    page.wait(lambda: picture.exists() and picture.stat().st_size)
    with Image.open(picture) as saved, Image.open(MANY) as plain:
        assert saved.size == plain.size


def test_a_link_restores_the_opacity(page):
    page.sample("many")
    page.slide("#opacity", 80)
    page.wait(lambda: "opacity=0.8" in page.driver.current_url)
    link = page.driver.current_url
    page.driver.get("about:blank")
    page.go(link.removeprefix(page.url))
    page.wait_drawn(opacity="0.8", picture="many.jpg")
    page.wait(lambda: page.stage("segments") not in ("", "0"))


def test_gallery_and_camera_label_too(page):
    page.script(
        "const e = document.getElementById('model'); e.value = 'segments';"
        "e.dispatchEvent(new Event('change', { bubbles: true }))"
    )
    page.pick([MANY, MANY.parent / "few.jpg"])
    page.wait(lambda: page.text("#gallery-said") == "2 of 2 pictures done.")
    assert all("kind" in thumb.text for thumb in page.all(".thumb"))
    page.find("#camera").click()
    page.wait(lambda: int(page.find("#camera-said").get_attribute("data-frames") or 0) >= 2)
    page.wait(lambda: page.stage("segments") not in ("", "0"))
    page.find("#camera").click()
    page.wait(lambda: page.text("#camera-label") == "Live camera")


@pytest.mark.parametrize(("size", "scheme"), [((1280, 900), "dark"), (PHONE, "light")])
def test_axe_finds_nothing_in_a_picture_with_labels(page, size, scheme):
    page.emulate(size, scheme, touch=size == PHONE)
    page.sample("many")
    page.wait(lambda: page.all(".object"))
    page.script("document.querySelector('[data-index=\"1\"]').focus()")
    page.wait(lambda: page.find("#under").is_displayed())
    assert not violations(page)
    assert page.script("return document.documentElement.scrollWidth") <= size[0]
