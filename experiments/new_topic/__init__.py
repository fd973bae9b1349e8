"""`llm-train new`: write a small working topic."""
