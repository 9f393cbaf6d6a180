"""The files of the pages, by the paths at which they are served.

The pages are plain HTML, CSS and ES modules in `page/`, which no build step touches; but for one
that `python -m deploy.attention_page` makes of `docs/attention.md`. Swagger UI comes with the
package `fastapi-offline`, pictures to try with the demo.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

_PAGE = Path(__file__).parent / "page"
_DEMO = Path(__file__).parent.parent.parent / "demo"
_SWAGGER_UI = ("swagger-ui-bundle.js", "swagger-ui.css")
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".jpg": "image/jpeg",
    ".png": "image/png",
    ".json": "application/json",
}
# Nothing from another host, nothing inline, and in no frame.
_CLOSED = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_PLAYGROUND_POLICY = f"{_CLOSED}; require-trusted-types-for 'script'"
_DOCS_POLICY = _CLOSED  # Swagger UI writes text that it has cleaned as HTML


@dataclass(frozen=True)
class Sample:
    """A picture to try.

    Attributes:
        name: what it shows.
        tasks: of the models that know such pictures.
        file: from which it is read.
    """

    name: str
    tasks: tuple[str, ...]
    file: Path

    @property
    def path(self) -> str:
        """Where it is served."""
        return f"/playground/samples/{self.file.name}"


SAMPLES = (
    *(
        Sample(name, ("classify",), _DEMO / "samples" / f"{name}.jpg")
        for name in ("star", "heart", "flower")
    ),
    *(
        Sample(name, ("detect", "segment"), _DEMO / "detection" / "samples" / f"{file}.jpg")
        for name, file in (("many shapes", "many"), ("few shapes", "few"))
    ),
)


@dataclass(frozen=True)
class File:
    """A file as it is served.

    Attributes:
        content: its bytes.
        etag: names the content.
        headers: of its answers, names in lower case.
    """

    content: bytes
    etag: str
    headers: tuple[tuple[bytes, bytes], ...]

    @classmethod
    def of(cls, path: str, content: bytes) -> "File":
        """What is served at a path."""
        etag = f'"{sha256(content).hexdigest()[:32]}"'
        suffix = Path(path).suffix or ".html"
        policy = _DOCS_POLICY if path.startswith("/docs") else _PLAYGROUND_POLICY
        headers = {
            "content-type": _MEDIA_TYPES[suffix],
            "etag": etag,
            # A browser asks each time whether it still has the newest, which costs a 304.
            "cache-control": "no-cache",
            "content-security-policy": policy,
            "cross-origin-opener-policy": "same-origin",
            "permissions-policy": "camera=(self), geolocation=(), microphone=()",
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }
        return cls(content, etag, tuple((n.encode(), v.encode()) for n, v in headers.items()))


def load() -> dict[str, File]:
    """All files of the pages, by path."""
    return {path: File.of(path, content) for path, content in _contents()}


def _contents() -> Iterator[tuple[str, bytes]]:
    for path in sorted(_PAGE.rglob("*.*")):
        yield _served_at(path.relative_to(_PAGE)), path.read_bytes()
    swagger_ui = files("fastapi_offline") / "static"
    for name in _SWAGGER_UI:
        yield f"/docs/{name}", (swagger_ui / name).read_bytes()
    for sample in SAMPLES:
        yield sample.path, sample.file.read_bytes()


def _served_at(path: Path) -> str:
    """The path of a file of `page/`; the pages themselves have short ones."""
    pages = {
        "index.html": "/",
        "docs/index.html": "/docs",
        "docs/attention.html": "/docs/attention",
    }
    written = path.as_posix()
    return pages.get(written) or (
        f"/{written}" if written.startswith("docs/") else f"/playground/{written}"
    )
