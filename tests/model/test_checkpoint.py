import argparse
import gzip
import io
import os
import pickle
import sys
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict, defaultdict, deque
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from model import DAT, VARIANTS, create_model, load_model
from model.checkpoint import (
    Checkpoint,
    CheckpointError,
    configure,
    read,
    resize_tables,
    sha256,
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
    torch.save({f"model.{key}": value for key, value in official_state("dat_nano").items()}, path)
    for variant in (None, "dat_nano"):
        with pytest.raises(CheckpointError, match=r"begin with 'model\.', expected no prefix"):
            load_model(path, variant)


def own_state(name, **changes):
    model = create_model(name, **changes)
    model.load_state_dict(official_state(name, **changes))
    return model.state_dict()


@pytest.mark.parametrize("name", ["dat_nano", "dat_tiny_224", "dat_tiny_224_ddetr"])
def test_the_state_dict_of_a_network_says_which_it_is(tmp_path, name):
    """As after a training with this repository's own networks."""
    state = own_state(name, num_classes=7)
    path = tmp_path / "trained.pth"
    torch.save({"model": prefixed(state, "module."), "epoch": 3}, path)
    model = load_model(path)
    assert (model.config.name, model.config.num_classes) == (name, 7)
    assert_same(model.state_dict(), state)


def test_a_prefix_before_the_keys_of_a_network_is_named(tmp_path):
    path = tmp_path / "wrapped.pth"
    torch.save(prefixed(own_state("dat_nano"), "net."), path)
    for variant in (None, "dat_nano"):
        with pytest.raises(CheckpointError, match=r"begin with 'net\.', expected no prefix"):
            load_model(path, variant)


def test_a_path_may_be_text(tmp_path):
    path = tmp_path / "official.pth"
    torch.save(official_state("dat_nano"), path)
    assert load_model(str(path)).config.name == "dat_nano"


WRAPPED = ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.module."]


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def assert_same(state, expected):
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_wrappers_before_every_key_are_taken_off(tmp_path, prefix, suffix):
    state = official_state("dat_nano")
    path = tmp_path / f"wrapped.{suffix}"
    wrapped = prefixed(state, prefix)
    if suffix == "pth":
        torch.save({"model": wrapped}, path)
    else:
        save_file(wrapped, path)
    assert_same(read(path).state, state)
    model = create_model("dat_nano")
    model.load_state_dict(wrapped)
    assert_same(load_model(path).state_dict(), model.state_dict())


def test_a_wrapper_before_some_keys_alone_is_named(tmp_path):
    state = official_state("dat_nano")
    path = tmp_path / "mixed.pth"
    torch.save({"bias": state.pop("cls_head.bias"), **prefixed(state, "module.")}, path)
    with pytest.raises(CheckpointError, match=r"begin with 'module\.', expected no prefix"):
        load_model(path)


# The moving average of the weights.


def buffers(state):
    """Averages as mmcv keeps them, beside the parameters."""
    return {f"ema_{key.replace('.', '_')}": value + 1 for key, value in state.items()}


def averaged(state, prefix=""):
    return {f"{prefix}{key}": value + 1 for key, value in state.items()}


STATE = {"backbone.a.weight": torch.ones(2), "backbone.b_c.bias": torch.zeros(3)}
AVERAGED = {
    "timm": {"state_dict": STATE, "state_dict_ema": averaged(STATE)},
    "deit": {"model": STATE, "model_ema": averaged(STATE), "optimizer": {}},
    "torchvision": {
        "model": STATE,
        "model_ema": averaged(STATE, "module.") | {"n_averaged": torch.tensor(9)},
    },
    "mmcv": {"meta": {}, "state_dict": STATE | buffers(STATE)},
    "mmcv-wrapped": {"state_dict": prefixed(STATE | buffers(STATE), "module.")},
    "bare": STATE | buffers(STATE),
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_the_moving_average_is_read_where_it_is_asked_for(tmp_path, kind):
    path = tmp_path / "averaged.pth"
    torch.save(AVERAGED[kind], path)
    assert_same(read(path).state, STATE)
    assert_same(read(path, ema=True).state, averaged(STATE))


def test_what_mmcv_does_not_average_is_that_of_the_model(tmp_path):
    counts = {"backbone.norm.running_mean": torch.ones(1)}
    path = tmp_path / "averaged.pth"
    torch.save({"state_dict": STATE | counts | buffers(STATE)}, path)
    assert_same(read(path, ema=True).state, averaged(STATE) | counts)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_moving_average_that_is_not_there_is_refused(tmp_path, suffix):
    path = tmp_path / f"plain.{suffix}"
    torch.save({"model": STATE, "model_ema": None}, path) if suffix == "pth" else save_file(
        STATE, path
    )
    assert_same(read(path).state, STATE)
    with pytest.raises(CheckpointError, match=rf"plain\.{suffix}: holds no EMA weights.*model_ema"):
        read(path, ema=True)


def test_a_moving_average_alone_must_be_asked_for(tmp_path):
    path = tmp_path / "alone.pth"
    torch.save({"model_ema": averaged(STATE)}, path)
    assert_same(read(path, ema=True).state, averaged(STATE))
    with pytest.raises(CheckpointError, match=r"alone\.pth: holds EMA weights alone"):
        read(path)


# What is no checkpoint is said by name.


def zipped(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("weights.pth"))
    return file.getvalue()


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def scripted():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


TENSORS = {"b": torch.zeros(7)}
OLD = {"_use_new_zipfile_serialization": False}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 114208321\n"
FOREIGN = {
    "empty": (b"", "empty file"),
    "pointer": (POINTER, r"Git-LFS pointer.*git lfs pull"),
    "page": (b"\n<!DOCTYPE html><html></html>", "HTML page"),
    "page without a type": (b"<HTML><body>", "HTML page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
    "json": (b'{"weight_map": {}}', r"JSON.*weight_map"),
    "json with a mark": (b"\xef\xbb\xbf[1]", "JSON"),
    "text": ("Überraschung: not found".encode(), r"text.*Überraschung"),
    "long text": ("ü".encode() * 9999, "text"),
    "wide text": ("text".encode("utf-16"), "UTF-16"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "tar": (tarred(), "tar archive"),
    "array": (b"\x93NUMPY\x01\0", "NumPy"),
    "zip": (zipped(**{"a.txt": "a"}), r"ZIP.*a\.txt"),
    "empty zip": (zipped(), "ZIP.*nothing"),
    "zip cut short": (saved(TENSORS)[:-40], "ZIP.*cut off"),
    "script": (scripted(), "TorchScript"),
    "unknown": (b"\0\1\2\3" * 9, r"no format known.*x00.x01"),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", ["pth", "pt", "safetensors"])
def test_what_is_no_checkpoint_is_named(tmp_path, kind, suffix):
    content, message = FOREIGN[kind]
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\.{suffix}: .*{message}"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", save(TENSORS), r"safetensors file.*must end in \.safetensors"),
        ("a.safetensors", saved(TENSORS), r"pickle of torch.*must end in \.pth"),
        ("a.safetensors", saved(TENSORS, **OLD), r"pickle of torch.*must end in \.pth"),
        ("a.safetensors", save(TENSORS)[:-1], "cut off or damaged"),
        ("a.pth", saved(TENSORS, **OLD)[:-1], "damaged"),
        ("a.pth", saved(TENSORS, pickle_protocol=4), "its own pickle protocol"),
        ("a.pth", saved({"state": {}, "param_groups": [{"lr": 1}]}), "the state of an optimizer"),
        ("a.pth", saved({"optimizer": {}, "epoch": 3}), "the keys 'optimizer', 'epoch'"),
        ("a.pth", saved(TENSORS | {"epoch": 3}), "'epoch', which is of type int"),
        ("a.pth", saved(torch.zeros(3)), "of type Tensor"),
        ("a.pth", saved(argparse.Namespace(lr=1)), r"of type argparse\.Namespace"),
    ],
)
def test_what_holds_no_state_dict_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name}: .*{message}"):
        read(tmp_path / name)


def test_what_is_no_file_is_named(tmp_path):
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    for path, message in (
        (tmp_path, "is a folder"),
        (tmp_path / "weights.pth", "no such file"),
        (Path(os.devnull), "no regular file"),
        (loop, "symbolic links"),
    ):
        for reader in (read, sha256):
            with pytest.raises(CheckpointError, match=f"{path}: .*{message}"):
                reader(path)


class OfTheirOwn:
    pass


FOREIGN_OBJECTS = {
    "numpy.ndarray": np.zeros(3),
    "pathlib.PosixPath": Path("/runs/7"),
    "collections.deque": deque([1.0]),
    "collections.defaultdict": defaultdict(list),
    "datetime.datetime": datetime(2026, 1, 1, tzinfo=UTC),
    "types.SimpleNamespace": types.SimpleNamespace(lr=1),
    "functools.partial": partial(print),
    f"{__name__}.OfTheirOwn": OfTheirOwn(),
    "torch.nn.modules.linear.Linear": torch.nn.Linear(1, 1),
}


@pytest.mark.parametrize("name", FOREIGN_OBJECTS)
@pytest.mark.parametrize("way", ["zip", "old", "protocol 4", "pickle"])
def test_a_refused_class_is_named_in_full(tmp_path, name, way):
    value = [{"deep": (FOREIGN_OBJECTS[name],)}]
    path = tmp_path / "weights.pth"
    if way == "pickle":
        path.write_bytes(pickle.dumps({"model": [], "args": value}))
    else:
        options = {"zip": {}, "old": OLD, "protocol 4": {"pickle_protocol": 4}}[way]
        torch.save(
            {"model": TENSORS, "args": value, "beside": argparse.Namespace()}, path, **options
        )
    with pytest.raises(CheckpointError) as refusal:
        read(path)
    assert f"{path}: not a readable checkpoint: refused, and nothing" in str(refusal.value)
    assert f" {name}" in str(refusal.value)
    for allowed in ("torch._utils", "argparse", "OrderedDict"):
        assert allowed not in str(refusal.value)


def test_a_class_of_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    with monkeypatch.context() as patched:
        for module in ("omegaconf", "omegaconf.dictconfig"):
            patched.setitem(sys.modules, module, types.ModuleType(module))
        node = type("DictConfig", (), {"__module__": "omegaconf.dictconfig"})
        patched.setattr(sys.modules["omegaconf.dictconfig"], "DictConfig", node, raising=False)
        torch.save({"model": TENSORS, "cfg": node()}, path)
    with pytest.raises(CheckpointError, match=r"omegaconf\.dictconfig\.DictConfig"):
        read(path)


def test_names_in_a_file_cannot_forge_lines(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"\x80\x02cos\x1b[31m\nsys\rtem" + b"x" * 9999 + b"\n.")
    with pytest.raises(CheckpointError, match=r"os\\x1b\[31m\.sys\\rtemx+$") as refusal:
        read(path)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 3000


@given(content=st.binary(max_size=40), pickled=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_refused_in_one_line(tmp_path, content, pickled):
    for name in ("a.pth", "a.safetensors"):
        path = tmp_path / name
        path.write_bytes(b"\x80\x02" * pickled + content)
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(refusal.value).startswith(f"{path}: ")
        assert str(refusal.value).isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.to_sparse(), "a sparse or quantized tensor"),
        (lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8), "quantized"),
        (lambda tensor: tensor.to("meta"), "a tensor without values"),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), r"torch\.float8_e4m3fn"),
        (lambda tensor: tensor.to(torch.complex64), r"torch\.complex64"),
        (lambda tensor: tensor > 0, r"torch\.bool"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch is about to remove some of these
def test_weights_of_another_kind_are_named(tmp_path, change, message):
    state = official_state("dat_nano")
    state["cls_head.weight"] = change(state["cls_head.weight"])
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=rf"weights\.pth: .*cls_head\.weight is .*{message}"):
        load_model(path, "dat_nano")


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


