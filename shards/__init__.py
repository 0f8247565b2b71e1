"""Token shards, the mixture as a pure function, and the window loader."""
