import argparse
import os
import sys
import types
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model import DAT, VARIANTS, create_model, load_model
from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    configure,
    read,
    resize_tables,
    shapes,
    write,
)
from model.official import official_shapes
from tests.conftest import SMALL_DAT, official_state, recipe_state
from tests.model.oracle import bicubic

PUBLISHED = [name for name in VARIANTS if "nano" not in name and "ddetr" not in name]


@pytest.fixture
def official(tmp_path):
    """The demo network under official names, as the official training loop saves it."""
    path = tmp_path / "official.pth"
    torch.save({"model": official_state("dat_nano"), "optimizer": {"state": {}}, "epoch": 3}, path)
    return path


def shape_checkpoint(name, training=None, **changes):
    """A checkpoint of a published variant without values."""
    expected = official_shapes(replace(VARIANTS[name], **changes))
    state = {key: torch.empty(shape, device="meta") for key, shape in expected.items()}
    return Checkpoint(Path("weights.pth"), state, training=training or {})


def test_a_file_becomes_the_model_that_it_is_of(official):
    model = load_model(official)
    assert model.config == VARIANTS["dat_nano"]
    expected = create_model("dat_nano")
    expected.load_state_dict(official_state("dat_nano"))
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_variant_shows_in_names_and_shapes(name):
    if name.startswith("dat_pp_base"):
        with pytest.raises(CheckpointError, match="may be dat_pp_base_224 or dat_pp_base_384"):
            configure(shape_checkpoint(name))
        size = VARIANTS[name].image_size[0]
        checkpoint = shape_checkpoint(name, {"DATA": {"IMG_SIZE": size}}, num_classes=7)
    else:
        checkpoint = shape_checkpoint(name, num_classes=7)
    assert configure(checkpoint) == replace(VARIANTS[name], num_classes=7)


def test_weights_of_no_variant_are_refused(tmp_path):
    path = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(10, 3)}, path)
    with pytest.raises(CheckpointError, match=r"other\.pth: fits no variant.*dat_tiny_224"):
        load_model(path)


@pytest.mark.parametrize("extra", ["buffers", "nothing"])
def test_buffers_that_official_files_store_are_derived_anew(tmp_path, extra):
    state = official_state("dat_nano")
    if extra == "buffers":
        state["stages.0.attns.0.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
        state["stages.0.attns.1.attn_mask"] = torch.full((4, 16, 16), -100.0)
    path = tmp_path / "official.pth"
    torch.save({"model": state}, path)
    torch.testing.assert_close(load_model(path).head.bias.data, state["cls_head.bias"])


def in_module(name, attribute, monkeypatch):
    """A class that pickles as `name.attribute`, of a package that need not be installed."""
    for module in ("yacs", "easydict", "addict", name):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    node = type(attribute, (dict,), {"__module__": name})
    monkeypatch.setattr(sys.modules[name], attribute, node, raising=False)
    return node


@pytest.mark.parametrize(
    ("module", "name"),
    [("yacs.config", "CfgNode"), ("easydict", "EasyDict"), ("addict.addict", "Dict")],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_configurations_that_are_pickled_need_no_foreign_class(
    tmp_path, monkeypatch, module, name, zipped
):
    path = tmp_path / "official.pth"
    with monkeypatch.context() as patched:
        node = in_module(module, name, patched)
        content = {"model": official_state("dat_nano"), "config": node(DATA=node(IMG_SIZE=128))}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    checkpoint = read(path)
    assert checkpoint.state.keys() == official_state("dat_nano").keys()
    assert checkpoint.training == {"DATA": {"IMG_SIZE": 128}}


def test_arguments_and_numpy_numbers_that_are_pickled_do_no_harm(tmp_path):
    path = tmp_path / "official.pth"
    torch.save(
        {
            "model": OrderedDict(official_state("dat_nano")),
            "max_accuracy": np.float64(82.03),
            "args": argparse.Namespace(lr=1e-3, batch=np.float32(4)),
        },
        path,
    )
    assert read(path).classes == 12


class Exploit:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["model", "config", "whole"])
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path, zipped, place):
    witness, path = tmp_path / "executed", tmp_path / "hostile.pth"
    exploit = Exploit(witness)
    content = exploit if place == "whole" else {"model": official_state("dat_nano"), place: exploit}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"hostile\.pth: .*nothing of it executed.*system"):
        read(path)
    assert not witness.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert witness.exists()


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"\x80\x02garbage", b"PK\x03\x04" + b"\0" * 99])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        read(tmp_path / name)


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    state = {"patch_proj.0.weight": torch.randn(4, 3, 3, 3), "b": torch.randn(7)}
    torch.save({"model": state}, folder / "new.pth")
    torch.save({"model": state}, folder / "old.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "own.safetensors")
    return sorted(folder.iterdir())


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_cut_short_or_damaged_is_read_whole_or_refused(whole_files, tmp_path, data):
    source = data.draw(st.sampled_from(whole_files))
    content = bytearray(source.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] = data.draw(st.integers(0, 255))
    path = tmp_path / source.name
    path.write_bytes(content)
    try:
        checkpoint = read(path)
    except CheckpointError as refusal:
        assert str(path) in str(refusal)  # noqa: PT017
    else:
        assert all(isinstance(value, torch.Tensor) for value in checkpoint.state.values())


@pytest.mark.parametrize("content", [3, [], {}, {"model": 3}, {"model": {1: torch.zeros(1)}}])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    path = tmp_path / "other.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.pth"):
        load_model(path)


