"""Makes the page that a server has of `docs/attention.md`: `python -m deploy.attention_page`.

Servers are used where no other host can be reached, so the page brings its pictures with it, and
its formulas are MathML, which browsers read themselves. Other files of the repository are named in
it, and not linked.
"""

import re
from collections.abc import MutableMapping, Sequence
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "docs" / "attention.md"
FOLDER = ROOT / "service" / "playground" / "page" / "docs"
PAGE = FOLDER / "attention.html"
# Paths are relative, as in the other pages: a proxy may have something before them.
_FRAME = """<!doctype html>
<html lang="en">
  <head>
    <meta charset="utf-8">
    <meta name="viewport" content="width=device-width, initial-scale=1">
    <meta name="color-scheme" content="light dark">
    <title>{title}</title>
    <link rel="icon" href="../playground/icon.svg" type="image/svg+xml">
    <link rel="stylesheet" href="../playground/base.css">
    <link rel="stylesheet" href="reading.css">
  </head>
  <!-- Made from docs/attention.md by `make attention-page`. -->
  <body>
    <header class="back"><a href="../">The playground</a></header>
    <main class="reading">
{body}    </main>
  </body>
</html>
"""
_NUMBER = re.compile(r"\\tag\{(\w+)\}")


class _Renderer(RendererHTML):
    """What stands in the page."""

    def image(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """A picture of the page, with the place that it needs before it is there."""
        token = tokens[idx]
        file = (SOURCE.parent / str(token.attrGet("src"))).resolve()
        token.attrSet("src", file.relative_to(FOLDER).as_posix())
        return super().image(tokens, idx, options, env)

    def link_open(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """A link to what can be reached; other files of the repository are named alone."""
        target = str(tokens[idx].attrGet("href"))
        if target.startswith(("#", "https:")):
            return self.renderToken(tokens, idx, options, env)
        closing = next(token for token in tokens[idx:] if token.type == "link_close")
        tokens[idx].tag = closing.tag = "cite"
        tokens[idx].attrs = {}
        return self.renderToken(tokens, idx, options, env)

    def table_open(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """A table may be wider than a screen."""
        return f"<div {_scrolling('Table')}>{self.renderToken(tokens, idx, options, env)}"

    def table_close(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """The end of that."""
        return f"{self.renderToken(tokens, idx, options, env)}</div>"

    def fence(
        self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: MutableMapping[str, Any]
    ) -> str:
        """So may code."""
        return f"<div {_scrolling('Commands')}>{super().fence(tokens, idx, options, env)}</div>\n"


def _scrolling(name: str) -> str:
    """Attributes of what is wider than a narrow screen: a keyboard has to reach it."""
    return f'class="wide" tabindex="0" role="group" aria-label="{name}"'


def _formula(text: str, place: dict[str, Any]) -> str:
    """A formula in MathML, and the number that stands beside it."""
    if not place["display_mode"]:
        return str(convert(text))
    number = _NUMBER.search(text)
    formula = convert(_NUMBER.sub("", text).strip(), display="block")
    told = f'<span class="number">({number[1]})</span>' if number else ""
    return f"<div {_scrolling('Formula')}>{formula}</div>{told}"


def page(text: str) -> str:
    """The page of a text in Markdown, whose first heading is its title."""
    reader = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")
    reader.use(anchors_plugin, max_level=3)
    reader.use(dollarmath_plugin, renderer=_formula)
    title = text.splitlines()[0].removeprefix("# ")
    return _FRAME.format(title=title, body=reader.render(text))


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(SOURCE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
