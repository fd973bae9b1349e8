"""LightningModules, one package for each topic, and the code that they share."""
