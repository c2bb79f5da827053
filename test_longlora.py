"""What this project claims, each claim checked against an independent definition of it.

    pytest                    # about a minute on one core
    pytest -k attention       # one part of it
"""
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import longlora
import train
from data import prepare
from longlora import Llama, LlamaConfig, shifted_sparse_attention

ROOT = Path(__file__).resolve().parent
TOKENIZER = ROOT / "data" / "tiny-llama" / "tokenizer.model"
PARTS = ["lora,embed,norm", "lora", "lora,norm", "lora,embed"]


def tiny(seed=0, **changes) -> Llama:
    """A random Llama of 2 layers with a window of 16, its weights large enough that attention matters."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
    torch.manual_seed(seed)
    model = Llama(LlamaConfig(**{**sizes, **changes}))
    return shaken(model, seed, model.parameters())


@torch.no_grad()
def shaken(model, seed, parameters):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters:
        p += 0.2 * torch.randn(p.shape, generator=generator)
    return model


def random_tokens(*shape, seed=0):
    return torch.randint(64, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------
# Attention


def visible(H, T, G, shift):
    """(H, T, T): query t sees key u iff u <= t and both are in the same group of that head."""
    t = torch.arange(T)
    groups = [(t + G // 2) // G if shift and h >= H // 2 else t // G for h in range(H)]
    return torch.stack([(g[:, None] == g) & (t[:, None] >= t) for g in groups])


def masked_attention(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def qkv(B, H, H_kv, T, D, tokens_first=True, generator=None):
    """q, k, v as (B, heads, T, D), in memory as the model has them, (B, T, heads, D), or contiguous."""
    shapes = [(B, T, h, D) if tokens_first else (B, h, T, D) for h in (H, H_kv, H_kv)]
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return leaves, [x.transpose(1, 2) if tokens_first else x for x in leaves]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_attention_is_the_masked_definition_in_value_and_gradient(shift, tokens_first):
    generator, rng = torch.Generator().manual_seed(0), np.random.default_rng(0)
    for _ in range(120):
        B, T, G = rng.integers(1, 4), rng.integers(1, 71), 2 * rng.integers(1, 41)
        H = 2 * rng.integers(1, 5) if shift else rng.integers(1, 9)
        H_kv, D = rng.choice([n for n in range(1, H + 1) if H % n == 0]), rng.choice([2, 4, 8, 16])
        B, H, H_kv, T, G, D = map(int, (B, H, H_kv, T, G, D))
        leaves, inputs = qkv(B, H, H_kv, T, D, tokens_first, generator)
        out = shifted_sparse_attention(*inputs, G, shift)
        expected = masked_attention(*inputs, visible(H, T, G, shift))
        weight = torch.randn(out.shape, generator=generator)
        gradients = [torch.autograd.grad(y, leaves, weight) for y in (out, expected)]
        for got, want in [(out, expected), *zip(*gradients)]:
            assert got.shape == want.shape and (got - want).abs().max() <= 1e-5, (B, H, H_kv, T, D, G)


@pytest.mark.parametrize("H, G", [(4, 7), (4, 0), (4, -2), (3, 8)])
def test_odd_groups_and_odd_heads_are_refused(H, G):
    with pytest.raises(ValueError, match="even"):
        shifted_sparse_attention(*qkv(1, H, H, 16, 4)[1], G)


def nodes(tensor):
    """The names of all nodes of the backward graph of `tensor`."""
    found, waiting = set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return [node.name() for node in found]


@pytest.mark.parametrize("shift, calls", [(True, 4), (False, 1)])
@pytest.mark.parametrize("H_kv", [4, 2, 1])
def test_the_flash_kernel_runs_on_views(H_kv, shift, calls):
    """Whole groups, and two half groups where shifted: a flash call each, no slow math, no copy."""
    leaves, inputs = qkv(1, 4, H_kv, 64, 8)
    names = nodes(shifted_sparse_attention(*inputs, 16, shift))
    assert names.count("ScaledDotProductFlashAttentionForCpuBackward0") == calls
    assert not [name for name in names if re.match("Softmax|SafeSoftmax|Bmm|Mm", name)]
    if not (shift and H_kv == 1):  # the one key-value head is repeated there, for both halves of the heads
        assert not [name for name in names if re.match("Clone|UnsafeView|Copy", name)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("H_kv", [4, 2, 1])
def test_on_cuda_a_fused_kernel_runs_and_is_right(H_kv):
    _, inputs = qkv(2, 4, H_kv, 300, 64)
    out = shifted_sparse_attention(*(x.to("cuda", torch.bfloat16) for x in inputs), 64)
    assert [name for name in nodes(out) if re.match("ScaledDotProduct(Flash|Cudnn)AttentionBackward", name)]
    expected = masked_attention(*inputs, visible(4, 300, 64, True))
    torch.testing.assert_close(out.float().cpu(), expected, rtol=0, atol=0.05)


# --------------------------------------------------------------------------------------------------
# The model


def reference_logits(model, tokens, group_size=None, shift=True):
    """Llama by the book, in float64: one sequence, one head at a time, rotary pairs as complex numbers."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    T, H, D = len(tokens), c.num_attention_heads, c.head_dim
    scale = 1 if c.rope_scaling is None else c.rope_scaling["factor"]
    frequency = c.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.exp(1j * torch.outer(torch.arange(T).double() / scale, frequency))
    mask = visible(H, T, group_size or 2 * T, shift and group_size is not None)

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[name]

    def head(x, name, n):
        return x @ w[name][n * D:(n + 1) * D].T

    def rotated(x):
        z = torch.complex(x[:, :D // 2], x[:, D // 2:]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.num_hidden_layers):
        layer, heads = f"model.layers.{i}.", []
        y = norm(x, layer + "input_layernorm.weight")
        for n in range(H):
            n_kv = n // (H // c.num_key_value_heads)
            q = rotated(head(y, layer + "self_attn.q_proj.weight", n))
            k = rotated(head(y, layer + "self_attn.k_proj.weight", n_kv))
            v = head(y, layer + "self_attn.v_proj.weight", n_kv)
            heads.append((q @ k.T / D ** 0.5).masked_fill(~mask[n], -torch.inf).softmax(-1) @ v)
        x = x + torch.cat(heads, dim=-1) @ w[layer + "self_attn.o_proj.weight"].T
        y = norm(x, layer + "post_attention_layernorm.weight")
        gate, up = (y @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[layer + "mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w["lm_head.weight"].T


SHAPES = {
    "plain": {},
    "multi-head": {"num_key_value_heads": 4},
    "one key-value head": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim apart": {"head_dim": 6},
    "interpolated": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "older spelling, other theta": {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500.0},
}


@pytest.mark.parametrize("attention", [(None, True), (6, True), (6, False)], ids=["full", "shifted", "local"])
@pytest.mark.parametrize("shape", SHAPES)
def test_llama_is_the_reference(shape, attention):
    model, tokens = tiny(**SHAPES[shape]), random_tokens(2, 15)
    logits = model(tokens, None, *attention)
    expected = torch.stack([reference_logits(model, row, *attention) for row in tokens])
    torch.testing.assert_close(logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_agrees(shape, tmp_path):
    transformers = pytest.importorskip("transformers")
    model, tokens = tiny(**SHAPES[shape]), random_tokens(2, 15)
    longlora.save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", [(None, True), (8, True), (8, False)], ids=["full", "shifted", "local"])
@torch.no_grad()
def test_a_token_changes_no_output_before_it(attention):
    model, tokens = tiny(), random_tokens(1, 21)
    before = model(tokens, None, *attention)
    for t in range(21):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 64
        difference = (model(changed, None, *attention) - before).abs().amax(-1)[0]
        assert difference[:t].sum() < 1e-5
        assert difference[t] > 1e-3


@torch.no_grad()
def test_information_crosses_group_borders_only_when_shifted():
    """G = 8, token 6 changes: its group ends at 7, the shifted one at 11, the next layer's at 15."""
    model, tokens = tiny(), random_tokens(1, 32)
    changed = tokens.clone()
    changed[0, 6] = (changed[0, 6] + 1) % 64
    reach = []
    for shift in (False, True):
        difference = (model(changed, None, 8, shift) - model(tokens, None, 8, shift)).abs().amax(-1)[0]
        reach.append((difference > 1e-5).nonzero().flatten().tolist())
    assert reach == [[6, 7], list(range(6, 16))]


def test_interpolated_tables():
    """Position t under factor s has the angles of position t / s, in float32 even in a bf16 model."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=100)
    t, i = np.arange(1000)[:, None], np.arange(8)
    cpu = torch.device("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        tables = longlora.rotary_tables(config.extended(1000), 1000, cpu)
    for table, function in zip(tables, (np.cos, np.sin)):
        assert table.dtype == torch.float32
        expected = function(t / 10 * 10000.0 ** (-2 * i / 16))
        np.testing.assert_allclose(table.squeeze(1).numpy(), expected, rtol=0, atol=1e-4)
    for stretched, plain in zip(tables, longlora.rotary_tables(config, 100, cpu)):
        torch.testing.assert_close(stretched[::10], plain, rtol=0, atol=1e-5)


def test_factor_is_rounded_up_and_multiplied_when_extended_again():
    config = LlamaConfig(max_position_embeddings=4096)
    assert config.extended(4096) is config and config.extended(100) is config
    assert config.extended(32768).interpolation_factor == 8
    once = config.extended(10000)
    assert (once.interpolation_factor, once.max_position_embeddings) == (3, 10000)
    twice = once.extended(20001)
    assert (twice.interpolation_factor, twice.max_position_embeddings) == (9, 20001)
    model = tiny()
    model.extend(40)
    assert model.config.interpolation_factor == model.model.config.interpolation_factor == 3


@pytest.mark.parametrize("change", [
    {"hidden_size": 30}, {"num_key_value_heads": 3}, {"head_dim": 7}, {"vocab_size": 0},
    {"num_hidden_layers": 1.5}, {"rope_theta": 0}, {"rms_norm_eps": float("nan")},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, {"rope_scaling": "linear"}, {"head_dim": "8"}])
def test_impossible_configs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        LlamaConfig(**{"hidden_size": 32, "num_attention_heads": 4, **change})


# --------------------------------------------------------------------------------------------------
# The loss, precision, memory


class Recorder(TorchDispatchMode):
    """The shapes of all tensors that operations make; views of the tensors `known` before do not count."""

    def __init__(self, *known):
        super().__init__()
        self.known, self.shapes = {x.untyped_storage().data_ptr() for x in known}, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.shapes.append(tuple(x.shape))
        return out


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_chunked_loss_is_cross_entropy_on_all_logits(ignored, head_trains, monkeypatch):
    """In value and gradients, without ever making all logits; where no target counts it is 0."""
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 7)
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((2, 13, 8), (50, 8)))
    weight.requires_grad_(head_trains)
    targets = torch.randint(50, (2, 13), generator=generator)
    targets[torch.rand(2, 13, generator=generator) < ignored] = -100
    leaves = [x, weight] if head_trains else [x]
    with Recorder() as recorder:
        loss = longlora.chunked_loss(x, weight, targets)
        gradients = torch.autograd.grad(3 * loss, leaves)
    assert max(np.prod(shape) for shape in recorder.shapes if 50 in shape) == 50 * max(7, 8)
    expected = F.cross_entropy((x @ weight.T).view(-1, 50), targets.view(-1), ignore_index=-100)
    wanted = torch.autograd.grad(3 * expected, leaves)
    if ignored == 1:  # the mean of nothing is NaN, and no use
        expected, wanted = torch.zeros(()), [torch.zeros_like(y) for y in leaves]
    for got, want in zip([loss, *gradients], [expected, *wanted]):
        torch.testing.assert_close(got, want)


def lora_model(trainable="lora,embed,norm", dtype=torch.float32, **changes):
    """A tiny model with LoRA whose B is no longer zero."""
    model = tiny(**changes).to(dtype)
    if trainable != "full":
        longlora.add_lora(model, rank=3, alpha=12)
    longlora.set_trainable(model, trainable)
    return shaken(model, 1, [p for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("trainable", ["lora,embed,norm", "full"])
def test_model_loss_is_the_mean_over_shifted_targets(trainable):
    """With gradients of everything that trains, head included."""
    model, tokens = lora_model(trainable), random_tokens(2, 16)
    trained = [p for p in model.parameters() if p.requires_grad]
    loss = model(tokens[:, :-1], tokens[:, 1:])
    expected = F.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    got, want = ([y, *torch.autograd.grad(y, trained)] for y in (loss, expected))
    for got, want in zip(got, want):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_residual_stream_is_bf16_under_a_float32_embedding():
    model, seen = lora_model(dtype=torch.bfloat16), []
    assert model.model.embed_tokens.weight.dtype == torch.float32
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(random_tokens(1, 9), random_tokens(1, 9), 4)
    loss.backward()
    assert seen == [torch.bfloat16] * 4
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_checkpointing_recomputes_layers_and_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        model, calls = lora_model(), []
        model.model.checkpointing = checkpointing
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        model(random_tokens(2, 16), random_tokens(2, 16, seed=1), 6).backward()
        assert len(calls) == 1 + checkpointing
        results.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*results):
        torch.testing.assert_close(plain, recomputed)


# --------------------------------------------------------------------------------------------------
# LoRA and LoRA+


def test_lora_starts_as_the_identity_and_merges_into_the_weights():
    model, tokens = tiny(), random_tokens(2, 11)
    logits, weights = model(tokens), {name: p.detach().double() for name, p in model.named_parameters()}
    longlora.add_lora(model, rank=3, alpha=12)
    assert torch.equal(model(tokens), logits)
    shaken(model, 1, [p for name, p in model.named_parameters() if "lora_" in name])
    trained, lora = model(tokens), {name: p.detach().double() for name, p in model.named_parameters()}
    assert (trained - logits).abs().max() > 0.1
    longlora.merge_lora(model)
    torch.testing.assert_close(model(tokens), trained, rtol=1e-4, atol=1e-4)
    assert dict(model.named_parameters()).keys() == weights.keys()
    for name, p in model.named_parameters():
        if re.search("[qkvo]_proj", name):
            A, B = (lora[name.replace("weight", f"lora_{x}.weight")] for x in "AB")
            weights[name] += 12 / 3 * B @ A
        torch.testing.assert_close(p.detach().double(), weights[name], rtol=1e-5, atol=1e-5)


def test_lora_never_forms_the_product_of_its_factors():
    lora = longlora.LoRALinear(torch.nn.Linear(24, 40, bias=False).requires_grad_(False), rank=3, alpha=6)
    product = {(40, 24), (24, 40)}
    with Recorder(lora.weight) as recorder:
        lora(torch.randn(2, 5, 24).requires_grad_()).sum().backward()
    assert (3, 24) in recorder.shapes and not product & set(recorder.shapes)
    with Recorder(lora.weight) as recorder:  # the recorder would have seen it
        lora.lora_B.weight @ lora.lora_A.weight
    assert product & set(recorder.shapes)


@pytest.mark.parametrize("arguments, match", [
    ({"rank": 0}, "rank"), ({"targets": ["q_proj", "query"]}, "query"), ({}, "already")])
def test_lora_refuses(arguments, match):
    model = tiny()
    if not arguments:
        longlora.add_lora(model)
    with pytest.raises(ValueError, match=match):
        longlora.add_lora(model, **arguments)


def test_llama_2_7b_trains_the_papers_parameter_counts():
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=32001))
        longlora.add_lora(model)
    longlora.set_trainable(model, "lora,embed,norm")
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    lora = sum(size for name, size in sizes.items() if "lora_" in name)
    assert (lora, sum(sizes.values()) - lora) == (8_388_608, 131_342_336)


LAYERS = ["model.layers.0.", "model.layers.1."]
TRAINED = {
    "lora": {f"{i}self_attn.{p}_proj.lora_{x}.weight" for i in LAYERS for p in "qkvo" for x in "AB"},
    "embed": {"model.embed_tokens.weight"},
    "norm": {"model.norm.weight",
             *(f"{i}{n}_layernorm.weight" for i in LAYERS for n in ("input", "post_attention"))},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", [*PARTS, "embed,norm", "norm", "full"])
def test_exactly_these_parameters_train_in_float32(trainable, tied):
    model = tiny(tie_word_embeddings=tied).to(torch.bfloat16)
    if trainable != "full":
        longlora.add_lora(model, rank=3)
    logits = model.float()(random_tokens(1, 9))
    model.to(torch.bfloat16)
    longlora.set_trainable(model, trainable)
    parameters = dict(model.named_parameters())
    parts = trainable.split(",")
    expected = set(parameters) if trainable == "full" else set().union(*(TRAINED[x] for x in parts))
    assert {name for name, p in parameters.items() if p.requires_grad} == expected
    for name, p in parameters.items():
        assert p.dtype == (torch.float32 if name in expected else torch.bfloat16)
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared == model.config.tie_word_embeddings == (tied and "embed" not in trainable)
    assert model.lm_head.weight.requires_grad == (trainable == "full")
    assert torch.equal(model.float()(random_tokens(1, 9)), logits)


@pytest.mark.parametrize("trainable", ["lora,head", "", "full,lora", "Lora", "lora"])
def test_unknown_parts_and_lora_without_lora_are_refused(trainable):
    with pytest.raises(ValueError, match="lora"):
        longlora.set_trainable(tiny(), trainable)


# --------------------------------------------------------------------------------------------------
# Files


def packed(header, data=b"", length=None):
    """A safetensors file, made by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype, shape, *offsets):
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def all_dtypes():
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(2, (3, 5), generator=generator)
    tensors = {name: raw.to(dtype) for name, dtype in longlora.DTYPES.items()}
    odd = torch.ones(7, dtype=torch.uint8)
    return tensors | {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "odd": odd}


def assert_same_tensors(got, want):
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert tensor.dtype == want[name].dtype and torch.equal(tensor, want[name]), name


def test_safetensors_round_trip_is_byte_identical(tmp_path):
    longlora.write_safetensors(all_dtypes(), tmp_path / "a")
    read = longlora.read_safetensors(tmp_path / "a")
    assert_same_tensors(read, all_dtypes())
    longlora.write_safetensors(read, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_the_safetensors_package_reads_ours_and_we_read_its(tmp_path):
    package = pytest.importorskip("safetensors.torch")
    longlora.write_safetensors(all_dtypes(), tmp_path / "ours")
    package.save_file(all_dtypes(), tmp_path / "theirs")
    assert_same_tensors(package.load_file(tmp_path / "ours"), all_dtypes())
    assert_same_tensors(longlora.read_safetensors(tmp_path / "theirs"), all_dtypes())


@pytest.mark.parametrize("padding", range(5))
def test_misaligned_safetensors_are_read(padding, tmp_path):
    header = {"a": entry("U8", [1], 0, 1), "b": entry("F32", [2], 1, 9), "c": entry("I64", [], 9, 17)}
    data = b"\7" + np.array([1.5, -2], "<f4").tobytes() + np.array(2 ** 40, "<i8").tobytes()
    (tmp_path / "x").write_bytes(packed(json.dumps(header).encode() + b" " * padding, data))
    tensors = longlora.read_safetensors(tmp_path / "x")
    assert {name: t.tolist() for name, t in tensors.items()} == {"a": [7], "b": [1.5, -2.0], "c": 2 ** 40}


A, B = entry("F32", [2], 0, 8), entry("U8", [4], 8, 12)
BROKEN = {
    "empty": b"", "seven bytes": b"\2\0\0\0\0\0\0", "cut header": packed({"a": A})[:20],
    "header of 0 bytes": packed(b""), "header of 2**63 bytes": packed({"a": A}, bytes(8), length=2 ** 63),
    "cut data": packed({"a": A, "b": B}, bytes(11)), "data behind": packed({"a": A, "b": B}, bytes(13)),
    "overlap": packed({"a": A, "b": entry("U8", [4], 4, 8)}, bytes(8)),
    "gap": packed({"a": A, "b": entry("U8", [4], 9, 13)}, bytes(13)),
    "a name twice": packed(b'{"a":%b,"a":%b}' % ((json.dumps(A).encode(),) * 2), bytes(8)),
    "offsets of two kinds": packed({"a": A, "b": entry("U8", [4], "8", 12)}, bytes(12)),
    "no offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "no JSON": packed(b"{'a': 1}"), "no UTF-8": packed(b'{"\xff\xfe": 1}'), "no object": packed([1, 2]),
    "no entry": packed({"a": 5}), "deep": packed(b"[" * 100_000),
} | {str(e): packed({"a": entry(*e)}, bytes(8)) for e in [
    ("F32", [2], 8, 0), ("F32", [-2], 0, -8), ("F32", [2.0], 0, 8), ("F32", [3], 0, 8), ("F31", [2], 0, 8),
    ([], [2], 0, 8), ("U8", [8], 0, 8, 8), ("U8", 8, 0, 8)]}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_safetensors_are_refused(kind, tmp_path):
    (tmp_path / "x").write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "x"))):
        longlora.read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_saved_model_loads_the_same(shape, dtype, tmp_path):
    model, tokens = tiny(**SHAPES[shape]).to(dtype), random_tokens(2, 15)
    longlora.save_model(model, tmp_path / "a")
    loaded = longlora.load_model(tmp_path / "a")
    assert loaded.config == model.config and not any(p.requires_grad for p in loaded.parameters())
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(loaded(tokens), model(tokens))
    longlora.save_model(loaded, tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    loaded = longlora.load_model(tmp_path / "a", dtype=torch.float64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", [*PARTS, "embed,norm"])
def test_a_saved_adapter_loads_the_same_with_its_context(trainable, tied, tmp_path):
    longlora.save_model(tiny(tie_word_embeddings=tied), tmp_path / "base")
    model, tokens = lora_model(trainable, tie_word_embeddings=tied), random_tokens(2, 40)
    model.extend(40)
    longlora.save_adapter(model, tmp_path / "adapter")
    loaded = longlora.load_model(tmp_path / "base")
    longlora.load_adapter(loaded, tmp_path / "adapter")
    assert (loaded.config.max_position_embeddings, loaded.config.interpolation_factor) == (40, 3)
    torch.testing.assert_close(loaded(tokens), model(tokens), rtol=0, atol=1e-6)


def test_peft_reads_our_adapter_and_we_read_its(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    longlora.save_model(tiny(), tmp_path / "base")
    model, tokens = lora_model(), random_tokens(2, 15)
    longlora.save_adapter(model, tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(theirs(tokens).logits, model(tokens), rtol=1e-4, atol=1e-4)
    trained = [p for name, p in theirs.named_parameters() if re.search("lora_|modules_to_save", name)]
    shaken(theirs, 2, trained)
    theirs.save_pretrained(tmp_path / "back")
    loaded = longlora.load_model(tmp_path / "base")
    longlora.load_adapter(loaded, tmp_path / "back")
    torch.testing.assert_close(loaded(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def edited(path, change):
    """Apply `change` to the tensors of a safetensors file, or to the object of a JSON file."""
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))
    else:
        tensors = {name: tensor.clone() for name, tensor in longlora.read_safetensors(path).items()}
        change(tensors)
        longlora.write_safetensors(tensors, path)


NORM, LORA = "model.norm.weight", "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
REFUSED = {
    "base/model.safetensors": {
        "missing": lambda x: x.pop(NORM),
        "unknown": lambda x: x.update({"model.extra.weight": torch.zeros(1)}),
        "mis-shaped": lambda x: x.update({NORM: torch.ones(31)}),
        "integers": lambda x: x.update({NORM: torch.ones(32, dtype=torch.int32)})},
    "base/config.json": {
        "not a Llama": lambda x: x.update(model_type="mistral"),
        "no model_type": lambda x: x.pop("model_type"),
        "quantised": lambda x: x.update(quantization_config={"bits": 4}),
        "other activation": lambda x: x.update(hidden_act="gelu"),
        "impossible": lambda x: x.update(num_attention_heads=5),
        "dynamic rope": lambda x: x.update(rope_scaling={"type": "dynamic", "factor": 2.0}),
        "broken rope": lambda x: x.update(rope_parameters=[1])},
    "adapter/adapter_model.safetensors": {
        "missing": lambda x: x.pop(LORA),
        "unknown": lambda x: x.update(extra=torch.zeros(1)),
        "mis-shaped": lambda x: x.update({LORA: torch.zeros(3, 31)})},
    "adapter/adapter_config.json": {
        "other kind": lambda x: x.update(peft_type="LOHA"),
        "dora": lambda x: x.update(use_dora=True),
        "rank 0": lambda x: x.update(r=0),
        "no rank": lambda x: x.pop("r"),
        "unknown target": lambda x: x.update(target_modules=["query"])},
    "adapter/longlora.json": {"no context": lambda x: x.pop("context")},
}
REFUSED = [(file, kind, change) for file, kinds in REFUSED.items() for kind, change in kinds.items()]


@pytest.mark.parametrize("file, kind, change", REFUSED, ids=[f"{file}: {kind}" for file, kind, _ in REFUSED])
def test_files_that_do_not_fit_are_refused(file, kind, change, tmp_path):
    longlora.save_model(tiny(), tmp_path / "base")
    longlora.save_adapter(lora_model(), tmp_path / "adapter")
    longlora.load_adapter(longlora.load_model(tmp_path / "base"), tmp_path / "adapter")
    edited(tmp_path / file, change)
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / file.split("/")[0]))):
        longlora.load_adapter(longlora.load_model(tmp_path / "base"), tmp_path / "adapter")


def test_only_what_fits_the_form_is_saved(tmp_path):
    with pytest.raises(ValueError, match="merge_lora"):
        longlora.save_model(lora_model(), tmp_path)
    with pytest.raises(ValueError, match="save_model"):
        longlora.save_adapter(tiny(), tmp_path)


# --------------------------------------------------------------------------------------------------
# data/prepare.py


class Letters:
    """A tokenizer of one token a character, `</s>` is 2."""

    encode, eos_id = staticmethod(lambda text: [ord(c) for c in text]), staticmethod(lambda: 2)

    def __init__(self, size):
        self.vocab_size = lambda: size


def test_the_split_of_a_file_is_fixed():
    splits = {"os.py": "train", "json/decoder.py": "train", "ast.py": "valid", "runpy.py": "test"}
    assert {name: prepare.split_of(name) for name in splits} == splits
    shares = [prepare.split_of(f"module{i}.py") for i in range(4000)]
    assert all(abs(shares.count(split) / 4000 - share) < 0.02 for split, share in
               [("train", 0.9), ("valid", 0.05), ("test", 0.05)])


def test_splits_are_disjoint_and_no_held_out_file_is_a_test():
    splits = ("train", "valid", "test")
    train_files, *held_out = [set(prepare.library_files(split, tests=True)) for split in splits]
    assert not train_files & set.union(*held_out) and not set.intersection(*held_out)
    assert all(files and not re.search("/(test|tests|idle_test|site-packages)/", path.as_posix())
               for files in held_out for path in files)
    assert set(prepare.library_files("train")) <= train_files


@pytest.mark.parametrize("size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_documents_are_joined_by_eos(size, dtype, tmp_path):
    """Text files, JSON lines and folders of them, each document, an empty one too, followed by one `</s>`."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "deep" / "b.jsonl").write_text('{"text": "x\\ny"}\n\n{"text": ""}\n{"text": "z", "n": 1}\n')
    (tmp_path / "c.bin").write_bytes(b"no text")
    files = prepare.text_files([tmp_path])
    count = prepare.write_tokens(files, Letters(size), tmp_path / "out" / "tokens.bin")
    tokens = np.fromfile(tmp_path / "out" / "tokens.bin", dtype)
    assert "".join(map(chr, tokens)) == "one\ntwo\2x\ny\2\2z\2" and count == len(tokens)
    assert prepare.text_files([tmp_path / "deep" / "b.jsonl", tmp_path / "a.txt"]) == files[::-1]


def test_a_large_text_is_one_document(tmp_path):
    text = "".join(f"line {i}\n" for i in range(200_000))  # several pieces of a megabyte
    (tmp_path / "a.txt").write_text(text)
    prepare.write_tokens([tmp_path / "a.txt"], Letters(256), tmp_path / "a.bin")
    assert np.fromfile(tmp_path / "a.bin", np.uint16).astype(np.uint8).tobytes() == text.encode() + b"\2"


@pytest.mark.parametrize("line", ["{", '"text"', '{"txt": "a"}', '{"text": 5}'])
def test_a_bad_json_line_is_named_and_leaves_no_file(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match="a.jsonl, line 3"):
        prepare.write_tokens([tmp_path / "a.jsonl"], Letters(256), tmp_path / "a.bin")
    assert os.listdir(tmp_path) == ["a.jsonl"]


def test_passkey_documents():
    """They fill their length, end in the key, and held-out keys and depths are never trained on."""
    tokenizer, rng, drawn = prepare.load_tokenizer(TOKENIZER), np.random.default_rng(0), {}
    for i in range(200):
        held_out, length = bool(i % 2), int(rng.integers(100, 400))
        ids, n = prepare.passkey_document(tokenizer, length, rng, held_out)
        assert length - 32 <= len(ids) <= length and ids[0] == tokenizer.bos_id()
        lines = tokenizer.decode(ids).split("\n")
        key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", lines[2])[1]
        assert len(lines) == 5 and lines[4].endswith(f"pass key is {key}") and 1 <= int(key) <= 50_000
        assert tokenizer.decode(ids[-n:]).strip() == key
        assert tokenizer.decode(ids[:-n]).rstrip().endswith("The pass key is")
        drawn.setdefault(held_out, []).append((int(key), len(lines[1])))
    for trained, tested in zip(zip(*drawn[False]), zip(*drawn[True])):
        assert not set(trained) & set(tested) and len(set(tested)) > 50
    with pytest.raises(ValueError, match="20 tokens"):
        prepare.passkey_document(tokenizer, 20, rng, True)


# --------------------------------------------------------------------------------------------------
# eval.py


@torch.no_grad()
def reference_perplexity(model, tokens, context, protocol, stride):
    """Token by token for "once", window by window for "official", from all logits."""
    def losses(window):
        window = torch.from_numpy(window.astype(np.int64))
        return -model(window[None, :-1])[0].log_softmax(-1).gather(1, window[1:, None]).squeeze(1)

    if protocol == "official":
        starts = range(0, len(tokens) - context + 1, stride)
        means = [losses(tokens[s:s + context]).mean() for s in starts]
        return torch.stack(means).mean().exp(), len(starts) * (context - 1)
    each = []
    for t in range(1, len(tokens)):
        # from the start of the first window that holds t
        start = next(s for s in range(0, len(tokens), stride) if s + context > t)
        each.append(losses(tokens[start:t + 1])[-1])
    return torch.stack(each).mean().exp(), len(tokens) - 1


@pytest.mark.parametrize("protocol", ["once", "official"])
@pytest.mark.parametrize("length, context, stride", [(40, 8, 4), (43, 8, 3), (30, 12, 11), (9, 9, 1)])
def test_perplexity_is_its_definition(protocol, length, context, stride, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 3 * context)  # three windows at a time
    model, tokens = tiny(), random_tokens(length).numpy().astype(np.uint16)
    value, count = evaluation.perplexity(model, tokens, context, protocol, stride)
    expected, scored = reference_perplexity(model, tokens, context, protocol, stride)
    assert count == scored and value == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("length, context, stride",
                         [(10, 16, 4), (10, 8, 8), (10, 1, 1), (1, 2, 1), (0, 8, 4)])
def test_perplexity_of_too_little_is_refused(length, context, stride):
    with pytest.raises(ValueError, match="windows of"):
        evaluation.perplexity(tiny(), np.zeros(length, np.uint16), context, "once", stride)


@pytest.mark.parametrize("wrong, accuracy", [([], 1.0), ([-1], 0.0), ([-2], 0.0), ([-9], 1.0)])
def test_a_passkey_is_retrieved_when_every_answer_token_is_the_arg_max(wrong, accuracy, monkeypatch):
    """A model that knows the text is right, one that misses any token of the answer wrong."""
    tokenizer, model = prepare.load_tokenizer(TOKENIZER), tiny(vocab_size=2048, hidden_size=32)

    def oracle(tokens, *_):
        known = tokens.roll(-1, dims=1)
        for position in wrong:
            known[:, position - 1] += 1
        return F.one_hot(known % 2048, 2048).float()

    monkeypatch.setattr(model.model, "forward", oracle)
    model.lm_head = torch.nn.Linear(2048, 2048, bias=False)
    torch.nn.init.eye_(model.lm_head.weight)
    assert evaluation.passkey_accuracy(model, tokenizer, 100, 5) == accuracy


# --------------------------------------------------------------------------------------------------
# train.py, and the command lines


def test_a_batch_is_a_function_of_seed_and_step():
    """Slices of the data, whatever was drawn before and however a step is cut into micro-steps."""
    tokens = np.arange(5000, dtype=np.uint16)

    def batch(step, seed=0, micro_batch=1):
        run = train.Run(context=20, batch_size=6, seed=seed, micro_batch=micro_batch,
                        passkey=0.0)
        return train.make_batch(run, tokens, None, step)

    first = batch(7)
    assert first.shape == (6, 21) and (first.diff(dim=1) == 1).all() and len(first[:, 0].unique()) > 1
    assert torch.equal(first, batch(7, micro_batch=3))
    assert not torch.equal(first, batch(8)) and not torch.equal(first, batch(7, seed=1))


@pytest.mark.parametrize("context", [128, 256])
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_so_many_sequences_open_with_a_passkey_document(share, context):
    tokenizer, tokens = prepare.load_tokenizer(TOKENIZER), np.full(5000, 5, np.uint16)
    rows = train.make_batch(train.Run(context=context, batch_size=200, passkey=share), tokens, tokenizer, 0)
    assert (rows[:, 0] == tokenizer.bos_id()).float().mean().item() == pytest.approx(share, abs=0.1)


def test_learning_rate_rises_stays_and_falls():
    run = train.Run(lr=2.0, warmup=4, steps=20, decay=0.5)
    rates = [train.learning_rate(run, step) for step in range(20)]
    assert rates == pytest.approx([0.5, 1, 1.5] + [2] * 8 + [1.8, 1.6, 1.4, 1.2, 1, 0.8, 0.6, 0.4, 0.2])
    constant = train.Run(lr=2.0, warmup=0, steps=20, decay=0.0)
    assert {train.learning_rate(constant, step) for step in range(20)} == {2.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model, token files, and what is wrong with others."""
    root = tmp_path_factory.mktemp("files")
    longlora.save_model(tiny(), root / "model")
    for name in ("broken", "mistral", "broken-config"):
        shutil.copytree(root / "model", root / name)
    os.truncate(root / "broken" / "model.safetensors", 1000)
    edited(root / "mistral" / "config.json", lambda x: x.update(model_type="mistral"))
    (root / "broken-config" / "config.json").write_text("{")
    tokens = np.random.default_rng(0).integers(3, 64, 6000).astype(np.uint16)
    tokens.tofile(root / "tokens.bin")
    np.append(tokens, np.uint16(64)).tofile(root / "beyond.bin")
    tokens[:50].tofile(root / "short.bin")
    (root / "empty.bin").touch()
    (root / "half.bin").write_bytes(b"123")
    return root


def command(capfd, script, arguments):
    """Run a script in this process: its exit status and what it wrote to stderr."""
    argv, handler, status = sys.argv, signal.getsignal(signal.SIGINT), 0
    sys.argv = [script, *map(str, arguments)]
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as error:
        status = error.code
    finally:
        sys.argv = argv
        signal.signal(signal.SIGINT, handler)
    return status, capfd.readouterr().err


RUN = "--context 64 --steps 7 --batch-size 2 --warmup 1 --lr 0.01 --rank 2 --dtype float32 --eval-tokens 200"


def training(files, out, *more):
    return ["--model", files / "model", "--data", files / "tokens.bin", "--out", out, *RUN.split(), *more]


def log_of(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def one_line(err):
    """No traceback: the one line of the error, behind argparse's usage if there is any."""
    lines = [line for line in err.splitlines() if not re.match("usage:|  ", line)]
    return len(lines) == 1 and ": error: " in lines[0]


def test_train_and_eval_as_a_user_runs_them(files, tmp_path):
    """train.py writes what it documents, refuses a second run into the same folder, and eval.py reads it."""
    def run(*arguments):
        line = [sys.executable, *map(str, arguments)]
        return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)

    out, arguments = tmp_path / "out", training(files, tmp_path / "out", "--eval-every", 3)
    done = run("train.py", *arguments)
    assert done.returncode == 0, done.stderr
    written = {"adapter_config.json", "adapter_model.safetensors", "log.jsonl", "results.json"}
    assert written <= set(os.listdir(out))
    log, perplexity = log_of(out), json.loads((out / "results.json").read_text())["perplexity"]
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6, 7] and log[-1]["tokens"] == 7 * 2 * 64
    fields = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "peak_memory_bytes"}
    assert all(fields <= line.keys() for line in log)
    assert all(row.keys() == {"16", "32", "64"} for row in perplexity.values())
    assert list(perplexity) == ["base", "interpolated", "extended"]

    again = run("train.py", *arguments)
    assert again.returncode == 2 and one_line(again.stderr) and "--resume" in again.stderr
    assert len(log_of(out)) == 7

    rows = tmp_path / "rows.json"
    done = run("eval.py", "perplexity", "--model", files / "model", "--adapter", out, "--context", "16,64",
               "--data", files / "tokens.bin", "--max-tokens", 500, "--dtype", "float32", "--json", rows)
    assert done.returncode == 0, done.stderr
    model = longlora.load_model(files / "model")
    longlora.load_adapter(model, out)
    tokens = np.fromfile(files / "tokens.bin", np.uint16)[:500]
    for row, context in zip(json.loads(rows.read_text())["rows"], (16, 64), strict=True):
        expected, scored = reference_perplexity(model, tokens, context, "once", context // 2)
        assert row == {"context": context, "protocol": "once", "stride": context // 2, "tokens": scored,
                       "perplexity": pytest.approx(expected.item(), rel=1e-4)}


@pytest.mark.parametrize("end", ["Ctrl-C", "crash"])
def test_a_resumed_run_is_the_uninterrupted_run(end, files, tmp_path, monkeypatch, capfd):
    """Bit for bit, after Ctrl-C in step 5, and from the save of step 3 where step 5 crashed."""
    clip, calls, whole, parts = torch.nn.utils.clip_grad_norm_, [], tmp_path / "whole", tmp_path / "parts"
    assert command(capfd, "train.py", training(files, whole))[0] == 0

    def fifth(*arguments, **more):
        calls.append(1)
        if len(calls) == 5:
            if end == "crash":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGINT)
        return clip(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", fifth)
        if end == "crash":
            with pytest.raises(MemoryError):
                command(capfd, "train.py", training(files, parts, "--save-every", 3))
        else:
            assert "--resume" in str(command(capfd, "train.py", training(files, parts))[0])
    assert len(log_of(parts)) == (4 if end == "crash" else 5)
    assert command(capfd, "train.py", training(files, parts, "--resume"))[0] == 0

    def same():
        values = [[(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in log_of(out)]
                  for out in (whole, parts)]
        adapters = [(out / "adapter_model.safetensors").read_bytes() for out in (whole, parts)]
        return values[0] == values[1] and adapters[0] == adapters[1]

    assert same()
    assert command(capfd, "train.py", training(files, parts, "--resume", "--seed", 1))[0] == 2 and same()
    assert command(capfd, "train.py", training(files, parts, "--overwrite", "--seed", 1))[0] == 0
    assert not same() and len(log_of(parts)) == 7


@pytest.mark.parametrize("attention", [("shifted", 16, True), ("local", 16, False), ("full", None, True)])
def test_the_first_loss_is_that_of_the_interpolated_base(attention, files, tmp_path, capfd):
    """Over all micro-steps, under the attention that was asked for."""
    name, *pattern = attention
    more = f"--attention {name} --group-size 16 --steps 1 --batch-size 5 --micro-batch 2 --eval-tokens 0"
    assert command(capfd, "train.py", training(files, tmp_path, *more.split()))[0] == 0
    model, run = longlora.load_model(files / "model"), train.Run(context=64, batch_size=5, passkey=0.0)
    model.extend(64)
    rows = train.make_batch(run, evaluation.open_tokens(str(files / "tokens.bin"), "", 64, "train"), None, 0)
    expected = model(rows[:, :-1], rows[:, 1:], *pattern).item()
    assert log_of(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_full_training_from_random_weights_writes_a_model(files, tmp_path, capfd):
    more = "--init random --trainable full --context 16 --attention full"
    assert command(capfd, "train.py", training(files, tmp_path, *more.split()))[0] == 0
    assert longlora.load_model(tmp_path).config == longlora.load_config(files / "model")


def test_a_norm_that_is_not_finite_stops_the_run_and_keeps_the_adapter(files, tmp_path, capfd, monkeypatch):
    clip, saved = torch.nn.utils.clip_grad_norm_, tmp_path / "adapter_model.safetensors"
    broken = lambda *arguments: clip(*arguments) * (float("nan") if saved.exists() else 1)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken)
    status, _ = command(capfd, "train.py", training(files, tmp_path, "--save-every", 3))
    assert "step 4" in str(status) and len(log_of(tmp_path)) == 3
    assert all(tensor.isfinite().all() for tensor in longlora.read_safetensors(saved).values())


BAD_INPUT = {
    "train.py": """
        --model {}/nowhere | --model {}/broken | --model {}/mistral | --model {}/broken-config
        | --data {}/nowhere.bin | --data {}/beyond.bin | --data {}/empty.bin | --data {}/half.bin
        | --data {}/short.bin | --data {}/model | --group-size 7 | --group-size 0 | --steps 0 | --context 1
        | --lr nan | --rank -1 | --trainable lora,head | --frobnicate | --attention sparse
        | --out {}/tokens.bin | --passkey 0.1""",
    "eval.py perplexity": """
        --model {}/nowhere | --model {}/broken | --adapter {}/nowhere | --adapter {}/model
        | --data {}/beyond.bin | --data {}/empty.bin | --data {}/short.bin --context 64 | --context 0
        | --context 16,x | --stride 16 | --attention shifted --group-size 7 | --frobnicate""",
    "eval.py passkey": "--model {}/model --length 128 | --length 16",
    "eval.py": " | frobnicate",
    "data/prepare.py": """
        {}/nowhere.txt --out {}/x.bin | {}/tokens.bin --out {}/x.bin | {}/model --out {}/x.bin
        | {}/tokens.bin | --tokenizer {}/nowhere | --tokenizer {}/tokens.bin""",
}
BAD_INPUT = [(script, case.strip()) for script, cases in BAD_INPUT.items() for case in cases.split("|")]


@pytest.mark.parametrize("script, arguments", BAD_INPUT, ids=[" ".join(case) for case in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_status_2(script, arguments, files, tmp_path, capfd):
    usual = {"train.py": training(files, tmp_path / "out"), "eval.py perplexity": [
        "--model", files / "model", "--data", files / "tokens.bin", "--context", "16"]}.get(script, [])
    script, *subcommand = script.split()
    given = [*subcommand, *usual, *arguments.replace("{}", str(files)).split()]
    status, err = command(capfd, script, given)
    assert status == 2 and one_line(err), err
    assert not (tmp_path / "out" / "log.jsonl").exists()
