"""The pages as a browser fetches them: what they are made of, and who may have them."""

import re
from collections.abc import Iterator
from urllib.parse import urljoin

import grpc
import httpx
import pytest

from service.pb import inference_pb2, inference_pb2_grpc
from service.security.keys import add_key
from tests.faults import SHAPES
from tests.server import RunningServer, start_server

PAGES = ("/", "/docs", "/docs/attention")
LIMIT = 123_456
PIXELS = 3_000_000
POLICY = {
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' blob: data:",
    "connect-src 'self'", "form-action 'none'", "base-uri 'none'", "frame-ancestors 'none'",
}  # fmt: skip
# What a page names of other files: in HTML, and in modules.
NAMED = re.compile(r'(?:src|href)="([^"#]+)"|(?:from|import) "(\./[^"]+)"')
# What people may follow, which a page does not fetch.
PAPERS = re.compile(r'<a href="https://arxiv\.org/')
MEDIA_TYPES = {
    "css": "text/css",
    "js": "text/javascript",
    "svg": "image/svg+xml",
    "png": "image/png",
}


@pytest.fixture(scope="module", params=SHAPES)
def shown(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server that asks for keys."""
    keys = tmp_path_factory.mktemp("keys") / "keys.toml"
    add_key(keys, "somebody")
    with start_server(
        ("service",),
        DAT_MODEL__NAME="dat_nano",
        DAT_SECURITY__API_KEYS=keys,
        DAT_LIMITS__MAX_IMAGE_BYTES=LIMIT,
        DAT_LIMITS__MAX_PIXELS=PIXELS,
        DAT_BATCHING__MAX_BATCH=1,
        **SHAPES[request.param],
    ) as running:
        yield running


@pytest.fixture(scope="module")
def off() -> Iterator[RunningServer]:
    """A server without pages."""
    with start_server(
        DAT_MODEL__NAME="dat_nano",
        DAT_BATCHING__MAX_BATCH=1,
        DAT_SERVER__PLAYGROUND="false",
        DAT_SERVER__OPEN_INFERENCE="false",
    ) as running:
        yield running


@pytest.fixture
def client(shown: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shown.http_url) as client:
        yield client


def reached(client: httpx.Client) -> dict[str, httpx.Response]:
    """All that the pages name, and what that names, by path."""
    found: dict[str, httpx.Response] = {}
    left = list(PAGES)
    while left:
        path = left.pop()
        if path in found:
            continue
        found[path] = client.get(path)
        if "swagger-ui" in path or found[path].headers["content-type"].startswith("image"):
            continue
        named = NAMED.finditer(PAPERS.sub("<a ", found[path].text))
        left.extend(urljoin(path, one[1] or one[2]) for one in named)
    return found


def test_all_that_the_pages_name_is_there_for_anybody(client):
    found = reached(client)
    assert {"/playground/main.js", "/playground/drawing.js", "/docs/docs.js"} <= found.keys()
    for path, answer in found.items():
        assert answer.status_code == 200, path
        kind = MEDIA_TYPES.get(path.rpartition(".")[2], "text/html")
        assert answer.headers["content-type"].startswith(kind), path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-request-id"]


def test_no_page_takes_anything_from_elsewhere_or_runs_what_stands_in_it(client):
    for path, answer in reached(client).items():
        policies = answer.headers.get_list("content-security-policy")
        assert len(policies) == 1, path
        assert set(policies[0].split("; ")) >= POLICY, path
        if "swagger-ui" in path:
            continue
        text = PAPERS.sub("", answer.text)
        for namespace in ("2000/svg", "1998/Math/MathML"):
            text = text.replace(f"http://www.w3.org/{namespace}", "")
        assert not re.search(r"https?://", text), path
        if answer.headers["content-type"].startswith("text/html"):
            assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", text), path
            assert all("src=" in tag for tag in re.findall(r"<script[^>]*>", text)), path
    policy = client.get("/").headers["content-security-policy"]
    assert "require-trusted-types-for 'script'" in policy


@pytest.mark.parametrize("path", [*PAGES, "/playground/main.js", "/docs/swagger-ui-bundle.js"])
def test_what_a_browser_has_is_not_sent_again(client, path):
    first = client.get(path)
    tag = first.headers["etag"]
    assert first.headers["cache-control"] == "no-cache"
    for shown in (tag, f'"other", W/{tag}'):
        again = client.get(path, headers={"if-none-match": shown})
        assert (again.status_code, again.content) == (304, b"")
        assert again.headers["etag"] == tag
    assert client.get(path, headers={"if-none-match": '"other"'}).content == first.content
    head = client.head(path)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", tag)
    assert head.headers["content-length"] == first.headers["content-length"]


def test_what_the_pages_ask_for_needs_a_key_as_ever(client):
    assert client.get("/?a=b").status_code == 200
    for path in ("/v1/models", "/openapi.json", "/playground", "/docs/", "/playground/x.js"):
        assert client.get(path).status_code == 401, path
    for path in PAGES:
        assert client.post(path).status_code == 401


def test_the_page_knows_what_the_server_takes_and_what_to_try(client, shown):
    facts = client.get("/playground/server.json").json()
    assert facts["limits"] == {"image_bytes": LIMIT, "pixels": PIXELS, "timeout_s": 30}
    assert shown.grpc_target.endswith(f":{facts['grpc_port']}")
    known = {task for sample in facts["samples"] for task in sample["tasks"]}
    assert known == {"classify", "detect", "segment"}
    for sample in facts["samples"]:
        picture = client.get(urljoin("/", sample["path"]))
        assert picture.headers["content-type"] == "image/jpeg"
        assert picture.content.startswith(b"\xff\xd8")


@pytest.mark.parametrize("path", [*PAGES, "/playground/main.js", "/playground/server.json"])
def test_pages_that_are_switched_off_are_not_there(off, path):
    answer = httpx.get(off.http_url + path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"
    assert answer.headers["cache-control"] == "no-store"
    assert httpx.get(f"{off.http_url}/openapi.json").status_code == 200


@pytest.mark.parametrize("path", ["/playground/..%2ffiles.py", "/docs/index.html", "/playground/"])
def test_nothing_else_is_served(server, path):
    assert httpx.get(server.http_url + path).status_code == 404


def test_the_open_inference_protocol_is_not_there_where_it_is_switched_off(off):
    infer = "/v2/models/dat_nano/infer"
    answers = [httpx.get(f"{off.http_url}/v2"), httpx.post(f"{off.http_url}{infer}")]
    assert [answer.status_code for answer in answers] == [404, 404]
    assert "/v2" not in httpx.get(f"{off.http_url}/openapi.json").text
    with grpc.insecure_channel(off.grpc_target) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        with pytest.raises(grpc.RpcError) as failure:
            stub.ServerLive(inference_pb2.ServerLiveRequest())
    assert failure.value.code() == grpc.StatusCode.UNIMPLEMENTED
