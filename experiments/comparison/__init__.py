"""What `llm-train compare` does, in this order: runs, arms, measures, statistics, tables, figures, page."""
