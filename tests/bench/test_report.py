"""What is published is what was measured."""

import pytest

from bench import report
from bench.harness import RESULTS


def test_the_published_tables_are_of_the_result_files(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    assert capsys.readouterr().out == (RESULTS / "README.md").read_text("utf-8")
