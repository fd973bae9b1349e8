"""The command, the configurations and the studies: everything a user launches."""
