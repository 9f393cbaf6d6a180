"""What bodies cost, what forms of them are read, and what is asked before they are."""

import asyncio
import base64
import contextlib
import gzip
import json
import re
import select
import socket
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidImage, InvalidRequest
from service.pb import dat_pb2_grpc
from service.transport.http.form_body import read_form
from service.transport.http.json_body import read_json
from tests.clients import JPEG, channel, encoded, eventually, message, read_http
from tests.server import RunningServer, start_server

MB = 2**20
BASE64 = base64.b64encode(JPEG).decode()
JSON, FORM = "application/json", "multipart/form-data; boundary=b"
PART = 'Content-Disposition: form-data; name="file"; filename="a.jpg"'


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server with a small budget, that pages of one origin may use."""
    with start_server(
        DAT_LIMITS__MAX_BYTES_IN_FLIGHT=64 * MB,
        DAT_SERVER__CORS_ORIGINS='["https://example.com"]',
        DAT_BATCHING__MAX_BATCH=1,
    ) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http_url, timeout=30) as opened:
        yield opened


def post(
    client: httpx.Client, content: bytes, kind: str = JSON, query: str = "", **headers: str
) -> httpx.Response:
    sent = {"content-type": kind} | {k.replace("_", "-"): v for k, v in headers.items()}
    return client.post(f"/v1/classify?{query}", content=content, headers=sent)


def form(*parts: tuple[str, bytes], end: bytes = b"--b--\r\n") -> bytes:
    """A body with the heads and contents of its parts."""
    return b"".join(b"--b\r\n%b\r\n\r\n%b\r\n" % (h.encode(), c) for h, c in parts) + end


# What a body costs.


def fill(unit: bytes, before: bytes = b"", after: bytes = b"") -> bytes:
    return before + unit * (4 * MB // len(unit)) + after


OPTION = b'--b\r\nContent-Disposition: form-data; name="top_k"\r\n\r\n'
FILE = b'--b\r\nContent-Disposition: form-data; name="file"\r\n'
HOSTILE = {
    "numbers for images": (JSON, fill(b"1,", b'{"images":[', b"1]}"), "invalid_request"),
    "empty images": (JSON, fill(b'"",', b'{"images":[', b'""]}'), "too_many_images"),
    "one key": (JSON, fill(b'"k":1,', b"{", b'"k":1}'), "invalid_option"),
    "keys": (
        JSON,
        b"{%b}" % b",".join(b'"k%d":1' % n for n in range(MB // 3)),
        "invalid_option",
    ),
    "a long key": (JSON, fill("\U0001f600".encode(), b'{"', b'":1}'), "invalid_option"),
    "depth": (JSON, fill(b"[", b'{"k":'), "invalid_option"),
    "brackets": (JSON, fill(b"[],", b'{"k":[', b"[]]}"), "invalid_option"),
    "digits": (JSON, fill(b"1", b'{"top_k":', b"}"), "invalid_option"),
    "escaped quotes": (JSON, fill(b'\\"', b'{"image":"', b'"}'), "invalid_image"),
    "backslashes": (JSON, fill(b"\\", b'{"image":"', b'"}'), "invalid_image"),
    "wide characters": (
        JSON,
        fill("\U0001f600".encode(), b'{"image":"', b'"}'),
        "invalid_image",
    ),
    "a string without an end": (JSON, fill(b"A", b'{"image":"'), "invalid_request"),
    "blanks": (JSON, fill(b" ", b"{", b"}"), "no_images"),
    "base64": (JSON, fill(b"AAAA", b'{"image":"', b'"}'), "invalid_image"),
    "parts": (FORM, fill(OPTION + b"1\r\n", after=b"--b--"), "invalid_option"),
    "files": (FORM, fill(FILE + b"\r\n\r\n", after=b"--b--"), "too_many_images"),
    "fields of a head": (FORM, fill(b"a: b\r\n", FILE), "invalid_request"),
    "a long head": (FORM, fill(b"a", FILE), "invalid_request"),
    "a long option": (FORM, fill(b"a", OPTION, b"\r\n--b--"), "invalid_option"),
    "near boundaries": (FORM, fill(b"\r\n--", FILE + b"\r\n", b"\r\n--b--"), "invalid_image"),
    "bytes": ("image/jpeg", fill(b"\xff\xd8"), "invalid_image"),
}


def memory(server: RunningServer, key: str) -> int:
    with open(f"/proc/{server.process.pid}/status") as lines:
        (kilobytes,) = re.findall(rf"{key}:\s+(\d+)", lines.read())
    return int(kilobytes) * 1024


@pytest.mark.parametrize(("kind", "body", "code"), HOSTILE.values(), ids=HOSTILE)
def test_a_body_costs_what_its_size_bounds(server, client, kind, body, code):
    with open(f"/proc/{server.process.pid}/clear_refs", "w") as peaks:
        peaks.write("5")
    before, start = memory(server, "VmRSS"), time.perf_counter()
    answer = read_http(post(client, body, kind))
    assert (answer.error, answer.status) == (code, 400)
    # A parser of everything took 22 s and 1.8 GB for the first of them.
    assert time.perf_counter() - start < 5
    assert memory(server, "VmHWM") - before < 3 * len(body) + 4 * MB


def test_the_options_of_a_body_are_few_faults_in_a_message(client):
    body = {f"k{n}": n for n in range(60)} | {"image": BASE64}
    answer = read_http(post(client, json.dumps(body).encode()))
    assert answer.error == "invalid_option"
    assert answer.message.count("there is no such option") == 4


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("&".join(["top_k=1"] * 1000), "invalid_option"),
        ("&" * 5000 + "a", "invalid_option"),
        (f"top_k={'9' * 5000}", "invalid_option"),
        (f"{'k' * 5000}=1", "invalid_option"),
        (f"explain={'e' * 5000}", "invalid_option"),
        (f"model={'%0A' * 2000}", "unknown_model"),
    ],
    ids=lambda value: value[:20],
)
def test_a_long_query_is_quoted_in_a_few_words(client, query, code):
    answer = read_http(post(client, JPEG, "image/jpeg", query))
    assert answer.error == code
    assert len(answer.message) < 600


def test_a_long_content_type_and_path_are_quoted_in_a_few_words(server, client):
    answer = read_http(post(client, JPEG, "x" * 5000))
    assert (answer.error, len(answer.message) < 600) == ("unsupported_media_type", True)
    missing = client.get("/" + "x" * 5000)
    assert missing.status_code == 404
    assert len(missing.json()["error"]["message"]) < 300
    while len((line := server.wait_for_event("request"))["path"]) < 100:
        pass
    assert len(line["path"]) == 200


# What forms of it are read.


@dataclass(frozen=True)
class Written:
    """A text of base64 and what it says; `None` where it is not base64."""

    text: str
    image: bytes | None


@st.composite
def base64_texts(draw: st.DrawFn) -> Written:
    image = draw(st.binary(max_size=200))
    encode = draw(st.sampled_from([base64.b64encode, base64.urlsafe_b64encode]))
    text = encode(image).decode()
    if draw(st.booleans()):
        text = text.rstrip("=")
    width = draw(st.sampled_from([1, 3, 64, 76, 1000]))
    text = draw(st.sampled_from(["", "\n", "\r\n"])).join(
        text[n : n + width] for n in range(0, len(text), width)
    )
    prefix = draw(
        st.sampled_from(
            ["", "", "data:image/jpeg;base64,", "data:;base64,", "DATA:a/b;c=d;BASE64,"]
        )
    )
    return Written(prefix + text, image)


NOT_BASE64 = [
    "A", "AA=", "AAA==", "AAAA=", "AAAA====", "AA==AA==", "AA AA", "=", "%%%", "AAA\u00e9",
    "\U0001f600", "data:image/jpeg,AAAA", "data:AAAA",
]  # fmt: skip


@given(
    st.lists(
        base64_texts() | st.sampled_from([Written(text, None) for text in NOT_BASE64]), max_size=8
    ),
    st.booleans(),
    st.sampled_from([b"", b"\xef\xbb\xbf", b" \r\n\t"]),
)
@settings(deadline=None)
def test_base64_is_read_as_clients_write_it(written, ascii_only, before):
    body = json.dumps({"images": [w.text for w in written]}, ensure_ascii=ascii_only)
    if before.startswith(b" "):
        body = body.replace("/", "\\/")
    images, options = read_json(before + body.encode(), max_images=8)
    assert options == b"{}"
    for image, expected in zip(images, written, strict=True):
        if expected.image is None:
            assert isinstance(image, InvalidImage)
            assert image.reason == "bad_base64"
        else:
            assert image == expected.image


@pytest.mark.parametrize("escape", ["\\/", "\\u002f", "\\n"])
@pytest.mark.parametrize("shift", range(8))
def test_base64_longer_than_one_look_is_read(escape, shift):
    """Wherever the looks happen to end, within an escape too."""
    text = "A" * shift + f"AAAA{escape}" * 300_000
    text += "A" * (-len(json.loads(f'"{text}"').replace("\n", "")) % 4)
    (image,), _ = read_json(f'{{"image":"{text}"}}'.encode(), 1)
    assert image == base64.b64decode(json.loads(f'"{text}"'))


options_of_any_type = st.dictionaries(
    st.text(max_size=5).filter(lambda name: name not in ("image", "images")),
    st.none() | st.booleans() | st.integers() | st.text(max_size=9)
    | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.text(max_size=4), max_size=4)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
    max_size=6,
)  # fmt: skip


@given(options_of_any_type, st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_options_go_to_the_real_parser_as_they_are(given_options, image_first, indent):
    body = {"image": "AAAA", **given_options} if image_first else {**given_options, "image": "AAAA"}
    images, options = read_json(json.dumps(body, indent=indent).encode(), 1)
    assert images == [b"\0\0\0"]
    assert json.loads(options) == given_options


GOOD_BODIES = [
    b'{"images": ["AAAA", "\\u0041AA="], "top_k": 3, "classes": ["a"], "x": {"y": [1, {}]}}',
    b'\xef\xbb\xbf{"image": null, "explain": "points"}',
]
GOOD_FORM = form(
    (PART, JPEG[:50]), ('Content-Disposition: form-data; name="top_k"', b"3"), end=b"--b--\r\n"
)


@st.composite
def damaged(draw: st.DrawFn, bodies: list[bytes]) -> bytes:
    body = bytearray(draw(st.sampled_from(bodies)))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(body)))
        end = start + draw(st.integers(0, 6))
        body[start:end] = draw(
            st.binary(max_size=4) | st.sampled_from([b'"', b"\\", b"\r\n", b"--"])
        )
    return bytes(body)


def is_json(body: bytes) -> bool:
    try:
        json.loads(body.decode("utf-8-sig"), parse_constant=lambda _: 1 / 0)
    except (ValueError, ZeroDivisionError):
        return False
    return True


@given(damaged(GOOD_BODIES))
@settings(max_examples=300, deadline=None)
def test_a_damaged_json_body_is_refused_in_words(body):
    with contextlib.suppress(InvalidRequest):
        _, options = read_json(body, 4)
        # What is left to the real parser is all that may still be wrong.
        assert is_json(body) or not is_json(options)


@given(damaged([GOOD_FORM]))
@settings(max_examples=300, deadline=None)
def test_a_damaged_form_is_refused_in_words(body):
    with contextlib.suppress(InvalidRequest):
        images, options = read_form(body, b"b", 4)
        assert len(images) + len(options) <= 4


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"top_k": 3, "top_k": 3, "image": "AAAA"}', "invalid_option"),
        (b'{"top_k": 3, "top\\u005fk": 3, "image": "AAAA"}', "invalid_option"),
        (b'{"image": "AAAA", "image": "AAAA"}', "invalid_request"),
        (b'{"topk": 3, "image": "AAAA"}', "invalid_option"),
        (b'{"top_k": "3", "image": "AAAA"}', "invalid_option"),
        (b'{"top_k": true, "image": "AAAA"}', "invalid_option"),
        (b'{"top_k": 1e999, "image": "AAAA"}', "invalid_option"),
        (b'{"top_k": -1%b, "image": "AAAA"}' % (b"0" * 4000), "invalid_option"),
        (b'{"top_k": -1%b, "image": "AAAA"}' % (b"0" * 5000), "invalid_request"),
        (b'{"timeout": NaN, "image": "AAAA"}', "invalid_option"),
        (b'{"timeout": Infinity, "image": "AAAA"}', "invalid_option"),
        (b'{"timeout": 0, "image": "AAAA"}', "invalid_option"),
        (b'{"timeout": "1", "image": "AAAA"}', "invalid_option"),
        (b'{"explain": 1, "image": "AAAA"}', "invalid_option"),
        (b'{"model": ["a"], "image": "AAAA"}', "invalid_option"),
        (b'{"model": "\\ud800", "image": "AAAA"}', "invalid_request"),
        (b'{"image": "AAAA"} x', "invalid_request"),
        (b'{"image": "AAAA",}', "invalid_request"),
        (b'{"image": "AA\nAA"}', "invalid_request"),
        (b'{"image": "AAAA"}\0', "invalid_request"),
        ('{"image": "AAAA"}'.encode("utf-16"), "invalid_request"),
        ('{"image": "AAAA"}'.encode("utf-32-be"), "invalid_request"),
    ],
)
def test_a_faulty_json_body_is_a_bad_request(client, body, code):
    answer = read_http(post(client, body))
    assert (answer.error, answer.status) == (code, 400)


def test_a_byte_order_mark_before_json_is_no_fault(client):
    body = json.dumps({"image": f"data:image/jpeg;base64,{BASE64}"}).encode("utf-8-sig")
    assert read_http(post(client, body)).error is None


@pytest.mark.parametrize(
    "head",
    [
        PART,
        f"{PART}\r\nContent-Type: image/jpeg\r\nContent-Transfer-Encoding: binary",
        'Content-Disposition: form-data; name="file"',
        "Content-Disposition: form-data; name=image",
        'content-disposition: FORM-DATA; NAME="anything"; filename=""',
        "Content-Disposition: form-data; name=\"x\"; filename*=UTF-8''%e2%82%ac.jpg",
        'Content-Disposition: form-data; name="x"; filename="a\\"; name=\\"top_k"',
        'Content-Disposition: form-data; name="x"\r\nContent-Type: image/jpeg',
        'Content-Disposition: form-data; name="x"\r\nContent-Type: application/octet-stream',
    ],
)
def test_an_image_of_a_form_is_known_by_its_name_its_file_name_or_its_type(client, head):
    body = form((head, JPEG), ('Content-Disposition: form-data; name="top_k"', b"2"))
    (result,) = read_http(post(client, body, FORM)).results
    assert len(result.predictions) == 2


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (form((PART, JPEG), end=b""), "invalid_request"),
        (form((PART, JPEG), (PART, JPEG), end=b"--b"), "invalid_request"),
        (form((PART, JPEG), end=b"--b-"), "invalid_request"),
        (form((PART, JPEG))[:-300], "invalid_request"),
        (form((f"{PART}\r\nContent-Transfer-Encoding: base64", b"AAAA")), "invalid_request"),
        (form((f"{PART}\r\nContent-Type: multipart/mixed; boundary=c", b"")), "invalid_request"),
        (form(("Content-Disposition: attachment; filename=a", JPEG)), "invalid_request"),
        (form(('Content-Disposition: form-data; name="top_k"', b"1")), "no_images"),
        (form((PART, JPEG), ('Content-Disposition: form-data; name="a"', b"")), "invalid_option"),
        (form(*[(PART, b"")] * 33), "too_many_images"),
        (
            form((PART, JPEG), *[('Content-Disposition: form-data; name="top_k"', b"1")] * 2),
            "invalid_option",
        ),
        (b"--b--", "no_images"),
    ],
)
def test_a_faulty_form_is_a_bad_request(client, body, code):
    answer = read_http(post(client, body, FORM))
    assert (answer.error, answer.status) == (code, 400)


def test_a_form_may_have_something_before_and_behind_it(client):
    body = b"preamble\r\n" + form((PART, JPEG), end=b"--b-- \r\nepilogue")
    answer = read_http(post(client, body, 'Multipart/Form-Data; charset=utf-8; Boundary="b"'))
    assert answer.error is None


def raw_deflate(content: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return stream.compress(content) + stream.flush()


def members(content: bytes) -> bytes:
    return b"".join(gzip.compress(content[n : n + 5000]) for n in range(0, len(content), 5000))


BODIES = {
    "image/jpeg": JPEG,
    JSON: json.dumps({"image": BASE64}).encode(),
    FORM: form((PART, JPEG)),
}


@pytest.mark.parametrize(
    ("coding", "compress"),
    [
        ("gzip", gzip.compress),
        ("X-GZIP", gzip.compress),
        ("identity, gzip", members),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("identity", bytes),
        ("", bytes),
    ],
)
@pytest.mark.parametrize("kind", BODIES)
def test_compressed_bodies_are_read(client, kind, coding, compress):
    answer = read_http(post(client, compress(BODIES[kind]), kind, content_encoding=coding))
    assert answer.error is None


@pytest.mark.parametrize(
    ("coding", "content", "code"),
    [
        ("gzip", gzip.compress(JPEG)[:-1], "invalid_request"),
        ("gzip", gzip.compress(JPEG) + b"x", "invalid_request"),
        ("gzip", gzip.compress(JPEG) + gzip.compress(JPEG)[:9], "invalid_request"),
        ("gzip", gzip.compress(JPEG)[:-8] + b"\0" * 8, "invalid_request"),
        ("gzip", gzip.compress(b"") * 50_000, "invalid_request"),
        ("gzip", JPEG, "invalid_request"),
        ("gzip", b"", "invalid_request"),
        ("deflate", zlib.compress(JPEG)[:-1], "invalid_request"),
        ("deflate", zlib.compress(JPEG) + b"x", "invalid_request"),
        ("deflate", raw_deflate(JPEG) + b"xyz", "invalid_request"),
        ("deflate", b"x", "invalid_request"),
        ("gzip", gzip.compress(b"\0" * 17 * MB), "image_too_large"),
        ("deflate", raw_deflate(b"\0" * 17 * MB), "image_too_large"),
        ("gzip", gzip.compress(gzip.compress(JPEG)), "invalid_image"),
    ],
)
def test_faulty_compression_is_refused(client, coding, content, code):
    answer = read_http(post(client, content, "image/jpeg", content_encoding=coding))
    assert (answer.error, answer.status) == (code, 413 if code == "image_too_large" else 400)


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "gzip, br", "x" * 5000])
def test_another_coding_is_named_and_those_that_are_read(client, coding):
    response = post(client, JPEG, "image/jpeg", content_encoding=coding)
    answer = read_http(response)
    assert (answer.error, answer.status) == ("unsupported_coding", 415)
    assert coding[:100] in answer.message
    assert response.headers["accept-encoding"] == "gzip, deflate"


# What is asked before it is read.


@contextlib.contextmanager
def begun(server: RunningServer, head: str, body: bytes = b"") -> Iterator[socket.socket]:
    """A request of which some was sent."""
    host, port = server.http_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(f"POST /v1/classify{head}\r\n\r\n".encode() + body)
        yield connection


def answered(connection: socket.socket) -> tuple[int, str]:
    """The status and the head of the answer."""
    with connection.makefile("rb") as answer:
        lines = iter(answer.readline, b"\r\n")
        head = b"".join(lines).decode().lower()
    return int(head.split()[1]), head


def announced(size: int, kind: str = "image/jpeg", query: str = "") -> str:
    return f"{query} HTTP/1.1\r\nHost: a\r\nContent-Type: {kind}\r\nContent-Length: {size}"


CHUNKED = " HTTP/1.1\r\nHost: a\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked"
IN_FLIGHT = "dat_request_bytes_in_flight"


async def test_bytes_in_flight_have_a_budget_that_is_asked_before_a_body_is_read(server, client):
    await eventually(lambda: server.metrics()[IN_FLIGHT] == 0)
    with contextlib.ExitStack() as stack:
        for _ in range(4):  # with enough of it to be in time for a while
            stack.enter_context(begun(server, announced(16 * MB - 1024), b"x" * (8 * MB)))
        await eventually(lambda: server.metrics()[IN_FLIGHT] == 64 * MB - 4096)
        with begun(server, announced(5000)) as refused:
            status, head = answered(refused)
        assert status == 429
        assert "retry-after: 1" in head
        chunk = b"5000\r\n" + b"x" * 0x5000 + b"\r\n"
        with begun(server, CHUNKED, chunk) as refused:
            assert answered(refused)[0] == 429
        content = gzip.compress(b"\0" * MB)
        response = post(client, content, "image/jpeg", content_encoding="gzip")
        assert response.status_code == 429
        assert client.get("/health/ready").status_code == 200
    await eventually(lambda: server.metrics()[IN_FLIGHT] == 0)
    assert read_http(post(client, JPEG, "image/jpeg")).error is None
    # The decoded images of the largest body are beside it, which fills the budget alone.
    body = b'{"image":"%b"}' % (b"AAAA" * (10 * MB))
    assert read_http(post(client, body)).error == "image_too_large"
    assert server.metrics()[IN_FLIGHT] == 0


async def test_late_uploads_give_way_when_bytes_are_short(server, client):
    """Whoever announces much and sends little would shut all others out until his deadline."""
    await eventually(lambda: server.metrics()[IN_FLIGHT] == 0)
    with contextlib.ExitStack() as stack:
        late = [
            stack.enter_context(begun(server, announced(16 * MB, query="?timeout=600")))
            for _ in range(4)
        ]
        await eventually(lambda: server.metrics()[IN_FLIGHT] == 64 * MB)
        await eventually(lambda: post(client, JPEG, "image/jpeg").status_code == 200)
        # One of them was enough.
        readable, _, _ = select.select(late, [], [], 10)
        assert [answered(connection)[0] for connection in readable] == [429]
        assert server.metrics()[IN_FLIGHT] == 48 * MB


@pytest.mark.parametrize(
    ("kind", "query", "code"),
    [
        ("image/jpeg", "?model=resnet", 404),
        ("image/jpeg", "?top_k=x", 400),
        (JSON, "?timeout=0", 400),
        ("text/plain", "", 415),
    ],
)
def test_what_the_head_shows_is_refused_before_the_body_is_read(server, kind, query, code):
    with begun(server, announced(10_000, kind, query)) as connection:
        assert answered(connection)[0] == code


@pytest.mark.parametrize("timeout", ["0.3", "0.000001"])
def test_an_upload_that_stalls_is_answered_at_its_deadline(server, timeout):
    start = time.perf_counter()
    with begun(server, announced(10_000, query=f"?timeout={timeout}"), b"x" * 100) as connection:
        assert answered(connection)[0] == 504
    assert float(timeout) < time.perf_counter() - start < 10


def test_the_time_of_the_upload_counts_for_the_deadline_in_the_body(server):
    body = json.dumps({"image": BASE64, "timeout": 0.2}).encode()
    with begun(server, announced(len(body), JSON), body[:100]) as connection:
        time.sleep(0.3)
        connection.sendall(body[100:])
        assert answered(connection)[0] == 504


async def test_a_full_queue_refuses_before_a_body_is_read(slow_server):
    server = slow_server.server

    def ask(kind):
        with begun(server, announced(10_000, kind)) as connection:
            return answered(connection)

    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        with slow_server.fault("wait"):
            crowd = [stub.Classify(message([JPEG]))]
            # Until it is on the device it has one of the eight places itself.
            await eventually(lambda: server.metrics()["dat_requests_running,model=dat_nano"] == 1)
            crowd += [stub.Classify(message([JPEG])) for _ in range(31)]
            await eventually(lambda: server.metrics()["dat_requests_waiting,model=dat_nano"] == 8)
            for kind in ("image/jpeg", JSON, FORM):
                status, head = await asyncio.to_thread(ask, kind)
                assert status == 429
                assert "retry-after" in head
                assert "access-control" not in head  # closed unless it is set
        await asyncio.gather(*(call.code() for call in crowd))


# What its answer has.


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/health/live"),
        ("GET", "/nothing"),
        ("PUT", "/v1/classify"),
        ("POST", "/v1/classify"),
    ],
)
def test_every_answer_has_the_headers_of_an_interface(client, method, path):
    headers = client.request(method, path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["x-request-id"]
    assert "access-control-allow-origin" not in headers


def test_pages_of_the_origins_that_are_set_may_use_the_interface(client):
    for origin, allowed in (("https://example.com", True), ("https://example.org", False)):
        asked = {"origin": origin, "access-control-request-method": "POST"}
        asked["access-control-request-headers"] = "content-type,x-request-id"
        preflight = client.options("/v1/classify", headers=asked)
        answer = post(client, b"", "image/jpeg", origin=origin)
        assert preflight.is_success == allowed
        for headers in (preflight.headers, answer.headers):
            assert (headers.get("access-control-allow-origin") == origin) == allowed
    exposed = post(client, JPEG, "image/jpeg", origin="https://example.com").headers
    for name in ("x-request-id", "server-timing", "retry-after"):
        assert name in exposed["access-control-expose-headers"]


def test_the_images_of_a_form_are_answered_in_order(client):
    images = [encoded(index=n, size=(100 + n, 120)) for n in range(3)]
    body = form(*((PART, image) for image in images))
    results = read_http(post(client, body, FORM)).results
    assert [result.size for result in results] == [(120, 100), (120, 101), (120, 102)]
