"""Benchmarks: `python -m tools.bench NAME` measures minigpt and a peer in the same run."""
