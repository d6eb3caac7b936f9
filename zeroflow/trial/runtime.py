"""Options of a trial's processes, which a person sets and which never change what is computed."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zeroflow.defaults import CACHE_BYTES
from zeroflow.errors import ConfigError

if TYPE_CHECKING:
    from zeroflow import Placement


@dataclass(frozen=True)
class RuntimeOptions:
    """How a trial uses its processes.

    Attributes:
        evaluation_batch: images per forward pass outside training.
        loader_threads: of each process, that make mini-batches ahead; 0: none; None: 4 on a GPU, 0 on a CPU.
        cache_bytes: the most that decoded images of all data sets, and the most that features of frozen backbones, may take on
            a machine's disk; 0: nothing is kept.
        endpoint: address of a black box, or a callable's name ``module:attribute``; None: no endpoint is named.
        endpoint_timeout: seconds of one try.
        price_per_1000_images: that the endpoint is asked for.
        keep_tasks: whether every finished task is kept beside the results, for cells that branch from it (``later``).

    Raises:
        ConfigError: a value is wrong; the message begins with its name.
    """

    evaluation_batch: int = 64
    loader_threads: int | None = None
    cache_bytes: int = CACHE_BYTES
    endpoint: str | None = None
    endpoint_timeout: float = 30.0
    price_per_1000_images: float | None = None
    keep_tasks: bool = False

    def __post_init__(self) -> None:
        require_integer("evaluation_batch", self.evaluation_batch, 1)
        if self.loader_threads is not None:
            require_integer("loader_threads", self.loader_threads, 0)
        require_integer("cache_bytes", self.cache_bytes, 0)
        require_endpoint(self.endpoint)
        if not isinstance(self.endpoint_timeout, int | float) or not 0 < self.endpoint_timeout < math.inf:
            raise ConfigError(f"endpoint_timeout={self.endpoint_timeout!r}: expected a number > 0, seconds")
        require_amount("price_per_1000_images", self.price_per_1000_images)
        if not isinstance(self.keep_tasks, bool):
            raise ConfigError(f"keep_tasks={self.keep_tasks!r}: expected true or false")

    def trial_placement(self, *, data_dir: str | None, device: str, threads: int, results: str | None) -> Placement:
        """The placement of a trial with these options; see ``Placement`` for the arguments."""
        from zeroflow import Placement

        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(RuntimeOptions)}
        return Placement(data_dir=data_dir, device=device, threads=threads, results=results, **options)


def require_integer(name: str, value: object, least: int) -> None:
    """Raise ``ConfigError`` for anything but an integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name}={value!r}: expected an integer >= {least}")


def require_amount(name: str, value: object) -> None:
    """Raise ``ConfigError`` for anything but None and a number of at least 0."""
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool) or not value >= 0):
        raise ConfigError(f"{name}={value!r}: expected a number >= 0")


def require_endpoint(endpoint: object) -> None:
    """Raise ``ConfigError`` for anything but None, an address and a callable's name."""
    if not isinstance(endpoint, str | None):
        raise ConfigError(
            f"endpoint={endpoint!r}: expected an address such as http://127.0.0.1:8017/, or a callable as my_module:features"
        )
    if endpoint is not None:
        from zeroflow.models.endpoint import check_address
        from zeroflow.models.named import is_name

        if not is_name(endpoint):
            check_address(endpoint)
