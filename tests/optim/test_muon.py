"""Muon: its formula against torch's, the choice of parameters, and runs that are resumed, accumulated or sharded."""

import copy
import signal

import forks
import pytest
import torch
from helpers import LAST, RUNS, assert_close_weights, assert_same_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from lightning_modules.models.decoder import Decoder, DecoderConfig
from lightning_modules.optim import Muon, ParameterGroups, muon, weight_decay_groups
from lightning_modules.optim.muon import COEFFICIENTS, orthogonalized

OPTIMIZER = {"class_path": "lightning_modules.optim.Muon", "init_args": {"lr": 1.0e-2}}


def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(DecoderConfig(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=8))


def set_gradients(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def algorithms(optimizer: Muon) -> dict[str, str]:
    return {name: group["algorithm"] for group in optimizer.param_groups for name in group["param_names"]}


def test_orthogonalisation_applies_its_polynomial_to_the_singular_values():
    matrices = torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    torch.testing.assert_close(orthogonalized(matrices), left * values[:, None] @ right)
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_a_gradient_of_zeros_gives_a_step_of_zeros():
    assert torch.equal(orthogonalized(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torch(scale, nesterov):
    ours, theirs = decoder(), decoder()
    options = {"lr": 0.02, "weight_decay": 0.3, "momentum": 0.8, "nesterov": nesterov}
    groups = weight_decay_groups(ours)
    optimizer = Muon(groups, scale=scale, dtype="bfloat16", **options)  # torch's is in bfloat16
    matrices = [p for name, p in theirs.named_parameters() if name in groups.hidden_matrices]
    reference = torch.optim.Muon(matrices, adjust_lr_fn=scale, **options)
    for seed in range(3):
        for model, one in ((ours, optimizer), (theirs, reference)):
            set_gradients(model, seed)
            one.step()
    before = dict(decoder().named_parameters())
    for name, p in theirs.named_parameters():
        if name in groups.hidden_matrices:
            step = (p - before[name]).abs().max().item()
            torch.testing.assert_close(ours.get_parameter(name), p, rtol=0, atol=0.02 * step)
            state = optimizer.state[ours.get_parameter(name)]["momentum_buffer"]
            torch.testing.assert_close(state, reference.state[p]["momentum_buffer"])


@pytest.mark.parametrize(
    ("chosen", "capabilities", "expected"),
    [
        (None, {"amx_bf16": True}, torch.bfloat16),
        (None, {"amx_bf16": False}, torch.float32),
        (None, {}, torch.float32),  # a processor of another architecture
        ("float32", {"amx_bf16": True}, torch.float32),
        ("bfloat16", {"amx_bf16": False}, torch.bfloat16),
    ],
)
def test_the_number_type_is_by_default_bfloat16_where_it_is_fast(monkeypatch, chosen, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    used = []
    monkeypatch.setattr(muon, "orthogonalized", lambda matrices, steps: used.append(matrices.dtype) or matrices)
    model = decoder()
    set_gradients(model, 0)
    Muon(weight_decay_groups(model), dtype=chosen).step()
    assert set(used) == {expected}


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_stacked_matrices_are_orthogonalised_and_scaled_each_by_itself(scale):
    def mixed() -> Decoder:
        torch.manual_seed(0)
        parts = {"n_kv_head": 1, "feed_forward": "swiglu", "bias": False}
        return Decoder(DecoderConfig(vocab_size=7, block_size=8, n_layer=2, n_head=2, n_embd=8, **parts))

    ours, apart = mixed(), mixed()
    options = {"lr": 0.02, "scale": scale, "dtype": "float32"}
    set_gradients(ours, 0)
    Muon(weight_decay_groups(ours), split_stacked=True, **options).step()
    set_gradients(apart, 0)
    sizes = {"attention.qkv": [8, 4, 4], "feed_forward.expansion": [24, 24]}  # by hand
    for i, block in enumerate(apart.blocks):
        for layer, rows in sizes.items():
            whole, stepped = block.get_submodule(layer).weight, ours.blocks[i].get_submodule(layer).weight
            pieces = {str(k): nn.Parameter(piece.detach().clone()) for k, piece in enumerate(whole.split(rows))}
            for piece, gradient in zip(pieces.values(), whole.grad.split(rows), strict=True):
                piece.grad = gradient.clone()
            Muon(ParameterGroups([{"params": list(pieces.items())}], pieces), **options).step()
            torch.testing.assert_close(stepped, torch.cat(list(pieces.values())))


@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_a_matrix_that_is_stored_transposed_takes_the_same_step(scale):
    torch.manual_seed(0)
    linear, transposed = nn.Linear(3, 12), Conv1D(12, 3)  # 3 inputs, 12 outputs
    with torch.no_grad():
        transposed.weight.copy_(linear.weight.T)
    linear.weight.grad = torch.randn(12, 3)
    transposed.weight.grad = linear.weight.grad.T.clone()
    for layer in (linear, transposed):
        Muon(weight_decay_groups(nn.ModuleDict({"layer": layer})), matrices=["layer.weight"], scale=scale).step()
    torch.testing.assert_close(transposed.weight.T, linear.weight)


def test_a_model_that_does_not_say_what_it_stacks_is_refused_and_its_attributes_do_not_matter():
    model = nn.Sequential(nn.Linear(2, 2))
    model.stacked_rows = True  # of a user, with another meaning
    assert weight_decay_groups(model).stacked == {}
    with pytest.raises(ValueError, match="split_stacked: this model does not say"):
        Muon(weight_decay_groups(model), matrices=["0.weight"], split_stacked=True)


def test_a_state_of_an_earlier_version_keeps_its_way():
    model, other = decoder(), decoder()
    optimizer, joint = Muon(weight_decay_groups(model), split_stacked=True), Muon(weight_decay_groups(other))
    saved = joint.state_dict()
    for group in saved["param_groups"]:
        group.pop("split_stacked", None)
    optimizer.load_state_dict(saved)
    for one, its in ((optimizer, model), (joint, other)):
        set_gradients(its, 0)
        one.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_the_other_parameters_get_the_steps_of_adamw():
    ours, theirs = decoder(), decoder()
    groups = weight_decay_groups(ours)
    optimizer = Muon(groups, lr=0.1, weight_decay=0.5, adamw_lr=0.02, adamw_weight_decay=0.3, betas=(0.8, 0.9))
    decayed, others = weight_decay_groups(theirs)
    decayed["params"] = [(name, p) for name, p in decayed["params"] if name not in groups.hidden_matrices]
    reference = torch.optim.AdamW([decayed, others], lr=0.02, weight_decay=0.3, betas=(0.8, 0.9), fused=True)
    for seed in range(3):
        for model, one in ((ours, optimizer), (theirs, reference)):
            set_gradients(model, seed)
            one.step()
    for name, p in theirs.named_parameters():
        assert name in groups.hidden_matrices or torch.equal(ours.get_parameter(name), p)


def test_muon_updates_the_matrices_of_the_blocks_only():
    by_name = algorithms(Muon(weight_decay_groups(decoder())))
    assert {name for name, algorithm in by_name.items() if algorithm == "muon"} == {
        f"blocks.{i}.{part}.weight"
        for i in range(2)
        for part in ("attention.qkv", "attention.projection", "feed_forward.expansion", "feed_forward.projection")
    }
    assert by_name["token_embedding.weight"] == by_name["blocks.0.attention.qkv.bias"] == "adamw"


class WithEmbeddingsAndHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"table": nn.Embedding(9, 4), "mix": nn.Linear(4, 4)}) for _ in "ab")
        self.head = nn.Linear(4, 9)


def test_embeddings_within_the_layers_and_the_head_are_not_hidden_matrices():
    groups = weight_decay_groups(WithEmbeddingsAndHead())
    assert groups.hidden_matrices == {"layers.0.mix.weight", "layers.1.mix.weight"}


def test_patterns_choose_other_matrices():
    optimizer = Muon(weight_decay_groups(WithEmbeddingsAndHead()), matrices=["*.weight"])
    assert {name for name, algorithm in algorithms(optimizer).items() if algorithm == "adamw"} == {
        "layers.0.mix.bias", "layers.1.mix.bias", "head.bias"
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"no matrix is named '\*.bias'; there are layers.*.table.weight"):
        Muon(weight_decay_groups(WithEmbeddingsAndHead()), matrices=["*.bias"])


def test_a_model_that_would_be_left_to_adamw_is_refused():
    frozen = decoder()
    frozen.blocks.requires_grad_(False)
    for model, matrices in ((nn.Linear(3, 3), None), (frozen, None), (decoder(), [])):
        with pytest.raises(ValueError, match=r"^Muon finds no trained matrix in a stack .*; name matrices by patterns"):
            Muon(weight_decay_groups(model), matrices=matrices)
    assert algorithms(Muon(weight_decay_groups(nn.Linear(3, 3)), matrices=["weight"]))["weight"] == "muon"


def test_groups_keep_their_shares_and_have_no_decay_for_vectors():
    optimizer = Muon(weight_decay_groups(decoder(), {"blocks.0.attention.qkv.weight": 0.5}), weight_decay=0.2)
    assert [(group["algorithm"], group.get("lr_share"), group["weight_decay"]) for group in optimizer.param_groups] == [
        ("muon", None, 0.2), ("adamw", None, 0.2), ("adamw", None, 0.0), ("muon", 0.5, 0.2)
    ]  # fmt: skip


def test_a_restored_optimiser_goes_on_as_if_it_had_not_stopped(tmp_path):
    model = decoder()
    optimizer = Muon(weight_decay_groups(model))
    set_gradients(model, 0)
    optimizer.step()
    restored_model = copy.deepcopy(model)
    restored = Muon(weight_decay_groups(restored_model))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    restored.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for one, its_model in ((optimizer, model), (restored, restored_model)):
        set_gradients(its_model, 1)
        one.step()
    for p, q in zip(model.parameters(), restored_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_parameter_without_a_gradient_is_left_alone():
    model = decoder()
    before = copy.deepcopy(model)
    optimizer = Muon(weight_decay_groups(model))
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before.parameters(), strict=True))
    assert not optimizer.state


