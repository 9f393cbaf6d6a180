"""What groups of settings have in common: a base, how lists are written, and bounds."""

import re

from pydantic import AfterValidator, BaseModel
from pydantic_core import from_json

DAY_S = 86_400  # the longest time of a setting; timers cannot hold any time
MOST_THREADS = 512
LARGEST_SIDE = 4096  # of an image that a model is given, pixels


class Group(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Settings that belong together."""


def form(pattern: str, meant: str) -> AfterValidator:
    """The form of a text, as a regular expression, and in words for those who got it wrong."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"must be {meant}")
        return text

    return AfterValidator(check)


def written_list(value: object) -> object:
    """The list that a variable holds: `1, 2` and `[1, 2]` are the same; a number stays one."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        try:
            return from_json(value)
        except ValueError as fault:
            raise ValueError(f"a list is written as in [1, 2]: {fault}") from fault
    return value.split(",") if "," in value else value


def one_or_more(value: object) -> object:
    """The same, where one value alone is a list of one."""
    listed = written_list(value)
    return [listed] if isinstance(listed, str) else listed
