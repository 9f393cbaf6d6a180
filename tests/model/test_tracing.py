import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import attention
from model.packing import pack
from model.tracing import Untraceable, record, trace


def assert_identical(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_gives_the_same_bits_as_the_network(network, batch, packed):
    if packed:
        pack(network)
    images = torch.randn(3 * batch, 3, *network.config.image_size)
    graph = trace(network.forward_explained, torch.zeros(images[:batch].shape))
    with torch.inference_mode():
        for part in images.split(batch):  # those from the middle of a larger batch as well
            explained = graph(part)
            assert type(explained).__name__ == "Explained"
            assert_identical(explained, network.forward_explained(part))


@pytest.mark.slow
def test_half_precision_and_broken_rows_give_the_same_bits(network):
    network.cast(torch.bfloat16)
    images = torch.randn(2, 3, *network.config.image_size).bfloat16()
    images[1] = torch.nan
    graph = trace(network, images[:1].expand(2, -1, -1, -1).contiguous())
    with torch.inference_mode():
        assert_identical(graph(images), network(images))


def test_attention_in_bands_writes_into_what_it_computed(network, monkeypatch):
    monkeypatch.setattr(attention, "BANDED_FROM", 0)
    monkeypatch.setattr(attention, "BAND", 1 << 12)
    images = torch.randn(2, 3, *network.config.image_size)
    traced = trace(network, torch.zeros_like(images))
    with torch.inference_mode():
        assert_identical(traced(images), network(images))


def test_a_graph_has_no_modules_no_views_and_nothing_it_does_not_use(network):
    graph = record(network, torch.zeros(1, 3, *network.config.image_size))
    assert {node.op for node in graph.nodes} == {"placeholder", "call_function", "output"}
    for node in graph.nodes:
        assert node.users or node.op == "output"
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target.is_view


def test_python_has_nothing_to_do_between_operations(network):
    images = torch.zeros(1, 3, *network.config.image_size)
    traced = trace(network, images)
    operations = len(record(network, images).nodes)
    called = []
    with torch.inference_mode():
        sys.setprofile(lambda frame, event, called_: called.append((event, called_)))
        traced(images)
        sys.setprofile(None)
    assert len(called) < 30 < operations


def test_a_thread_that_is_busy_in_python_is_waited_for_once(network):
    """Each wait takes a switch interval: here one of them is a tenth of a second."""
    images = torch.zeros(1, 3, *network.config.image_size)
    pack(network)
    traced = trace(network, images)
    ended = threading.Event()

    def be_busy():
        while not ended.is_set():
            pass

    busy = threading.Thread(target=be_busy)
    before = sys.getswitchinterval()
    with torch.inference_mode():
        traced(images)
        sys.setswitchinterval(0.1)
        busy.start()
        try:
            start = time.perf_counter()
            traced(images)
            # Called from Python, the operations of the network would take over 20 seconds.
            assert time.perf_counter() - start < 5
        finally:
            sys.setswitchinterval(before)
            ended.set()
            busy.join()


class Peak(TorchDispatchMode):
    """Most bytes that were alive at a time of all that was computed."""

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage()
            self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


def test_memory_is_given_back_as_soon_as_by_the_network(network):
    images = torch.zeros(1, 3, *network.config.image_size)
    traced = trace(network, images)
    with torch.no_grad(), Peak() as of_network:
        network(images)
    with torch.no_grad(), Peak() as of_traced:
        traced(images)
    assert 0 < of_traced.bytes <= of_network.bytes


def test_two_threads_can_run_a_graph_at_once(network):
    images = torch.randn(16, 1, 3, *network.config.image_size)
    graph = trace(network, images[0])

    def run(image):
        with torch.inference_mode():
            return graph(image)

    with ThreadPoolExecutor(4) as threads:
        for logits, image in zip(threads.map(run, images), images, strict=True):
            assert_identical(logits, run(image))


def chain(steps):
    """Views, copies and sums in any order."""

    def work(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x
        for step in steps:
            match step:
                case "turn":
                    x = x.transpose(0, -1)
                case "first":
                    x = x[:1].expand(4, -1, -1)
                case "half":
                    x = (x + 0).unflatten(0, (2, 2))[1].repeat(2, 1, 1)
                case "add":
                    x = x + torch.arange(4.0)
                case "write":
                    x = x.clone()
                    x[1:, ..., ::2] = total.sum()
            total = total + x.reshape(-1)[:4]
        return total, x

    return work


@given(st.lists(st.sampled_from(["turn", "first", "half", "add", "write"]), max_size=8))
def test_any_chain_of_views_and_writes_gives_the_same_bits(steps):
    work = chain(steps)
    graph = trace(work, torch.zeros(4, 4, 4))
    values = torch.randn(4, 4, 4)
    assert_identical(graph(values), work(values))


constant = torch.zeros(3)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda x: x * float(x.sum()), "depends on the values"),
        (lambda x: x[x > 0], "depends on the values"),
        (lambda x: x + constant.add_(x), "writes to a constant"),
        (lambda x: x[1:] + 1, "from the middle of an input"),
        (lambda x: x.mul_(2)[1:] + 1, "from the middle of an input"),
        (lambda x: (x + 1).view(torch.int32) + 1, "read as torch.int32"),
    ],
)
def test_what_a_graph_cannot_repeat_is_refused(work, message):
    with pytest.raises(Untraceable, match=message):
        trace(work, torch.ones(3))
