"""Two models beside each other in the page: the points of a DAT, and the window of a Swin."""

import json
import subprocess

import httpx
import pytest
from PIL import Image
from selenium.webdriver.common.keys import Keys

from tests.browser.page import Page
from tests.browser.test_access import PHONE, violations
from tests.server import ROOT, start_server

STAR = ROOT / "demo" / "samples" / "star.jpg"
WIDTH, HEIGHT = 700, 460  # of the star
ORANGE = (0xFF, 0xB0, 0x00)
PIXEL = """
const canvas = document.getElementById(arguments[2]);
const scale = canvas.width / arguments[3];
const at = [arguments[0], arguments[1]].map((value) => Math.round(value * scale));
return [...canvas.getContext("2d").getImageData(...at, 1, 1).data];
"""


@pytest.fixture(scope="module")
def with_swin():
    """The demo models with a Swin beside them."""
    with start_server(DAT_MODEL__FILE=ROOT / "demo" / "beside_swin.toml") as server:
        yield server


@pytest.fixture
def page(browser, with_swin):
    with Page.opened(browser, with_swin.http_url) as page:
        yield page
        page.check()


def select(page, name, value):
    page.script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1];"
        "e.dispatchEvent(new Event('change', { bubbles: true }))",
        name, value,
    )  # fmt: skip


def beside(page, name):
    """What the second picture says of what is drawn over it."""
    code = "return document.getElementById('beside-stage').dataset[arguments[0]]"
    return str(page.script(code, name) or "")


def compare(page, layer="2.2"):
    page.sample("star")
    select(page, "beside", "swin_nano")
    page.wait(lambda: "star" in page.text("#beside-caption"))
    page.choose("layer-choices", layer)
    page.wait_drawn(layer=layer)


def attention(page, **options):
    answer = httpx.post(
        f"{page.url}/v1/classify",
        params={"model": "swin_nano", "explain": "attention", "top_n": 32, **options},
        content=STAR.read_bytes(),
    )
    (layer,) = answer.json()["results"][0]["attention"]
    (query,) = layer["queries"]
    return query


def asked(page):
    """The models and options of the requests so far."""
    return [dict(httpx.URL(url).params) for url in page.requested("/v1/classify")]


def test_one_click_asks_both_at_once_and_shows_points_and_window(page):
    compare(page)
    before = len(asked(page))
    page.click_at(0.4, 0.5)
    page.wait(lambda: page.stage("query") and beside(page, "query"))
    new = asked(page)[before:]
    assert [one["model"] for one in new] == ["dat_nano", "swin_nano"]
    assert new[0]["queries"] == new[1]["queries"]
    assert all(one["explain"] == "attention" for one in asked(page))
    query = attention(page, layers="2.1", queries=new[1]["queries"])
    assert beside(page, "layer") == "2.1"
    assert beside(page, "query") == f"{query['row']},{query['column']}"
    assert beside(page, "keys") == str(len(query["keys"])) == "16"
    assert [float(x) for x in beside(page, "window").split(",")] == query["window"]
    assert page.stage("window") == ""
    assert page.stage("keys") == "16"
    best = query["keys"][0]
    x, y = (round(value) for value in best["points"][0])
    said = page.text("#beside-attention-said")
    assert f"one at {x}, {y}, with weight {best['weight']:.2f} of 4 heads" in said
    # The window is as bright as the picture, what lies around it is not; its outline is seen.
    x1, y1, x2, y2 = query["window"]
    outline = page.script(PIXEL, x1, (y1 + y2) / 2, "beside-overlay", WIDTH)
    assert tuple(outline[:3]) == ORANGE
    assert page.script(PIXEL, x1 / 2, y1 / 2, "beside-overlay", WIDTH)[3] > 80
    gap = page.script(PIXEL, x1 + (x2 - x1) / 4, y1 + (y2 - y1) / 4, "beside-overlay", WIDTH)
    assert gap[3] == 0
    tile = page.script(PIXEL, x, y, "beside-overlay", WIDTH)
    assert tile[3] > 100


def test_arrow_keys_walk_in_both(page):
    compare(page)
    page.script("document.getElementById('stage').focus()")
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: beside(page, "query"))
    row, column = map(int, beside(page, "query").split(","))
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    cell = f"{row + 1},{column + 1}"
    page.wait(lambda: page.stage("query") == beside(page, "query") == cell)
    page.tab_to("beside-stage")
    page.press(Keys.ARROW_UP)
    cell = f"{row},{column + 1}"
    page.wait(lambda: page.stage("query") == beside(page, "query") == cell)
    page.press(Keys.ESCAPE)
    page.wait(lambda: page.stage("query") == beside(page, "query") == "")


def test_windows_at_the_rim_have_fewer_cells(page):
    compare(page, "3.1")
    page.click_at(0.01, 0.01)
    page.wait(lambda: beside(page, "query") == "0,0")
    query = attention(page, layers="3.1", queries="0,0")
    assert beside(page, "keys") == str(len(query["keys"]))
    page.choose("layer-choices", "1.0")
    page.wait(lambda: (beside(page, "layer"), beside(page, "query")) == ("1.1", "0,0"))
    query = attention(page, layers="1.1", queries="0,0")
    assert beside(page, "keys") == str(len(query["keys"])) == "4"


