"""What may the head of a request say, and how large may it be?"""

from collections.abc import Sequence
from ipaddress import AddressValueError, IPv6Address
from re import compile as pattern

from service.errors import HeadersTooLarge, InvalidRequest, UrlTooLong

MAX_URL_BYTES = 8 * 1024
MAX_HEADER_BYTES = 16 * 1024  # a name and its value; tokens of single sign-on take 8 KiB
MAX_HEADERS_BYTES = 64 * 1024
MAX_HEADERS = 100

_HOST = pattern(rb"[A-Za-z0-9._~!$&'()*+,;=%-]*(:[0-9]{0,5})?")
_IPV6_HOST = pattern(rb"\[([0-9A-Fa-f:.]+)\](:[0-9]{0,5})?")

Header = tuple[bytes, bytes]  # a name in lower case and its value


def check_head(url: bytes, version: str, headers: Sequence[Header]) -> None:
    """Check a whole head.

    Raises:
        UrlTooLong: the URL has too many bytes.
        HeadersTooLarge: too many bytes, or too many headers.
        InvalidRequest: another version of HTTP, or a head that two readers could understand in two
            ways.
    """
    _check_sizes(url, headers)
    if version not in ("1.1", "1.0"):
        raise InvalidRequest(f"this server does not speak HTTP/{version}; send HTTP/1.1")
    total, hosts = 0, []
    for name, value in headers:
        size = len(name) + len(value)
        total += size
        if size > MAX_HEADER_BYTES:
            raise HeadersTooLarge(f"a header has more than {MAX_HEADER_BYTES} bytes")
        if name == b"host":
            hosts.append(value)
        elif name == b"transfer-encoding" and (value.lower() != b"chunked" or version == "1.0"):
            raise InvalidRequest(
                "the only transfer coding that this server reads is chunked, in HTTP/1.1"
            )
    if total > MAX_HEADERS_BYTES:
        raise _too_many_header_bytes()
    if len(hosts) != 1 and (hosts or version == "1.1"):
        raise InvalidRequest(f"a request needs one Host header; this one has {len(hosts)}")
    if hosts and not _is_host(hosts[0]):
        raise InvalidRequest("the Host header must be a host, or a host and a port")


def check_growing_head(url: bytes, headers: Sequence[Header], size: int) -> None:
    """Check a head before its end.

    Args:
        url: what has come of it.
        headers: that are whole.
        size: bytes that have come of the head, at least.

    Raises:
        UrlTooLong: already now.
        HeadersTooLarge: already now.
    """
    _check_sizes(url, headers)
    if size > MAX_URL_BYTES + MAX_HEADERS_BYTES:
        raise _too_many_header_bytes()


def _check_sizes(url: bytes, headers: Sequence[Header]) -> None:
    if len(url) > MAX_URL_BYTES:
        raise UrlTooLong(f"the URL has more than {MAX_URL_BYTES} bytes")
    if len(headers) > MAX_HEADERS:
        raise HeadersTooLarge(f"the request has more than {MAX_HEADERS} headers")


def _too_many_header_bytes() -> HeadersTooLarge:
    return HeadersTooLarge(f"the headers have more than {MAX_HEADERS_BYTES} bytes")


def _is_host(value: bytes) -> bool:
    if _HOST.fullmatch(value):
        return True
    literal = _IPV6_HOST.fullmatch(value)
    if literal is None:
        return False
    try:
        IPv6Address(literal[1].decode())
    except AddressValueError:
        return False
    return True
