"""What fine-tunings of pretrained models share: bases, causal language models, adapters, frozen weights."""
