"""Tiny models of Transformers that fine-tunings start from."""

from pathlib import Path

import torch

CONTEXT = 32


def save_gpt_neo(folder: Path) -> Path:
    """Write a GPT-Neo over bytes whose second layer attends to four tokens, and return its folder."""
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    torch.manual_seed(2)
    config = GPTNeoConfig(
        vocab_size=257,
        max_position_embeddings=CONTEXT,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        resid_dropout=0.1,
        bos_token_id=None,
        eos_token_id=None,
    )
    GPTNeoForCausalLM(config).save_pretrained(folder)
    return folder
