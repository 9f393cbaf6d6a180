"""Whose attention is asked for, as a text: in a query, a form, JSON or a parameter."""

from typing import Literal

from service.errors import InvalidOption, quoted
from service.tasks.attention import Layer, Point, Queries

_AUTO: Literal["auto"] = "auto"
_LONGEST_COUNT = 4  # digits of a stage or a block


def read_queries(written: str | list[Point] | None) -> Queries | None:
    """The queries of a request.

    Raises:
        InvalidOption: they are neither `auto` nor positions.
    """
    if written is None:
        return None
    if written == "auto":
        return _AUTO
    if isinstance(written, list):
        return tuple(written)
    positions = [position.split(",") for position in written.split(";")]
    try:
        return tuple((float(x), float(y)) for x, y in positions)
    except ValueError:
        raise InvalidOption(
            f"queries is auto, or positions such as 80,64;120.5,30, not {quoted(written)}"
        ) from None


def read_layer(written: str) -> Layer:
    """A layer from its name.

    Raises:
        InvalidOption: it is not `stage.block`.
    """
    stage, _, block = written.partition(".")
    if not (_is_count(stage) and _is_count(block)):
        raise InvalidOption(f"a layer is named stage.block, such as 3.1, not {quoted(written)}")
    return int(stage), int(block)


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= _LONGEST_COUNT
