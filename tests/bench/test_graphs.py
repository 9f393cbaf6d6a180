"""Which switches a way is timed with."""

import pytest

from bench import graphs
from bench.graphs import BASIS, SERVED, WAYS, Times, network, time_way
from model import kernels


# To trace a network takes long; the rehearsal of `bench/gpu.sh` does it.
@pytest.mark.parametrize("title", [title for title, way in WAYS.items() if not way.compiled])
def test_every_way_runs_with_its_own_switches_alone(title):
    before = kernels.enabled
    seen = []
    hook = network("dat_nano", "cpu").model.stem.register_forward_pre_hook(
        lambda *_: seen.append(kernels.enabled)
    )
    assert time_way("dat_nano", WAYS[title], 1, "cpu", 0) > 0
    hook.remove()
    assert set(seen) == {WAYS[title].fused}
    assert kernels.enabled == before


def test_what_a_graph_is_compared_with_has_neither_graph_nor_kernels():
    assert WAYS[BASIS] == graphs.Way(captured=False)
    assert WAYS[SERVED].fused
    assert any(way.compiled and way.fused for way in WAYS.values())


def test_times_are_held_against_the_targets(capsys):
    times = Times()
    for way, batch, seconds in ((SERVED, 1, 0.0005), (SERVED, 32, 0.002), (BASIS, 1, 0.001)):
        times.add("dat_tiny_224", way, batch, seconds)
    times.judge("dat_tiny_224", SERVED)
    times.judge("dat_tiny_224", BASIS)
    printed = [line.partition('"what": ')[2] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in printed if line] == [
        '"graph, kernels: images/s, best batch", "figure": 16000.0, "at_least": 18000}',
        '"graph, kernels: ms of one image", "figure": 0.5, "at_most": 0.6}',
        '"eager / graph, kernels, batch 1", "figure": 2.0, "at_least": 3.0}',
    ]
