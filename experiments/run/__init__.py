"""The folder of a run, its record, and what a resumed run may change."""
