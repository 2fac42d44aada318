"""Where trials run, as the searcher sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from graft.runtime.trials import Asked, Loss


class Seats:
    """Where the trials of an executor run; here, each by itself."""

    def has_seat(self) -> bool:
        """Tells whether another trial may begin now."""
        return True

    def take(self, asked: Asked, folder: Path) -> dict[str, Any]:
        """Seats a trial; returns what its process is told of that. Only where there is a seat.

        Args:
            asked: The trial.
            folder: Its own, where its recipe is.
        """
        return {}

    def loss_of(self, number: int) -> Loss | None:
        """Says why what a trial ran in is lost; None where it is not, or not known to be."""
        return None

    def goes_on_without(self, number: int) -> bool:
        """Gives up what a trial ran in; tells whether its trials find seats elsewhere."""
        return False
