"""Which models a replica serves: the one of the settings, or those of a model file."""

import tomllib
from pathlib import Path
from typing import Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from service.command_errors import StartupError
from service.models.folder import look_into
from service.settings.batching import Batching
from service.settings.engine import Dtype
from service.settings.environment import PREFIX
from service.settings.model import ModelChoice
from service.settings.settings import Settings
from service.text_file import first_fault, read_text


class ModelFileError(StartupError):
    """A model file that cannot be used; the message names the file, the field and the reason."""


class ModelEntry(ModelChoice):
    """One model, with what it has of its own instead of the general settings."""

    dtype: Dtype | None = None
    max_batch: int | None = None
    buckets: tuple[int, ...] | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    queue_limit: int | None = None

    @property
    def files(self) -> list[tuple[str, Path]]:
        """The files that it is made of, each with the field that names it."""
        named = [("checkpoint", self.checkpoint), ("labels", self.labels)]
        return [(field, path) for field, path in named if path is not None]

    def batching(self, general: Batching) -> Batching:
        """The general settings of batches with those of this model.

        Raises:
            pydantic.ValidationError: the two contradict each other.
        """
        own = {
            name: value
            for name in ("max_batch", "buckets", "sizes", "queue_limit")
            if (value := getattr(self, name)) is not None
        }
        # The largest batch and the buckets say the same; one of the two replaces both.
        replaced = {"max_batch", "buckets"} if {"max_batch", "buckets"} & own.keys() else set()
        return Batching(**general.model_dump(exclude=replaced) | own)


class Lineup(BaseModel, frozen=True, extra="forbid"):
    """The models of one replica.

    Attributes:
        models: at least one, with distinct names.
        default: the one that answers a request without a name; `None` means the first.
    """

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    default: str | None = None

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [entry.name for entry in self.models]
        if len(names) > 1 and None in names:
            raise ValueError("every model needs a name")
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"two models are called {', '.join(map(str, twice))}")
        if self.default is not None and self.default not in names:
            raise ValueError(
                f"the default {self.default!r} is none of {', '.join(map(str, names))}"
            )
        return self

    def find(self, name: str | None) -> ModelEntry:
        """The model of that name, or the default.

        Raises:
            ModelFileError: there is none of that name.
        """
        wanted = name or self.default
        if wanted is None:
            return self.models[0]
        for entry in self.models:
            if entry.name == wanted:
                return entry
        names = ", ".join(str(entry.name) for entry in self.models)
        raise ModelFileError(f"no model is called {name!r}; there are {names}")


# What a server serves whose settings choose no model.
_DEMO = Lineup(
    models=tuple(
        ModelEntry(name=name)
        for name in ("dat_nano", "mask_rcnn_dat_nano", "semantic_fpn_dat_nano")
    )
)


def choose_models(settings: Settings) -> Lineup:
    """The models that the settings ask for.

    Raises:
        ModelFileError: the model file is missing, malformed, or contradicts the settings.
        FolderError: the folder of the models holds none, or several without a model file.
    """
    model = settings.model
    if not model.model_fields_set:
        return _DEMO
    if model.file is not None:
        require_file(model.file, f"{PREFIX}MODEL__FILE: ")
        return _read_file(model.file, settings)
    choice = model.model_dump(exclude={"file", "folder"})
    if model.folder is not None:
        found = look_into(model.folder)
        if found.model_file is not None:
            return _read_file(found.model_file, settings)
        choice["checkpoint"] = found.checkpoint
        choice["labels"] = choice["labels"] or found.labels
    return Lineup(models=(ModelEntry(**choice),))


def _read_file(path: Path, settings: Settings) -> Lineup:
    """The models of a model file.

    Raises:
        ModelFileError: it is malformed, or contradicts the settings.
    """
    try:
        lineup = Lineup.model_validate(tomllib.loads(read_text(path)))
        for entry in lineup.models:
            _check_batching(path, entry, settings)
    except ValidationError as faults:
        fields = (*Lineup.model_fields, *ModelEntry.model_fields)
        raise ModelFileError(f"{path}: {first_fault(faults, fields)}") from faults
    except (OSError, ValueError) as fault:
        raise ModelFileError(f"{path}: {fault}") from fault
    beside = settings.model.model_fields_set - {"file", "folder", "name"}
    if beside:
        raise ModelFileError(
            f"{path}: names the models, so {', '.join(sorted(beside))} belongs there"
        )
    models = tuple(_beside(path, entry) for entry in lineup.models)
    if settings.model.name is not None and models[0].name is None:  # the only one
        models = (models[0].model_copy(update={"name": settings.model.name}),)
    return lineup.model_copy(update={"models": models})


def _check_batching(path: Path, entry: ModelEntry, settings: Settings) -> None:
    """See that what a model of the file has of its own goes with the settings.

    Raises:
        ModelFileError: it contradicts them.
    """
    named = f"{path}: " if entry.name is None else f"{path}: {entry.name}: "
    try:
        queue_limit = entry.batching(settings.batching).queue_limit
    except ValidationError as faults:
        raise ModelFileError(named + first_fault(faults, ())) from faults
    if queue_limit < settings.limits.max_images:
        raise ModelFileError(
            f"{named}queue_limit must not be under DAT_LIMITS__MAX_IMAGES "
            f"({settings.limits.max_images}), or a full request could never be admitted"
        )


def require_files(settings: Settings, lineup: Lineup) -> None:
    """Open the files that the models of a lineup are made of, and close them again.

    Raises:
        ModelFileError: a file is missing, is not a regular file, or may not be read.
    """
    for entry in lineup.models:
        require_files_of(entry, settings)


def require_files_of(entry: ModelEntry, settings: Settings) -> None:
    """What `require_files` does, for one model.

    Raises:
        ModelFileError: as there.
    """
    chosen = settings.model
    for field, path in entry.files:
        if chosen.file is not None:
            named = f"{chosen.file}: {entry.name}: {field}: "
        elif getattr(chosen, field) is None:  # it was found
            named = f"{PREFIX}MODEL__FOLDER: {field}: "
        else:
            named = f"{PREFIX}MODEL__{field.upper()}: "
        require_file(path, named)


def require_file(path: Path, named: str) -> None:
    """Open a file and close it again.

    Args:
        path: of the file.
        named: where the path comes from, for the message.

    Raises:
        ModelFileError: the file is missing, is not a regular file, or may not be read.
    """
    try:
        if path.exists() and not path.is_file():  # to open a pipe would wait for its writer
            raise ModelFileError(f"{named}{path}: not a file")
        path.open("rb").close()
    except OSError as fault:
        raise ModelFileError(f"{named}{path}: {fault.strerror}") from fault
    except ValueError as fault:  # a NUL in a path of a model file
        raise ModelFileError(f"{named}{path}: {fault}") from fault


def _beside(path: Path, entry: ModelEntry) -> ModelEntry:
    """Files are named relative to the folder of the model file."""
    files = {field: path.parent / file for field, file in entry.files}
    return entry.model_copy(update=files)
