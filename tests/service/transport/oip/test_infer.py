"""What the Open Inference Protocol answers, over both wires and in both shapes of the server."""

import base64
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from model import VARIANTS
from model.transforms import MEAN, STD, Preprocessing, to_model_pixels
from service.pb import inference_pb2, inference_pb2_grpc
from tests.clients import encoded
from tests.server import RunningServer, start_server
from tests.service.transport.oip.asking import (
    INFER,
    MODEL,
    Answer,
    files,
    in_binary,
    message,
    over_rest,
    over_rpc,
    parameters,
    pixels,
    post,
    read_http,
    read_rpc,
    tensor,
)

DETECTOR = "mask_rcnn_dat_nano"
SIZE = (96, 130)
PNG = [encoded("PNG", index, SIZE) for index in range(3)]
ARRAYS = np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in PNG])


@pytest.fixture(scope="module", params=["one", "many"])
def shaped(request, server) -> Iterator[RunningServer]:
    """One process, and front ends without torch before a worker."""
    if request.param == "one":
        yield server
        return
    with start_server(DAT_SERVER__FRONT_ENDS=1, DAT_ENGINE__THREADS=1) as running:
        yield running


def predictions(server: RunningServer, image: bytes, path: str = "classify") -> dict[str, Any]:
    """What our own interface says of an image."""
    url = f"{server.http_url}/v1/{path}"
    (result,) = httpx.post(url, content=image, params={"top_k": 12}).json()["results"]
    return dict(result)


def every_way(server: RunningServer, sent, typed: bool = True) -> list[Answer]:
    ways = [
        over_rest(server, [sent]),
        over_rest(server, [sent], binary=False),
        over_rpc(server, message([sent])),
    ]
    return [*ways, over_rpc(server, message([sent], typed=True))] if typed else ways


def test_files_and_pixels_get_the_answers_of_our_own_interface(shaped):
    expected = np.zeros((3, 12))
    for row, png in zip(expected, PNG, strict=True):
        for found in predictions(shaped, png)["predictions"]:
            row[found["index"]] = found["score"]
    for sent in (files(PNG), pixels(ARRAYS)):
        for answer in every_way(shaped, sent):
            assert answer.error is None
            np.testing.assert_allclose(answer.outputs["probabilities"], expected, atol=1e-5)
            logits = np.exp(answer.outputs["logits"].astype(float))
            softmax = logits / logits.sum(1, keepdims=True)
            np.testing.assert_allclose(softmax, expected, atol=1e-5)
            assert answer.datatypes == {
                "logits": "FP32",
                "probabilities": "FP32",
                "labels": "BYTES",
            }
            best = [row[0].split(b":") for row in answer.outputs["labels"]]
            assert [int(index) for _, index, _ in best] == expected.argmax(1).tolist()
            assert answer.outputs["labels"].shape == (3, 5)


def test_normalised_values_are_the_input_of_the_network(shaped):
    """They are those of the image after it was resized; others of a size are refused."""
    preprocessing = Preprocessing.of(VARIANTS[MODEL])
    resized = np.stack([to_model_pixels(Image.fromarray(one), preprocessing) for one in ARRAYS])
    values = (resized / 255 - MEAN) / STD
    sent = tensor("normalised", "FP32", values.transpose(0, 3, 1, 2))
    same = over_rest(shaped, [pixels(ARRAYS)]).outputs["probabilities"]
    for answer in (over_rest(shaped, [sent]), over_rpc(shaped, message([sent]))):
        np.testing.assert_allclose(answer.outputs["probabilities"], same, atol=1e-5)
    small = tensor("normalised", "FP32", np.zeros((1, 3, 96, 96)))
    for answer in (over_rest(shaped, [small]), over_rpc(shaped, message([small]))):
        assert answer.status in (400, "INVALID_ARGUMENT")
        assert "has the shape [1, 3, 96, 96]; expected [-1, 3, 128, 128]" in answer.error
    for strange, words in (
        (resized[:1].transpose(0, 3, 1, 2) * 1.0, "they stand for pixels from"),
        (np.full((1, 3, 128, 128), np.nan), "expected 0 to 255"),
        (np.full((1, 3, 128, 128), np.inf), "expected 0 to 255"),
    ):
        answer = over_rest(shaped, [tensor("normalised", "FP32", strange)])
        assert answer.status == 400
        assert words in answer.error


