"""Tests of minutes: crowds, storms, a soak, servers that are killed and replaced under load."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults import SHAPES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> dict[str, object]:
    """Settings of a server of one process, or of many."""
    return SHAPES[request.param]


@pytest.fixture
def figures(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Shows what was measured; `pytest -rP` prints it, and a report in XML has it."""

    def show(**measured: object) -> None:
        for name, value in measured.items():
            record_property(name, value)
            print(f"{name} = {value}")  # noqa: T201

    return show
