"""`manifest.json` of a stage's output folder: which documents lie there. It is written last: with it, all is there."""

from __future__ import annotations

from typing import Any

import orjson

from prep.documents import DOCUMENT
from prep.storage import Folder

MANIFEST, KIND, VERSION = "manifest.json", "minigpt documents", 1


def read_manifest(folder: Folder) -> dict[str, Any] | None:
    """The manifest of a stage's folder; None: it has none, or another program's."""
    content = folder.read(MANIFEST)
    try:
        manifest = orjson.loads(content) if content is not None else None
    except orjson.JSONDecodeError:
        return None
    return manifest if isinstance(manifest, dict) and manifest.get("kind") == KIND else None


def kept_columns(manifest: dict[str, Any]) -> list[str]:
    """The columns of the documents beside id, text and source."""
    return [name for name, _ in manifest["columns"] if name not in DOCUMENT.names]
