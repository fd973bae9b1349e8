"""`llm-train claims`: claims of the experiments, checked against records of runs."""
