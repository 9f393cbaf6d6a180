"""What the measurement of explanations asks for."""

from argparse import Namespace

from bench.explain import KINDS, asking, measure, open_model, tables


def test_every_kind_is_asked_of_the_engine_and_answered() -> None:
    opened = open_model("dat_nano", 2)
    opened.engine.close()
    layers = {kind: asking(opened, kind)[1].wanted.attention for kind in KINDS}
    assert layers == {
        "plain": (),
        "points": (),
        "attention": (4, 6),
        "most layers": (0, 1, 2, 3),
    }
    assert not asking(opened, "plain")[0].wanted.points
    assert asking(opened, "points")[0].wanted.points
    computed, answers = measure("dat_nano", 2, Namespace(times=1, rounds=1))
    assert [row["kind"] for row in computed] == list(KINDS)
    sizes = [row["json_kb"] for row in answers]
    assert sizes == sorted(sizes)
    assert all(row["grpc_kb"] < row["json_kb"] for row in answers)
    shown = tables({"computed": computed, "answers": answers})
    assert shown.count("| dat_nano |") == len(KINDS) * 2 - 1
