"""The playground in Chromium: pictures in, answers and what was drawn out."""

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_masks
from selenium.webdriver.common.keys import Keys

from service.errors import all_errors
from service.security.keys import add_key
from tests.browser.page import Page
from tests.faults import faulty
from tests.server import ROOT, RunningServer, start_server

SAMPLES = ROOT / "demo" / "samples"
SCENES = ROOT / "demo" / "detection" / "samples"
STAR, HEART, MANY = SAMPLES / "star.jpg", SAMPLES / "heart.jpg", SCENES / "many.jpg"
WIDTH, HEIGHT = 700, 460  # of the star
GROUP_COLOURS = {(0xFF, 0xB0, 0x00), (0x5C, 0xC3, 0xFF)}
PIXEL = """
const [x, y] = arguments;
const canvas = document.getElementById("overlay");
const scale = canvas.width / arguments[2];
const at = [x, y].map((value) => Math.round(value * scale));
return [...canvas.getContext("2d").getImageData(...at, 1, 1).data];
"""


def operations(server: RunningServer, **headers: str) -> int:
    paths = httpx.get(f"{server.http_url}/openapi.json", headers=headers).json()["paths"]
    return sum(map(len, paths.values()))


def ask(page, task, picture, **options):
    answer = httpx.post(
        f"{page.url}/v1/{task}", params=options, content=picture.read_bytes()
    ).json()
    return answer["results"][0]


def layer_of(result, kind, name):
    (layer,) = [one for one in result[kind] if f"{one['stage']}.{one['block']}" == name]
    return layer


def labels(page):
    return [bar.text for bar in page.all("#results .bar-label")]


# Lets no question out to the server until `release` is called with its number.
HOLD = """
const ask = window.fetch;
const held = [];
window.fetch = (path, options) => options?.method === "POST"
  ? new Promise((resolve, reject) => { held.push(() => ask(path, options).then(resolve, reject)); })
  : ask(path, options);
window.asked = () => held.length;
window.release = async (index) => {
  await held[index]();
  await new Promise((resolve) => { setTimeout(resolve, 500); });
};
"""


# Pictures in


def test_a_picked_picture_is_told_and_its_way_shown(page):
    page.pick([STAR])
    page.wait_drawn(points=32, layer="3.1", travel="1.00")
    assert labels(page)[0] == "star"
    assert len(labels(page)) == 5
    said = page.text("#timing-said")
    assert "star.jpg, 700 x 460 pixels; dat_nano, version 1" in said
    stages = [row.text for row in page.all("#timing li")]
    assert [stage.split("\n")[0] for stage in stages] == [
        "on the way", "decode", "queue", "compute, batch of 1", "render",
    ]  # fmt: skip
    assert page.requested("/v1/classify")


@pytest.mark.parametrize("way", ["drop", "paste"])
def test_a_picture_is_dropped_anywhere_or_pasted(page, way):
    page.bring(way, [("heart.jpg", "image/jpeg", HEART.read_bytes())])
    page.wait_drawn(points=32)
    assert labels(page)[0] == "heart"


def test_a_sample_brings_the_model_that_knows_such_pictures(page):
    page.sample("star")
    assert page.find("#model").get_attribute("value") == "dat_nano"
    assert labels(page)[0] == "star"
    page.sample("few")
    page.wait(lambda: page.all("#results .object"))
    assert page.find("#model").get_attribute("value") == "mask_rcnn_dat_nano"


def test_a_model_that_is_chosen_while_another_is_asked_is_waited_for(page):
    page.script(HOLD)
    page.pick([STAR])
    page.wait(lambda: page.script("return window.asked()") == 1)
    page.find("#model option[value=mask_rcnn_dat_nano]").click()
    page.wait(lambda: page.script("return window.asked()") == 2)
    page.script("return window.release(0)")
    assert page.find("#asking").is_displayed()
    assert not page.find("#failure").is_displayed()
    page.script("return window.release(1)")
    page.wait(lambda: page.all("#results .object"))
    assert not page.find("#asking").is_displayed()


