"""Servers that leave, and processes of theirs that end, while somebody looks at the page."""

import socket
import time

import pytest

from tests.browser.page import Page
from tests.browser.test_playground import HEART, STAR, labels
from tests.faults import faulty, one_by_one
from tests.processes import kill
from tests.server import start_server

pytestmark = pytest.mark.timeout(400)
STARTED_S = 120  # until another process is there, where others want the cores
LEAVING = "This server is shutting down and takes no more pictures."
GONE = "The server cannot be reached."
READING = "The server is still reading its models."
LOST = "The process that computed this picture ended. Another one is being started."
# Keep what the page says, as it may be said for a moment alone.
HEARD = """
window.heard = [];
new MutationObserver(() => {
  const said = document.getElementById("waiting-said").textContent;
  if (window.heard.at(-1) !== said) window.heard.push(said);
}).observe(document.getElementById("waiting-said"), { childList: true });
"""


def running(server):
    return server.metrics().get("dat_requests_running,model=dat_nano")


def wait_until(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_server_that_leaves_answers_what_it_has_and_the_next_one_the_rest(browser, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with one_by_one(tmp_path, DAT_SERVER__HTTP_PORT=port) as leaving:
        server = leaving.server
        with Page.opened(browser, server.http_url) as page:
            page.allowed = (503,)
            page.script(HEARD)
            with leaving.fault("wait"):
                page.pick([STAR])
                wait_until(lambda: running(server) == 1)
                server.process.terminate()
                server.wait_for_event("draining")
                page.pick([HEART])
                page.wait(lambda: page.find("#waiting").is_displayed())
            page.wait(lambda: page.text("#gallery-said") == "1 of 2 pictures done.")
            assert server.process.wait(60) == 0
            page.wait(lambda: page.text("#waiting-said") == GONE)
            assert page.find("#waiting").is_displayed()
            with start_server(DAT_MODEL__NAME="dat_nano", DAT_SERVER__HTTP_PORT=port):
                page.wait(lambda: page.text("#gallery-said") == "2 of 2 pictures done.", STARTED_S)
                page.wait_drawn(picture="heart.jpg", points=32)
                assert labels(page)[0] == "heart"
                assert not page.find("#waiting").is_displayed()
            heard = page.script("return window.heard")
            # Whether the page has a connection left on which it is told depends on the browser.
            assert heard[0] in {LEAVING, GONE}
            assert {GONE} <= set(heard) <= {LEAVING, GONE, READING}


def test_a_worker_that_ends_is_said_to_be_lost_and_asked_again(browser, tmp_path):
    with (
        faulty(tmp_path, DAT_SERVER__FRONT_ENDS=1, DAT_ENGINE__HANG_TIMEOUT_S=100) as lost,
        Page.opened(browser, lost.server.http_url) as page,
    ):
        page.allowed = (503,)
        page.script(HEARD)
        with lost.fault("wait"):
            page.find('[data-sample="star"]').click()
            wait_until(lambda: running(lost.server) == 1)
            kill(lost.server, "worker-0")
            page.wait(lambda: page.text("#waiting-said") == LOST)
            assert page.find("#waiting").is_displayed()
        page.wait(lambda: page.stage("points") == "32", STARTED_S)
        assert labels(page)[0] == "star"
        assert not page.find("#waiting").is_displayed()
        with lost.fault("wait"):
            page.click_at(0.3, 0.4)
            wait_until(lambda: running(lost.server) == 1)
            kill(lost.server, "worker-0")
            page.wait(lambda: page.find("#waiting").is_displayed())
        page.wait(lambda: page.stage("query"), STARTED_S)
        assert not page.find("#failure").is_displayed()
        assert page.script("return window.heard[0]") == LOST
        page.check()
