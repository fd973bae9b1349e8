"""The target of a position that carries no loss."""

IGNORED = -100  # the default `ignore_index` of torch's cross entropy
