"""What is told of a model on each device when it is loaded."""

import structlog
from prometheus_client import CollectorRegistry

from service.engine.device import open_devices
from service.metrics.replica import Metrics
from service.models.lineup import ModelEntry
from service.open_model import Shared, open_model
from service.settings.settings import Settings


async def test_a_line_of_the_log_and_a_metric_say_what_computes_on_each_device():
    registry, settings = CollectorRegistry(), Settings()
    metrics, devices = Metrics(registry), open_devices("cpu,cpu", 1)
    shared = Shared(settings, devices, metrics)
    for name, dtype, bytes_each in (("dat_nano", "bfloat16", 2), ("dat_nano", "float32", 4)):
        entry = ModelEntry(name=name, variant=name, version=dtype, dtype=dtype, max_batch=1)
        opened = open_model(entry, shared)
        with structlog.testing.capture_logs() as lines:
            await opened.load()
        opened.batcher.open()
        weights = opened.facts.card.parameters * bytes_each
        for line, device in zip(lines, ("cpu:0", "cpu:1"), strict=True):
            assert line.pop("seconds") > 0
            assert abs(line.pop("weights_mb") - weights / 1e6) < 0.1
            assert line == {
                "event": "computes", "log_level": "info", "model": name, "device": device,
                "hardware": "cpu", "backend": "torch", "dtype": dtype, "kernels": "off: cpu",
                "tf32": "off", "graphs": 0, "graphs_mb": 0,
            }  # fmt: skip
            labels = ("hardware", "backend", "dtype", "kernels", "tf32", "device", "model")
            assert registry.get_sample_value(
                "dat_model_engine_info", {label: line[label] for label in labels}
            )
    for device in devices:
        assert device.close()
