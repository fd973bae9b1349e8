"""Parts of every run: reproducible steps, stopping, checkpoints, throughput, progress, loggers, sharding, figures."""
