"""A light start: what the libraries of a preparation would load without need.

Arrow imports pandas, and numba scipy, as soon as they find them installed, only to know their types: 0.4 s of every
process. Nothing here uses either, so in the processes of `minigpt-prep` they are not found.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

UNUSED = ("pandas", "scipy")


class _NotFound:
    """A finder that is asked first."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Stop at the unused packages, pass on all others."""
        if name in UNUSED:
            raise ModuleNotFoundError(f"No module named {name!r}: not loaded in minigpt-prep", name=name)
        return None


def hide_unused() -> None:
    """Hide the packages from all imports of this process from here on."""
    if not any(isinstance(finder, _NotFound) for finder in sys.meta_path):
        sys.meta_path.insert(0, _NotFound())
