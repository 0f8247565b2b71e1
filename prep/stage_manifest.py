"""`manifest.json` of a stage's output folder: which documents lie there. It is written last: with it, all is there."""

from __future__ import annotations

from typing import Any, NamedTuple

import orjson

from prep.documents import DOCUMENT
from prep.storage import Folder
from shards.errors import UserError

MANIFEST, KIND, VERSION = "manifest.json", "minigpt documents", 1
STATE, MARK = "state", "stage.json"  # state/stage.json is written first: the folder is a stage's, finished or not
DOCUMENTS = "documents"  # in a recipe's folder


class StageFolder(NamedTuple):
    """A stage's folder that is finished, and its manifest."""

    folder: Folder
    manifest: dict[str, Any]


def find_documents(folder: Folder) -> StageFolder | None:
    """The documents of a stage's folder, or of a recipe's; None: it is neither.

    Raises:
        UserError: the stage is not finished. What lies there is no input: removed documents are among it.
    """
    for place in (folder, folder.child(DOCUMENTS)):
        if manifest := read_manifest(place):
            return StageFolder(place, manifest)
        if is_stage_folder(place):
            raise UserError(f"{place}: this stage is not finished; run its command again before reading its documents")
    return None


def is_stage_folder(folder: Folder) -> bool:
    """Whether a stage writes or wrote here."""
    return folder.child(STATE).exists(MARK)


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
