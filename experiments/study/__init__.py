"""`llm-train study`: run a W&B sweep file on this machine or on a SLURM cluster."""
