"""Training a fastText classifier from good and bad documents, and the table that helps to choose its threshold.

The documents are those with the smallest xxh3-64 of their texts, as many of each class as fit into the bytes allowed,
in the order of these hashes: the model depends neither on the order of the input nor on chance, and copies of a text
fall on the same side of the split. One thread trains, from a fixed seed: the same documents give the same file (on the
same kind of processor; fastText is compiled for the one that it is installed on). A part of the documents is held out,
and the figures are measured on it with the file that was written.
"""

from __future__ import annotations

import ctypes
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import xxhash

from prep.documents import BrokenInput, Columns, Rejected, too_many_bad
from prep.filters.classifier import ClassifierStage
from prep.filters.fasttext_model import PREFIX, open_model
from prep.progress import Progress
from prep.sources import check_inputs, find_inputs, read_blocks
from prep.train_tokenizer import SmallestHashes
from shards.errors import UserError
from shards.files import publish, write_atomic

POSITIVE, NEGATIVE = PREFIX + "hq", PREFIX + "cc"  # DCLM's names
MIN_DOCUMENTS = 100  # of each class; with fewer there is nothing to hold out
HELD_OUT_BYTES = 50_000_000
SPLIT = 1_000  # hashes are split by their remainder
POSITIVES_KEPT = (0.99, 0.95, 0.9, 0.8, 0.5)
NEGATIVES_KEPT = (0.5, 0.2, 0.1, 0.05, 0.01)
QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)
BATCH = 1_024
ADVICE = "mend it, or give other files"


@dataclass(frozen=True)
class ThresholdRow:
    """What a threshold keeps of the held-out documents; `positive_kept` is the recall."""

    threshold: float
    positive_kept: float
    negative_kept: float
    precision: float


@dataclass(frozen=True)
class ClassifierTraining:
    """What came out.

    Attributes:
        model: the file.
        size: bytes of it.
        positive, negative: documents trained on.
        positive_bytes, negative_bytes: their text.
        positive_held_out, negative_held_out: documents measured on.
        auc: area under the ROC curve: how often a positive document scores above a negative one.
        rows: thresholds, from low to high.
        positive_quantiles, negative_quantiles: scores of the held-out documents at QUANTILES.
        bad: malformed rows that were left out.
        seconds: how long it took.
    """

    model: Path
    size: int
    positive: int
    negative: int
    positive_bytes: int
    negative_bytes: int
    positive_held_out: int
    negative_held_out: int
    auc: float
    rows: tuple[ThresholdRow, ...]
    positive_quantiles: tuple[float, ...]
    negative_quantiles: tuple[float, ...]
    bad: int
    seconds: float

    def table(self) -> str:
        """Thresholds and what they keep, as text."""
        lines = ["threshold  positive kept  negative kept  precision"]
        lines += [
            f"{row.threshold:9.6f}  {row.positive_kept:13.1%}  {row.negative_kept:13.1%}  {row.precision:9.1%}"
            for row in self.rows
        ]
        return "\n".join(lines)


