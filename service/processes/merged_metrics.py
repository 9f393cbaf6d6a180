"""One truth from the metrics of many processes.

Every process writes its counters, histograms and gauges to files in one folder, as
prometheus_client does for several processes: to count costs what it costs in one process, and
what a process that died has counted stays. The supervisor adds them up when somebody asks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from service.processes.board import Board
from service.processes.shared_forecast import SharedForecast

# What ended processes have counted.
_PAST = "past"


class MergedMetrics(Collector):
    """The metrics of all processes.

    Args:
        folder: of their files.
        board: of the server.
        models: the places on the board of each model, by its name.
        processes: name and id of each process that runs.
        restarts: how often each process was replaced, by its name and why.
    """

    def __init__(
        self,
        folder: Path,
        board: Board,
        models: Callable[[], Mapping[str, Sequence[int]]],
        processes: Callable[[], Iterable[tuple[str, int]]],
        restarts: dict[tuple[str, str], int],
    ) -> None:
        self._folder = folder
        self._files = MultiProcessCollector(None, str(folder))
        self._board = board
        self._models = models
        self._processes = processes
        self._restarts = restarts
        self._lock = Lock()

    def collect(self) -> Iterator[Metric]:
        """Everything, added up."""
        known = list(self._of_board())
        names = {metric.name for metric in known}
        with self._lock:
            counted = self._files.collect()
        yield from (metric for metric in counted if metric.name not in names)
        yield from known
        yield from self._of_processes()

    def bury(self, pid: int) -> None:
        """Add what an ended process has counted to what others had, and drop its files."""
        with self._lock:
            mark_process_dead(pid, str(self._folder))
            self._add_to_past(pid)

    def _add_to_past(self, pid: int) -> None:
        for file in self._folder.glob(f"*_{pid}.db"):
            kind = file.name.removesuffix(f"_{pid}.db")
            if not kind.startswith("gauge"):
                past = MmapedDict(str(self._folder / f"{kind}_{_PAST}.db"))
                for key, value, _, _ in MmapedDict.read_all_values_from_file(str(file)):
                    before, _ = past.read_value(key)
                    past.write_value(key, before + value, 0.0)
                past.close()
            file.unlink()

    def _of_board(self) -> Iterator[Metric]:
        """The gauges that are counted on the board, because several processes change them."""
        board = self._board
        waiting = GaugeMetricFamily(
            "dat_requests_waiting", "Images admitted and not yet on the device.", labels=["model"]
        )
        running = GaugeMetricFamily(
            "dat_requests_running", "Images on the device.", labels=["model"]
        )
        estimate = GaugeMetricFamily(
            "dat_queue_wait_estimate_seconds",
            "Time in which the images that wait now will have their answers.",
            labels=["model"],
        )
        for name, places in self._models().items():
            held = sum(board.count(place)[0] for place in places)
            waiting.add_metric([name], held)
            running.add_metric([name], int(board.running[:, places].sum()))
            estimate.add_metric([name], max(self._estimate_s(place) for place in places))
        yield from (waiting, running, estimate)

    def _estimate_s(self, place: int) -> float:
        held, _, running = self._board.count(place)
        return SharedForecast(self._board, place).expect(held, running).seconds

    def _of_processes(self) -> Iterator[Metric]:
        merged: dict[str, Metric] = {}
        for name, pid in self._processes():
            for metric in ProcessCollector(pid=partial(int, pid), registry=None).collect():
                known = merged.setdefault(
                    metric.name, Metric(metric.name, metric.documentation, metric.type)
                )
                for sample in metric.samples:
                    known.add_sample(sample.name, {"process": name}, sample.value)
        yield from merged.values()
        restarts = CounterMetricFamily(
            "dat_process_restarts",
            "Processes of this server that ended and were replaced, by why.",
            labels=["process", "reason"],
        )
        for labels, count in list(self._restarts.items()):
            restarts.add_metric(labels, count)
        yield restarts


def registry_of(merged: MergedMetrics) -> CollectorRegistry:
    """A registry that shows them."""
    registry = CollectorRegistry()
    registry.register(merged)
    return registry
