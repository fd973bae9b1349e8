"""The exported decoder in other programs: it truncates, pads and stops."""

import pytest
import torch
from exported import LLAMA, NANOCHAT, check_generation

from datamodules.tokenizers import byte_tokenizer
from lightning_modules.decoder_pretrain import PretrainModule

CLASSES = {
    "GPT2LMHeadModel": {},
    "LlamaForCausalLM": LLAMA | {"n_kv_head": 1},
    "NanoChatForCausalLM": NANOCHAT,
}


@pytest.mark.parametrize("name", CLASSES)
def test_the_exported_decoder_truncates_pads_and_stops(tmp_path, name):
    from transformers import AutoConfig

    torch.manual_seed(0)
    module = PretrainModule(257, 48, n_layer=2, n_head=2, n_embd=16, **CLASSES[name])
    for parameter in module.decoder.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=1.0)
    folder = tmp_path / "model"
    check_generation(module, byte_tokenizer(), folder, 48, ("Hello", "A longer prompt"))
    assert AutoConfig.from_pretrained(folder).architectures == [name]
