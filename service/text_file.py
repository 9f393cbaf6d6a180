"""Text that is read from disk: labels, model files, annotations."""

import codecs
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from pydantic import ValidationError

# The marks of UTF-32 begin with those of UTF-16.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without the byte order mark that some editors put before it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not text in UTF-8; the message says what it is, without naming the file.
    """
    return parse_text(path.read_bytes())


def parse_text(data: bytes) -> str:
    """The text of the bytes of a file; as in `read_text`.

    Raises:
        ValueError: they are not text in UTF-8.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"the text is in {encoding}, save it as UTF-8")
    if b"\0" in data:
        raise ValueError(
            "holds zero bytes, as text in UTF-16 or a binary file does; expected UTF-8"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        line = data.count(b"\n", 0, fault.start) + 1
        raise ValueError(
            f"line {line} is not in UTF-8 (byte 0x{data[fault.start]:02x}), save the text as UTF-8"
        ) from fault


def first_fault(error: ValidationError, fields: Iterable[str]) -> str:
    """Where the content of a file is wrong, and how; without the value, which may be a secret.

    Args:
        error: of the content.
        fields: names that the file may use, one of which a wrong name may be meant for.
    """
    faults = error.errors(include_url=False, include_input=False)
    # A name that is misspelt is why another one is missing.
    fault = next((one for one in faults if one["type"] == "extra_forbidden"), faults[0])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        near = get_close_matches(str(fault["loc"][-1]), fields, n=1)
        message = "there is no such field" + "".join(f"; did you mean {name}?" for name in near)
    where = ".".join(map(str, fault["loc"]))
    return f"{where}: {message}" if where else message
