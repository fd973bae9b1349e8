"""Networks and algorithms in plain torch: no Lightning, no files, no processes."""
