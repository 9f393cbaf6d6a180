"""What a server has counted of everything that it was sent."""

from collections import Counter

from tests.server import RunningServer


def counters(server: RunningServer) -> dict[str, float]:
    """What only ever grows: counters, and histograms by their buckets."""
    return {
        name: value
        for name, value in server.metrics().items()
        if name.split(",")[0].endswith(("_total", "_bucket", "_count", "_sum"))
        and not name.startswith(("process_", "python_"))
    }


def assert_no_step_back(before: dict[str, float], after: dict[str, float]) -> None:
    """Nothing that grows is less than it was, or gone."""
    assert before.keys() <= after.keys()
    assert {name for name, value in before.items() if after[name] < value} == set()


def in_flight(server: RunningServer) -> float:
    """Requests received and not yet answered, over all transports."""
    return sum(v for n, v in server.metrics().items() if n.startswith("dat_requests_in_flight"))


def device_rows(server: RunningServer) -> float:
    """Images that the device computed."""
    return server.metrics()["dat_batch_images_total,kind=real,model=dat_nano"]


def outcomes(server: RunningServer) -> Counter[str]:
    """Images by what became of each."""
    counted: Counter[str] = Counter()
    for name, value in server.metrics().items():
        if name.startswith("dat_image_outcomes_total"):
            counted[name.split("code=")[1].split(",")[0]] += int(value)
    return counted


def seen(server: RunningServer) -> float:
    """Requests that the server knows of, whether or not they are over."""
    metrics = server.metrics()
    counted = ("dat_requests_total", "dat_requests_in_flight")
    return sum(value for name, value in metrics.items() if name.startswith(counted))
