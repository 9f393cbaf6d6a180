"""Takes the pictures of the playground in the README: `python -m tests.browser.screenshots`."""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image

from tests.browser.chromium import open_browser
from tests.browser.page import Page
from tests.server import ROOT, start_server

FOLDER = ROOT / "docs" / "pictures"
SIZE = (1280, 880)
BESIDE = "/#model=dat_nano&layer=2.2&sample=star&query=255,165&beside=swin_nano&travel=1"
SHARP = 1.25  # pixels of the picture for each of the screen


def take(page: Page, name: str, colours: int) -> None:
    """Write what is on the screen, with few colours, so that the file is small."""
    page.driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": SHARP, "mobile": False},
    )
    page.wait(lambda: page.script("return document.getElementById('overlay').width > 300"))
    picture = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")
    FOLDER.mkdir(exist_ok=True)
    few = picture.quantize(colours, kmeans=3, dither=Image.Dither.NONE)
    few.save(FOLDER / f"{name}.png", optimize=True)


def main() -> None:
    """Take a classifier in the light, a detector in the dark, and a Swin beside a DAT."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium is not None
    assert driver is not None
    with (
        tempfile.TemporaryDirectory() as downloads,
        open_browser(chromium, driver, Path(downloads)) as browser,
    ):
        with start_server() as server, Page.opened(browser, server.http_url) as page:
            alone(page)
        models = ROOT / "demo" / "beside_swin.toml"
        with (
            start_server(DAT_MODEL__FILE=models) as server,
            Page.opened(browser, server.http_url, BESIDE) as page,
        ):
            beside(page)


def beside(page: Page) -> None:
    """A DAT and a Swin."""
    page.emulate(SIZE, "light")
    page.wait(lambda: page.script("return document.getElementById('beside-stage').dataset.query"))
    page.wait(lambda: page.stage("query"))
    take(page, "playground-beside", 144)


def alone(page: Page) -> None:
    """One model at a time."""
    page.emulate(SIZE, "light")
    page.sample("star")
    page.choose("layer-choices", "2.2")
    page.click_at(0.36, 0.36)
    page.wait(lambda: page.stage("query"))
    take(page, "playground-light", 144)
    page.emulate(SIZE, "dark")
    page.go()
    page.sample("few")
    page.wait(lambda: page.all(".object"))
    take(page, "playground-dark", 256)


if __name__ == "__main__":
    main()
