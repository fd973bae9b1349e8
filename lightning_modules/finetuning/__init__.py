"""Parts of fine-tuning: pretrained bases, causal language models, freezing, learning rates by layer, adapters."""
