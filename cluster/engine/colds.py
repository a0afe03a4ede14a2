"""What the scheduler wants to know of experts that are not in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ColdCosts(Protocol):
    """Who knows what prompts will make groups load. What a prompt needs is whatever `need` gives, None where nothing
    can be cold."""

    def need(self, prompt_ids: Sequence[int]) -> Any:
        """What a prompt will probably want."""
        ...

    def cold_bytes(self, need: Any, beside: Sequence[Any] = ()) -> float:
        """Bytes that will probably be loaded for it, and not for those beside it anyway."""
        ...

    def seconds(self, num_bytes: float) -> float:
        """What loading so many bytes takes."""
        ...
