"""All classes by their scores, against a softmax in float64 and the order of what is given."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.kernels.ranking import MOST_CLASSES, rank
from service.engine import classify
from tests.model.kernels.conftest import DEVICE, generator, some_examples


def check(logits):
    scores, classes = rank(logits.to(DEVICE))
    scores, classes = scores.cpu(), classes.cpu()
    assert (scores.dtype, classes.dtype) == (torch.float32, torch.int32)
    assert torch.equal(
        classes.long().sort(-1).values, torch.arange(logits.shape[1]).expand_as(classes)
    )
    exact = logits.double().softmax(-1).gather(1, classes.long())
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-9)
    # The order is that of these very scores; of two that are equal the lower class comes first.
    earlier, later = scores[:, :-1], scores[:, 1:]
    assert (earlier >= later).all()
    assert (classes[:, :-1] < classes[:, 1:])[earlier == later].all()


@given(
    rows=st.integers(1, 3),
    classes=st.integers(1, 300),
    spread=st.sampled_from((0.0, 1e-7, 1.0, 20.0, 300.0)),
    values=st.sampled_from((2, 40, 10**6)),
    seed=st.integers(0, 2**31),
)
@some_examples
def test_any_row(rows, classes, spread, values, seed):
    """Of few values most are equal; of a wide spread most scores are zero."""
    drawn = torch.randint(values, (rows, classes), generator=generator(seed))
    check(spread * (drawn / values - 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1000, 1025])
def test_many_classes(classes):
    check(3 * torch.randn(1, classes, generator=generator()))


def test_different_logits_of_the_same_score():
    """The smallest are different numbers, and so much below the best that their scores are not."""
    logits = torch.linspace(-1e-8, 1e-8, 20).flip(0).repeat(2, 1)
    logits[:, 7] = torch.tensor([0.0, 30.0])
    assert len(logits[0].unique()) > 15
    check(logits)


@pytest.mark.slow
@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_without_a_softmax_is_written_whole(broken):
    logits = torch.randn(3, 150, generator=generator())
    logits[0, 140] = broken
    logits[2] = -torch.inf
    with np.errstate(invalid="ignore"):
        scores, classes = rank(logits.to(DEVICE))
    assert scores.isnan().all(1).tolist() == [True, False, True]
    assert classes[0].tolist() == classes[2].tolist() == list(range(150))
    check(logits[1:2])


def test_impossible_classes_come_last():
    logits = torch.randn(1, 40, generator=generator())
    logits[0, 3:9] = -torch.inf
    check(logits)
    _, classes = rank(logits.to(DEVICE))
    assert classes[0, -6:].tolist() == [3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize("classes", [30, MOST_CLASSES + 1])
def test_a_classifier_gives_what_torch_gives(monkeypatch, classes):
    """By the kernel, as far as it goes, and beyond."""
    logits = torch.randn(2, classes, generator=generator()).to(DEVICE)
    expected = classify._rank(logits)
    monkeypatch.setattr(classify, "usable", lambda logits: True)
    scores, order = classify._rank(logits)
    torch.testing.assert_close(scores, expected[0])
    assert torch.equal(order, expected[1])
