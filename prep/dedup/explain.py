"""What a choice of bands finds, and what a deduplication needs, before anything is computed.

A pair of documents with Jaccard similarity s shares all `rows` values of a band with probability s^rows, so it becomes
a candidate with probability 1 - (1 - s^rows)^bands. Verification removes the candidates below the threshold, so the
curve says what is missed and how much is verified in vain, never what is removed wrongly.

Memory, of the process that decides: NEED_DOCUMENT bytes per document (digests 16, their order 8, ranks 4, keepers and
similarities 8 each, and copies of those), 24 per edge, and the shingles of the candidates as a memory map, which the
system may drop; of each worker while it sorts a band: NEED_BAND bytes per document (keys 8, order 8, ranks 4, room);
BASE for the libraries of each process and the batches that it reads.
"""

from __future__ import annotations

from typing import NamedTuple

from prep.dedup.minhash import BANDS, ROWS

NEED_DOCUMENT, NEED_BAND, NEED_UNIT, BASE = 64, 32, 32, 400 << 20
SIMILARITIES = [round(0.5 + 0.05 * step, 2) for step in range(11)]
_WIDTH = 50


class Need(NamedTuple):
    """Bytes: resident memory of all processes together, and of scratch files."""

    memory: int
    disk: int


def collision(similarity: float, bands: int = BANDS, rows: int = ROWS) -> float:
    """Probability that a pair of this similarity becomes a candidate.

    >>> round(collision(0.8, 18, 7), 3)
    0.986
    """
    return float(1 - (1 - similarity**rows) ** bands)


def need(documents: int, *, bands: int = BANDS, workers: int = 1) -> Need:
    """What a run needs for so many documents, edges and shingles of candidates aside (with few duplicates, little)."""
    memory = documents * (NEED_DOCUMENT + NEED_BAND * min(workers, max(bands, 1))) + BASE * (workers + 1)
    return Need(memory, documents * (8 * bands + 24))


def need_units(units: int, partition: int, workers: int = 1) -> Need:
    """What the cutting of repeated units needs, of which `partition` are worked through at a time by each worker.

    Repeats are the most where all units are the same: 8 bytes each, in the process that decides.
    """
    at_once = min(units, partition) * min(workers, -(-units // partition))
    return Need(8 * units + NEED_UNIT * at_once + BASE * (workers + 1), 17 * units)


def explain(
    *, threshold: float, bands: int = BANDS, rows: int = ROWS, documents: int | None = None, workers: int = 1
) -> str:
    """The collision curve as a table with bars, and the need for `documents`, or for 1, 10 and 100 million."""
    lines = [
        f"{bands} bands x {rows} rows = {bands * rows} of the hashes of a signature; threshold {threshold:g}",
        "",
        "similarity  candidate",
    ]
    for similarity in SIMILARITIES:
        found = collision(similarity, bands, rows)
        note = "verified, stays" if similarity < threshold else f"misses {1 - found:.2%}"
        bar = "█" * round(found * _WIDTH)
        lines.append(f"      {similarity:.2f}     {found:.4f}  {bar:<{_WIDTH}}  {note}")
    lines += ["", "  documents      memory        disk"]
    for number in [documents] if documents is not None else [10**6, 10**7, 10**8]:
        wanted = need(number, bands=bands, workers=workers)
        lines.append(f"{number:>11,}  {megabytes(wanted.memory):>10}  {megabytes(wanted.disk):>10}")
    plural = "worker" if workers == 1 else "workers"
    lines.append(
        f"with {workers} {plural}; on top 24 bytes of memory per pair of candidates, "
        f"8 of disk per shingle of a candidate"
    )
    return "\n".join(lines)


def megabytes(size: int) -> str:
    """Bytes for people: "640 MB", "2.5 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
