"""A real Chromium, and the servers that it looks at."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver

from tests.browser.chromium import open_browser
from tests.browser.page import Page
from tests.faults import Faulty, one_by_one
from tests.server import RunningServer


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


def program(name: str, package: str) -> str:
    """A machine may lack the browser, CI may not."""
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed")
        pytest.skip(f"{name} is not installed (Debian: {package})")
    return path


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the browser saves files."""
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture
def downloads(saved: Path) -> Path:
    """The same, without what other tests saved: a second file of a name would get another one."""
    for file in saved.iterdir():
        file.unlink()
    return saved


@pytest.fixture(scope="session")
def browser(saved: Path) -> Iterator[webdriver.Chrome]:
    chromium = program("chromium", "chromium")
    with open_browser(chromium, program("chromedriver", "chromium-driver"), saved) as driver:
        yield driver


@pytest.fixture
def page(browser: webdriver.Chrome, server: RunningServer) -> Iterator[Page]:
    """The playground of the demo server in a new tab, which has to stay clean."""
    with Page.opened(browser, server.http_url) as page:
        yield page
        page.check()


@pytest.fixture(scope="session")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """A server with one place on its device, which waits as long as a test says."""
    with one_by_one(tmp_path_factory.mktemp("busy")) as running:
        yield running
