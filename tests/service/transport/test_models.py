"""A server with several models: both transports, metrics, and one device for all."""

import asyncio

import httpx
import pytest

from service.pb import dat_pb2, dat_pb2_grpc
from tests.clients import JPEG, TRANSPORTS, channel
from tests.server import start_server

MODELS = """
default = "shapes"

[[models]]
name = "tiny"
checkpoint = "{tiny}"
version = "2022"
max_batch = 2

[[models]]
name = "shapes"

variant = "dat_nano"
version = "5"

[[models]]
name = "wide"
variant = "dat_nano"
image_size = [96, 160]
dtype = "bfloat16"
max_batch = 1
"""


@pytest.fixture(scope="module")
def server(tiny_checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "models.toml"
    path.write_text(MODELS.format(tiny=tiny_checkpoint))
    with start_server(DAT_MODEL__FILE=path) as running:
        yield running


@pytest.mark.parametrize("classify", TRANSPORTS)
async def test_a_request_picks_its_model_by_name(server, classify):
    chosen = {None: "shapes", "tiny": "tiny", "shapes": "shapes", "wide": "wide"}
    answers = await asyncio.gather(
        *(classify(server, [JPEG], **({"model": name} if name else {})) for name in chosen)
    )
    for answer, name in zip(answers, chosen.values(), strict=True):
        assert answer.error is None
        version = {"tiny": "2022", "shapes": "5", "wide": "1"}[name]
        assert (answer.model, answer.version) == (name, version)
    shapes, tiny, _, wide = (answer.results[0] for answer in answers)
    assert tiny.predictions[0][0] != shapes.predictions[0][0]
    assert {label for label, *_ in wide.predictions} <= {
        "arrow", "circle", "crescent", "cross", "droplet", "flower", "heart", "hexagon", "ring",
        "square", "star", "triangle",
    }  # fmt: skip


@pytest.mark.parametrize("classify", TRANSPORTS)
async def test_an_unknown_model_is_refused_with_the_names_there_are(server, classify):
    answer = await classify(server, [JPEG], model="resnet")
    assert answer.error == "unknown_model"
    assert "'tiny', 'shapes', 'wide'" in answer.message


@pytest.mark.parametrize("classify", TRANSPORTS)
async def test_points_are_those_of_the_model_that_answered(server, classify):
    wide, tiny = [
        (await classify(server, [JPEG], model=name, explain="points")).results[0].layers
        for name in ("wide", "tiny")
    ]
    assert [layer.sampling_locations.shape[:3] for layer in tiny] == [(3, 14, 14)] * 3 + [(6, 7, 7)]
    assert {layer.sampling_locations.shape[1:3] for layer in wide} == {(3, 5)}


async def test_both_transports_describe_the_models(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        listed = (await client.get("/v1/models")).json()["models"]
        tiny = (await client.get("/v1/models/tiny")).json()
        unknown = await client.get("/v1/models/resnet")
    assert listed[0] == {
        "name": "tiny", "version": "2022", "default": False, "task": "classify",
        "variant": "dat_tiny_224", "image_size": {"width": 224, "height": 224}, "classes": 1000,
        "parameters": 28319138, "flops": listed[0]["flops"], "device": "cpu", "dtype": "float32",
        "max_batch": 2, "explained_layers": ["2.1", "2.3", "2.5", "3.1"],
    }  # fmt: skip
    assert abs(listed[0]["flops"] / 1e9 - 4.589) < 0.001
    assert [(model["name"], model["default"], model["dtype"]) for model in listed] == [
        ("tiny", False, "float32"), ("shapes", True, "float32"), ("wide", False, "bfloat16"),
    ]  # fmt: skip
    assert listed[2]["image_size"] == {"width": 160, "height": 96}
    labels = tiny.pop("labels")
    assert tiny == listed[0]
    assert labels[0] == {"index": 0, "label": "tench, Tinca tinca", "wnid": "n01440764"}
    assert len(labels) == 1000
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "unknown_model"

    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ModelServiceStub(open_channel)
        over_grpc = await stub.ListModels(dat_pb2.ListModelsRequest())
        default = await stub.GetModel(dat_pb2.GetModelRequest())
        named = await stub.GetModel(dat_pb2.GetModelRequest(name="tiny"))
    for ours, theirs in zip(over_grpc.models, listed, strict=True):
        size = theirs.pop("image_size")
        assert (ours.width, ours.height) == (size["width"], size["height"])
        layers = [f"{layer.stage}.{layer.block}" for layer in ours.explained_layers]
        assert layers == theirs.pop("explained_layers")
        assert all(getattr(ours, field) == value for field, value in theirs.items())
    assert default.model.name == "shapes"
    assert [label.name for label in default.labels][:2] == ["arrow", "circle"]
    assert named.labels[0].wnid == "n01440764"


async def test_predictions_of_imagenet_carry_their_wordnet_id(server):
    async with httpx.AsyncClient(base_url=server.http_url) as client:
        answers = [
            (await client.post(f"/v1/classify?model={name}", content=JPEG)).json()
            for name in ("tiny", "shapes")
        ]
    tiny, shapes = (answer["results"][0]["predictions"][0] for answer in answers)
    assert tiny["wnid"].startswith("n")
    assert "wnid" not in shapes
    async with channel(server) as open_channel:
        stub = dat_pb2_grpc.ClassifierServiceStub(open_channel)
        request = dat_pb2.ClassifyRequest(images=[JPEG], model="tiny")
        answer = (await stub.Classify(request)).results[0].classification.predictions[0]
    assert (answer.wnid, answer.label) == (tiny["wnid"], tiny["label"])


async def test_each_model_has_its_own_series_and_requests_without_one_are_counted(server):
    classify = TRANSPORTS[0]
    before = server.metrics()
    await asyncio.gather(
        *(classify(server, [JPEG], model="tiny") for _ in range(3)),
        classify(server, [JPEG]),
        classify(server, [JPEG], model="resnet"),
    )
    after = server.metrics()

    def change(name):
        return after[name] - before[name]

    def requests(model, outcome):
        labels = f"model={model},outcome={outcome},protocol=http,task=classify"
        return change(f"dat_requests_total,{labels}")

    assert [requests(name, "ok") for name in ("tiny", "shapes", "wide")] == [3, 1, 0]
    assert requests("_unknown", "client_error") == 1
    assert change("dat_images_total,model=tiny,task=classify") == 3
    assert change("dat_batch_images_total,kind=real,model=shapes") == 1
    assert all(after[f"dat_model_ready,model={name}"] == 1 for name in ("tiny", "shapes", "wide"))


@pytest.mark.slow
async def test_models_take_turns_on_the_device(server):
    """A model with a long queue does not hold up the others until it is empty."""
    classify = TRANSPORTS[0]
    async with asyncio.TaskGroup() as tasks:
        crowd = [tasks.create_task(classify(server, [JPEG] * 16, model="tiny")) for _ in range(6)]
        while server.metrics()["dat_requests_waiting,model=tiny"] < 40:
            await asyncio.sleep(0.01)
        alone = await classify(server, [JPEG], model="shapes")
        assert alone.error is None
        assert not all(task.done() for task in crowd)