def test_differences_are_named_by_key_and_shape(tmp_path):
    state = official_state("dat_nano")
    del state["cls_head.bias"]
    state["extra.weight"] = torch.zeros(3)
    state["cls_norm.norm.weight"] = torch.zeros(7)
    state["cls_norm.norm.bias"] = torch.zeros(128, dtype=torch.int64)
    path = tmp_path / "edited.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError) as refusal:
        load_model(path, "dat_nano")
    message = str(refusal.value)
    assert message.startswith(f"{path}: not a checkpoint of dat_nano")
    assert "missing cls_head.bias (12,)" in message
    assert "unexpected extra.weight" in message
    assert "cls_norm.norm.weight has shape (7,), expected (128,)" in message
    assert "cls_norm.norm.bias is of type torch.int64" in message


def test_a_state_dict_of_another_variant_is_refused():
    with pytest.raises(CheckpointError, match=r"not a checkpoint of dat_tiny_224.*and \d+ more"):
        create_model("dat_tiny_224").load_state_dict(official_state("dat_small_224"))


def test_differences_of_own_names_are_named_too():
    model = create_model("dat_nano")
    state = dict(model.state_dict())
    del state["head.bias"]
    state["head.weight"] = torch.zeros(5, 128)
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \(5, 128\), expected \(12"):
        model.load_state_dict(state)


def test_a_prefix_before_the_keys_is_named(tmp_path):
    path = tmp_path / "wrapped.pth"
    torch.save({f"module.{key}": value for key, value in official_state("dat_nano").items()}, path)
    for variant in (None, "dat_nano"):
        with pytest.raises(CheckpointError, match=r"begin with 'module\.', expected no prefix"):
            load_model(path, variant)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused_by_their_official_name(tmp_path, value):
    state = official_state("dat_nano")
    state["stages.2.attns.1.proj_q.weight"][0, 0] = value
    path = tmp_path / "broken.pth"
    torch.save({"model": state}, path)
    with pytest.raises(CheckpointError, match=r"broken\.pth.*stages\.2\.attns\.1\.proj_q\.weight"):
        load_model(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_become_float32(tmp_path, dtype):
    path = tmp_path / "other.pth"
    torch.save({key: value.to(dtype) for key, value in official_state("dat_nano").items()}, path)
    model = load_model(path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    torch.testing.assert_close(
        model.head.weight.data, official_state("dat_nano")["cls_head.weight"].to(dtype).float()
    )


def test_own_files_say_what_they_are(tmp_path):
    model = create_model("dat_pp_tiny_224", image_size=(64, 96), num_classes=5)
    path = tmp_path / "own.safetensors"
    facts = {"variant": "dat_pp_tiny_224", "image_size": "[64, 96]", "window": "7"}
    write(path, model.state_dict(), facts)
    loaded = load_model(path)
    assert loaded.config == model.config
    assert shapes(loaded.state_dict()) == shapes(model.state_dict())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="holds a dat_pp_tiny_224, expected dat_tiny_224"):
        load_model(path, "dat_tiny_224")


@pytest.mark.parametrize(
    "metadata",
    [
        {"variant": "resnet50"},
        {"variant": "dat_nano", "image_size": "[8, 8]"},
        {"variant": "dat_nano", "image_size": "7"},
        {"variant": "dat_nano", "image_size": "{"},
        {"variant": "dat_nano", "image_size": "[128, 128]", "table_size": "1000000000"},
        {"variant": "dat_nano", "image_size": "[128, 128]", "window": "-7"},
    ],
)
def test_facts_of_own_files_that_make_no_sense_are_refused(tmp_path, metadata):
    path = tmp_path / "own.safetensors"
    write(path, create_model("dat_nano").state_dict(), metadata)
    with pytest.raises(CheckpointError, match=r"own\.safetensors"):
        load_model(path)


# Another resolution.


@pytest.mark.parametrize(
    ("size", "window"), [(128, 4), (256, 4), (160, 5), (192, 6), (384, 4), (96, 3), (32, 1)]
)
def test_windows_stay_where_they_fit_and_else_grow_with_the_size(size, window):
    config = SMALL_DAT.resized((size, size))
    assert (config.window, config.table_size, config.image_size) == (window, size, (size, size))


def test_the_published_resolutions_come_from_each_other():
    resized = VARIANTS["dat_base_224"].resized((384, 384))
    assert replace(resized, name="dat_base_384") == VARIANTS["dat_base_384"]


@pytest.mark.parametrize("size", [(128, 160), (100, 100), (20, 20), (0, 0), (9000, 9000)])
def test_a_size_that_dat_cannot_take_is_refused_with_the_reason(size):
    with pytest.raises(ValueError, match=r"square|from 1 to"):
        SMALL_DAT.resized(size)


def interpolated(state, config):
    """Tables for another resolution by nested loops, under official names."""
    changed = dict(state)
    for key, shape in official_shapes(config).items():
        if changed[key].shape == torch.Size(shape):
            continue
        table = changed[key].double().numpy()
        if key.endswith("rpe_table"):
            changed[key] = np.stack([bicubic(head, *shape[1:]) for head in table])
        else:
            side, new = round(len(table) ** 0.5), round(shape[0] ** 0.5)
            heads = [bicubic(head.reshape(side, side), new, new).ravel() for head in table.T]
            changed[key] = np.stack(heads, 1)
        changed[key] = torch.from_numpy(changed[key])
    return changed


@pytest.mark.parametrize("size", [96, 160, 256])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=["f64", "f32"]
)
def test_tables_are_interpolated_as_by_nested_loops(size, dtype, tolerance):
    state = {key: value.to(dtype) for key, value in recipe_state(SMALL_DAT).items()}
    config = SMALL_DAT.resized((size, size))
    resized = resize_tables(state, official_shapes(config))
    expected = interpolated(state, config)
    differing = [key for key in state if resized[key].shape != state[key].shape]
    assert any("rpe_table" in key for key in differing)
    for key in state:
        torch.testing.assert_close(resized[key], expected[key].to(dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("size", [384, 448])
def test_a_published_checkpoint_serves_another_resolution(tiny_checkpoint, size):
    model = load_model(tiny_checkpoint, image_size=(size, size))
    assert model.config.window == (12 if size == 384 else 7)
    state = official_state("dat_tiny_224")
    expected = DAT(model.config).eval()
    expected.load_state_dict(interpolated(state, model.config))
    images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(model(images), expected(images), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_that_resolution_is_taken_as_it_is(tmp_path):
    """Fine-tuned at 384 with windows of 12 and served there, nothing is interpolated."""
    at_384 = VARIANTS["dat_tiny_224"].resized((384, 384))
    state = recipe_state(replace(at_384, num_classes=10))
    path = tmp_path / "fine_tuned.pth"
    torch.save({"model": state}, path)
    model = load_model(path, "dat_tiny_224", (384, 384))
    for name in ("stages.0.blocks.0", "stages.2.blocks.1"):
        own = model.state_dict()[f"{name}.attention.relative_position_bias_table"]
        table = "rpe_table" if "2" in name else "relative_position_bias_table"
        official = state[f"{name.replace('blocks', 'attns')}.{table}"]
        torch.testing.assert_close(own, official, rtol=0, atol=0)
    back = load_model(path, "dat_tiny_224", (224, 224))
    assert back.config.window == 7


def test_the_window_of_the_checkpoint_is_kept_where_it_fits():
    checkpoint = shape_checkpoint("dat_tiny_224", image_size=(448, 448), table_size=448, window=14)
    for size, window in ((448, 14), (896, 14), (672, 21), (224, 7)):
        assert configure(checkpoint, "dat_tiny_224", (size, size)).window == window


def test_tables_of_dat_pp_keep_their_size_at_any_input(tmp_path):
    """They are read at normalised displacements, so none is interpolated."""
    built_for_256 = replace(VARIANTS["dat_pp_tiny_224"], table_size=256, image_size=(256, 256))
    path = tmp_path / "built_for_256.pth"
    torch.save({"model": recipe_state(built_for_256)}, path)
    with pytest.raises(CheckpointError, match=r"rpe_table has shape \(2, 127, 127\), expected"):
        load_model(path, "dat_pp_tiny_224")
    model = load_model(path, "dat_pp_tiny_224", (160, 96))
    assert (model.config.table_size, model.config.image_size) == (256, (160, 96))


def test_tables_of_own_files_are_interpolated_too(tmp_path, tiny_checkpoint):
    path = tmp_path / "own.safetensors"
    write(path, load_model(tiny_checkpoint).state_dict(), {"variant": "dat_tiny_224"})
    own, official = (load_model(p, image_size=(384, 384)) for p in (path, tiny_checkpoint))
    for name, value in official.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=0)
