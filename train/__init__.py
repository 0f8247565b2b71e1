"""Model families, parallelism, optimisers, checkpoints, and one entry file per training stage."""
