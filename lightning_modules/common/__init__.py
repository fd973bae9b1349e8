"""Code shared by modules, datamodules and commands; it imports neither torch nor Lightning nor other packages here."""
