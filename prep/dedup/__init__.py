"""Deduplication: exact copies, near-duplicates (MinHash LSH with verification), repeated paragraphs and lines."""
