"""`python -m tools.bench NAME [options]`: run one benchmark; without a name, list them."""

from __future__ import annotations

import importlib
import sys

from shards.errors import UserError, run_command, unknown_name

BENCHMARKS = {  # name: module and what it measures
    "checkpoint": ("tools.bench.checkpoint_speed", "time that a checkpoint keeps training, in the background and not"),
    "loader": ("tools.bench.loader", "window loader against nanoGPT's get_batch, opening a trillion tokens"),
    "filter": ("tools.bench.filter_speed", "each filter against datatrove's"),
    "filter-decisions": ("tools.bench.filter_decisions", "documents that datatrove's filters judge differently"),
    "dedup": ("tools.bench.dedup_speed", "MinHash deduplication against datasketch and rensa; whole runs"),
    "generate": ("tools.bench.generate_speed", "generation with a cache against transformers.generate"),
    "language": ("tools.bench.language_table", "language identification: accuracy and speed by language and length"),
    "moe-step": ("tools.bench.moe_step", "one mixture-of-experts layer against transformers' loop over experts"),
    "models": ("tools.bench.model_speed", "forward and backward of whole models against transformers, both compiled"),
    "optimizers": ("tools.bench.optimizers", "AdamW against Muon on the demo's data, both tuned; validation curves"),
    "plan-memory": ("tools.bench.plan_memory", "planned memory of a training step against measured"),
    "prep": ("tools.bench.prep_speed", "JSONL to clean, deduplicated shards against datatrove; peak memory"),
    "tokenize": ("tools.bench.tokenize_speed", "JSONL to shards against a pool of `tokenizers`"),
    "train-step": ("tools.bench.train_step", "training step against the machine's own matrix-product rate"),
}


def main() -> None:
    """Hand the remaining arguments to the benchmark that the first one names."""
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        for name, (_, summary) in BENCHMARKS.items():
            print(f"  {name:<18}{summary}")
        return
    name = sys.argv.pop(1)
    if name not in BENCHMARKS:
        raise UserError(unknown_name("benchmark", name, BENCHMARKS))
    importlib.import_module(BENCHMARKS[name][0]).main()


if __name__ == "__main__":
    run_command(main)
