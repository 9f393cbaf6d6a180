import json

import pytest
import torch
from safetensors import safe_open

from model import load_model
from model.checkpoint import sha256
from service.served_model import load
from service.settings import Model
from tests.clients import JPEG, over_http
from tests.conftest import official_state
from tests.server import start_server
from tests.service.commands import run


@pytest.fixture(scope="module")
def converted(tiny_checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "tiny.safetensors"
    ended = run("convert", "--checkpoint", tiny_checkpoint, "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert "dat_tiny_224" in ended.stdout
    return out


def test_a_converted_file_says_what_it_is_and_where_from(converted, tiny_checkpoint):
    with safe_open(converted, framework="pt") as file:
        assert file.metadata() == {
            "variant": "dat_tiny_224",
            "image_size": "[224, 224]",
            "table_size": "224",
            "window": "7",
            "classes": "1000",
            "source": tiny_checkpoint.name,
            "source_sha256": sha256(tiny_checkpoint),
        }


def test_a_converted_file_is_the_same_model(converted, tiny_checkpoint):
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, outputs = (load_model(path)(images) for path in (tiny_checkpoint, converted))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


async def test_a_converted_file_is_served_without_further_settings(converted):
    with start_server(DAT_MODEL__CHECKPOINT=converted) as server:
        answer = await over_http(server, [JPEG])
    assert answer.model == "dat_tiny_224"
    assert len(answer.results[0].predictions) == 5


def test_sizes_and_labels_are_kept(tmp_path):
    names = [f"kind {n}" for n in range(3)]
    weights, labels, out = (tmp_path / name for name in ("w.pth", "l.txt", "o.safetensors"))
    torch.save(official_state("dat_nano", num_classes=3), weights)
    labels.write_text("\n".join(names))
    ended = run(
        "convert", "--checkpoint", weights, "--out", out, "--labels", labels, "--image-size", 96
    )
    assert ended.returncode == 0, ended.stderr
    served = load(Model(checkpoint=out))
    assert [label.name for label in served.labels] == names
    assert served.network.config.image_size == (96, 96)


def test_a_resized_dat_keeps_its_window_and_interpolated_tables(tmp_path, tiny_checkpoint):
    out = tmp_path / "at_384.safetensors"
    ended = run("convert", "--checkpoint", tiny_checkpoint, "--out", out, "--image-size", 384)
    assert ended.returncode == 0, ended.stderr
    own, official = load_model(out), load_model(tiny_checkpoint, image_size=(384, 384))
    assert own.config == official.config
    for name, value in official.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("out", "options", "message"),
    [
        ("o.pth", (), "o.pth: the file to write must end in .safetensors"),
        ("missing/o.safetensors", (), "o.safetensors: cannot be written"),
        ("o.safetensors", ("--variant", "dat_tiny_224"), "not a checkpoint of dat_tiny_224"),
        ("o.safetensors", ("--variant", "resnet"), "no variant 'resnet'"),
        ("o.safetensors", ("--image-size", "7"), "at least 33 pixels"),
        ("o.safetensors", ("--labels", __file__), "test_convert.py: line"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_nothing_written(tmp_path, out, options, message):
    weights = tmp_path / "w.pth"
    torch.save(official_state("dat_nano"), weights)
    ended = run("convert", "--checkpoint", weights, "--out", tmp_path / out, *options)
    assert ended.returncode == 1
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert list(tmp_path.iterdir()) == [weights]


def test_the_classes_of_the_demo_model_survive_a_conversion(tmp_path):
    demo = load(Model())
    out = tmp_path / "demo.safetensors"
    assert run("convert", "--checkpoint", demo.source, "--out", out).returncode == 0
    assert load(Model(checkpoint=out)).labels == demo.labels
    with safe_open(out, framework="pt") as file:
        assert len(json.loads(file.metadata()["labels"])) == 12