def train_classifier(
    positive: Sequence[str],
    negative: Sequence[str],
    out: Path,
    *,
    word_ngrams: int = 2,
    dimension: int = 32,
    buckets: int = 1_000_000,
    epochs: int = 5,
    learning_rate: float = 0.1,
    min_count: int = 3,
    characters: int = 0,
    held_out: float = 0.1,
    seed: int = 0,
    sample_bytes: int = 500_000_000,
    text_column: str = "text",
    max_bad_rows: float = 0.001,
    say: Callable[[str], None] = print,
) -> ClassifierTraining:
    """Train a classifier and write it, and its settings and figures as JSON beside it.

    Args:
        positive, negative: files, globs and folders with the documents of the classes `hq` and `cc`.
        out: the model; `.bin`, or `.ftz` for a quantised one of about an eighth of the size. The JSON is `OUT.json`.
        word_ngrams: longest n-gram of words that is a feature; 2 as in DCLM.
        dimension: size of a feature's vector. A `.bin` takes 4 x dimension bytes for each bucket and word.
        buckets: hash buckets of the n-grams.
        epochs, learning_rate: of the training.
        min_count: rarer words are left out.
        characters: how much of each document is used; 0: all. Give the rule the same number.
        held_out: share of the documents that is kept for measuring.
        seed: of the first vectors.
        sample_bytes: UTF-8 bytes of text of each class.
        text_column: the column with the text.
        max_bad_rows: largest share of bad rows, looked at from 1,000 rows on.
        say: takes one-line notices.

    Raises:
        UserError: a wrong option, too few documents of a class, too many bad rows, a broken file, or a training that
            does not converge.
    """
    begin = time.monotonic()
    _check_options(out, held_out, word_ngrams, dimension, buckets, epochs, min_count, learning_rate)
    settings = {
        "positive": list(positive),
        "negative": list(negative),
        "word_ngrams": word_ngrams,
        "dimension": dimension,
        "buckets": buckets,
        "epochs": epochs,
        "learning_rate": learning_rate,
        "min_count": min_count,
        "characters": characters,
        "held_out": held_out,
        "seed": seed,
        "sample_bytes": sample_bytes,
    }
    columns = Columns(text_column)
    classes = [
        _read(name, arguments, columns, characters, held_out, sample_bytes, max_bad_rows, say)
        for name, arguments in (("positive", positive), ("negative", negative))
    ]
    (good, good_measured, good_bad), (poor, poor_measured, poor_bad) = classes
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="train-classifier-", dir=out.parent) as scratch:
        text = Path(scratch) / "text"
        _write_lines(text, good, poor)
        say(f"training on {len(good):,} positive and {len(poor):,} negative documents")
        temporary = Path(scratch) / out.name
        _train(
            text,
            temporary,
            wordNgrams=word_ngrams,
            dim=dimension,
            bucket=buckets,
            epoch=epochs,
            lr=learning_rate,
            minCount=min_count,
            seed=seed,
        )
        publish(temporary, out)
    scorer = ClassifierStage(open_model(out, "--out"), POSITIVE)
    good_scores, poor_scores = _score(scorer, good_measured), _score(scorer, poor_measured)
    training = ClassifierTraining(
        model=out,
        size=out.stat().st_size,
        positive=len(good),
        negative=len(poor),
        positive_bytes=sum(len(text.encode()) for text in good),
        negative_bytes=sum(len(text.encode()) for text in poor),
        positive_held_out=len(good_measured),
        negative_held_out=len(poor_measured),
        auc=area_under_curve(good_scores, poor_scores),
        rows=threshold_rows(good_scores, poor_scores),
        positive_quantiles=tuple(np.quantile(good_scores, QUANTILES).tolist()),
        negative_quantiles=tuple(np.quantile(poor_scores, QUANTILES).tolist()),
        bad=good_bad + poor_bad,
        seconds=time.monotonic() - begin,
    )
    figures = {**asdict(training), "model": out.name, "model_xxh3": scorer.model.digest, "quantiles": QUANTILES}
    write_atomic(out.with_name(out.name + ".json"), json.dumps({"settings": settings, "figures": figures}, indent=1))
    return training


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """The share of pairs (positive [n], negative [m]) in which the positive scores higher; ties count half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, "left") + np.searchsorted(ordered, positive, "right")
    return float(below.sum() / 2 / len(positive) / len(negative))


def threshold_rows(positive: np.ndarray, negative: np.ndarray) -> tuple[ThresholdRow, ...]:
    """Thresholds that keep given shares of the positive [n] or negative [m] scores, and 0.5; from low to high."""
    high_first = [np.sort(scores)[::-1].astype(float) for scores in (positive, negative)]
    wanted = {0.5}
    for scores, shares in zip(high_first, (POSITIVES_KEPT, NEGATIVES_KEPT), strict=True):
        wanted |= {float(scores[max(int(np.ceil(share * len(scores))), 1) - 1]) for share in shares}
    rows = []
    for threshold in sorted(wanted):
        good, poor = (int((scores >= threshold).sum()) for scores in high_first)
        precision = good / (good + poor) if good + poor else 1.0
        rows.append(ThresholdRow(threshold, good / len(positive), poor / len(negative), precision))
    return tuple(rows)


def _check_options(out: Path, held_out: float, *numbers: float) -> None:
    if out.suffix not in (".bin", ".ftz"):
        raise UserError(f"--out {out}: end the name in .bin, or in .ftz for a quantised model")
    if not 1 / SPLIT <= held_out <= 0.5:
        raise UserError(f"--held-out {held_out:g}: give a share between {1 / SPLIT:g} and 0.5")
    names = ("--word-ngrams", "--dimension", "--buckets", "--epochs", "--min-count", "--learning-rate")
    for name, number in zip(names, numbers, strict=True):
        if number <= 0:
            raise UserError(f"{name} {number}: give a number above 0")


def _read(
    name: str,
    arguments: Sequence[str],
    columns: Columns,
    characters: int,
    held_out: float,
    sample_bytes: int,
    max_bad_rows: float,
    say: Callable[[str], None],
) -> tuple[list[str], list[str], int]:
    """Documents of a class to train on and to measure on, in the order of their hashes; the number of bad rows."""
    inputs, left_out = find_inputs(arguments)
    for rest in left_out:
        say(str(rest))
    check_inputs(inputs, columns)
    sample, measured = SmallestHashes(sample_bytes), SmallestHashes(HELD_OUT_BYTES)
    rejected: list[Rejected] = []
    rows = bad = read = 0
    with Progress(f"reading {name}", sum(item.size for item in inputs)) as progress:
        for block in read_blocks(inputs, columns):
            try:
                documents = block.load()
            except BrokenInput as error:
                raise UserError(f"{error}; {ADVICE}") from None
            rows, bad = rows + documents.rows, bad + len(documents.rejected)
            rejected += documents.rejected[: 1 - len(rejected)]
            if block.broken:
                raise UserError(f"the rest of a file cannot be read: {block.broken}; {ADVICE}")
            if too_many_bad(bad, rows, max_bad_rows):
                first = f"{rejected[0].file}:{rejected[0].row} ({rejected[0].reason})"
                raise UserError(
                    f"{bad:,} of {rows:,} rows are bad, more than --max-bad-rows {max_bad_rows:g}; the first: {first}"
                )
            for text in documents.batch.column("text").to_pylist():
                content = (text[:characters] if characters else text).encode()
                value = xxhash.xxh3_64_intdigest(content)
                (measured if value % SPLIT < held_out * SPLIT else sample).add(value, content)
            read += block.size
            progress.update(block.consumed, read)
    texts, held = sample.texts(), measured.texts()
    if len(texts) + len(held) < MIN_DOCUMENTS or not texts or not held:
        raise UserError(
            f"--{name} {' '.join(arguments)}: {len(texts) + len(held):,} documents; "
            f"give at least {MIN_DOCUMENTS} of each class (some thousands make a useful classifier)"
        )
    return texts, held, bad


def _write_lines(path: Path, positive: Sequence[str], negative: Sequence[str]) -> None:
    """fastText's input, one document per line, the classes mixed by the hashes of the texts."""
    both = [(label, text) for label, texts in ((POSITIVE, positive), (NEGATIVE, negative)) for text in texts]
    both.sort(key=lambda pair: (xxhash.xxh3_64_intdigest(pair[1].encode()), pair))
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for label, text in both:
            # a word of the text that looks like a label would be taken for one
            line = text.replace("\n", " ").replace(PREFIX, "_" + PREFIX)
            file.write(f"{label} {line}\n")


