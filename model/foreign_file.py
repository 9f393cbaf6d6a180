"""What lies in a file that was given as a checkpoint and cannot be read as one.

It is looked at, and nothing in it is executed.
"""

import contextlib
import io
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Container, Iterator
from pathlib import Path

_HEAD_BYTES = 1024
_SHOWN = 8  # names of classes or of members of an archive
# The pickle of a checkpoint, without its tensors, takes some 100 kB.
_LONGEST_PICKLE = 2**24

_TAR_AT, _TAR = 257, b"ustar"
_BINARY = {
    b"\x1f\x8b": "a gzip archive: unpack it",
    b"BZh": "a bzip2 archive: unpack it",
    b"\xfd7zXZ\0": "an xz archive: unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"Rar!": "a RAR archive: unpack it",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
    b"(dp": "a pickle of protocol 0, which torch.save does not write",
}
_TEXT = {
    b"version https://git-lfs": "a Git-LFS pointer, not the weights: `git lfs pull` fetches them",
    b"<!doctype html": "an HTML page, not what was to be downloaded",
    b"<html": "an HTML page, not what was to be downloaded",
    b"<": "an XML or HTML document",
    b"{": "JSON",
    b"[": "JSON",
}


def kind(path: Path) -> str | None:
    """What a file is, with an article; `None` where it is in the format that its name says."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    own_format = path.suffix == ".safetensors"
    if _is_safetensors(head):
        return None if own_format else "a safetensors file: its name must end in .safetensors"
    if _is_pickle(head) or (head.startswith(b"PK") and _holds_pickle(path)):
        return "a pickle of torch: its name must end in .pth" if own_format else None
    if head.startswith(b"PK"):
        return _archive(path)
    return _signed(head) or _text(head) or f"in no format known here: it begins with {head[:8]!r}"


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header in JSON."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _is_pickle(head: bytes) -> bool:
    """Whether a file begins with the number of a pickle protocol."""
    return head[:1] == b"\x80" and head[1:2] in (b"\2", b"\3", b"\4", b"\5")


def _members(path: Path) -> list[str] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return None


def _holds_pickle(path: Path) -> bool:
    """Whether an archive is one of `torch.save`; those of TorchScript hold pickles too."""
    within = {name.partition("/")[2] for name in _members(path) or ()}
    return "data.pkl" in within and "constants.pkl" not in within


def _archive(path: Path) -> str:
    members = _members(path)
    if members is None:
        return "a ZIP archive that is cut off or damaged"
    if any(name.endswith("/constants.pkl") for name in members):
        return "a TorchScript archive: save the state dict of its module instead"
    held = listed([repr(name) for name in members]) or "nothing"
    return f"a ZIP archive that torch.save did not write: it holds {held}"


def _signed(head: bytes) -> str | None:
    if not head:
        return "an empty file"
    if head.startswith(_TAR, _TAR_AT):
        return "a tar archive: unpack it"
    return next((name for start, name in _BINARY.items() if head.startswith(start)), None)


def _text(head: bytes) -> str | None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16"
    # What was read may end within a character.
    text = head.decode("utf-8-sig", "ignore" if len(head) == _HEAD_BYTES else "replace").strip()
    if not text or "\ufffd" in text or not all(c.isprintable() or c.isspace() for c in text):
        return None
    begin = text.lower().encode()
    found = next((name for start, name in _TEXT.items() if begin.startswith(start)), "text")
    return f"{found}: it begins with {text[:40]!r}" if found in ("JSON", "text") else found


def refused_names(path: Path, allowed: Container[str]) -> list[str]:
    """The full names of classes and functions that a pickle asks for and that are not allowed.

    The file is one of `torch.save`, a ZIP archive or not, or any other pickle. It is looked at,
    opcode by opcode, and never loaded.
    """
    names = dict.fromkeys(name for data in _pickles(path) for name in _names(data))
    return [name for name in names if name not in allowed]


def listed(names: list[str]) -> str:
    """Some names, and how many there are more."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _pickles(path: Path) -> Iterator[io.BytesIO]:
    if zipfile.is_zipfile(path):
        # A damaged archive raises anything, and has no pickle to look at.
        with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
            (name,) = (one for one in archive.namelist() if one.endswith("/data.pkl"))
            with archive.open(name) as file:
                yield io.BytesIO(file.read(_LONGEST_PICKLE))
        return
    with path.open("rb") as file:
        data = io.BytesIO(file.read(_LONGEST_PICKLE))
    # torch wrote several pickles, one behind the other, before 1.6: three heads, then the object.
    for _ in range(4):
        yield data


_STRINGS = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_GETS, _PUTS = {"GET", "BINGET", "LONG_BINGET"}, {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}


def _names(data: io.BytesIO) -> Iterator[str]:
    """Every name that a pickle looks up, up to its end or to where it is damaged."""
    memo: dict[object, str] = {}
    pushed: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _STRINGS:
                pushed.append(str(argument))
            elif opcode.name in _GETS:
                pushed.append(memo.get(argument, ""))
            elif opcode.name in _PUTS:
                key = len(memo) if opcode.name == "MEMOIZE" else argument
                memo[key] = pushed[-1] if pushed else ""
            elif opcode.name == "STACK_GLOBAL":
                yield _full_name(*pushed[-2:])
            elif opcode.name in ("GLOBAL", "INST"):
                yield _full_name(*str(argument).split(" ", 1))
    except ValueError:
        return


def _full_name(module: str = "", name: str = "") -> str:
    """The name in Python 3: torch writes pickles in which some names are those of Python 2."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"
