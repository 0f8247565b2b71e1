"""What a deduplication is told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from prep.dedup.minhash import BANDS, PERMUTATIONS, ROWS, SEED
from prep.dedup.paragraphs import MAX_CUT, MIN_CHARACTERS
from shards.errors import UserError, unknown_name

Method = Literal["exact", "minhash", "paragraph", "line"]
METHODS: tuple[str, ...] = get_args(Method)
KEEPERS = ("first", "longest", "highest:COLUMN")
HIGHEST = "highest:"
THRESHOLD = 0.8
MAX_REMOVED, GUARD_DOCUMENTS = 0.5, 1_000
VERSION = 1  # raise it when the same settings remove other documents than before


@dataclass(frozen=True)
class Settings:
    """Options of a deduplication.

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

    Raises:
        UserError: a value that cannot be.
    """

    method: Method = "minhash"
    threshold: float = THRESHOLD
    bands: int = BANDS
    rows: int = ROWS
    seed: int = SEED
    keep: str = "first"
    min_characters: int = MIN_CHARACTERS
    max_cut: float = MAX_CUT
    max_removed: float = MAX_REMOVED

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"dedup: {unknown_name('method', self.method, METHODS)}")
        if self.keep not in KEEPERS[:2] and not (self.keep.startswith(HIGHEST) and self.keep[len(HIGHEST) :]):
            raise UserError(f"dedup: {unknown_name('keeper policy', self.keep, KEEPERS)}")
        for name in ("threshold", "max_cut", "max_removed"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"dedup: {name} is {getattr(self, name):g}; it is a share, from 0 to 1")
        if self.threshold == 0:
            raise UserError("dedup: threshold is 0; every document would be a duplicate of every other, take 0.5 to 1")
        for name in ("bands", "rows", "min_characters"):
            if getattr(self, name) < 1:
                raise UserError(f"dedup: {name} is {getattr(self, name)}; it must be 1 or more")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"dedup: seed is {self.seed}; it must be from 0 to 2^32 - 1")

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
        left_out = {"max_removed"}
        if self.level:
            left_out |= {"threshold", "bands", "rows", "seed", "keep"}
        else:
            left_out |= {"min_characters", "max_cut"}
        if self.method == "exact":
            left_out |= {"threshold", "bands", "rows", "seed"}
        return {"version": VERSION, **{name: value for name, value in asdict(self).items() if name not in left_out}}
