"""The playground for everybody: by keyboard, on a phone, in the dark, with a camera; axe agrees."""

import re
from importlib.resources import files

import pytest
from selenium.webdriver.common.keys import Keys

PHONE = (360, 740)
AXE = (files("axe_core_python") / "axe.min.js").read_text("utf-8")
RUN_AXE = """
const [finish] = [...arguments].slice(-1);
axe.run(document, { resultTypes: ["violations"] }).then(({ violations }) => finish(
  violations.map(({ id, nodes }) => [id, ...nodes.map((node) => node.html + node.failureSummary)])
));
"""


def violations(page):
    page.script(AXE)
    return page.driver.execute_async_script(RUN_AXE)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), PHONE])
def test_axe_finds_nothing(page, scheme, size):
    page.emulate(size, scheme, touch=size == PHONE)
    assert not violations(page)
    page.sample("star")
    page.click_at(0.5, 0.5)
    page.wait(lambda: page.stage("query"))
    assert not violations(page)
    page.sample("many")
    page.wait(lambda: page.all(".object"))
    page.script("document.querySelector('details').open = true")
    assert not violations(page)


@pytest.mark.parametrize(("scheme", "size"), [("light", (1280, 900)), ("dark", PHONE)])
def test_the_page_that_explains_is_reached_from_the_playground(page, scheme, size):
    page.emulate(size, scheme)
    page.find(".top-choices a[href='docs/attention']").click()
    page.wait(lambda: page.text("h1").startswith("Attention"))
    pictures = "return [...document.images].map((image) => image.complete && image.naturalWidth)"
    page.wait(lambda: all(page.script(pictures)))
    assert len(page.script(pictures)) == 6
    assert page.all("math")
    assert page.script("return document.documentElement.scrollWidth") <= size[0]
    assert not violations(page)
    page.find("a[href='../']").click()
    page.wait_ready()


def test_a_phone_is_wide_enough(page):
    page.emulate(PHONE, touch=True)
    for sample in ("star", "many"):
        page.sample(sample)
        page.click_at(0.4, 0.5)
        page.wait(lambda: page.stage("query"))
        wide = page.script("return document.documentElement.scrollWidth")
        assert wide <= PHONE[0]
        box = page.script(
            "const b = document.getElementById('stage').getBoundingClientRect();"
            "return [b.left, b.right, b.height]"
        )
        assert box[0] >= 0
        assert box[1] <= PHONE[0]
        assert box[2] > 150
    assert page.find("#photograph").is_displayed()


def test_the_dark_is_dark(page):
    def ground():
        colour = page.script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", colour)[:3]))

    light = ground()
    page.emulate(scheme="dark")
    assert light > 600
    assert ground() < 120


def test_everything_is_done_by_keyboard(page):
    page.tab_to("star")
    page.press(Keys.ENTER)
    page.wait_drawn(points=32)
    page.tab_to("stage", back=True)
    page.press(Keys.ARROW_UP)
    page.wait(lambda: page.stage("query"))
    first = page.stage("query")
    page.press(Keys.ARROW_UP)
    page.wait(lambda: page.stage("query") != first)
    page.tab_to("travel")
    page.press(Keys.HOME)
    page.wait_drawn(travel="0.00")
    page.tab_to("3.1")
    page.press(Keys.ARROW_LEFT)
    page.wait_drawn(layer="3.0")
    page.tab_to("0")
    page.press(Keys.SPACE)
    page.wait_drawn(points=16)
    page.tab_to("copy")


def test_the_camera_has_one_frame_in_flight(page):
    page.find("#camera").click()
    page.wait(lambda: int(page.find("#camera-said").get_attribute("data-frames") or 0) >= 6)
    page.wait_drawn(points=32)
    said = page.text("#camera-said")
    assert re.fullmatch(
        r"[\d.]+ frames a second, [\d.]+ ms each; \d+ older frames dropped", said
    ), said
    print(said)  # noqa: T201
    page.find("#camera").click()
    page.wait(lambda: page.text("#camera-label") == "Live camera")
    flying = most = sent = 0
    asked = set()
    for event in page.events():
        parameters = event["params"]
        if event["method"] == "Network.requestWillBeSent":
            if "/v1/classify" in parameters["request"]["url"]:
                asked.add(parameters["requestId"])
                sent += 1
                flying += 1
        elif event["method"] in ("Network.loadingFinished", "Network.loadingFailed"):
            flying -= parameters["requestId"] in asked
        most = max(most, flying)
    assert sent >= 6
    assert most == 1
    page.click_at(0.5, 0.5)  # the last frame stays, to be looked at
    page.wait(lambda: page.stage("query"))


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ("NotAllowedError", "The browser does not let this page use the camera."),
        ("NotFoundError", "This device has no camera."),
    ],
)
def test_a_camera_that_is_refused_is_said_to_be(page, refusal, said):
    page.script(
        "navigator.mediaDevices.getUserMedia ="
        " () => Promise.reject(new DOMException('no', arguments[0]))",
        refusal,
    )
    page.find("#camera").click()
    page.wait(lambda: said in page.text("#failure-said"))
    assert page.text("#camera-label") == "Live camera"


def test_a_page_without_a_camera_says_why(page):
    """As browsers do it to pages in plain text from another machine."""
    page.script("Object.defineProperty(navigator, 'mediaDevices', { value: undefined })")
    page.find("#camera").click()
    page.wait(lambda: "over HTTPS" in page.text("#failure-said"))
