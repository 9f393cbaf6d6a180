"""The log."""

from typing import Literal

from pydantic import Field

from service.settings.group import Group


class Log(Group):
    """Log lines on standard output."""

    format: Literal["console", "json"] = Field(
        "console", description="`console` for people, `json` for machines."
    )
    level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severity that is logged."
    )
