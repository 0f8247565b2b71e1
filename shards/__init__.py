"""Token shards, the mixture as a pure function, and the window loader."""

from typing import Any

__all__ = ["DatasetMixer"]


def __getattr__(name: str) -> Any:
    if name == "DatasetMixer":  # imported when asked for: it needs torch
        from shards.loader import DatasetMixer

        return DatasetMixer
    raise AttributeError(f"module 'shards' has no attribute '{name}'")
