"""LightningModules, one a topic, and what they share."""
