"""Commands around the trainer: demo, generation, benchmarks."""
