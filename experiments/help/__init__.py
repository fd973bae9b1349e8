"""Help, completion, lists and the schema, read from the source text without importing PyTorch."""