def test_a_detector_fills_up_to_the_most_objects(shaped):
    path = f"/v2/models/{DETECTOR}/infer"
    asked = {"score_threshold": 0.05, "max_detections": 20}
    answers = [
        over_rest(shaped, [files(PNG)], path=path, parameters=asked),
        over_rest(shaped, [pixels(ARRAYS)], path=path, parameters=asked, binary=False),
        over_rpc(shaped, message([files(PNG)], DETECTOR, parameters=parameters(**asked))),
    ]
    url, query = f"{shaped.http_url}/v1/detect", {**asked, "model": DETECTOR}
    alone = [httpx.post(url, content=png, params=query).json()["results"][0] for png in PNG]
    for answer in answers:
        assert answer.error is None
        outputs = answer.outputs
        count, most = outputs["count"], int(outputs["count"].max())
        assert outputs["boxes"].shape == (3, most, 4)
        for index, result in enumerate(alone):
            found = result["detections"]
            assert count[index] == len(found)
            boxes = np.array([one["box"] for one in found]).reshape(-1, 4)
            np.testing.assert_allclose(outputs["boxes"][index, : len(found)], boxes, atol=0.1)
            assert outputs["classes"][index].tolist() == [one["index"] for one in found] + [-1] * (
                most - len(found)
            )
            names = [one["label"].encode() for one in found]
            assert outputs["labels"][index].tolist() == names + [b""] * (most - len(found))
            for one, text in zip(found, outputs["masks"][index], strict=False):
                area = coco.area(json.loads(text))
                assert area == pytest.approx(coco.area(one["mask"]["rle"]), abs=3)
    only = over_rest(shaped, [files(PNG[:1])], path=path, outputs=[{"name": "count"}])
    assert list(only.outputs) == ["count"]


def test_outputs_are_those_that_are_named_in_their_order_and_form(shaped):
    outputs = [
        {"name": "probabilities", "parameters": {"classification": 3}},
        {"name": "labels", "parameters": {"binary_data": False}},
        {"name": "logits", "parameters": {"classification": 100, "binary_data": True}},
    ]
    answer = over_rest(shaped, [files(PNG)], outputs=outputs, parameters={"top_k": 2})
    assert list(answer.outputs) == ["probabilities", "labels", "logits"]
    assert answer.outputs["labels"].shape == (3, 2)
    assert answer.outputs["probabilities"].shape == (3, 3)
    assert answer.outputs["logits"].shape == (3, 12)
    assert set(answer.datatypes.values()) == {"BYTES"}
    assert ["data" in one for one in answer.body["outputs"]] == [False, True, False]
    ranked = answer.outputs["probabilities"]
    assert (ranked[:, :2] == answer.outputs["labels"]).all()
    score, index, label = ranked[0, 0].decode().split(":")
    best = predictions(shaped, PNG[0])["predictions"][0]
    assert (int(index), label) == (best["index"], best["label"])
    assert float(score) == pytest.approx(best["score"], abs=1e-5)
    request = message([files(PNG)])
    request.outputs.add(name="probabilities", parameters=parameters(classification=3))
    also_ranked = over_rpc(shaped, request).outputs["probabilities"]
    for one, other in zip(also_ranked.flat, ranked.flat, strict=True):
        # An image of another batch differs by rounding.
        score, found = one.split(b":", 1)
        expected_score, expected = other.split(b":", 1)
        assert found == expected
        assert float(score) == pytest.approx(float(expected_score), abs=1e-5)


def test_an_id_comes_back_and_is_made_where_there_is_none(shaped):
    assert over_rest(shaped, [files(PNG[:1])], id="mine").id == "mine"
    assert over_rpc(shaped, message([files(PNG[:1])], id="mine")).id == "mine"
    none = over_rest(shaped, [files(PNG[:1])], id="")
    assert none.id == none.headers["x-request-id"]
    assert len(over_rpc(shaped, message([files(PNG[:1])])).id) == 32


def test_what_is_not_known_is_passed_over(shaped):
    """Clients send parameters and keys that others know."""
    strange = {"sequence_id": 7, "triton_x": True, "list": [1], "binary_data_output": False}
    answer = over_rest(shaped, [files(PNG[:1])], parameters=strange, model_name="x", extra=None)
    assert answer.error is None
    sent = parameters(triton_enable_empty_final_response=True, sequence_end=False, x=1.5)
    assert over_rpc(shaped, message([files(PNG[:1])], parameters=sent)).error is None


