"""Two classes of requests: those somebody waits for, and those that can wait."""

from typing import Literal

Priority = Literal["high", "low"]

_KEPT = 4  # one part in so many of whatever is bounded is for the upper class alone


def fits(wanted: int, priority: Priority, *, held: int, held_low: int, limit: int) -> bool:
    """Whether a request may take so much more of something that is bounded.

    The lower class leaves a quarter to the upper one, so that however many of it come, the upper
    one is not refused for them. What it has is its own: a crowd of the upper class does not shut
    it out. While nothing at all is held a request within the limit is always taken.

    Args:
        wanted: by the request.
        priority: of the request.
        held: by both classes.
        held_low: by the lower class.
        limit: of both together.
    """
    if held + wanted > limit:
        return False
    return priority == "high" or not held or held_low + wanted <= limit - -(-limit // _KEPT)
