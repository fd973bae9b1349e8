"""What every run has: reproducible steps, stopping, checkpoints, throughput, progress, loggers, sharding, figures."""
