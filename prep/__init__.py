"""Raw text to token shards: readers, the tokenizer, the writer's command line."""
