"""A Swin against the library that computes it: weights, windows, shifts, padding, masks."""

import json
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import transformers

from model.checkpoint import CheckpointError, read, write
from model.swin import SwinFile, create_swin, load_swin, read_swin, swin_shapes
from model.swin_config import SwinConfig
from model.tracing import trace
from service.engine.classify import Classify

# Maps of 16x16, 8x8 and 4x4 cells: shifted windows in two stages, one window in the last.
SMALL = SwinConfig(
    "swin", 8, (2, 2, 2), (1, 2, 4), window=4, image_size=(64, 64), num_classes=5, crop=True
)
# 26x15, 13x8 and 7x4 cells: all of them padded, the first two shifted.
ODD = replace(SMALL, image_size=(101, 60))


def random_state(config, seed=0):
    """Weights that make attention far from even."""
    random = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in swin_shapes(config).items():
        norm = "norm" in name and name.endswith("weight")
        spread = 2.0 if name.endswith("table") else max(1, np.prod(shape[1:])) ** -0.5
        state[name] = torch.randn(shape, generator=random) * spread + norm
    return state


def images_for(config, count=2, seed=1):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *config.image_size, generator=random)


def by_the_library(model, images):
    """The attention of the last block of each stage over its padded map, cell by cell.

    It is what `output_attentions=True` gives, `(B * windows, heads, N, N)`, laid out by loops:
    `(B, heads, cells, cells)`.
    """
    with torch.inference_mode():
        given = model.network(images, output_attentions=True).attentions
    laid_out = []
    for stage, attention in enumerate(given):
        windows = model.config.windows(stage, model.config.depths[stage] - 1)
        (height, width), side, shift = windows.padded_size, windows.side, windows.shift
        heads, cells = attention.shape[1], height * width
        whole = np.zeros((len(images), heads, cells, cells), np.float32)
        place = [(i, j) for i in range(side) for j in range(side)]
        of_window = iter(attention.numpy())
        for image in whole:
            for top in range(0, height, side):
                for left in range(0, width, side):
                    rolled = [
                        (top + i + shift) % height * width + (left + j + shift) % width
                        for i, j in place
                    ]
                    image[:, np.array(rolled)[:, None], rolled] = next(of_window)
        laid_out.append(whole)
    return laid_out


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["even", "odd"])
def test_the_attention_is_that_of_the_library(config):
    model = create_swin(config, random_state(config))
    images = images_for(config)
    expected = by_the_library(model, images)
    layers = range(len(config.depths))
    random = np.random.default_rng(0)
    cells = np.stack([random.integers(0, np.prod(config.map_size(s)), (2, 8)) for s in layers], 1)
    cells[:, :, 0], cells[:, :, 1] = 0, [[np.prod(config.map_size(s)) - 1 for s in layers]] * 2
    with torch.inference_mode():
        logits, locations, attention = model.forward_explained(
            images, layers, torch.from_numpy(cells)
        )
        torch.testing.assert_close(logits, model.network(images).logits, rtol=0, atol=0)
    assert locations == ()
    for stage, (whole, weights) in enumerate(zip(expected, attention, strict=True)):
        windows = config.windows(stage, config.depths[stage] - 1)
        (H, W), (_, PW) = windows.map_size, windows.padded_size
        real = [row * PW + column for row in range(H) for column in range(W)]
        np.testing.assert_array_equal(weights.cells.numpy(), cells[:, stage])
        np.testing.assert_allclose(
            weights.received.numpy(), whole[:, :, real].sum(2), rtol=1e-5, atol=1e-6
        )
        for image, of_image in enumerate(cells[:, stage]):
            for place, cell in enumerate(of_image):
                ours = weights.weights[image, place].numpy()
                np.testing.assert_array_equal(ours, whole[image, :, real[cell]])
                np.testing.assert_allclose(ours.sum(1), 1, rtol=1e-5)
                top, left, bottom, right = windows.seen_from(*divmod(cell, W))
                seen = np.zeros(windows.padded_size, bool)
                seen[top:bottom, left:right] = True
                # What the mask of the shift leaves is nothing.
                assert (ours[:, ~seen.ravel()] < 1e-30).all()
                assert (ours[:, seen.ravel()] > 0).all()
    assert [config.windows(stage, 1).shift for stage in layers] == [2, 2, 0]


