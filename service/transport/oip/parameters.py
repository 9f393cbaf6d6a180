"""Parameters of requests and tensors; those that nobody here knows are passed over."""

from collections.abc import Mapping
from math import isfinite
from typing import Any

from service.errors import InvalidOption, quoted
from service.priority import Priority

_MICROSECONDS = 1e6
_LONGEST_S = 1e9


class Parameters:
    """The parameters of a request.

    Args:
        given: as they came: texts, numbers and booleans, and in JSON anything else.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self._given = given

    def text(self, name: str) -> str | None:
        """A text, if it is given.

        Raises:
            InvalidOption: it is something else.
        """
        value = self._given.get(name)
        if value is not None and not isinstance(value, str):
            raise InvalidOption(f"the parameter {name} is a text, not {quoted(value)}")
        return value

    def number(self, name: str) -> float | None:
        """A number, if it is given.

        Raises:
            InvalidOption: it is something else.
        """
        value = self._given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
            raise InvalidOption(f"the parameter {name} is a number, not {quoted(value)}")
        return value

    def count(self, name: str) -> int | None:
        """A whole number that is not negative, if it is given.

        Raises:
            InvalidOption: it is something else.
        """
        value = self.number(name)
        if value is None:
            return None
        if value < 0 or value != int(value):
            raise InvalidOption(
                f"the parameter {name} is a whole number from 0 on, not {quoted(value)}"
            )
        return int(value)

    def flag(self, name: str) -> bool | None:
        """A boolean, if it is given.

        Raises:
            InvalidOption: it is something else.
        """
        value = self._given.get(name)
        if value is not None and not isinstance(value, bool):
            raise InvalidOption(f"the parameter {name} is true or false, not {quoted(value)}")
        return value

    @property
    def timeout_s(self) -> float | None:
        """Seconds from the request until its answer is of no use; `timeout` has microseconds.

        0 means that the request names none, as in Triton.

        Raises:
            InvalidOption: it is no such number.
        """
        timeout = self.number("timeout")
        if timeout is not None and timeout < 0:
            raise InvalidOption(
                f"the parameter timeout is in microseconds, from 0 on, not {quoted(timeout)}"
            )
        return min(timeout / _MICROSECONDS, _LONGEST_S) if timeout else None

    @property
    def priority(self) -> Priority:
        """The class of the request: `priority` is 0 or 1, or larger for what may wait.

        As in Triton, 1 is the highest and 0 the default, which here is the highest as well.

        Raises:
            InvalidOption: it is no such number.
        """
        return "low" if (self.count("priority") or 0) > 1 else "high"


def _finite(value: float) -> bool:
    try:
        return isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
