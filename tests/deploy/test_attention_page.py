"""The page that servers have of `docs/attention.md`."""

import re

from deploy.attention_page import FOLDER, PAGE, SOURCE, page

LARGEST = 600_000  # bytes, with the pictures


def test_the_page_is_that_of_the_document():
    assert PAGE.read_text("utf-8") == page(SOURCE.read_text("utf-8")), "run make attention-page"


def test_it_brings_what_it_shows_and_links_to_what_can_be_reached():
    text = PAGE.read_text("utf-8")
    pictures = re.findall(r'<img src="([^"]+)"', text)
    assert len(pictures) == SOURCE.read_text("utf-8").count("![")
    files = [PAGE, *(FOLDER / name for name in pictures)]
    assert sum(file.stat().st_size for file in files) < LARGEST
    assert {file.name for file in (FOLDER / "pictures").iterdir()} == {f.name for f in files[1:]}
    identifiers = set(re.findall(r'id="([^"]+)"', text))
    for target in re.findall(r'<a href="([^"]+)"', text):
        assert target.startswith("https://arxiv.org/") or target[1:] in identifiers | {"./"}
    assert " style=" not in text  # which the policy of the page forbids


def test_formulas_are_for_browsers_and_have_their_numbers():
    text = page(
        "# A title\n\nInline $a_1$.\n\n$$b = \\sqrt{d} \\tag{7}$$\n\n[a file](other.md#x)\n"
    )
    assert "<title>A title</title>" in text
    assert text.count("<math") == 2
    assert "<msqrt>" in text
    assert '<span class="number">(7)</span>' in text
    assert "<cite>a file</cite>" in text
