"""tritonclient, unmodified, against a running server: each wire with and without asyncio."""

import base64
import json
from typing import Any

import numpy as np
import pytest

from model.transforms import MEAN, STD
from tests.foreign.client import ForeignClient, Refused
from tests.foreign.conftest import Ours
from tests.foreign.tensors import (
    DETECTOR,
    GRPC,
    HTTP,
    INPUT,
    KINDS,
    MODEL,
    WHOLE,
    image,
    pixels,
    probabilities,
    small_pixels,
)
from tests.server import ROOT


@pytest.mark.parametrize("kind", KINDS)
def test_health(triton: ForeignClient, kind: str) -> None:
    assert triton.call("ask", kind, "is_server_live") is True
    assert triton.call("ask", kind, "is_server_ready") is True
    assert triton.call("ask", kind, "is_model_ready", MODEL) is True
    assert triton.call("ask", kind, "is_model_ready", MODEL, "1") is True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name_and_version", [("no_such_model", ""), (MODEL, "2")])
def test_a_model_that_is_not_there_is_not_ready(
    triton: ForeignClient, kind: str, name_and_version: tuple[str, str]
) -> None:
    if kind in HTTP:
        assert triton.call("ask", kind, "is_model_ready", *name_and_version) is False
    else:
        with pytest.raises(Refused, match="NOT_FOUND"):
            triton.call("ask", kind, "is_model_ready", *name_and_version)