def test_a_head_without_a_class_is_refused(tmp_path):
    path, state = tmp_path / "none.pth", create_model("dat_nano").state_dict()
    torch.save(state | {name: state[name][:0] for name in ("head.weight", "head.bias")}, path)
    with pytest.raises(CheckpointError, match=r"none\.pth: dat_nano: a head has 1 class"):
        load_model(path, "dat_nano")


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_tables_of_dat_pp_keep_their_size_at_any_input(tmp_path):
    """They are read at normalised displacements, so none is interpolated."""
    built_for_256 = replace(VARIANTS["dat_pp_tiny_224"], table_size=256, image_size=(256, 256))
    path = tmp_path / "built_for_256.pth"
    torch.save({"model": recipe_state(built_for_256)}, path)
    with pytest.raises(CheckpointError, match=r"rpe_table has shape \(2, 127, 127\), expected"):
        load_model(path, "dat_pp_tiny_224")
    model = load_model(path, "dat_pp_tiny_224", (160, 96))
    assert (model.config.table_size, model.config.image_size) == (256, (160, 96))


@pytest.mark.slow
def test_tables_of_own_files_are_interpolated_too(tmp_path, tiny_checkpoint):
    path = tmp_path / "own.safetensors"
    write(path, load_model(tiny_checkpoint).state_dict(), {"variant": "dat_tiny_224"})
    own, official = (load_model(p, image_size=(384, 384)) for p in (path, tiny_checkpoint))
    for name, value in official.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=0, atol=0)