def test_the_raw_body_is_one_image(shaped):
    answer = read_http(post(shaped, PNG[0], {"Inference-Header-Content-Length": "0"}))
    alone = over_rest(shaped, [files(PNG[:1])])
    np.testing.assert_allclose(answer.outputs["logits"], alone.outputs["logits"], atol=1e-4)
    assert all("data" not in one for one in answer.body["outputs"])
    bad = read_http(post(shaped, b"no image", {"Inference-Header-Content-Length": "0"}))
    assert (bad.status, bad.error) == (400, "the bytes are not a JPEG, PNG or WebP image")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_request_counts_its_json_uncompressed(server, coding):
    squeeze = {"gzip": gzip.compress, "deflate": zlib.compress}[coding]
    sent = pixels(ARRAYS)
    head = json.dumps({"inputs": [in_binary(sent)]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Encoding": coding}
    answer = read_http(post(server, squeeze(head + sent.raw), headers))
    assert answer.outputs["probabilities"].shape == (3, 12)
    strange = post(server, b"x", {"Content-Encoding": "br"})
    assert strange.status_code == 415
    assert strange.headers["accept-encoding"] == "gzip, deflate"
    assert "does not read the content coding" in strange.json()["error"]


def test_one_bad_image_fails_the_request_with_its_sentence(shaped):
    sent = files([PNG[0], b"no image", PNG[1]])
    sentence = "the bytes are not a JPEG, PNG or WebP image"
    for answer in every_way(shaped, sent):
        assert answer.status in (400, "INVALID_ARGUMENT")
        assert answer.error == sentence
    text = {"name": "image", "datatype": "BYTES", "shape": [1], "data": ["no base64!"]}
    answer = read_http(post(shaped, json.dumps({"inputs": [text]}).encode(), {}))
    assert (answer.status, answer.error[:31]) == (400, "the image is not base64: it has")


def test_where_a_model_looked(shaped):
    named = [{"name": "points.3.1"}, {"name": "attention.3.1.weights"}, {"name": "labels"}]
    two = over_rest(shaped, [pixels(ARRAYS[:2])], outputs=named, parameters={"top_n": 3})
    assert [value.shape for value in two.outputs.values()] == [(2, 2, 4, 4, 2), (2, 1, 3), (2, 5)]
    query = {"explain": "attention", "layers": "3.1", "top_n": 3}
    url = f"{shaped.http_url}/v1/classify"
    (alone,) = httpx.post(url, content=PNG[1], params=query).json()["results"]
    points = next(one for one in alone["points"] if (one["stage"], one["block"]) == (3, 1))
    located = two.outputs["points.3.1"][1]
    np.testing.assert_allclose(located, points["sampling_locations"], atol=0.02)
    keys = alone["attention"][0]["queries"][0]["keys"]
    weights = [key["weight"] for key in keys]
    np.testing.assert_allclose(two.outputs["attention.3.1.weights"][1, 0], weights, atol=1e-4)
    asked = parameters(explain="points")
    every = over_rpc(shaped, message([files(PNG[:1])], parameters=asked))
    assert {"logits", "labels", "points.2.0", "reference_points.3.1"} <= every.outputs.keys()
    for refused, words in (
        ({"outputs": [{"name": "points.9.9"}]}, "has no output 'points.9.9'"),
        ({"outputs": [{"name": "attention.3.1"}]}, "has no output 'attention.3.1'"),
        ({"parameters": {"explain": "all"}}, "explain is one of none, points, attention"),
        ({"parameters": {"top_n": 3}}, "are for explain=attention"),
        ({"parameters": {"explain": "attention", "queries": "9999,1"}}, "lies outside"),
        ({"parameters": {"top_k": 1.5}}, "top_k is a whole number"),
        ({"parameters": {"top_k": "2"}}, "top_k is a number"),
        ({"parameters": {"timeout": -1}}, "timeout is in microseconds"),
        ({"parameters": {"priority": True}}, "priority is a number"),
        ({"parameters": {"binary_data_output": 1}}, "binary_data_output is true or false"),
        ({"outputs": [{"name": "labels"}, {"name": "labels"}]}, "is asked for twice"),
        ({"outputs": [{"name": "labels", "parameters": {"classification": 1}}]}, "no classes to"),
    ):
        answer = over_rest(shaped, [files(PNG[:1])], **refused)
        assert (answer.status, words in (answer.error or "")) == (400, True), answer


def test_a_large_tensor_in_json_is_answered_with_a_word_of_a_better_way(server):
    assert "warning" not in over_rest(server, [pixels(ARRAYS)]).headers
    assert "warning" not in over_rest(server, [files(PNG)], binary=False).headers
    warned = over_rest(server, [pixels(ARRAYS)], binary=False).headers["warning"]
    assert warned.startswith("299 ")
    assert "binary tensor data extension" in warned


def test_what_is_said_of_the_server_and_of_models(shaped):
    def get(path: str) -> httpx.Response:
        return httpx.get(f"{shaped.http_url}{path}")

    server = get("/v2").json()
    assert {"binary_tensor_data", "classification"} <= set(server["extensions"])
    assert get("/v2/health/live").json() == {"live": True}
    assert get("/v2/health/ready").json() == {"live": True, "ready": True}
    for path in (f"/v2/models/{MODEL}", f"/v2/models/{MODEL}/versions/1"):
        assert get(f"{path}/ready").json() == {"name": MODEL, "ready": True}
        model = get(path).json()
        assert (model["name"], model["versions"]) == (MODEL, ["1"])
        assert [one["name"] for one in model["inputs"]] == ["image", "pixels", "normalised"]
        assert [one["shape"] for one in model["outputs"]] == [[-1, 12], [-1, 12], [-1, -1]]
    versioned = post(shaped, PNG[0], {"Inference-Header-Content-Length": "0"},
                     f"/v2/models/{MODEL}/versions/1/infer")  # fmt: skip
    assert versioned.status_code == 200
    with grpc.insecure_channel(shaped.grpc_target) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert stub.ServerLive(inference_pb2.ServerLiveRequest()).live
        assert stub.ServerReady(inference_pb2.ServerReadyRequest()).ready
        asked = inference_pb2.ModelReadyRequest(name=MODEL, version="1")
        assert stub.ModelReady(asked).ready
        said = stub.ServerMetadata(inference_pb2.ServerMetadataRequest())
        assert [said.name, said.version, list(said.extensions)] == list(server.values())
        said = stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name=MODEL))
        for kind in ("inputs", "outputs"):
            tensors = [
                {"name": one.name, "datatype": one.datatype, "shape": list(one.shape)}
                for one in getattr(said, kind)
            ]
            assert tensors == model[kind]
        assert dict(said.properties) == model["properties"]
        with pytest.raises(grpc.RpcError) as failure:
            stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name=MODEL, version="2"))
        assert failure.value.code() == grpc.StatusCode.NOT_FOUND
        assert "has no version '2'; there is '1'" in failure.value.details()


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/v2/nothing", 404, None),
        ("GET", "/v2/", 404, None),
        ("GET", "/v2/models/x", 404, None),
        ("GET", "/v2/models/x/ready", 404, None),
        ("POST", "/v2/models/x/infer", 404, None),
        ("POST", f"/v2/models/{MODEL}/versions/2/infer", 404, None),
        ("GET", INFER, 405, "POST"),
        ("PUT", INFER, 405, "POST"),
        ("POST", "/v2", 405, "GET"),
        ("DELETE", f"/v2/models/{MODEL}", 405, "GET"),
        ("POST", "/v2/health/ready", 405, "GET"),
    ],
)
def test_errors_have_the_form_of_the_protocol(server, method, path, status, allow):
    answer = httpx.request(method, f"{server.http_url}{path}", content=b"{}" * (method == "POST"))
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert isinstance(answer.json()["error"], str)
    assert answer.headers.get("allow") == allow
    assert answer.headers["x-request-id"]