@pytest.mark.parametrize("kind", KINDS)
def test_metadata(triton: ForeignClient, kind: str) -> None:
    server = triton.call("ask", kind, "get_server_metadata")
    assert server["name"] == "dat-serve"
    assert {"binary_tensor_data", "classification", "parameters"} <= set(server["extensions"])
    model = triton.call("ask", kind, "get_model_metadata", MODEL)
    assert (model["name"], model["versions"]) == (MODEL, ["1"])
    tensors = {
        one["name"]: (one["datatype"], [int(size) for size in one["shape"]])
        for one in (*model["inputs"], *model["outputs"])
    }
    assert tensors == {
        "image": ("BYTES", [-1, 1]),
        "pixels": ("UINT8", [-1, -1, -1, 3]),
        "normalised": ("FP32", [-1, 3, INPUT, INPUT]),
        "logits": ("FP32", [-1, 12]),
        "probabilities": ("FP32", [-1, 12]),
        "labels": ("BYTES", [-1, -1]),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_answered_as_over_our_own_interface(
    triton: ForeignClient, ours: Ours, kind: str
) -> None:
    answer = triton.call("infer", kind, MODEL, [image(*ours.jpegs)], request_id="mine")
    assert answer["response"]["id"] == "mine"
    assert answer["response"]["model_name"] == MODEL
    np.testing.assert_allclose(probabilities(answer), ours.probabilities, atol=1e-6)
    best = [row[0].split(b":")[2].decode() for row in answer["outputs"]["labels"]]
    assert best == ours.labels
    logits = np.exp(answer["outputs"]["logits"].astype(np.float64))
    np.testing.assert_allclose(
        logits / logits.sum(axis=1, keepdims=True), ours.probabilities, atol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_answered_as_their_file(triton: ForeignClient, ours: Ours, kind: str) -> None:
    for array, expected in zip(ours.pixels, ours.probabilities, strict=True):
        answer = triton.call("infer", kind, MODEL, [pixels(array[None])])
        np.testing.assert_allclose(probabilities(answer)[0], expected, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_normalised_pixels_are_answered_as_pixels(triton: ForeignClient, kind: str) -> None:
    array, edge = small_pixels(2), (WHOLE - INPUT) // 2
    read = array[:, edge : edge + INPUT, edge : edge + INPUT]
    scaled = (read / np.float32(255) - np.array(MEAN)) / np.array(STD)
    planes = np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)
    as_pixels = triton.call("infer", kind, MODEL, [pixels(array)])
    normalised = triton.call("infer", kind, MODEL, [{"name": "normalised", "array": planes}])
    np.testing.assert_allclose(probabilities(normalised), probabilities(as_pixels), atol=1e-6)


@pytest.mark.parametrize("kind", HTTP)
@pytest.mark.parametrize("binary_outputs", [True, False])
def test_tensors_in_json(
    triton: ForeignClient, ours: Ours, kind: str, *, binary_outputs: bool
) -> None:
    encoded = [base64.b64encode(jpeg) for jpeg in ours.jpegs]
    wanted = [{"name": name, "binary": binary_outputs} for name in ("probabilities", "labels")]
    answer = triton.call("infer", kind, MODEL, [image(*encoded, binary=False)], wanted)
    np.testing.assert_allclose(probabilities(answer), ours.probabilities, atol=1e-6)
    assert all(("data" in one) is not binary_outputs for one in answer["response"]["outputs"])
    array = small_pixels()
    as_json = triton.call("infer", kind, MODEL, [pixels(array, binary=False)], wanted)
    as_bytes = triton.call("infer", kind, MODEL, [pixels(array)], wanted)
    np.testing.assert_allclose(probabilities(as_json), probabilities(as_bytes), atol=1e-6)


@pytest.mark.parametrize("kind", HTTP)
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_both_ways_over_http(
    triton: ForeignClient, ours: Ours, kind: str, algorithm: str
) -> None:
    options = {
        "request_compression_algorithm": algorithm,
        "response_compression_algorithm": algorithm,
    }
    for given in (image(*ours.jpegs), image(*map(base64.b64encode, ours.jpegs), binary=False)):
        answer = triton.call("infer", kind, MODEL, [given], **options)
        np.testing.assert_allclose(probabilities(answer), ours.probabilities, atol=1e-6)


@pytest.mark.parametrize("kind", GRPC)
@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compressed_over_grpc(triton: ForeignClient, ours: Ours, kind: str, algorithm: str) -> None:
    given = [image(*ours.jpegs)]
    answer = triton.call("infer", kind, MODEL, given, compression_algorithm=algorithm)
    np.testing.assert_allclose(probabilities(answer), ours.probabilities, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("output", ["probabilities", "logits"])
def test_classification(triton: ForeignClient, ours: Ours, kind: str, output: str) -> None:
    wanted = [{"name": output, "classes": 3}]
    answer = triton.call("infer", kind, MODEL, [image(*ours.jpegs)], wanted)
    ranked = answer["outputs"][output]
    assert ranked.shape == (3, 3)
    for row, expected, label in zip(ranked, ours.probabilities, ours.labels, strict=True):
        told = [one.decode().split(":") for one in row]
        assert [int(index) for _, index, _ in told] == np.argsort(-expected)[:3].tolist()
        assert told[0][2] == label
        if output == "probabilities":
            scores = [float(score) for score, _, _ in told]
            np.testing.assert_allclose(scores, np.sort(expected)[::-1][:3], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_said_beside_the_tensors(triton: ForeignClient, ours: Ours, kind: str) -> None:
    """Parameters that are ours, that are the protocol's, and that nobody here knows."""
    answer = triton.call(
        "infer",
        kind,
        MODEL,
        [image(ours.jpegs[0])],
        priority=1,
        timeout=30_000_000,
        model_version="1",
        headers={"x-nobody": "knows"},
        parameters={"top_k": 2, "something_else": "unknown"},
    )
    assert answer["outputs"]["labels"].shape == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_is_wrong_is_told_why(triton: ForeignClient, kind: str) -> None:
    wrong = [{"name": "pixels", "array": np.zeros((1, 4, 4, 2), np.uint8)}]
    with pytest.raises(Refused, match=r"expected \[-1, -1, -1, 3\]") as refused:
        triton.call("infer", kind, MODEL, wrong)
    assert refused.value.kind == "InferenceServerException"
    assert ("[400]" if kind in HTTP else "INVALID_ARGUMENT") in refused.value.text
    with pytest.raises(Refused, match="no_such_model"):
        triton.call("infer", kind, "no_such_model", [image(b"jpeg")])
    with pytest.raises(Refused, match="no output"):
        triton.call("infer", kind, MODEL, [image(b"jpeg")], [{"name": "no_such_output"}])
    with pytest.raises(Refused, match="image"):
        triton.call("infer", kind, MODEL, [image(b"this is no image")])


@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_requests_side_by_side(triton: ForeignClient, ours: Ours, kind: str) -> None:
    requests = [[image(jpeg)] for jpeg in ours.jpegs * 4]
    answers = triton.call("infer_many", kind, MODEL, requests)
    found = np.concatenate([probabilities(answer) for answer in answers])
    np.testing.assert_allclose(found, np.tile(ours.probabilities, (4, 1)), atol=1e-6)


@pytest.mark.parametrize("kind", GRPC)
def test_a_stream(triton: ForeignClient, ours: Ours, kind: str) -> None:
    """The second request fails alone, and answers say whose they are."""
    sent = [ours.jpegs[0], b"this is no image", ours.jpegs[2]]
    answers = triton.call("stream", kind, MODEL, [[image(jpeg)] for jpeg in sent])
    (failure,) = [answer for answer in answers if isinstance(answer, str)]
    assert "image" in failure
    found = {one["response"]["id"]: one for one in answers if not isinstance(one, str)}
    assert set(found) == {"0", "2"}
    for index in (0, 2):
        expected = ours.probabilities[index : index + 1]
        np.testing.assert_allclose(probabilities(found[f"{index}"]), expected, atol=1e-6)


def config_of(triton: ForeignClient, kind: str) -> dict[str, Any]:
    answer = triton.call("ask", kind, "get_model_config", MODEL)
    config: dict[str, Any] = answer["config"] if kind in GRPC else answer
    return config


@pytest.mark.parametrize("kind", KINDS)
def test_config(triton: ForeignClient, kind: str) -> None:
    config = config_of(triton, kind)
    assert config["name"] == MODEL
    assert int(config["max_batch_size"]) >= 1
    assert [(one["name"], one["optional"]) for one in config["input"]] == [
        ("image", True),
        ("pixels", True),
        ("normalised", True),
    ]
    assert "dynamic_batching" in config


def counts(triton: ForeignClient, kind: str) -> tuple[int, int, int]:
    """Requests that were answered, images, and passes."""
    answer = triton.call("ask", kind, "get_inference_statistics", MODEL)
    (found,) = answer["model_stats"]
    success = found["inference_stats"]["success"]
    return int(success["count"]), int(found["inference_count"]), int(found["execution_count"])


@pytest.mark.parametrize("kind", KINDS)
def test_statistics(triton: ForeignClient, ours: Ours, kind: str) -> None:
    requests, images, passes = counts(triton, kind)
    triton.call("infer", kind, MODEL, [image(*ours.jpegs)])
    with pytest.raises(Refused):
        triton.call("infer", kind, MODEL, [image(b"this is no image")])
    requests_then, images_then, passes_then = counts(triton, kind)
    assert (requests_then - requests, images_then - images) == (1, 3)
    assert 1 <= passes_then - passes <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector(triton: ForeignClient, kind: str) -> None:
    """Boxes, classes and masks of as many objects as our own interface finds."""
    with open(ROOT / "demo" / "detection" / "samples" / "few.jpg", "rb") as file:
        jpeg = file.read()
    names = ("count", "boxes", "scores", "classes", "labels", "masks")
    wanted = [{"name": name} for name in names]
    options = {"parameters": {"score_threshold": 0.5}}
    answer = triton.call("infer", kind, DETECTOR, [image(jpeg)], wanted, **options)
    found = answer["outputs"]
    (count,) = found["count"]
    assert count > 0
    assert found["boxes"].shape == (1, count, 4)
    assert (found["scores"] >= 0.5).all()
    assert [one.decode() for one in found["labels"][0]]
    assert all(json.loads(one)["counts"] for one in found["masks"][0])