def test_the_most_attended_cells_are_chosen():
    model = create_swin(ODD, random_state(ODD))
    images = images_for(ODD)
    cells = torch.tensor([[[-1, -2, -3, -4, 7]], [[3, -1, -1, -4, -2]]])
    with torch.inference_mode():
        (weights,) = model.forward_explained(images, (1,), cells).attention
    windows = ODD.windows(1, 1)
    (H, W), (PH, PW) = windows.map_size, windows.padded_size
    of_cells = weights.received.sum(1).view(2, PH, PW)[:, :H, :W].flatten(1)
    order = of_cells.argsort(descending=True).tolist()
    assert weights.cells.tolist() == [
        [*order[0][:4], 7],
        [3, order[1][0], order[1][0], order[1][3], order[1][1]],
    ]


@pytest.mark.parametrize("layers", [(), (1, 2)])
def test_a_traced_pass_gives_the_same(layers):
    classify = Classify(create_swin(ODD, random_state(ODD)), torch.float32).eval()
    random = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (3, 2, *ODD.image_size, 3), dtype=torch.uint8, generator=random)
    cells = torch.randint(20, (3, 2, len(layers), 8), generator=random)

    def work(*given):
        return classify(*given, layers=layers)

    asked = zip(pixels, cells, strict=True)
    inputs = [(images, of) if layers else (images,) for images, of in asked]
    traced = trace(work, *(given.clone() for given in inputs[0]))
    for given in inputs:
        with torch.inference_mode():
            expected, found = work(*given), traced(*(one.clone() for one in given))
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=0)
        assert len(found.attention) == len(layers)
        for ours, theirs in zip(found.attention, expected.attention, strict=True):
            for part, same in zip(ours, theirs, strict=True):
                torch.testing.assert_close(part, same, rtol=0, atol=0)


def test_in_half_precision_it_is_near():
    state, images = random_state(SMALL), images_for(SMALL)
    cells = torch.zeros(2, 1, 8, dtype=torch.int64)
    with torch.inference_mode():
        exact = create_swin(SMALL, state).forward_explained(images, (1,), cells)
        model = create_swin(SMALL, state).cast(torch.bfloat16)
        half = model.forward_explained(images.to(torch.bfloat16), (1,), cells)
    assert half.logits.dtype == torch.float32
    torch.testing.assert_close(half.logits, exact.logits, rtol=0, atol=0.2)
    weights, rounded = exact.attention[0].weights, half.attention[0].weights
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, weights, rtol=0, atol=0.1)


def test_no_images_have_no_logits():
    swin = create_swin(SMALL)
    cells = torch.zeros(0, 1, 2, dtype=torch.int64)
    seen = swin.forward_explained(torch.ones(0, 3, *SMALL.image_size), [1], cells)
    assert seen.logits.shape == (0, SMALL.num_classes)
    assert seen.attention[0].weights.shape[:2] == (0, 2)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"built for images \(B, 3, 101, 60\); got \(2, 3, 64, 64"):
        create_swin(ODD)(images_for(SMALL))


@pytest.fixture
def published(tmp_path):
    """A folder as `save_pretrained` writes it, and the network in it."""
    torch.manual_seed(0)
    network = transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=64, embed_dim=8, depths=[2, 2, 2], num_heads=[1, 2, 4], window_size=4,
            id2label={0: "cat", 1: "dog", 2: "owl"}, label2id={"cat": 0, "dog": 1, "owl": 2},
        )
    ).eval()  # fmt: skip
    network.save_pretrained(tmp_path)
    return tmp_path, network


def test_a_folder_of_the_library_is_read(published):
    folder, network = published
    checkpoint = read(folder / "model.safetensors")
    file = read_swin(checkpoint)
    assert file.config == replace(SMALL, num_classes=3, crop=False)
    assert json.loads(file.labels) == ["cat", "dog", "owl"]
    images = images_for(SMALL)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_swin(checkpoint)(images), network(images).logits, rtol=1e-6, atol=1e-6
        )


def test_a_pickle_of_the_library_is_read(published):
    folder, network = published
    saved = read(folder / "model.safetensors").state
    # Older versions wrote this, with the index of the table in it.
    index = {"swin.encoder.layers.0.blocks.0.attention.self.relative_position_index": torch.ones(1)}
    torch.save(saved | index, folder / "pytorch_model.bin")
    images = images_for(SMALL)
    with torch.inference_mode():
        found = load_swin(read(folder / "pytorch_model.bin"))(images)
        torch.testing.assert_close(found, network(images).logits, rtol=1e-6, atol=1e-6)