def test_a_swin_alone_has_attention_and_says_that_it_has_no_points(page):
    page.sample("star")
    select(page, "model", "swin_nano")
    page.wait_drawn(layer="3.1", points=0)
    said = page.find("#no-points")
    assert said.is_displayed()
    assert said.text.startswith("swin_nano has no points")
    assert not page.find("#travel").is_displayed()
    assert not page.find("#sized").is_displayed()
    page.choose("layer-choices", "0.1")
    page.wait_drawn(layer="0.1")
    page.choose("layer-choices", "2.1")
    page.wait_drawn(layer="2.1")
    page.click_at(0.4, 0.5)
    page.wait_drawn(keys=16)
    assert "sees the cells of its window" in page.text("#attention-said")
    assert "of 4 heads" in page.text("#attention-said")
    for head in ("0", "1", "3"):
        page.choose("group-choices", head)
    page.wait(lambda: "of 1 head." in page.text("#attention-said"))
    query = attention(page, layers="2.1", queries=asked(page)[-1]["queries"].split(";")[0])
    best = query["groups"][2][0]
    x, y = (round(value) for value in best["point"])
    assert f"{x}, {y}, with weight {best['weight']:.2f}" in page.text("#attention-said")
    assert all(one["explain"] == "attention" for one in asked(page))


def test_both_are_taken_along(page, downloads):
    compare(page)
    page.click_at(0.4, 0.5)
    page.wait(lambda: page.stage("query") and beside(page, "query"))
    page.choose("copy-forms", "curl")
    done = subprocess.run(
        ["bash", "-c", page.text("#call").replace("curl", "curl -w '\\n'")],
        cwd=STAR.parent, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert [json.loads(line)["model"] for line in done.stdout.split("\n") if line] == [
        "dat_nano", "swin_nano",
    ]  # fmt: skip
    page.wait(lambda: "beside=swin_nano" in page.driver.current_url)
    page.find("#save-png").click()
    page.find("#save-json").click()
    picture, answer = downloads / "star-points.png", downloads / "star.json"
    page.wait(lambda: picture.exists() and answer.exists() and answer.stat().st_size)
    with Image.open(picture) as saved:
        assert saved.width > 2 * WIDTH
        assert saved.height == HEIGHT
    assert [body["model"] for body in json.loads(answer.read_text())] == ["dat_nano", "swin_nano"]
    link, query = page.driver.current_url, beside(page, "query")
    page.driver.get("about:blank")
    page.go(link.removeprefix(page.url))
    page.wait(lambda: beside(page, "query") == query)
    select(page, "beside", "")
    page.wait(lambda: not page.find("#beside-plate").is_displayed())
    page.wait(lambda: "beside" not in page.driver.current_url)


def test_one_that_cannot_be_asked_leaves_the_other_alone(browser, with_swin):
    with Page.opened(browser, with_swin.http_url) as page:
        page.driver.execute_cdp_cmd("Network.enable", {})
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": ["*model=swin_nano*"]})
        select(page, "beside", "swin_nano")
        page.sample("star")
        page.wait(lambda: page.find("#waiting").is_displayed())
        assert page.text("#caption") == "dat_nano, layer 3.1: star"
        assert page.text("#beside-caption") == "Asking swin_nano"
        page.find("#waiting-stop").click()
        page.wait(lambda: page.text("#beside-caption") == "You stopped this picture.")
        assert not page.find("#failure").is_displayed()
        page.driver.execute_cdp_cmd("Network.setBlockedURLs", {"urls": []})
        select(page, "beside", "")
        select(page, "beside", "swin_nano")
        page.wait(lambda: page.text("#beside-caption") == "swin_nano, layer 3.1: star")


def test_a_detector_beside_a_classifier_shows_its_objects(page):
    page.sample("many")
    page.wait(lambda: page.all(".object"))
    select(page, "beside", "swin_nano")
    page.wait(lambda: page.text("#beside-caption").startswith("swin_nano, layer"))
    select(page, "model", "swin_nano")
    page.wait_drawn(points=0, objects=0)
    assert not page.find("#beside-plate").is_displayed()
    select(page, "beside", "mask_rcnn_dat_nano")
    page.wait(lambda: int(beside(page, "objects") or 0) > 1)
    assert "objects" in page.text("#beside-caption")


def test_a_camera_shows_both(page):
    select(page, "beside", "swin_nano")
    page.find("#camera").click()
    page.wait(lambda: int(page.find("#camera-said").get_attribute("data-frames") or 0) >= 3)
    page.wait(lambda: page.text("#beside-caption").startswith("swin_nano, layer 3.1"))
    page.find("#camera").click()
    page.wait(lambda: page.text("#camera-label") == "Live camera")
    page.click_at(0.5, 0.5)
    page.wait(lambda: page.stage("query") and beside(page, "query"))


@pytest.mark.parametrize(("size", "scheme"), [((1280, 900), "light"), (PHONE, "dark")])
def test_axe_finds_nothing_in_two_pictures(page, size, scheme):
    page.emulate(size, scheme, touch=size == PHONE)
    compare(page)
    page.click_at(0.4, 0.5)
    page.wait(lambda: page.stage("query") and beside(page, "query"))
    assert not violations(page)
    boxes = page.script(
        "return ['stage', 'beside-stage'].map((name) => {"
        "const b = document.getElementById(name).getBoundingClientRect();"
        "return [b.left, b.top, b.right, b.bottom] })"
    )
    (left, top, right, bottom), (left2, top2, right2, _) = boxes
    if size == PHONE:
        assert top2 > bottom
        assert page.script("return document.documentElement.scrollWidth") <= PHONE[0]
    else:
        assert left2 > right
        assert top2 == top
    assert right2 - left2 == pytest.approx(right - left, abs=1)
    assert left >= 0
    select(page, "model", "swin_nano")
    page.wait_drawn(points=0)
    assert not violations(page)
