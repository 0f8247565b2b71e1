"""What a deduplication is told."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from prep.dedup.minhash import BANDS, PERMUTATIONS, ROWS, SEED
from prep.dedup.paragraphs import MAX_CUT, MIN_CHARACTERS
from shards.errors import unknown_name
from shards.settings import Settings

Method = Literal["exact", "minhash", "paragraph", "line"]
METHODS: tuple[str, ...] = get_args(Method)
KEEPERS = ("first", "longest", "highest:COLUMN")
HIGHEST = "highest:"
THRESHOLD = 0.8
_NEAR, _UNITS = frozenset({"threshold", "bands", "rows", "seed"}), frozenset({"min_characters", "max_cut"})
_UNUSED: dict[str, frozenset[str]] = {  # what a method does not look at
    "exact": _NEAR | _UNITS,
    "minhash": _UNITS,
    "paragraph": _NEAR | {"keep"},
    "line": _NEAR | {"keep"},
}
VERSION = 1  # raise it when the same settings remove other documents than before


class DedupSettings(Settings):
    """Options of a deduplication; those that its method does not look at are refused.

    Attributes:
        method: "exact" copies; "minhash": exact copies, then near-duplicates; repeated units: "paragraph", "line".
        threshold: lowest Jaccard similarity of near-duplicates.
        bands: of the LSH.
        rows: signature values in a band.
        seed: of the permutations.
        keep: which document of several stays: "first", "longest", "highest:COLUMN".
        min_characters: shorter paragraphs and lines are never cut.
        max_cut: a document that loses more than this share of its characters is dropped.
        max_removed: a source that would lose more than this share of its documents stops the run.
    """

    method: Method = "minhash"
    threshold: float = Field(THRESHOLD, gt=0, le=1)
    bands: int = Field(BANDS, ge=1)
    rows: int = Field(ROWS, ge=1)
    seed: int = Field(SEED, ge=0, lt=2**32)
    keep: str = "first"
    min_characters: int = Field(MIN_CHARACTERS, ge=1)
    max_cut: float = Field(MAX_CUT, ge=0, le=1)
    max_removed: float = Field(0.5, ge=0, le=1)

    @field_validator("method", mode="before")
    @classmethod
    def _known_method(cls, value: Any) -> Any:
        if value not in METHODS:
            raise ValueError(unknown_name("method", str(value), METHODS))
        return value

    @field_validator("keep")
    @classmethod
    def _known_keeper(cls, value: str) -> str:
        if value not in KEEPERS[:2] and not (value.startswith(HIGHEST) and value[len(HIGHEST) :]):
            raise ValueError(unknown_name("keeper policy", value, KEEPERS))
        return value

    @model_validator(mode="after")
    def _no_unused(self) -> DedupSettings:
        unused = sorted(_UNUSED[self.method] & self.model_fields_set)
        if unused:
            name = unused[0]
            methods = [method for method in METHODS if name not in _UNUSED[method]]
            raise ValueError(f"method {self.method} does not look at {name}, which is for {' and '.join(methods)}")
        return self

    @property
    def column(self) -> str | None:
        """The column that decides which document stays, where one does."""
        return self.keep[len(HIGHEST) :] if self.keep.startswith(HIGHEST) else None

    @property
    def level(self) -> Literal["paragraph", "line"] | None:
        """The unit that is cut, for the methods that cut."""
        return self.method if self.method in ("paragraph", "line") else None

    @property
    def hashes(self) -> int:
        """Hashes of a signature: datasketch's default, or as many as the bands need."""
        return max(PERMUTATIONS, self.bands * self.rows)

    def describe(self) -> dict[str, Any]:
        """All that decides which documents go, as JSON; what the method does not look at is left out."""
        left_out = {"max_removed", *_UNUSED[self.method]}
        return {"version": VERSION, **self.model_dump(exclude=left_out)}
