"""The models that a server could serve: which are loaded, and loading and unloading them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from service.errors import ModelControlOff
from service.tasks.statistics import ModelStatistics

State = Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]


@dataclass(frozen=True)
class Listed:
    """A version of a model as the repository shows it.

    Attributes:
        name: of the model.
        version: as answers call it; empty where that is not known.
        state: `READY` while it serves; `UNAVAILABLE` where it is not loaded, or its device fails;
            `UNLOADING` while its last requests are answered.
        reason: why it is unavailable; of a version that is ready, why a newer one is not there.
    """

    name: str
    version: str
    state: State
    reason: str = ""

    @classmethod
    def serving(cls, name: str, version: str, works: bool) -> Self:
        """A version that serves.

        Args:
            name: of the model.
            version: as answers call it.
            works: whether a device can run it.
        """
        if works:
            return cls(name, version, "READY")
        return cls(name, version, "UNAVAILABLE", "its device is lost, or it fails again and again")


class Repository(Protocol):
    """The models of the settings."""

    async def index(self) -> Sequence[Listed]:
        """Every model of the settings, and every version that is in memory."""

    async def statistics(self) -> Mapping[str, ModelStatistics]:
        """What was done for each model since the start, by its name."""

    async def load(self, name: str) -> None:
        """Load a model; where it serves already and its settings or files changed, anew.

        The version that serves goes on until the new one is warm, and longer if that cannot be
        used.

        Raises:
            UnknownModel: the settings have no model of that name.
            ModelNotLoaded: it cannot be loaded; the message says why.
            NotReady: the server is starting or leaving.
            Overloaded: too many loads and unloads wait already.
        """

    async def unload(self, name: str) -> None:
        """Take a model out of service, and give its memory back when its last request is answered.

        Raises:
            UnknownModel: neither serves a model of that name nor do the settings have one.
            NotReady: the server is starting or leaving.
            Overloaded: too many loads and unloads wait already.
        """


class GuardedRepository:
    """A repository as callers see it.

    Args:
        repository: of the server.
        control: whether callers may load and unload.
    """

    def __init__(self, repository: Repository, *, control: bool) -> None:
        self._repository = repository
        self._control = control

    @property
    def controlled(self) -> bool:
        """Whether callers may load and unload."""
        return self._control

    async def index(self) -> Sequence[Listed]:
        """See `Repository`."""
        return await self._repository.index()

    async def statistics(self) -> Mapping[str, ModelStatistics]:
        """See `Repository`."""
        return await self._repository.statistics()

    async def load(self, name: str) -> None:
        """See `Repository`.

        Raises:
            ModelControlOff: callers may not.
            ServiceError: as there.
        """
        self._require_control()
        await self._repository.load(name)

    async def unload(self, name: str) -> None:
        """See `Repository`.

        Raises:
            ModelControlOff: callers may not.
            ServiceError: as there.
        """
        self._require_control()
        await self._repository.unload(name)

    def _require_control(self) -> None:
        if not self._control:
            raise ModelControlOff(
                "clients may not load and unload models here; the operator of the server can "
                "allow it with DAT_SERVER__MODEL_CONTROL=true"
            )
