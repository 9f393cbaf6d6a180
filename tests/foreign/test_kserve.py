"""KServe's clients, unmodified; their environment takes a minute to make."""

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.foreign.client import ForeignClient, Refused, foreign_client
from tests.foreign.conftest import Ours
from tests.foreign.tensors import MODEL, files, probabilities, small_pixels
from tests.server import RunningServer

pytestmark = pytest.mark.slow

KINDS = ("http", "grpc")


@pytest.fixture(scope="module")
def kserve(server: RunningServer) -> Iterator[ForeignClient]:
    addresses = server.http_url, server.grpc_target
    with foreign_client("kserve", "kserve_calls", *addresses) as client:
        yield client


def image(*jpegs: bytes, **more: Any) -> dict[str, Any]:
    shape = [len(jpegs), 1]
    return {"name": "image", "shape": shape, "datatype": "BYTES", "array": files(*jpegs), **more}


@pytest.mark.parametrize("kind", KINDS)
def test_health(kserve: ForeignClient, kind: str) -> None:
    assert kserve.call("ask", kind, "is_server_live") is True
    assert kserve.call("ask", kind, "is_server_ready") is True
    assert kserve.call("ask", kind, "is_model_ready", MODEL) is True


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_not_there(kserve: ForeignClient, kind: str) -> None:
    if kind == "http":
        assert kserve.call("ask", kind, "is_model_ready", "no_such_model") is False
    else:
        with pytest.raises(Refused, match="NOT_FOUND"):
            kserve.call("ask", kind, "is_model_ready", "no_such_model")
    with pytest.raises(Refused, match="no_such_model"):
        kserve.call("infer", kind, "no_such_model", [image(b"jpeg")])


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_answered_as_over_our_own_interface(
    kserve: ForeignClient, ours: Ours, kind: str
) -> None:
    answer = kserve.call("infer", kind, MODEL, [image(*ours.jpegs)], request_id="mine")
    assert (answer["id"], answer["model"]) == ("mine", MODEL)
    np.testing.assert_allclose(probabilities(answer), ours.probabilities, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_and_outputs_that_are_asked_for(kserve: ForeignClient, kind: str) -> None:
    array = small_pixels()
    given = {"name": "pixels", "shape": list(array.shape), "datatype": "UINT8", "array": array}
    wanted = [{"name": "probabilities", "parameters": {"binary_data": True}}]
    both = [
        kserve.call("infer", kind, MODEL, [given | {"binary": binary}], wanted)
        for binary in (True, False)
    ]
    assert [list(answer["outputs"]) for answer in both] == [["probabilities"]] * 2
    found = [probabilities(answer) for answer in both]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)


def test_a_file_in_json(kserve: ForeignClient, ours: Ours) -> None:
    encoded = [base64.b64encode(jpeg) for jpeg in ours.jpegs]
    answer = kserve.call("infer", "http", MODEL, [image(*encoded, binary=False)])
    np.testing.assert_allclose(probabilities(answer), ours.probabilities, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_is_wrong_is_told_why(kserve: ForeignClient, kind: str) -> None:
    with pytest.raises(Refused, match="no_such_input") as refused:
        kserve.call("infer", kind, MODEL, [image(b"jpeg") | {"name": "no_such_input"}])
    assert ("400" if kind == "http" else "INVALID_ARGUMENT") in refused.value.text
