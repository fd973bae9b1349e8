"""What fine-tunings share: pretrained bases, causal language models, freezing, learning rates by layer, adapters."""