def test_one_of_several_pictures_fails_alone(page, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(STAR.read_bytes()[:3000])
    nothing = tmp_path / "nothing.png"
    nothing.write_bytes(b"no picture at all")
    page.allowed = (400,)
    page.pick([STAR, broken, HEART, nothing])
    page.wait(lambda: page.text("#gallery-said") == "2 of 4 pictures done, 2 failed.")
    states = [thumb.text.split("\n")[-1] for thumb in page.all(".thumb")]
    assert states == ["star", "failed", "heart", "failed"]
    page.all(".thumb")[3].click()
    page.wait(lambda: "not a JPEG, PNG or WebP image." in page.text("#failure-said"))
    page.all(".thumb")[2].click()
    page.wait_drawn(points=32)
    assert labels(page)[0] == "heart"
    assert not page.find("#failure").is_displayed()


def test_what_is_too_large_is_told_before_anything_is_sent(page, tmp_path):
    large, wide = tmp_path / "large.jpg", tmp_path / "wide.png"
    large.write_bytes(STAR.read_bytes() + bytes(17 * 2**20))
    Image.new("1", (6000, 5000)).save(wide)
    page.pick([large])
    page.wait(lambda: "takes pictures of at most 16.8 MB" in page.text("#failure-said"))
    page.pick([wide])
    page.wait(lambda: "at most 25 million pixels" in page.text("#failure-said"))
    assert not page.requested("/v1/classify")


# What is drawn


def test_a_point_is_drawn_where_its_coordinates_say(page):
    page.sample("star")
    result = ask(page, "classify", STAR, explain="attention", layers="3.1")
    points = np.array(layer_of(result, "points", "3.1")["sampling_locations"]).reshape(-1, 2)
    received = np.ravel(layer_of(result, "attention", "3.1")["received"])
    x, y = points[received.argmin()]  # the smallest lies on top
    assert tuple(page.script(PIXEL, x, y, WIDTH)[:3]) in GROUP_COLOURS
    page.slide("#travel", 0)
    page.wait_drawn(travel="0.00")
    assert tuple(page.script(PIXEL, x, y, WIDTH)[:3]) not in GROUP_COLOURS
    references = np.array(layer_of(result, "points", "3.1")["reference_points"]).reshape(-1, 2)
    seen = {tuple(page.script(PIXEL, *at, WIDTH)[:3]) for at in references.tolist()}
    assert seen <= GROUP_COLOURS


def test_points_move_from_the_grid_unless_motion_is_unwanted(page):
    page.script("window.seen = new Set(); new MutationObserver(() => window.seen.add("
                "document.getElementById('stage').dataset.travel)).observe("
                "document.getElementById('stage'), { attributes: true })")  # fmt: skip
    page.sample("star")
    assert len(page.script("return [...window.seen].filter(Boolean)")) == 1
    page.emulate(motion="no-preference")
    page.find("#play").click()
    page.wait(lambda: len(page.script("return [...window.seen]")) > 3)
    page.wait_drawn(travel="1.00")


def test_layers_and_groups_are_switched(page):
    page.sample("star")
    page.choose("layer-choices", "2.0")
    page.wait_drawn(layer="2.0", points=32)
    page.choose("group-choices", "1")
    page.wait_drawn(points=16)
    page.choose("layer-choices", "0.0")
    page.wait_drawn(layer="0.0", points=16)
    page.find("#sized").click()
    page.wait_drawn(layer="0.0")


# Queries


def test_a_place_that_is_clicked_shows_its_keys(page):
    page.sample("star")
    page.click_at(0.4, 0.6)
    result = ask(
        page, "classify", STAR,
        explain="attention", layers="3.1", queries=f"{0.4 * WIDTH},{0.6 * HEIGHT}",
    )  # fmt: skip
    (query,) = layer_of(result, "attention", "3.1")["queries"]
    page.wait_drawn(query=f"{query['row']},{query['column']}", keys=16)
    group, best = max(
        ((group, keys[0]) for group, keys in enumerate(query["groups"])),
        key=lambda pair: pair[1]["weight"],
    )
    said = page.text("#attention-said")
    assert f"Row {query['row']}, column {query['column']}" in said
    assert f"point {best['key']} of group {group}" in said
    assert f"weight {best['weight']:.2f}" in said
    page.click_at(0.4, 0.6)
    page.wait_drawn(query="", keys=0)


def test_arrow_keys_walk_from_cell_to_cell(page):
    page.sample("star")
    page.choose("layer-choices", "2.2")
    page.wait_drawn(layer="2.2")
    page.script("document.getElementById('stage').focus()")
    page.press(Keys.ARROW_RIGHT)
    page.wait(lambda: page.stage("query"))
    row, column = map(int, page.stage("query").split(","))
    page.press(Keys.ARROW_RIGHT, Keys.ARROW_DOWN)
    page.wait_drawn(query=f"{row + 1},{column + 1}")
    page.press(*[Keys.ARROW_LEFT] * 12)
    page.wait(lambda: page.stage("query").endswith(",0"))
    print(f"an answer and its drawing: {page.stage('answeredMs')} ms")  # noqa: T201
    page.press(Keys.ESCAPE)
    page.wait_drawn(query="", keys=0)


def test_a_place_stays_when_the_layer_changes(page):
    page.sample("star")
    page.click_at(0.3, 0.4)
    page.wait(lambda: page.stage("query"))
    page.choose("layer-choices", "1.0")
    page.wait_drawn(layer="1.0", keys=8)


# Objects


def test_objects_light_up_the_points_inside_them(page):
    page.sample("many")
    page.wait(lambda: page.all(".object"))
    result = ask(page, "detect", MANY, explain="objects")
    found = [one for one in result["detections"] if one["score"] >= 0.5]
    assert page.stage("objects") == str(len(found))
    assert len(page.all(".object")) == len(found)
    layer = page.stage("layer")
    for index in range(len(found)):
        page.script("document.querySelector(`[data-index='${arguments[0]}']`).focus()", index)
        inside = layer_of(found[index], "points_inside", layer)["indices"]
        page.wait_drawn(lit=len(inside))
    page.slide("#threshold", 95)
    least = [one for one in found if one["score"] >= 0.95]
    page.wait_drawn(objects=len(least))


def test_masks_are_read_as_coco_writes_them(page):
    rng = np.random.default_rng(5)
    for height, width in ((1, 1), (7, 3), (40, 60), (64, 64)):
        for share in (0.0, 0.02, 0.5, 1.0):
            bits = rng.random((height, width)) < share
            coded = coco_masks.encode(np.asfortranarray(bits.astype(np.uint8)))
            rows, columns = page.module(
                "const { Mask } = await load('masks.js');"
                "const [size, counts] = given; const mask = new Mask({ size, counts });"
                "const found = [[], []];"
                "for (let y = -1; y <= size[0]; y += 1) for (let x = -1; x <= size[1]; x += 1)"
                "  if (mask.has(x, y)) { found[0].push(y); found[1].push(x); }"
                "return found;",
                [height, width], coded["counts"].decode(),
            )  # fmt: skip
            seen = np.zeros_like(bits)
            seen[rows, columns] = True
            assert (seen == bits).all()


# Taking it along


@pytest.mark.parametrize("form", ["curl", "Python", "gRPC"])
def test_the_copied_call_says_what_is_shown(page, server, form):
    page.sample("star")
    page.click_at(0.4, 0.6)
    page.wait(lambda: page.stage("query"))
    cell = [int(number) for number in page.stage("query").split(",")]
    page.choose("copy-forms", form)
    text = page.text("#call")
    assert "queries" in text
    port = server.grpc_target.rpartition(":")[2]
    if form == "gRPC":
        assert f":{port}" in text
    importing = f"import sys; sys.path.append({str(ROOT)!r})"
    python = [sys.executable, "-c", f"{importing}\n{text}"]
    command = ["bash", "-c", text] if form == "curl" else python
    done = subprocess.run(command, cwd=SAMPLES, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)["results"]
    answer = result.get("classification", result)
    layers = answer["attention"]["layers"] if form == "gRPC" else answer["attention"]
    assert answer["predictions"][0]["label"] == "star"
    layer = next(one for one in layers if (one["stage"], one.get("block", 0)) == (3, 1))
    queries = [[query.get(name, 0) for name in ("row", "column")] for query in layer["queries"]]
    assert queries[0] == cell


def test_a_link_restores_what_was_shown(page):
    page.sample("star")
    page.choose("layer-choices", "2.2")
    page.wait_drawn(layer="2.2")
    page.click_at(0.25, 0.5)
    page.wait(lambda: page.stage("query"))
    page.choose("group-choices", "0")
    page.slide("#travel", 40)
    page.wait_drawn(travel="0.40", points=16)
    query = page.stage("query")
    page.wait(lambda: "travel=0.40" in page.driver.current_url)
    link = page.driver.current_url
    assert "star" in link
    page.driver.get("about:blank")
    page.go(link.removeprefix(page.url))
    page.wait_drawn(layer="2.2", travel="0.40", points=16, query=query, keys=8)


def test_what_is_shown_is_saved_at_the_size_of_the_picture(page, downloads):
    page.sample("star")
    page.find("#save-png").click()
    page.find("#save-json").click()
    picture, answer = downloads / "star-points.png", downloads / "star.json"
    page.wait(lambda: picture.exists() and answer.exists() and answer.stat().st_size)
    assert json.loads(answer.read_text())["results"][0]["predictions"][0]["label"] == "star"
    with Image.open(picture) as saved, Image.open(STAR) as plain:
        assert saved.size == plain.size == (WIDTH, HEIGHT)
        difference = np.abs(
            np.asarray(saved.convert("RGB"), int) - np.asarray(plain.convert("RGB"), int)
        )
    assert difference.max() > 100


# What goes wrong


def test_a_busy_server_is_waited_for(browser, busy_server):
    server = busy_server.server

    def crowd() -> None:
        httpx.post(f"{server.http_url}/v1/classify", content=STAR.read_bytes(), timeout=60)

    with Page.opened(browser, server.http_url) as page, ThreadPoolExecutor(32) as pool:
        page.allowed = (429,)
        with busy_server.fault("wait"):
            while server.metrics()["dat_requests_waiting,model=dat_nano"] < 8:
                pool.submit(crowd)
                time.sleep(0.05)
            page.find('[data-sample="star"]').click()
            page.wait(lambda: page.find("#waiting").is_displayed())
            said = page.text("#waiting")
            assert "The server is busy" in said
            assert re.search(r"Trying again in \d+ s\.", said)
        page.wait_drawn(points=32)
        assert not page.find("#waiting").is_displayed()
        assert labels(page)[0] == "star"
        page.check()


def test_a_server_that_still_reads_its_models_is_waited_for(browser, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    loading = tmp_path / "load"
    loading.touch()
    with ExitStack() as stack, ThreadPoolExecutor() as pool:
        start = faulty(tmp_path, DAT_SERVER__HTTP_PORT=port)
        starting = pool.submit(stack.enter_context, start)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda: httpx.get(f"{url}/health/live").status_code == 200)
            with Page.opened(browser, url, ready=False) as page:
                page.allowed = (503,)
                page.wait(lambda: "still reading its models" in page.text("#waiting"))
                loading.unlink()
                page.wait_ready()
                assert not page.find("#waiting").is_displayed()
        finally:
            loading.unlink(missing_ok=True)
            starting.result()


def wait_for(condition):
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            time.sleep(0.05)


def test_a_key_is_asked_for_and_kept_and_a_server_that_is_gone_said_to_be(browser, tmp_path):
    key = add_key(tmp_path / "keys.toml", "somebody")
    with (
        start_server(
            DAT_MODEL__NAME="dat_nano", DAT_SECURITY__API_KEYS=tmp_path / "keys.toml"
        ) as server,
        Page.opened(browser, server.http_url, ready=False) as page,
    ):
        page.allowed = (401,)
        page.wait(lambda: page.find("#key-dialog").is_displayed())
        page.find("#key").send_keys("not a key", Keys.ENTER)
        page.wait(lambda: page.find("#key-wrong").is_displayed())
        page.find("#key").send_keys(key, Keys.ENTER)
        page.wait_ready()
        page.sample("star")
        assert key not in page.text("#call")
        assert "$DAT_KEY" in page.text("#call")
        count = operations(server, authorization=f"Bearer {key}")
        page.go("/docs", ready=False)
        page.wait(lambda: len(page.all(".opblock")) == count)
        page.check()
        page.go()
        page.sample("star")
        assert server.terminate() == 0
        page.click_at(0.3, 0.7)
        page.wait(lambda: "The server cannot be reached." in page.text("#waiting"))


def test_every_passing_failure_is_tried_again_and_has_a_sentence(page):
    passing = {error.code for error in all_errors() if error.http_status in (429, 503)}
    seen = page.module(
        "const { Failure } = await load('failures.js');"
        "return given[0].map((code) => { const f = new Failure(code, 'said so');"
        "return [f.passes, f.message]; })",
        sorted(passing),
    )
    assert all(passes and message != "Said so." for passes, message in seen)
    assert page.module(
        "const { Failure } = await load('failures.js');"
        "return [new Failure('invalid_option', 'no layer 9.9').message, "
        "new Failure('invalid_option').passes]"
    ) == ["No layer 9.9.", False]


# The interface


def test_swagger_ui_shows_the_interface(browser, server):
    count = operations(server)
    with Page.opened(browser, server.http_url, "/docs", ready=False) as page:
        page.wait(lambda: len(page.all(".opblock")) == count)
        page.check()
