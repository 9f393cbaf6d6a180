"""The id that a request carries through headers, answers and logs."""

import re
from uuid import uuid4

HEADER = "x-request-id"  # in HTTP headers and gRPC metadata
_USABLE = re.compile(r"[\x21-\x7e]{1,128}")


def choose(given: str) -> str:
    """The caller's own id where it is printable ASCII of at most 128 characters, or a new one."""
    return given if _USABLE.fullmatch(given) else uuid4().hex
