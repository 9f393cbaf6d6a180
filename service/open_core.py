"""What answers for a model: decoders and core, put together. Needs no torch."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from service import process
from service.batching.queue import Queue
from service.images.decoders import Decoders
from service.memory import reach_heap
from service.metrics.model import ModelMetrics
from service.metrics.replica import Metrics
from service.models.card import ModelFacts
from service.served_tasks import TASKS, ServedTask
from service.settings.limits import Limits
from service.tasks.core import AnyCore
from service.threads import open_pool


def open_workers(threads: int) -> ThreadPoolExecutor:
    """Threads that decode uploads and prepare answers, each for itself.

    Raises:
        RuntimeError: the system gives no more threads.
    """

    def begin() -> None:
        process.compute_alone()
        reach_heap()

    return open_pool(threads, "decode", begin)


def open_decoders(limits: Limits, metrics: Metrics) -> Decoders:
    """The threads of `open_workers`, with the line of images before them.

    Raises:
        RuntimeError: the system gives no more threads.
    """
    pool = open_workers(limits.decoders)
    return Decoders(pool, limits.decoders, limits.pixels_in_flight, metrics.pixels_in_flight)


def open_core(  # noqa: PLR0917
    facts: ModelFacts,
    queue: Queue,
    decoders: Decoders,
    limits: Limits,
    metrics: ModelMetrics,
    tasks: Sequence[ServedTask] = TASKS,
) -> AnyCore:
    """What answers the requests of a model."""
    task = next(task for task in tasks if task.name == facts.card.task)
    return task.core(
        facts.config,
        facts.card,
        facts.labels,
        queue,
        decoders=decoders,
        limits=limits,
        metrics=metrics,
    )
