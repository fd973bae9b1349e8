"""`llm-train new-topic`: write a small working topic."""
