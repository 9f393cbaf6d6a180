"""The id that a request carries through headers, answers and logs."""

import re
from random import Random

HEADER = "x-request-id"  # in HTTP headers and gRPC metadata
# Seeded by the system once. To ask it for each id gives the interpreter up, and on a busy server
# that takes longer to come back than all else that is done for the id.
_random = Random()  # noqa: S311
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")


def choose(given: str) -> str:
    """The caller's own id where it is printable ASCII of at most 128 characters, or a new one."""
    return given if _USABLE.fullmatch(given) else f"{_random.getrandbits(128):032x}"
