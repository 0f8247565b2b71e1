"""Model families on shared blocks."""