@contextmanager
def _zeroed_memory() -> Iterator[None]:
    """glibc fills with zeros what it allocates in this time.

    With one thread fastText 0.9.3 sets only a tenth of the first vectors (`DenseMatrix::uniform`) and takes the rest as
    the memory comes, so what a process did before would change the model, or give NaN.
    """
    m_perturb = -6  # from malloc.h: memory is filled with this byte's complement
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        raise UserError(
            "training a classifier needs glibc: with another C library fastText is not reproducible"
        ) from None
    mallopt(m_perturb, 0xFF)
    try:
        yield
    finally:
        mallopt(m_perturb, 0)


def _train(text: Path, out: Path, **options: float) -> None:
    from fasttext import train_supervised

    try:
        with _zeroed_memory():
            model = train_supervised(str(text), thread=1, verbose=0, **options)
    except (RuntimeError, ValueError) as error:  # NaN: the learning rate; an empty vocabulary: min_count
        raise UserError(
            f"fastText stops: {error}; try a lower --learning-rate, a lower --min-count or more text"
        ) from None
    if out.suffix == ".ftz":
        model.quantize(thread=1, verbose=0)
    model.save_model(str(out))


def _score(scorer: ClassifierStage, texts: list[str]) -> np.ndarray:
    """Scores of documents, float32 [n]."""
    parts = [pa.array(texts[at : at + BATCH], pa.string()) for at in range(0, len(texts), BATCH)]
    return np.concatenate([scorer.scores(part) for part in parts])
