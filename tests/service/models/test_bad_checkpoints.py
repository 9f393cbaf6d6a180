"""The command refuses to serve files that it cannot use: which file, which key, what it expects."""

import json
import os

import numpy as np
import pytest
import torch

from tests.conftest import official_state
from tests.service.commands import run_all


class Exploit:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.system, (f"touch {self.witness}",)


def weights(folder, edit):
    """A file of the demo network with official names, after an edit of its state dict."""
    state = official_state("dat_nano")
    path = folder / "weights.pth"
    torch.save({"model": edit(state) or state}, path)
    return path


def cut(folder):
    path = weights(folder, lambda state: None)
    path.write_bytes(path.read_bytes()[:-1000])
    return {"CHECKPOINT": path}


def with_nan(folder):
    def edit(state):
        state["stages.1.attns.0.proj_q.bias"][3] = float("nan")

    return {"CHECKPOINT": weights(folder, edit)}


def with_prefix(folder):
    def edit(state):
        return {f"model.{key}": value for key, value in state.items()}

    return {"CHECKPOINT": weights(folder, edit)}


def without_a_key(folder):
    def edit(state):
        del state["cls_norm.norm.bias"]

    return {"CHECKPOINT": weights(folder, edit), "VARIANT": "dat_nano"}


def of_another_variant(folder):
    return {"CHECKPOINT": weights(folder, lambda state: None), "NAME": "dat_tiny_224"}


def hostile(folder):
    path = folder / "weights.pth"
    torch.save({"model": Exploit(folder / "executed")}, path)
    return {"CHECKPOINT": path}


def with_an_array(folder):
    path = folder / "weights.pth"
    torch.save({"model": official_state("dat_nano"), "best": np.zeros(3)}, path)
    return {"CHECKPOINT": path}


def without_averages(folder):
    return {"CHECKPOINT": weights(folder, lambda state: None), "WEIGHTS": "ema"}


def without_labels(folder):
    return {"CHECKPOINT": weights(folder, lambda state: None)}


def with_other_labels(folder):
    labels = folder / "labels.json"
    labels.write_text(json.dumps(["a", "b"]))
    return {"CHECKPOINT": weights(folder, lambda state: None), "LABELS": labels}


def of_other_bytes(folder):
    return {"CHECKPOINT": weights(folder, lambda state: None), "SHA256": "ab" * 32}


MESSAGES = {
    cut: ["weights.pth: not a readable checkpoint"],
    with_nan: ["weights.pth", "stages.1.attns.0.proj_q.bias", "not finite numbers"],
    with_prefix: ["weights.pth", "'model.'", "expected no prefix"],
    without_a_key: ["weights.pth", "dat_nano", "missing cls_norm.norm.bias (128,)"],
    of_another_variant: ["weights.pth", "dat_tiny_224", "patch_proj.0.weight", "expected"],
    hostile: ["weights.pth", "system", "nothing of it executed"],
    with_an_array: ["weights.pth", "numpy.ndarray", "nothing of it executed"],
    without_averages: ["weights.pth: holds no EMA weights"],
    without_labels: ["weights.pth", "12 classes", "DAT_MODEL__LABELS"],
    with_other_labels: ["labels.json", "names 2 classes", "expected the 12"],
    of_other_bytes: ["weights.pth", "SHA-256", "expected abab"],
}


# One that cannot be read, one of other weights, one that would run a command.
QUICK = (cut, of_another_variant, hostile)


@pytest.mark.parametrize(
    "makes",
    [
        pytest.param(QUICK, id="some"),
        pytest.param(set(MESSAGES) - set(QUICK), id="others", marks=pytest.mark.slow),
    ],
)
def test_the_command_names_file_key_and_expectation(tmp_path, makes):
    folders = {make: tmp_path / make.__name__ for make in makes}
    chosen = []
    for make, folder in folders.items():
        folder.mkdir()
        chosen.append({f"DAT_MODEL__{name}": value for name, value in make(folder).items()})
    refusals = run_all((("serve",), settings) for settings in chosen)
    for (make, folder), ended in zip(folders.items(), refusals, strict=True):
        assert ended.returncode == 1, make
        assert ended.stderr.count("\n") == 1, make
        for message in MESSAGES[make]:
            assert message in ended.stderr, make
        assert not (folder / "executed").exists()


def test_a_model_file_is_refused_as_a_whole(tmp_path):
    models = tmp_path / "models.toml"
    models.write_text("[[models]]\nname = 'a'\nvariant = 'dat_nano'\n[[models]]\nname = 'b'\n")
    (ended,) = run_all([(("serve",), {"DAT_MODEL__FILE": models})])
    assert ended.returncode == 1
    assert "b: no checkpoint is given, and this is none of the bundled models" in ended.stderr