def test_plain_groups_of_named_parameters_have_no_hidden_matrices_but_those_of_the_patterns():
    groups = ParameterGroups([{"params": list(nn.Linear(2, 2).named_parameters())}], [])
    assert algorithms(Muon(groups, matrices=["weight"])) == {"weight": "muon", "bias": "adamw"}


SETTINGS = {
    "optimizer": OPTIMIZER,
    "data__init_args__batch_size": 8,
    "trainer__accumulate_grad_batches": 2,
    "trainer__gradient_clip_val": 0.5,
    "trainer__max_steps": 8,
    "trainer__val_check_interval": 4,
    "trainer__callbacks+": [],
}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_weights(llm_train, forked, tiny, whole):
    command = ("fit", "-c", tiny(**SETTINGS), "--run.name", "killed")
    assert forked(*command, prepare=lambda: forks.signal_after_step(6)) == -signal.SIGKILL
    resumed = llm_train(*command, "--ckpt_path", "last")
    assert resumed.code == 0, resumed.err
    assert_same_weights(whole(**SETTINGS) / LAST, RUNS / "killed" / LAST)


@pytest.mark.slow
def test_two_processes_and_two_shards_train_the_model_of_one_process(tiny, whole, monkeypatch):
    monkeypatch.setattr(muon, "_MOST_GATHERED", 2_000)  # one or two matrices at a time
    settings = SETTINGS | {"model__init_args__dropout": 0.0, "trainer__max_steps": 4}
    settings["optimizer"] = {**OPTIMIZER, "init_args": {**OPTIMIZER["init_args"], "split_stacked": True}}
    command = ("fit", "-c", tiny(**settings), "--run.name")
    then = [(*command, "sharded", *forks.SHARDED, "--trainer.strategy.cpu_offload=true")]
    assert forks.wait(forks.start_ranks(2, *command, "two", *forks.TWO_PROCESSES, then=then)) == [0, 0]
    for name in ("two", "sharded"):
        assert_close_weights(whole(**settings) / LAST, RUNS / name / LAST)


def test_wrong_arguments_are_one_line(llm_train, tiny):
    for argument, value, reason in (
        ("matrices", "['*.head.*']", "error: optimizer: no matrix is named '*.head.*'; there are decoder.token_embed"),
        ("betas", "[0.9, 1.5]", "error: optimizer: Invalid beta parameter at index 1: 1.5"),
    ):
        done = llm_train("fit", "-c", tiny(optimizer=OPTIMIZER), f"--optimizer.init_args.{argument}={value}")
        assert (done.code, done.err.splitlines()[-1].startswith(reason)) == (1, True), done.err
