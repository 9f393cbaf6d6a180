"""Images that come as tensors are measured against a running server."""

import pytest

from bench import oip
from bench.load import make_jpeg
from bench.oip_load import tensor_of
from bench.running_server import running_server


@pytest.mark.slow
def test_every_form_is_answered_over_both_wires_and_to_both_clients() -> None:
    shape = {"concurrency": 2, "seconds": 0.6}
    program = oip.PROGRAMS["null"]
    with running_server(None, program, DAT_MODEL__NAME=oip.MODEL) as server:
        for protocol in oip.PROTOCOLS:
            expected = {"http": "200", "grpc": "OK"}[protocol]
            rounds = {form: [oip.load(server, protocol, form, shape)] for form in oip.FORMS}
            for (figures,) in rounds.values():
                assert set(figures["statuses"]) == {expected}
                assert figures["cpu_ms"] > 0
            perf = oip.load_by_perf_analyzer(server, protocol, oip.PERF_FORMS[0], shape)
            assert perf["statuses"]["answered"] > 0
            assert perf["answered_per_s"] > 0
            summary = oip.summary([perf], rounds[oip.OWN])
            assert summary["ratio"] == pytest.approx(perf["cpu_ms"] / rounds[oip.OWN][0]["cpu_ms"])


def test_tensors_are_of_the_picture() -> None:
    jpeg = make_jpeg(8, 6)
    for name, datatype, shape, size in (
        ("image", "BYTES", [1, 1], 4 + len(jpeg)),
        ("pixels", "UINT8", [1, 8, 6, 3], 144),
        ("normalised", "FP32", [1, 3, 8, 6], 4 * 144),
    ):
        given, dimensions, raw = tensor_of(name, jpeg)
        assert (given, dimensions, len(raw)) == (datatype, shape, size)
