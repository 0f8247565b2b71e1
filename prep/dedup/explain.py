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
from prep.dedup.settings import DedupSettings

NEED_DOCUMENT, NEED_BAND, NEED_UNIT, BASE = 64, 32, 40, 400 << 20
PARTITION_UNITS = 1 << 24
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


def need_units(units: int, partition: int = PARTITION_UNITS, workers: int = 1) -> Need:
    """What the cutting of repeated units needs, of which `partition` are worked through at a time by each worker.

    Repeats are the most where all units are the same: 8 bytes each, in the process that decides. On the disk lie
    hashes 8, repeats 8, cuts 1, and, where there are several partitions, the hashes by partition and their numbers 16.
    """
    at_once = min(units, partition) * min(workers, -(-units // partition))
    return Need(8 * units + NEED_UNIT * at_once + BASE * (workers + 1), (33 if units > partition else 17) * units)


def explain(settings: DedupSettings, *, number: int | None = None, workers: int = 1) -> str:
    """What a deduplication needs, and for MinHash the collision curve as a table with bars.

    Args:
        settings: of the deduplication.
        number: about how many documents there are (for repeated units: paragraphs or lines that are long enough);
            None: show the need for several numbers.
        workers: processes.
    """
    lines = _curve(settings) if settings.method == "minhash" else []
    what = f"{settings.level}s" if settings.level else "documents"
    lines.append(f"{what:>17}      memory        disk")
    million = 10 if settings.level else 1
    for count in [number] if number is not None else [million * 10**power for power in (6, 7, 8)]:
        if settings.level:
            wanted = need_units(count, workers=workers)
        else:
            wanted = need(count, bands=settings.bands if settings.method == "minhash" else 0, workers=workers)
        text = f"{count:,}" if number is None else f"about {count:,}"
        lines.append(f"{text:>17}  {megabytes(wanted.memory):>10}  {megabytes(wanted.disk):>10}")
    note = f"with {workers} {'worker' if workers == 1 else 'workers'}"
    if settings.method == "minhash":
        note += "; on top 24 bytes of memory per pair of candidates, 16 of disk per shingle of a candidate"
    note += "; JSON Lines and CSV are written once more, to OUT/scratch: as much disk as they hold text"
    return "\n".join([*lines, note])


def _curve(settings: DedupSettings) -> list[str]:
    bands, rows, threshold = settings.bands, settings.rows, settings.threshold
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
    return [*lines, ""]


def megabytes(size: int) -> str:
    """Bytes for people: "640 MB", "2.5 GB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
