"""Where a replica is in its life, as its probes see it."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Lifecycle:
    """From starting over ready to draining.

    Attributes:
        engine_healthy: whether every device can still be trusted.
        started: whether warm-up is over.
        draining: whether the replica was told to leave.
    """

    engine_healthy: Callable[[], bool] = field(repr=False)
    started: bool = False
    draining: bool = False

    @property
    def live(self) -> bool:
        """Whether the process should go on; false when only a restart can help."""
        return self.engine_healthy()

    @property
    def ready(self) -> bool:
        """Whether requests should be sent here."""
        return self.started and not self.draining and self.live
