"""What the driver hears of Tune's trials."""

from __future__ import annotations

from collections.abc import Callable

from ray import tune
from ray.tune.logger import LoggerCallback


class TrialCallback(LoggerCallback):
    """Told when a trial starts, reports and ends, however it ends."""

    def __reduce__(self) -> tuple[Callable[[], tune.Callback], tuple[()]]:
        return (tune.Callback, ())  # Tune pickles callbacks into a snapshot that nobody reads
