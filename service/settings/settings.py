"""All settings put together, read once from the environment.

A group is a nested model: `DAT_BATCHING__MAX_BATCH` is `Settings.batching.max_batch`.
"""

from typing import Any

from pydantic import BaseModel, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.machine import cores
from service.settings.batching import Batching
from service.settings.engine import Engine
from service.settings.environment import PREFIX, refuse_unknown, written
from service.settings.limits import Limits
from service.settings.log import Log
from service.settings.model import Model
from service.settings.security import Security
from service.settings.server import Server


class Settings(BaseSettings):
    """All settings; the environment is read when it is made.

    Raises:
        pydantic.ValidationError: a value is out of its range, a variable of the prefix is
            unknown, or two settings contradict each other.
    """

    # A list is read where its field is checked, so that its faults are shown as all others are.
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", enable_decoding=False, frozen=True
    )

    model: Model = Model()
    engine: Engine = Engine()
    batching: Batching = Batching()
    limits: Limits = Limits()
    server: Server = Server()
    security: Security = Security()
    log: Log = Log()

    @property
    def front_ends(self) -> int:
        """How many processes answer; 0 where one does all."""
        if self.server.front_ends == "auto":
            spare = cores() - len(self.engine.device.split(","))
            # On two cores one process answers more (`bench.scale`).
            return spare if spare > 1 else 0
        return self.server.front_ends

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: dict[str, Any]) -> dict[str, Any]:
        refuse_unknown(variables())
        return {name: written(group) for name, group in values.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.limits.max_images > self.batching.queue_limit:
            raise ValueError(
                "DAT_LIMITS__MAX_IMAGES must not exceed DAT_BATCHING__QUEUE_LIMIT, or a full "
                "request could never be admitted"
            )
        if self.limits.max_image_bytes > self.limits.max_body_bytes:
            raise ValueError(
                "DAT_LIMITS__MAX_IMAGE_BYTES must not exceed DAT_LIMITS__MAX_BODY_BYTES"
            )
        if self.limits.max_pixels > self.limits.max_request_pixels:
            raise ValueError(
                "DAT_LIMITS__MAX_PIXELS must not exceed DAT_LIMITS__MAX_REQUEST_PIXELS"
            )
        if self.limits.max_shared_memory_bytes and not self.server.open_inference:
            raise ValueError(
                "DAT_LIMITS__MAX_SHARED_MEMORY_BYTES is for the Open Inference Protocol and needs "
                "DAT_SERVER__OPEN_INFERENCE=true"
            )
        if self.limits.max_shared_memory_bytes and self.front_ends:
            raise ValueError(
                "DAT_LIMITS__MAX_SHARED_MEMORY_BYTES needs DAT_SERVER__FRONT_ENDS=0: a region is "
                "registered with one process, and another one may get the request that names it"
            )
        if self.limits.bytes_in_flight < self.limits.max_body_bytes:
            raise ValueError(
                "DAT_LIMITS__MAX_BODY_BYTES must not exceed DAT_LIMITS__MAX_BYTES_IN_FLIGHT, or "
                "the largest request could never be admitted"
            )
        return self


def variables() -> dict[str, tuple[type[BaseModel], str]]:
    """Every environment variable with the group and the field that it sets."""
    groups = {name: field.annotation for name, field in Settings.model_fields.items()}
    return {
        f"{PREFIX}{name}__{field}".upper(): (group, field)
        for name, group in groups.items()
        if isinstance(group, type) and issubclass(group, BaseModel)
        for field in group.model_fields
    }