def test_requests_are_counted_as_those_of_the_task(server):
    def counted() -> Any:
        return sum(
            value
            for name, value in server.metrics().items()
            if name.startswith(f"dat_requests_total,model={MODEL}")
            and "outcome=ok" in name
            and "task=classify" in name
        )

    before = counted()
    answer = over_rest(server, [files(PNG)])
    assert answer.headers["server-timing"].startswith("decode;dur=")
    over_rpc(server, message([files(PNG)]))
    assert counted() == before + 2


def test_a_stream_answers_every_request_by_its_id(shaped):
    unknown = message([files(PNG[:1])], "nobody", id="b")
    bad = message([files([b"no image"])], id="c")
    with grpc.insecure_channel(shaped.grpc_target) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        sent = [message([files(PNG[:1])], id="a"), unknown, bad, message([pixels(ARRAYS)], id="d")]
        answers = {
            one.infer_response.id: one for one in stub.ModelStreamInfer(iter(sent), timeout=60)
        }
    assert sorted(answers) == ["a", "b", "c", "d"]
    assert "no model 'nobody' is served here" in answers["b"].error_message
    assert answers["c"].error_message == "the bytes are not a JPEG, PNG or WebP image"
    assert not answers["d"].error_message
    assert read_rpc(answers["d"].infer_response).outputs["logits"].shape == (3, 12)


def test_json_carries_the_files_as_base64_in_any_form(server):
    text = base64.urlsafe_b64encode(PNG[0]).decode().rstrip("=")
    for written in (text, "data:image/png;base64," + base64.b64encode(PNG[0]).decode()):
        one = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [[written]]}
        answer = read_http(post(server, json.dumps({"inputs": [one]}).encode(), {}))
        assert answer.error is None
