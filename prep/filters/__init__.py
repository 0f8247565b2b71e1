"""Filters: statistics of documents, rules that bound them, presets of rules, and the cleaning of lines."""
