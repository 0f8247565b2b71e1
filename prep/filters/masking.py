"""Masking: e-mail addresses, public IP addresses, phone numbers and secrets are replaced, and counted by kind.

What counts as one of them stands in `addresses` and `credentials`. A kernel finds the documents that may hold
something; only these become Python strings. What is put in their place:

    kind    default          default replacement
    email   on               email@example.com (as in FineWeb)
    ipv4    on (`ip`)        192.0.2.1         (RFC 5737; FineWeb draws from six public addresses that did not answer)
    ipv6    on (`ip`)        2001:db8::1       (RFC 3849; FineWeb leaves IPv6)
    phone   off              555-0100          (kept for fiction)
    secret  off (`secrets`)  <SECRET>

Masking is done over and over until nothing changes, so masking twice is the same as masking once. A replacement that
would itself be masked is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from prep.filters.addresses import Masked, mask_emails, mask_ipv4, mask_ipv6, mask_phones
from prep.filters.credentials import mask_secrets
from prep.stages import NOTHING_ADDED, Tally, replace_text
from shards.errors import UserError
from shards.settings import Settings, validate

VERSION = 1  # raise it when the same text would be masked differently
MOST_ROUNDS = 16
# secrets first: a password in a link or a token may hold what looks like something else
MASKERS: dict[str, Callable[[str, str], Masked]] = {
    "secret": mask_secrets,
    "email": mask_emails,
    "ipv4": mask_ipv4,
    "ipv6": mask_ipv6,
    "phone": mask_phones,
}


class MaskSettings(Settings):
    """The section `mask` of a recipe: which kinds are masked, and by what."""

    email: bool = True
    ip: bool = True
    phone: bool = False
    secrets: bool = False
    email_replacement: str = Field("email@example.com", min_length=1)
    ipv4_replacement: str = Field("192.0.2.1", min_length=1)
    ipv6_replacement: str = Field("2001:db8::1", min_length=1)
    phone_replacement: str = Field("555-0100", min_length=1)
    secret_replacement: str = Field("<SECRET>", min_length=1)

    @model_validator(mode="after")
    def _masks_something(self) -> MaskSettings:
        if not (self.email or self.ip or self.phone or self.secrets):
            raise ValueError("nothing to mask; switch on email, ip, phone or secrets")
        return self

    def replacements(self) -> dict[str, str]:
        """Kind -> replacement, of the kinds that are masked."""
        on = {"secret": self.secrets, "email": self.email, "ipv4": self.ip, "ipv6": self.ip, "phone": self.phone}
        return {kind: getattr(self, f"{kind}_replacement") for kind, wanted in on.items() if wanted}


@dataclass(frozen=True)
class MaskStage:
    """Masks documents; keeps them all.

    Attributes:
        replacements: kind (a key of MASKERS) -> what is put in its place.
    """

    replacements: dict[str, str]
    name: str = "mask"
    adds: pa.Schema = NOTHING_ADDED

    def describe(self) -> dict[str, Any]:
        """Kinds, replacements and the version of the definitions."""
        return {"version": VERSION, "replacements": self.replacements}

    def __call__(self, batch: pa.RecordBatch, tally: Tally) -> pa.RecordBatch:
        """The documents, masked; counts `masked.KIND` and, as `masked.documents`, those that changed."""
        texts = batch.column("text")
        masked, counts = self.mask(texts)
        for kind, number in counts.items():
            tally.count(f"masked.{kind}", number)
        if not masked:
            return batch
        tally.count("masked.documents", len(masked))
        changed = np.zeros(len(texts), bool)
        changed[sorted(masked)] = True
        new = pa.array([masked[row] for row in sorted(masked)], texts.type)
        return replace_text(batch, pc.replace_with_mask(texts, pa.array(changed), new))

    def mask(self, texts: pa.Array) -> tuple[dict[int, str], dict[str, int]]:
        """Mask a column of texts.

        >>> MaskStage({"email": "<EMAIL>"}).mask(pa.array(["nothing", "write to ann@site.org"]))
        ({1: 'write to <EMAIL>'}, {'email': 1})

        Returns:
            Row -> masked text, of the rows that change; kind -> how many were replaced.
        """
        from prep.filters import masking_kernel

        bits = {kind: getattr(masking_kernel, kind.upper()) for kind in MASKERS if kind in self.replacements}
        masked: dict[int, str] = {}
        counts: dict[str, int] = {}
        rows = list(range(len(texts)))
        for _ in range(MOST_ROUNDS):  # what was put in may stand beside something that was not whole before
            hints = masking_kernel.find_hints(texts, sum(bits.values()))
            changed: dict[int, str] = {}
            for place in np.flatnonzero(hints).tolist():
                text = before = texts[place].as_py()
                for kind, bit in bits.items():
                    if hints[place] & bit:
                        text, number = MASKERS[kind](text, self.replacements[kind])
                        counts[kind] = counts.get(kind, 0) + number
                if text != before:
                    changed[rows[place]] = text
            if not changed:
                break
            masked |= changed
            rows, texts = list(changed), pa.array(changed.values(), texts.type)
        return masked, {kind: number for kind, number in counts.items() if number}


def build(settings: dict[str, Any], where: str) -> MaskStage:
    """The stage of a recipe's section `mask`.

    Args:
        settings: the section.
        where: its place, for messages.

    Raises:
        UserError: a wrong setting, nothing to mask, or a replacement that would itself be masked.
    """
    replacements = validate(MaskSettings, settings, where).replacements()
    stage = MaskStage(replacements)
    again = stage.mask(pa.array(replacements.values(), pa.string()))[0]
    for row, (kind, replacement) in enumerate(replacements.items()):
        if row in again:
            raise UserError(
                f"{where}: {kind}_replacement: '{replacement}' would itself be masked, as '{again[row]}'; "
                f"use an address kept for examples, or a word in brackets"
            )
    return stage
