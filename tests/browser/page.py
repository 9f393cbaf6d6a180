"""The playground as somebody uses it in a tab of their own."""

import base64
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

TIMEOUT_S = 30
FILES = """
const [files, type] = arguments;
const carried = new DataTransfer();
for (const [name, kind, text] of files) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  carried.items.add(new File([bytes], name, { type: kind }));
}
const target = document.getElementById("main");
if (type === "paste") {
  target.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carried, bubbles: true }));
} else {
  for (const step of ["dragenter", "dragover", "drop"]) {
    const carrying = { dataTransfer: carried, bubbles: true, cancelable: true };
    target.dispatchEvent(new DragEvent(step, carrying));
  }
}
"""


class Page:
    """A tab with the playground.

    Attributes:
        driver: of the browser.
        url: of the server.
        allowed: statuses that the browser may complain of.
    """

    def __init__(self, driver: webdriver.Chrome, url: str) -> None:
        self.driver = driver
        self.url = url
        self.allowed: tuple[int, ...] = ()
        self._events: list[dict[str, Any]] = []

    @classmethod
    @contextmanager
    def opened(
        cls, driver: webdriver.Chrome, url: str, at: str = "/", *, ready: bool = True
    ) -> Iterator[Self]:
        """A new tab, as wide as a desk's, without what other tabs knew."""
        for log in ("browser", "performance"):
            driver.get_log(log)
        before = driver.current_window_handle
        driver.switch_to.new_window("tab")
        page = cls(driver, url)
        page.emulate()
        try:
            page.go(at, ready=ready)
            yield page
        finally:
            driver.close()
            driver.switch_to.window(before)

    def go(self, at: str = "/", *, ready: bool = True) -> None:
        self.driver.get(self.url + at)
        if ready:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the page has heard of the models."""
        self.wait(lambda: self.script("return document.body.dataset.ready") == "yes")

    def emulate(
        self,
        size: tuple[int, int] = (1280, 900),
        scheme: str = "light",
        motion: str = "reduce",
        *,
        touch: bool = False,
    ) -> None:
        """Be a screen of a size, with the wishes of its owner."""
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": touch},
        )
        self.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": touch})
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    # What is there

    def script(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def module(self, code: str, *arguments: Any) -> Any:
        """The value of some code in which `load` imports a module of the page."""
        whole = (
            "const [finish] = [...arguments].slice(-1);"
            "const load = (name) => import(new URL(`playground/${name}`, document.baseURI).href);"
            f"(async (given) => {{ {code} }})([...arguments].slice(0, -1)).then(finish);"
        )
        return self.driver.execute_async_script(whole, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.script("return document.querySelector(arguments[0]).textContent", selector))

    def stage(self, name: str) -> str:
        """What the stage says of what is drawn."""
        code = "return document.getElementById('stage').dataset[arguments[0]]"
        return str(self.script(code, name) or "")

    def wait(self, condition: Callable[[], Any], timeout_s: float = TIMEOUT_S) -> Any:
        return WebDriverWait(self.driver, timeout_s, poll_frequency=0.03).until(
            lambda _: condition()
        )

    def wait_drawn(self, **expected: object) -> None:
        """Wait until the stage says so."""

        def drawn() -> bool:
            return all(self.stage(name) == str(value) for name, value in expected.items())

        self.wait(drawn)

    # What people do

    def sample(self, name: str) -> None:
        self.find(f'[data-sample="{name}"]').click()
        self.wait_drawn(picture=f"{name}.jpg", travel="1.00")
        self.wait(lambda: self.stage("points") not in ("", "0"))

    def pick(self, files: Sequence[Path]) -> None:
        self.find("#pick-input").send_keys("\n".join(map(str, files)))

    def bring(self, way: str, files: Sequence[tuple[str, str, bytes]]) -> None:
        """Drop or paste files: name, media type, bytes."""
        encoded = [(name, kind, base64.b64encode(data).decode()) for name, kind, data in files]
        self.script(FILES, encoded, way)

    def choose(self, place: str, value: str) -> None:
        """Click on one of the choices of a row of chips."""
        self.find(f'#{place} label:has([value="{value}"])').click()

    def press(self, *keys: str) -> None:
        for key in keys:
            ActionChains(self.driver).send_keys(key).perform()

    def focused(self) -> str:
        return str(
            self.script(
                "const e = document.activeElement;"
                "return e.id || e.dataset.sample || e.value || e.tagName"
            )
        )

    def tab_to(self, name: str, *, back: bool = False, most: int = 60) -> None:
        """Press Tab, or Shift and Tab, until something has the focus."""
        for _ in range(most):
            if back:
                backwards = ActionChains(self.driver).key_down(Keys.SHIFT).send_keys(Keys.TAB)
                backwards.key_up(Keys.SHIFT).perform()
            else:
                self.press(Keys.TAB)
            if self.focused() == name:
                return
        raise AssertionError(f"Tab does not come to {name}")

    def slide(self, selector: str, value: int) -> None:
        self.script(
            "const e = document.querySelector(arguments[0]); e.value = arguments[1];"
            "e.dispatchEvent(new Event('input', { bubbles: true }))",
            selector, value,
        )  # fmt: skip

    def click_at(self, x: float, y: float) -> None:
        """Click on the picture, at a share of its sides."""
        place = self.script(
            "const s = document.getElementById('stage'); s.scrollIntoView({block: 'center'});"
            "const b = s.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]"
        )
        at = {"x": place[0] + x * place[2], "y": place[1] + y * place[3]}
        for kind in ("mousePressed", "mouseReleased"):
            self.driver.execute_cdp_cmd(
                "Input.dispatchMouseEvent", {"type": kind, **at, "button": "left", "clickCount": 1}
            )

    # What the browser saw

    def events(self) -> list[dict[str, Any]]:
        """What went over the network, so far."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"].startswith("Network."):
                self._events.append(message)
        return self._events

    def requested(self, part: str = "") -> list[str]:
        return [
            url
            for event in self.events()
            if event["method"] == "Network.requestWillBeSent"
            and part in (url := event["params"]["request"]["url"])
        ]

    def check(self) -> None:
        """Nothing was asked of another host, and the console has no error."""
        others = [
            url for url in self.requested() if not url.startswith((self.url, "blob:", "data:"))
        ]
        assert not others, others
        severe = [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] == "SEVERE"
            and not any(f"status of {status}" in entry["message"] for status in self.allowed)
        ]
        assert not severe, severe
