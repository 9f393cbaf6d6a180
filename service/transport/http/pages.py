"""Serves the pages that people see: the playground at `/`, the interface's at `/docs`.

Whoever asks may have them, because they hold nothing of the models: what they ask for needs a key
as that of any other client does.
"""

from json import dumps

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.playground.files import SAMPLES, File, load
from service.settings.limits import Limits

FACTS = "/playground/server.json"
_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp")


class Pages:
    """The pages, and what they have to know of this server before they ask for anything.

    Args:
        limits: of a request, so that a page says before an upload that it is too large.
    """

    def __init__(self, limits: Limits) -> None:
        self._files = load()
        self._limits = limits
        self.tell(grpc_port=0)

    def tell(self, *, grpc_port: int) -> None:
        """Tell the pages at which port gRPC listens, for the commands that they show."""
        limits = self._limits
        facts = {
            "limits": {
                "image_bytes": limits.max_image_bytes,
                "pixels": limits.max_pixels,
                "timeout_s": limits.default_timeout_s,
            },
            "types": _IMAGE_TYPES,
            "grpc_port": grpc_port,
            "samples": [
                # Beside the page, whatever a proxy has before its path.
                {"name": sample.name, "tasks": sample.tasks, "path": sample.path.removeprefix("/")}
                for sample in SAMPLES
            ],
        }
        self._files[FACTS] = File.of(FACTS, dumps(facts).encode())

    @property
    def paths(self) -> frozenset[bytes]:
        """Where pages and their files are."""
        return frozenset(path.encode() for path in self._files)

    def before(self, app: ASGIApp) -> ASGIApp:
        """The application that answers for the pages, and leaves all else to another one."""

        async def serve(scope: Scope, receive: Receive, send: Send) -> None:
            is_get = scope["type"] == "http" and scope["method"] == "GET"
            file = self._files.get(scope["path"]) if is_get else None
            if file is None:
                await app(scope, receive, send)
                return
            # In place of those of all other answers.
            scope["state"]["headers"] = file.headers
            response = Response(status_code=304) if _is_known(file, scope) else _whole(file)
            await response(scope, receive, send)

        return serve


def _is_known(file: File, scope: Scope) -> bool:
    """Whether the caller has the content already."""
    tags = Headers(scope=scope).get("if-none-match", "").split(",")
    return file.etag in (tag.strip().removeprefix("W/") for tag in tags)


def _whole(file: File) -> Response:
    return Response(file.content)