def test_at_another_size_it_is_the_library_at_that_size(published):
    folder, network = published
    model = load_swin(read(folder / "model.safetensors"), (101, 60))
    assert model.config.image_size == (101, 60)
    images = images_for(ODD)
    with torch.inference_mode():
        torch.testing.assert_close(model(images), network(images).logits, rtol=1e-5, atol=1e-6)


def test_classes_without_names_have_none(published):
    folder, _ = published
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {str(n): f"LABEL_{n}" for n in range(3)}
    (folder / "config.json").write_text(json.dumps(config))
    assert read_swin(read(folder / "model.safetensors")).labels is None


def test_our_own_file_needs_no_other(tmp_path):
    file = SwinFile(replace(SMALL, name="swin_nano"), random_state(SMALL), '["a","b","c","d","e"]')
    write(tmp_path / "own.safetensors", file.state, file.facts)
    checkpoint = read(tmp_path / "own.safetensors")
    assert checkpoint.metadata["variant"] == "swin_nano"
    again = read_swin(checkpoint)
    assert (again.config, again.labels) == (file.config, file.labels)
    images = images_for(SMALL)
    with torch.inference_mode():
        found, expected = load_swin(checkpoint)(images), create_swin(SMALL, file.state)(images)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def written(folder, state=None, config=None, **metadata):
    """A checkpoint with a change of its state or of its configuration."""
    path = folder / "model.safetensors"
    write(path, {**random_state(SMALL), **(state or {})}, metadata)
    if config is not None:
        (folder / "config.json").write_text(config)
    return path


CONFIG_JSON = json.dumps(
    {
        "model_type": "swin", "image_size": 64, "embed_dim": 8, "depths": [2, 2, 2],
        "num_heads": [1, 2, 4], "window_size": 4,
    }
)  # fmt: skip


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (None, "model.safetensors: a Swin of transformers needs its config.json beside it"),
        ("{", "config.json: not the configuration of a model"),
        ("[]", "config.json: not the configuration of a model: is no JSON object"),
        ("\xff", "not the configuration of a model"),
        ("{}", "is of a None, expected a 'swin'"),
        (" " * (1 << 20) + "{}", "config.json: is larger than a configuration is"),
        (CONFIG_JSON.replace("4}", "2}"), "relative_position_bias_table has shape"),
        (CONFIG_JSON.replace('"embed_dim": 8', '"embed_dim": 16'), "expected \\(16, 3, 4, 4\\)"),
        (CONFIG_JSON.replace("[2, 2, 2]", "[2, 2, 4]"), "missing swin.encoder.layers.2.blocks.2"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, config, sentence):
    path = written(tmp_path, config=config)
    with pytest.raises(CheckpointError, match=sentence) as caught:
        load_swin(read(path))
    assert str(tmp_path) in str(caught.value)


NORM = "swin.layernorm.weight"


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({NORM: torch.full((32,), torch.nan)}, f"{NORM} holds values that are not finite"),
        ({NORM: torch.ones(31)}, rf"{NORM} has shape \(31,\), expected \(32,\)"),
        ({NORM: torch.ones(32, dtype=torch.int64)}, f"{NORM} is of type torch.int64"),
        ({"swin.more.weight": torch.ones(1)}, "unexpected swin.more.weight"),
        ({"decoder.0.weight": torch.ones(1)}, "unexpected decoder.0.weight"),
    ],
)
def test_weights_are_read_strictly(tmp_path, state, sentence):
    path = written(tmp_path, state, CONFIG_JSON)
    with pytest.raises(CheckpointError, match=f"model.safetensors: .*{sentence}"):
        load_swin(read(path))


def test_another_variant_than_the_one_in_the_file_is_refused(tmp_path):
    path = written(tmp_path, config=CONFIG_JSON)
    with pytest.raises(CheckpointError, match="is of the variant swin, expected dat_tiny_224"):
        read_swin(read(path), "dat_tiny_224")
    facts = json.dumps(asdict(replace(SMALL, name="other")))
    path = written(tmp_path, swin=facts)
    with pytest.raises(CheckpointError, match="is of the variant other, expected swin or"):
        read_swin(read(path))


def test_without_the_library_a_sentence_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"not installed; pip install -c .*'\.\[swin\]'"):
        create_swin(SMALL)
