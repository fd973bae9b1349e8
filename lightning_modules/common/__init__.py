"""What modules, datamodules and commands share; it imports neither torch, nor Lightning, nor the rest."""
