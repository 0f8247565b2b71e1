"""Lists that the user gives: blocked addresses on a kept column, and words that a text may not hold (or not often).

A list is a text file in UTF-8, one entry a line; blank lines and lines that begin with # are left out. Its digest is
part of what a stage describes, so a changed list recomputes what depends on it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from prep.stages import NOTHING_ADDED, Tally
from shards.errors import UserError
from shards.settings import Settings

if TYPE_CHECKING:
    from prep.filters.automaton import Automaton


class UrlSettings(Settings):
    """Block lists for addresses.

    Attributes:
        column: the kept column that holds the address.
        domains: files of domains; a document of one of them, or of a domain below it, goes.
        urls: files of whole addresses (with or without scheme; `#...` and a last `/` do not matter).
        substrings: files of texts that may stand nowhere in the address, in any case.
    """

    column: str = "url"
    domains: list[str] = Field(default_factory=list)
    urls: list[str] = Field(default_factory=list)
    substrings: list[str] = Field(default_factory=list)


class WordListSettings(Settings):
    """A list of words or phrases, in any case.

    Attributes:
        name: of the list, for the report.
        files: where the entries are.
        match: whole words (`word`), or anywhere (`substring`, for scripts without spaces).
        max_matches: how many matches a document may have.
    """

    name: str = "list"
    files: list[str] = Field(min_length=1)
    match: Literal["word", "substring"] = "word"
    max_matches: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Lists:
    """Files of one kind, and the digest of what stood in them when the stage was made."""

    files: tuple[str, ...]
    digest: str

    @classmethod
    def find(cls, files: list[str], where: str) -> Lists:
        """Read the files for their digest.

        Raises:
            UserError: a file is missing, no UTF-8, or without entries.
        """
        names = tuple(str(Path(name).expanduser().resolve()) for name in files)
        hashed = hashlib.sha256()
        for name in names:
            if not (entries := _entries(name, where)):
                raise UserError(f"{where}: {name}: the list has no entries")
            hashed.update("\n".join([*entries, ""]).encode())
        return cls(names, hashed.hexdigest()[:32] if names else "")

    def entries(self) -> list[str]:
        """All entries, each once, in their order.

        Raises:
            UserError: a file has changed since.
        """
        if Lists.find(list(self.files), "word list").digest != self.digest:
            raise UserError(f"{', '.join(self.files)}: changed while the run goes on; start it again")
        return list(dict.fromkeys(entry for name in self.files for entry in _entries(name, "word list")))


def _entries(name: str, where: str) -> list[str]:
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: the list {name} cannot be read: {error}") from None
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


@dataclass(frozen=True)
class UrlStage:
    """Removes documents by their address; a document without one (null or empty) stays."""

    column: str
    domains: Lists
    urls: Lists
    substrings: Lists
    name: str = "urls"

    @classmethod
    def load(cls, settings: UrlSettings, where: str) -> UrlStage:
        """From settings; reads the lists.

        Raises:
            UserError: a list cannot be read, or there is none.
        """
        if not (settings.domains or settings.urls or settings.substrings):
            raise UserError(f"{where}: urls: no list; give domains, urls or substrings")
        domains, urls, substrings = settings.domains, settings.urls, settings.substrings
        return cls(settings.column, Lists.find(domains, where), Lists.find(urls, where), Lists.find(substrings, where))

    @property
    def adds(self) -> pa.Schema:
        """Nothing."""
        return NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """Column and digests of the lists."""
        digests = {name: getattr(self, name).digest for name in ("domains", "urls", "substrings")}
        return {"stage": "urls", "version": 1, "column": self.column, **digests}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents whose address is on no list.

        Raises:
            UserError: the column is missing, or is no text.
        """
        from prep.filters import automaton

        place = batch.schema.get_field_index(self.column)
        if place < 0:
            raise UserError(
                f"urls: the documents have no column '{self.column}'; keep it when they are read "
                f"(columns here: {', '.join(batch.schema.names)})"
            )
        column = batch.column(place)
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            raise UserError(f"urls: the column '{self.column}' is {column.type}, not text")
        if batch.num_rows == 0:
            return batch
        urls = column.fill_null("")
        left = np.ones(batch.num_rows, bool)
        rules = (("domain", self.domains), ("url", self.urls), ("substring", self.substrings))
        details = column.to_pylist()
        for rule, lists in rules:
            if not lists.files:
                continue
            if rule == "substring":
                found = automaton.count_matches(urls, _automaton(lists, False))[0] > 0
            else:
                found = automaton.find_addresses(urls, _addresses(lists), whole=rule == "url")
            tally.reject(batch, found & left, f"{self.name}.{rule}", detail=details)
            left &= ~found
        return batch if left.all() else batch.filter(pa.array(left))


@dataclass(frozen=True)
class WordListStage:
    """Removes documents that hold more words of a list than they may."""

    lists: Lists
    whole_words: bool
    max_matches: int
    name: str

    @classmethod
    def load(cls, settings: WordListSettings, where: str) -> WordListStage:
        """From settings; reads the lists.

        Raises:
            UserError: a list cannot be read.
        """
        lists = Lists.find(settings.files, where)
        return cls(lists, settings.match == "word", settings.max_matches, f"words_{settings.name}")

    @property
    def adds(self) -> pa.Schema:
        """Nothing."""
        return NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """Digest of the list, and the options."""
        return {
            "stage": "words",
            "version": 1,
            "digest": self.lists.digest,
            "whole_words": self.whole_words,
            "max_matches": self.max_matches,
        }

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents with at most `max_matches` matches."""
        from prep.filters import automaton

        if batch.num_rows == 0:
            return batch
        built = _automaton(self.lists, self.whole_words)
        matches, first = automaton.count_matches(batch.column("text"), built)
        rule = f"{self.name}.matches"
        tally.histogram(rule, matches.astype(np.float64), unit="count", high=self.max_matches)
        broken = matches > self.max_matches
        if not broken.any():
            return batch
        details = [built.entries[number] if number >= 0 else None for number in first]
        tally.reject(
            batch, broken, rule, value=matches.astype(np.float64), threshold=float(self.max_matches), detail=details
        )
        return batch.filter(pa.array(~broken))


@lru_cache(maxsize=16)
def _automaton(lists: Lists, whole_words: bool) -> Automaton:
    """Built once in a process."""
    from prep.filters import automaton

    return automaton.build(lists.entries(), whole_words=whole_words)


@lru_cache(maxsize=16)
def _addresses(lists: Lists) -> np.ndarray:
    """Sorted hashes of the entries."""
    from prep.filters import automaton

    return automaton.address_hashes(lists.entries())
