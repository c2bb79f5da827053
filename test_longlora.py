"""Lesson two: what this project claims, each claim checked against an independent definition of it.

    pytest                    # three minutes on 2 cores
    pytest -k attention       # one part of it
    python test_longlora.py   # no test: the time of S2-Attn over that of full attention, and of
                              # loading a model over that of reading its file
"""
import contextlib
import dataclasses
import fcntl
import io
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import longlora
import train
from data import (batches, bench, chat, formats, instruct, nf4, paper, plots, prepare, recompute,
                  states, team)
from data.plan import micro_step, plan, report, token_flops
from longlora import Llama, LlamaConfig, shifted_sparse_attention

ROOT = Path(__file__).resolve().parent
TOKENIZER = prepare.load_tokenizer(ROOT / "data" / "tiny-llama")
TOKENS = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
ATTENTIONS = {"full": (None, True), "shifted": (6, True), "local": (6, False)}
SHAPES = {
    "grouped heads": {}, "tied": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 6, "num_key_value_heads": 4},
    "interpolated": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "older spelling": {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 500.0},
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def tiny(**changes) -> Llama:
    """The same random Llama at every call: 2 layers, a window of 16, large weights."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**{**sizes, **changes}))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model


def lora_model(trainable="lora,embed,norm", **changes) -> Llama:
    """tiny() as after training: all that trains has moved."""
    model = tiny(**changes)
    longlora.add_lora(model, rank=3, alpha=12)
    longlora.set_trainable(model, trainable)
    for p in model.parameters():
        p.data += p.requires_grad * torch.randn(p.shape) / 20
    return model


# Attention ----------------------------------------------------------------------------------------


def visible(H, T, G, shift):
    """(H, T, T): query t sees key u iff u <= t, both in one group of that head (G None: all)."""
    t, G = torch.arange(T), G or 2 * T
    groups = [(t + G // 2) // G if shift and h >= H // 2 else t // G for h in range(H)]
    return torch.stack([(g[:, None] == g) & (t[:, None] >= t) for g in groups])


def masked_attention(q, k, v, mask):
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


def qkv(B, H, H_kv, T, D, tokens_first=True):
    """q, k, v (B, heads, T, D): in memory (B, T, heads, D) like the model's own, or contiguous."""
    shapes = [(B, T, h, D) if tokens_first else (B, h, T, D) for h in (H, H_kv, H_kv)]
    leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return [x.transpose(1, 2) if tokens_first else x for x in leaves]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_attention_is_the_masked_definition_in_value_and_gradient(shift, tokens_first):
    """On random shapes, T divisible by G or not, any number of key-value heads that fits."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for _ in range(120):
        B, T, G = rng.integers(1, 4), rng.integers(1, 71), 2 * rng.integers(1, 41)
        H = 2 * rng.integers(1, 5) if shift else rng.integers(1, 9)
        H_kv, D = rng.choice([n for n in range(1, H + 1) if H % n == 0]), rng.choice([2, 4, 8, 16])
        B, H, H_kv, T, G, D = map(int, (B, H, H_kv, T, G, D))
        inputs = qkv(B, H, H_kv, T, D, tokens_first)
        out = shifted_sparse_attention(*inputs, G, shift)
        expected = masked_attention(*inputs, visible(H, T, G, shift))
        weight = torch.randn(out.shape)
        got, want = ([y, *torch.autograd.grad(y, inputs, weight)] for y in (out, expected))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def nodes(node):
    """The names of a backward graph's nodes, one for each path to them."""
    return [node.name()] + [name for n, _ in node.next_functions if n for name in nodes(n)]


@pytest.mark.parametrize("device, dtype", [
    ("cpu", torch.float32), pytest.param("cuda", torch.bfloat16, marks=[
        pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")])])
@pytest.mark.parametrize("shift, calls", [(True, 4), (False, 1)])
@pytest.mark.parametrize("H_kv", [4, 2, 1])
def test_attention_is_flash_on_views(H_kv, shift, calls, device, dtype):
    """Whole groups, and two half groups where shifted: a flash call each, no slow math, no copy."""
    inputs = [x.to(device, dtype) for x in qkv(1, 4, H_kv, 256, 64)]
    out = shifted_sparse_attention(*inputs, 64, shift)
    names = " ".join(nodes(out.grad_fn))
    flash = r"ScaledDotProduct(Flash|Cudnn)Attention(ForCpu)?Backward"
    assert len(re.findall(flash, names)) == calls and not re.search("Softmax|Bmm|Mm", names)
    if not (shift and H_kv == 1):  # there both halves of the heads need the one: it is repeated
        assert not re.search(r"\b(Clone|UnsafeView|Copy)", names)
    expected = masked_attention(*(x.float() for x in inputs), visible(4, 256, 64, shift).to(device))
    torch.testing.assert_close(out.float(), expected, rtol=0, atol=0.05)


# The model, its loss, its precision and memory ----------------------------------------------------


def reference_logits(model, tokens, G=None, shift=True):
    """Llama by the book, in float64, its rotary pairs as complex numbers."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    (B, T), D = tokens.shape, c.head_dim
    factor = c.rope_scaling["factor"] if c.rope_scaling else 1
    frequency = c.rope_theta ** (-torch.arange(0, D, 2).double() / D)
    turn = torch.exp(1j * torch.outer(torch.arange(T).double() / factor, frequency))
    mask = visible(c.num_attention_heads, T, G, shift)

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def rotated(x):
        z = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c.num_hidden_layers):
        block = f"model.layers.{i}."
        y = norm(x, block + "input_layernorm")
        q, k, v = (linear(y, f"{block}self_attn.{name}_proj").view(B, T, -1, D).transpose(1, 2)
                   for name in "qkv")
        y = masked_attention(rotated(q), rotated(k), v, mask)
        x = x + linear(y.transpose(1, 2).flatten(2), block + "self_attn.o_proj")
        y = norm(x, block + "post_attention_layernorm")
        gate, up = (linear(y, f"{block}mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * gate.sigmoid() * up, block + "mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("name", ATTENTIONS)
@each_shape
def test_llama_is_the_reference(shape, name):
    model, tokens = tiny(**shape), TOKENS[:, :15]
    logits = model(tokens, None, *ATTENTIONS[name]).double()
    expected = reference_logits(model, tokens, *ATTENTIONS[name])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_what_a_token_can_change(name):
    """Nothing before it; nothing beyond its group unless shifted; all that two layers can reach."""
    T, attention, model = 21, ATTENTIONS[name], tiny()
    tokens = TOKENS[:1, :T].expand(T, T)
    changed = (tokens + torch.eye(T, dtype=torch.int64)) % 64  # row t: only token t is another
    difference = model(changed, None, *attention) - model(tokens, None, *attention)
    depends = difference.abs().amax(-1) > 1e-5  # (t, u)
    assert depends.diagonal().all() and not depends.tril(-1).any()
    assert depends[4, 6:].any() == (name != "local")  # G is 6
    layer = visible(4, T, *attention).any(0).float()  # (u, t)
    assert torch.equal(depends.T, layer @ layer > 0)


def test_interpolated_positions():
    """Position t has the angles of t / factor, in float32; extending again multiplies factors."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=100)
    with torch.autocast("cpu", torch.bfloat16):
        tables = longlora.rotary_tables(config.extended(1000), torch.arange(1000))
    angle = np.arange(1000)[:, None] / 10 * 10000.0 ** (-2 * np.arange(8) / 16)
    for table, expected in zip(tables, (np.cos(angle), np.sin(angle))):
        assert table.dtype == torch.float32
        np.testing.assert_allclose(table.squeeze(1).numpy(), expected, rtol=0, atol=1e-4)
    model = tiny()
    for context, expected in [(9, (16, 1)), (16, (16, 1)), (40, (40, 3)), (81, (81, 9))]:
        model.extend(context)
        config = model.model.config
        assert (config.max_position_embeddings, config.interpolation_factor) == expected


@pytest.mark.parametrize("match, ask", [
    ("size must be even", lambda: shifted_sparse_attention(*qkv(1, 4, 4, 16, 8), 7)),
    ("even number of them", lambda: shifted_sparse_attention(*qkv(1, 3, 3, 16, 8), 8)),
    ("hidden_size", lambda: tiny(hidden_size=30)),
    ("rope_scaling", lambda: tiny(rope_scaling={"rope_type": "yarn", "factor": 2})),
    ("no LoRA", lambda: longlora.set_trainable(tiny(), "lora")),
    ("trainable must be", lambda: longlora.set_trainable(lora_model(), "lora,head"))])
def test_what_cannot_be_is_refused(match, ask):
    with pytest.raises(ValueError, match=match):
        ask()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_sequences_end_to_end_in_a_row_are_sequences_alone(name):
    """In loss and gradients, each with its own positions, group size and number of targets."""
    rng, model, shift = np.random.default_rng(0), lora_model(), ATTENTIONS[name][1]
    trained = [p for p in model.parameters() if p.requires_grad]
    for checkpointing in (False, True):
        model.model.checkpointing = checkpointing
        lengths = [1, *map(int, rng.integers(1, 40, 4)), 2]
        rows = [torch.from_numpy(rng.integers(64, size=(2, n))) for n in lengths]
        targets = [row.masked_fill(torch.rand(row.shape) < 0.4, -100) for row in rows]
        groups = None if name == "full" else [2 * int(rng.integers(1, 9)) for _ in lengths]
        packed = model(torch.cat(rows, dim=1), torch.cat(targets, dim=1), groups, shift,
                       lengths=lengths)
        sums, counts = 0, 0
        for row, target, G in zip(rows, targets, groups or [None] * 6):
            n = int((target != -100).sum())
            sums, counts = sums + model(row, target, G, shift) * n, counts + n
        got, want = ([x, *torch.autograd.grad(x, trained)] for x in (packed, sums / counts))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="do not make 64"):
        model(TOKENS, lengths=[30, 33])


def test_logits_of_the_tokens_that_are_asked_for():
    """And losses; of none of them the loss is 0, and there is a gradient."""
    for trainable in ("embed,norm", "full"):
        longlora.set_trainable(model := tiny(), trainable)
        logits = model(TOKENS)
        for places in ([0, 9, 4], []):
            keep = torch.tensor(places, dtype=torch.int64)
            torch.testing.assert_close(model(TOKENS, logits_to_keep=keep), logits[:, keep])
            loss = model(TOKENS, TOKENS[:, keep], logits_to_keep=keep)
            others = torch.full_like(TOKENS, -100).index_copy(1, keep, TOKENS[:, keep])
            torch.testing.assert_close(loss, model(TOKENS, others))
            loss.backward()


class Recorder(TorchDispatchMode):
    """The names of all operations, and the shapes of what they make, views aside."""
    names, shapes = (), ()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.names += (str(function),)
        if not function.is_view:
            made = out if isinstance(out, (tuple, list)) else [out]
            self.shapes += tuple(tuple(x.shape) for x in made if isinstance(x, torch.Tensor))
        return out


@pytest.mark.parametrize("head_trains", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_chunked_loss_is_cross_entropy_on_all_logits(ignored, head_trains, monkeypatch):
    """In value and gradients, without ever making all logits; where no target counts it is 0."""
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 7)
    torch.manual_seed(0)
    x = torch.randn(2, 13, 8, requires_grad=True)
    weight = torch.randn(50, 8, requires_grad=head_trains)
    targets = torch.randint(50, (2, 13)).masked_fill(torch.rand(2, 13) < ignored, -100)
    leaves = [x, weight][:1 + head_trains]
    with Recorder() as recorder:
        loss = longlora.chunked_loss(x, weight, targets)
        gradients = torch.autograd.grad(3 * loss, leaves)
    assert max(math.prod(shape) for shape in recorder.shapes if 50 in shape) <= 50 * max(7, 8)
    expected = F.cross_entropy((x @ weight.T).flatten(0, 1), targets.flatten(), ignore_index=-100)
    expected = [expected, *torch.autograd.grad(3 * expected, leaves)]
    if ignored == 1:  # the mean of nothing is NaN, and no use
        expected = [torch.zeros_like(y) for y in expected]
    torch.testing.assert_close([loss, *gradients], expected)
    each = longlora.chunked_loss(x, weight, targets, mean=False)
    expected = F.cross_entropy((x @ weight.T).mT, targets, ignore_index=-100, reduction="none")
    torch.testing.assert_close(each, expected)


@pytest.mark.parametrize("trainable", ["lora,embed,norm", "full"])
def test_memory_savers_change_no_gradient(trainable, monkeypatch):
    """With all of them and without, the model's loss has the gradients of cross-entropy on its
    logits; what is recomputed is layers, with their attention only if asked."""
    monkeypatch.setitem(recompute.CHUNK, "cpu", 5)
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 7)
    model, calls, inputs, targets = lora_model(trainable), [], TOKENS[:, :16], TOKENS[:, 1:17]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = F.cross_entropy(model(inputs, None, 6).flatten(0, 1), targets.flatten())
    expected = [expected, *torch.autograd.grad(expected, trained)]
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
    kernels = {}
    for checkpointing, attention in ((False, False), (True, False), (True, True)):
        calls.clear()
        model.model.checkpointing, model.model.recompute_attention = checkpointing, attention
        with Recorder() as recorder:
            loss = model(inputs, targets, 6)
            results = [loss, *torch.autograd.grad(loss, trained)]
        torch.testing.assert_close(results, expected, rtol=1e-5, atol=1e-5)
        assert len(calls) == 1 + checkpointing
        kernels[checkpointing, attention] = sum("flash" in name for name in recorder.names)
    assert kernels[True, False] == kernels[False, False] < kernels[True, True]


def test_offloaded_activations_come_back_from_buffers_that_are_used_again(monkeypatch):
    """As many as the first step takes, also where later ones are shorter or longer."""
    monkeypatch.setattr(team.HostMemory, "SMALL", 1)
    model, host, count, buffers = lora_model(), team.HostMemory(), set(), []
    model.model.checkpointing = model.model.recompute_attention = True
    for T in (16, 16, 9, 33, 12, 40):
        results = []
        for saver in (contextlib.nullcontext(), host):
            with saver:
                loss = model(TOKENS[:, :T], TOKENS[:, 1:T + 1], 6)
            model.zero_grad()
            loss.backward()
            results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
        torch.testing.assert_close(*results, rtol=0, atol=0)
        count.add(len(host.free))
        buffers.append(sorted(x.data_ptr() for x in host.free))
    assert buffers[0] == buffers[1] == buffers[2] != buffers[3]  # what is no longer fits
    assert len(count) == 1 and min(count) > 2
    assert host.free == sorted(host.free, key=len) and len(host.free[-1]) >= 2 * 40 * 32 * 4


def test_memory_of_a_step_grows_by_the_layer_inputs_and_16_tensors():
    """Beyond the weights, by (T, C) tensors, at a fixed group size."""
    C, L, peaks = 256, 4, []
    config = LlamaConfig(vocab_size=64, hidden_size=C, intermediate_size=704, num_hidden_layers=L,
                         num_attention_heads=8)
    for T in (32768, 65536):
        with torch.device("meta"):
            longlora.add_lora(model := Llama(config))
            longlora.set_trainable(model, "lora,embed,norm")
        model.model.checkpointing = True
        live = micro_step(model, (1, T), torch.float32, False, False, group_size=1024)
        peaks.append(max(most for most, _ in live.peaks))
    assert (peaks[1] - peaks[0]) / (32768 * C * 4) < L + 16


def test_residual_stream_is_bf16_under_a_float32_embedding():
    model, seen = tiny().to(torch.bfloat16), []
    longlora.set_trainable(model, "embed,norm")
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, x, out: seen.extend([x[0].dtype, out.dtype]))
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS[:, :9], TOKENS[:, :9], 4).backward()
    assert seen == [torch.bfloat16] * 4
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# LoRA, LoRA+ and files ----------------------------------------------------------------------------


def test_lora_adds_the_product_of_its_factors_and_never_forms_it():
    """W x + (alpha / r) B A x, where B starts as zero."""
    linear, x = torch.nn.Linear(24, 40, bias=False).requires_grad_(False), torch.randn(2, 5, 24)
    lora = longlora.LoRALinear(linear, rank=3, alpha=12)
    assert torch.equal(lora(x), linear(x))
    A, B = lora.lora_A.weight, torch.nn.init.normal_(lora.lora_B.weight)
    with Recorder() as recorder:
        (out := lora(x)).sum().backward()
    torch.testing.assert_close(out, x @ (linear.weight + 12 / 3 * B @ A).T, rtol=1e-4, atol=1e-4)
    assert (3, 24) in recorder.shapes and not {(40, 24), (24, 40)} & set(recorder.shapes)


def test_llama_2_7b_trains_the_papers_parameter_counts():
    with torch.device("meta"):
        model = Llama(LlamaConfig(vocab_size=32001))
        longlora.add_lora(model)
    longlora.set_trainable(model, "lora,embed,norm")
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    lora = sum(size for name, size in sizes.items() if "lora_" in name)
    assert (lora, sum(sizes.values()) - lora) == (8_388_608, 131_342_336)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", ["lora,embed,norm", "lora", "lora,embed", "norm", "full"])
def test_exactly_these_parameters_train_in_float32(trainable, tied):
    """A tied head parts from an embedding that trains without it; LoRA starts as the identity."""
    model = tiny(tie_word_embeddings=tied).to(torch.bfloat16)
    logits = model.float()(TOKENS)
    longlora.add_lora(model.to(torch.bfloat16), rank=3)
    longlora.set_trainable(model, trainable)
    names = {name for name, _ in model.named_parameters()}
    parts = {"lora": r"layers\.\d\.self_attn\.[qkvo]_proj\.lora_[AB]", "embed": "embed_tokens",
             "norm": r"norm|layers\.\d\.(input|post_attention)_layernorm"}
    if trainable != "full":
        pattern = "|".join(parts[part] for part in trainable.split(","))
        names = {name for name in names if re.fullmatch(rf"model\.({pattern})\.weight", name)}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared == model.config.tie_word_embeddings == (tied and "embed" not in trainable)
    assert torch.equal(model.float()(TOKENS), logits)


TENSORS = {name: torch.arange(15).view(3, 5).to(dtype) for name, dtype in formats.DTYPES.items()}
TENSORS |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "odd": torch.ones(7).byte()}


def packed(header, data=b""):
    """A safetensors file by hand: `header` in bytes, or {name: (dtype, shape, start, stop)}."""
    if isinstance(header, dict):
        header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                             for name, (dtype, shape, *offsets) in header.items()}).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_safetensors_round_trip_is_byte_identical(tmp_path):
    formats.write_safetensors(TENSORS, tmp_path / "a")
    read = dict(formats.read_safetensors(tmp_path / "a"))
    torch.testing.assert_close(read, TENSORS, rtol=0, atol=0)  # names, dtypes and shapes too
    formats.write_safetensors(read, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    misaligned = {"a": ("U8", [1], 0, 1), "b": ("F32", [1], 1, 5)}
    (tmp_path / "c").write_bytes(packed(misaligned, b"\1\0\0\xc0\x3f"))
    assert dict(formats.read_safetensors(tmp_path / "c"))["b"].item() == 1.5


def test_broken_safetensors_are_refused(tmp_path):
    a, entry = ("F32", [2], 0, 8), b'"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}'
    broken = {
        "empty": b"", "header cut": packed({"a": a})[:20], "no JSON": packed(b"{'a': 1}"),
        "endless header": b"\xff" * 99, "nested deeply": packed(b"[" * 100_000),
        "data cut": packed({"a": a}, bytes(7)), "data behind": packed({"a": a}, bytes(9)),
        "a name twice": packed(b"{%b, %b}" % (entry, entry), bytes(8)),
        "overlap": packed({"a": a, "b": ("U8", [4], 4, 8)}, bytes(8)),
        "gap": packed({"a": a, "b": ("U8", [4], 9, 13)}, bytes(13)),
        "unknown dtype": packed({"a": ("F31", [2], 0, 8)}, bytes(8)),
        "negative sizes": packed({"a": ("U8", [-2, -4], 0, 8)}, bytes(8)),
        "another size": packed({"a": ("F32", [3], 0, 8)}, bytes(8)),
    }
    for kind, content in broken.items():
        (tmp_path / kind).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(tmp_path / kind))):
            dict(formats.read_safetensors(tmp_path / kind))


@pytest.mark.parametrize("trainable", ["lora,embed,norm", "lora", "lora,norm", "lora,embed"])
@each_shape
def test_saved_models_and_adapters_load_the_same(shape, trainable, tmp_path):
    """An adapter brings its context, and merges into the weights."""
    base, tuned = tiny(**shape).bfloat16(), lora_model(trainable, **shape)
    longlora.save_model(base, tmp_path / "bf16")
    loaded = longlora.load_model(tmp_path / "bf16")
    assert loaded.config == base.config and torch.equal(loaded(TOKENS), base(TOKENS))
    assert {(p.dtype, p.requires_grad) for p in loaded.parameters()} == {(torch.bfloat16, False)}
    tuned.extend(40)
    longlora.save_adapter(tuned, tmp_path / "adapter")
    longlora.save_model(tiny(**shape), tmp_path / "base")
    loaded = longlora.load_model(tmp_path / "base")
    longlora.load_adapter(loaded, tmp_path / "adapter")
    assert loaded.config == tuned.config and loaded.config.max_position_embeddings == 40
    torch.testing.assert_close(loaded(TOKENS), tuned(TOKENS), rtol=0, atol=1e-6)
    longlora.merge_lora(loaded)
    assert loaded.state_dict().keys() == base.state_dict().keys()
    torch.testing.assert_close(loaded(TOKENS), tuned(TOKENS), rtol=1e-4, atol=1e-4)


@each_shape
def test_safetensors_transformers_and_peft_read_ours_and_we_read_theirs(shape, tmp_path):
    package, peft = pytest.importorskip("safetensors.torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    formats.write_safetensors(TENSORS, tmp_path / "a")
    package.save_file(TENSORS, tmp_path / "b")
    torch.testing.assert_close(package.load_file(tmp_path / "a"), TENSORS, rtol=0, atol=0)
    read = dict(formats.read_safetensors(tmp_path / "b"))
    torch.testing.assert_close(read, TENSORS, rtol=0, atol=0)
    model, tuned = tiny(**shape), lora_model(**shape)
    longlora.save_model(model, tmp_path / "base")
    longlora.save_adapter(tuned, tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS), rtol=1e-4, atol=1e-4)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    torch.testing.assert_close(theirs(TOKENS).logits, tuned(TOKENS), rtol=1e-4, atol=1e-4)
    for name, p in theirs.named_parameters():
        p.data += bool(re.search("lora_|modules_to_save", name)) * torch.randn(p.shape) / 20
    theirs.save_pretrained(tmp_path / "back")
    longlora.load_adapter(model, tmp_path / "back")
    torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, rtol=1e-4, atol=1e-4)


NORM, EXTRA = "model.norm.weight", ("extra.weight", torch.zeros(1))
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISFITS = {  # None: not there
    "base/model.safetensors": [(NORM, None), (NORM, torch.ones(31)), EXTRA],
    "base/config.json": [("model_type", "qwen2"), ("quantization_config", {"bits": 4}),
                         ("rope_parameters", {"rope_type": "dynamic", "factor": 2.0}),
                         ("rope_scaling", {"type": "yarn", "factor": 2.0}), ("mlp_bias", True),
                         ("num_hidden_layers", 10**9), ("hidden_size", 1 << 40)],
    "adapter/adapter_model.safetensors": [(LORA, None), (LORA, torch.zeros(3, 31)), EXTRA],
    "adapter/adapter_config.json": [("peft_type", "LOHA"), ("r", None), ("target_modules", ["q"]),
                                    ("use_dora", True), ("bias", "all"), ("r", 4),
                                    ("init_lora_weights", "pissa"), ("lora_alpha", math.nan),
                                    ("layer_replication", [[0, 2]]), ("modules_to_save", ["x"]),
                                    ("alpha_pattern", {"(.*)*q_proj": 2}),
                                    ("rank_pattern", {"(": 3})],
    "adapter/longlora.json": [("context", None), ("factor", 2.0)],  # the factor of another base
}


@pytest.mark.parametrize("file, name, value", [
    (file, *change) for file, changes in MISFITS.items() for change in changes])
def test_files_that_do_not_fit_are_refused(file, name, value, tmp_path):
    path, base, adapter = tmp_path / file, tmp_path / "base", tmp_path / "adapter"
    longlora.save_model(tiny(), base)
    longlora.save_adapter(lora_model(), adapter)
    longlora.load_adapter(longlora.load_model(base), adapter)
    as_json = path.suffix == ".json"
    content = dict((formats.read_json if as_json else formats.read_safetensors)(path))
    content = {n: x for n, x in {**content, name: value}.items() if x is not None}
    formats.write_json(path, content) if as_json else formats.write_safetensors(content, path)
    with pytest.raises(ValueError, match=re.escape(str(path.parent))):
        longlora.load_adapter(longlora.load_model(base), adapter)


# Other people's files: data/formats.py, merge -----------------------------------------------------


HF = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
      "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
# What differs from the Llama above, in transformers' config and then in the file that it writes.
KINDS = {
    "Llama 1 and 2": ({"num_key_value_heads": 4}, {}),
    "grouped heads, theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, {}),
    "tied": ({"tie_word_embeddings": True}, {}), "head_dim": ({"head_dim": 12}, {}),
    "linear": ({"rope_parameters": {**LINEAR, "rope_theta": 500.0}}, {}),
    "linear, old": ({"rope_parameters": {**LINEAR, "rope_theta": 500.0}},
                    {"rope_theta": 500.0, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "llama3": ({"rope_parameters": {**LLAMA3, "rope_theta": 50.0}}, {}),
    "llama3, old, both names": ({"rope_parameters": {**LLAMA3, "rope_theta": 50.0}},
                                {"rope_theta": 50.0, "rope_scaling": {**LLAMA3, "type": "llama3"}}),
    "Mistral": ({"model_type": "mistral", "sliding_window": 16}, {}),
    "Mistral, all sees all": ({"model_type": "mistral", "sliding_window": None}, {}),
}
FORMS = ["safetensors", "safetensors in shards", "bin", "bin in shards", "bin before 2020"]


def write_weights(weights, folder, form):
    """In one file or in three, by hand: without transformers, whose newest writes no .bin."""
    name = "model.safetensors" if "safetensors" in form else "pytorch_model.bin"
    names, stem = sorted(weights), name.split(".")
    shards = [names[i::3] for i in range(3)] if "shards" in form else [names]
    for i, shard in enumerate(shards, 1):
        file = f"{stem[0]}-{i:05}-of-00003.{stem[1]}" if "shards" in form else name
        part = {n: weights[n].clone() for n in shard}
        if "safetensors" in form:
            formats.write_safetensors(part, folder / file)
        else:
            torch.save(part, folder / file, _use_new_zipfile_serialization="2020" not in form)
        if "shards" in form:
            index = folder / f"{name}.index.json"
            mapped = formats.read_json(index)["weight_map"] if i > 1 else {}
            formats.write_json(index, {"weight_map": {**mapped, **dict.fromkeys(shard, file)}})


@pytest.mark.parametrize("form", FORMS)
def test_weights_are_read_in_any_form(form, tmp_path):
    model = tiny().bfloat16()
    longlora.save_model(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    extra = {"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as old files have it
    write_weights({**model.state_dict(), **extra}, tmp_path, form)
    torch.testing.assert_close(longlora.load_model(tmp_path).state_dict(), model.state_dict())
    loaded = longlora.load_model(tmp_path, torch.float32)
    torch.testing.assert_close(loaded.state_dict(), model.float().state_dict(), rtol=0, atol=0)
    for lost in tmp_path.glob("*model*00002*"):
        lost.unlink()
        with pytest.raises(FileNotFoundError, match="00002"):
            longlora.load_model(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, tmp_path):
    """Beyond the original window too, there and back, in every form of file."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    changes, in_file = KINDS[kind]
    sizes = {**HF, **changes}
    config = transformers.AutoConfig.for_model(sizes.pop("model_type", "llama"), **sizes)
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for p in theirs.parameters():
        p.data += torch.randn(p.shape) / 5
    theirs.save_pretrained(tmp_path / "a")
    if in_file:
        written = formats.read_json(tmp_path / "a" / "config.json")
        del written["rope_parameters"]
        formats.write_json(tmp_path / "a" / "config.json", {**written, **in_file})
    tokens = TOKENS[:, :changes.get("sliding_window")]
    model, logits = longlora.load_model(tmp_path / "a"), theirs(tokens).logits
    torch.testing.assert_close(model(tokens), logits, rtol=1e-4, atol=1e-4)
    longlora.save_model(model, tmp_path / "b")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="float32")
    torch.testing.assert_close(back(tokens).logits, logits, rtol=1e-4, atol=1e-4)


def meta_folder(model, folder, shards, by_rows, params=()):
    """`model` as Meta would have written it: pairs of q and k as neighbours, split over GPUs."""
    c, state = model.config, model.state_dict()
    names = {"tok_embeddings": "model.embed_tokens", "output": "lm_head", "norm": "model.norm"}
    for i in range(c.num_hidden_layers):
        parts = {"attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
                 "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
                 "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
                 "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
                 "ffn_norm": "post_attention_layernorm"}
        names |= {f"layers.{i}.{ours}": f"model.layers.{i}.{his}" for ours, his in parts.items()}
    folder.mkdir()
    for n in range(shards):
        shard = {"rope.freqs": torch.ones(c.head_dim // 2)}
        for ours, his in names.items():
            w = state[f"{his}.weight"]
            if ours.endswith(("wq", "wk")):
                D, rows = c.head_dim, torch.arange(len(w))
                w = w[rows // D * D + rows % D // 2 + rows % 2 * (D // 2)]
            columns = ours.endswith(("wo", "w2")) or ours == "tok_embeddings" and not by_rows
            if w.dim() == 2:
                w = w.chunk(shards, dim=int(columns))[n]
            shard[f"{ours}.weight"] = w.clone()
        torch.save(shard, folder / f"consolidated.{n:02}.pth")
    formats.write_json(folder / "params.json", {
        "dim": c.hidden_size, "n_layers": c.num_hidden_layers, "n_heads": c.num_attention_heads,
        "n_kv_heads": c.num_key_value_heads, "norm_eps": c.rms_norm_eps, "multiple_of": 256,
        "vocab_size": -1, **dict(params)})


@pytest.mark.parametrize("shards, by_rows", [(1, True), (2, False), (2, True), (4, False)])
def test_metas_folders_are_their_hugging_face_twins(shards, by_rows, tmp_path):
    model = tiny(num_key_value_heads=4)
    meta_folder(model, tmp_path / "meta", shards, by_rows)
    loaded = longlora.load_model(tmp_path / "meta")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert loaded.config.max_position_embeddings == 4096 and loaded.config.rope_theta == 10000
    torch.testing.assert_close(loaded(TOKENS), model(TOKENS), rtol=0, atol=0)


@pytest.mark.parametrize("params, window, factor", [
    ({"norm_eps": 1e-6}, 2048, None), ({"rope_theta": 1e6}, 16384, None),
    ({"rope_theta": 5e5}, 8192, None), ({"rope_theta": 5e5, "use_scaled_rope": True}, 131072, 8.0)])
def test_metas_windows(params, window, factor, tmp_path):
    meta_folder(tiny(), tmp_path / "meta", 1, True, params)
    config = longlora.load_config(tmp_path / "meta")
    assert config.max_position_embeddings == window
    assert (config.rope_scaling or {}).get("factor") == factor


@pytest.mark.parametrize("context, says", [
    (None, "sliding_window 12"), (13, "sliding_window 12"), (12, None), (5, None)])
def test_a_mistral_is_a_llama_up_to_its_sliding_window(context, says, tmp_path):
    longlora.save_model(tiny(), tmp_path)
    config = formats.read_json(tmp_path / "config.json")
    formats.write_json(tmp_path / "config.json",
                       {**config, "model_type": "mistral", "sliding_window": 12})
    if says:
        with pytest.raises(ValueError, match=says):
            longlora.load_model(tmp_path, context=context)
    else:
        assert longlora.load_model(tmp_path, context=context).config.max_position_embeddings == 12


@pytest.mark.parametrize("beyond", [{"sliding_window": 16}, {"rope_scaling": LLAMA3}])
def test_what_cannot_be_extended_is_refused_wherever_it_is_asked(beyond, files, tmp_path, command):
    """By merge, by an adapter's own context, and by train.py before it has measured the base."""
    longlora.save_model(tiny(**beyond), tmp_path / "base")
    adapter = lora_model()
    adapter.extend(64)
    longlora.save_adapter(adapter, tmp_path / "adapter")
    for more in ({"context": 64}, {"adapter": tmp_path / "adapter"}):
        with pytest.raises(ValueError, match="sliding_window|llama3"):
            longlora.merge(tmp_path / "base", **{"adapter": None, **more}, out=tmp_path / "out")
    for out in ((), ("--plan",)):
        flags = ["--model", tmp_path / "base", "--out", tmp_path / "out", *out]
        status, err = command("train.py", *RUN, *flags)
        assert refused(status, err) and "held-out" not in err
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]


def test_llama3_scaling_takes_no_interpolation_on_top():
    model = tiny(rope_scaling={**LLAMA3, "type": "linear"})
    with pytest.raises(ValueError, match="llama3"):
        model.extend(17)
    model.extend(16)


def test_extending_twice_is_extending_once_by_the_product(tmp_path):
    """16 -> 48 -> 96 tokens, merged in between, reads as 16 -> 96."""
    longlora.save_model(tiny(), tmp_path / "a")
    longlora.merge(tmp_path / "a", None, tmp_path / "b", context=48)
    longlora.merge(tmp_path / "b", None, tmp_path / "c", context=96)
    once, twice = longlora.load_model(tmp_path / "a"), longlora.load_model(tmp_path / "c")
    once.extend(96)
    assert once.config == twice.config and once.config.interpolation_factor == 6
    assert torch.equal(once(TOKENS), twice(TOKENS))


@pytest.mark.parametrize("most", [longlora.SHARD_BYTES, 20_000])
def test_saving_what_was_loaded_gives_the_same_bytes(most, tmp_path, monkeypatch):
    """Models, in one file or in shards, and adapters; nothing of an earlier save stays behind."""
    a, b = tmp_path / "a", tmp_path / "b"
    monkeypatch.setattr(longlora, "SHARD_BYTES", 8_000)
    longlora.save_model(tiny(), b)
    monkeypatch.setattr(longlora, "SHARD_BYTES", most)
    longlora.save_model(tiny(), a)
    longlora.save_adapter(lora_model(), a)
    longlora.save_model(longlora.load_model(a), b)
    tuned = longlora.load_model(a)
    longlora.load_adapter(tuned, a)
    longlora.save_adapter(tuned, b)
    assert sorted(os.listdir(a)) == sorted(os.listdir(b))
    files = [path for path in a.iterdir() if path.name != "adapter_config.json"]  # names its base
    assert all(path.read_bytes() == (b / path.name).read_bytes() for path in files)
    sizes = [path.stat().st_size for path in a.glob("model*.safetensors")]
    assert len(sizes) == 1 if most > 20_000 else len(sizes) > 3 and max(sizes) < 22_000


PEFTS = {
    "all linear": {"target_modules": "all-linear", "lora_alpha": 5},
    "embedding and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "patterns": {"target_modules": ["q_proj", "k_proj", "up_proj"], "r": 4, "use_rslora": True,
                 "rank_pattern": {r"model.layers.0.*k_proj": 2, "up_proj": 3},
                 "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 7}},
    "some layers": {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    "not all": {"target_modules": ["v_proj", "o_proj"],
                "exclude_modules": ["model.layers.0.self_attn.o_proj"]},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", PEFTS)
def test_adapters_made_by_peft_give_the_same_logits(name, tied, tmp_path):
    """Read here; written again by us, and read again by PEFT."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    longlora.save_model(tiny(tie_word_embeddings=tied), tmp_path / "base")

    def base():
        path = tmp_path / "base"
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32")

    theirs = peft.get_peft_model(base(), peft.LoraConfig(**PEFTS[name]))
    for p in theirs.parameters():
        p.data += p.requires_grad * torch.randn(p.shape) / 20
    theirs.save_pretrained(tmp_path / "adapter")
    logits, model = theirs(TOKENS).logits, longlora.load_model(tmp_path / "base")
    longlora.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(TOKENS), logits, rtol=1e-4, atol=1e-4)
    longlora.save_adapter(model, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(base(), tmp_path / "ours")
    torch.testing.assert_close(back(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)
    longlora.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="float32")
    torch.testing.assert_close(merged(TOKENS).logits, logits, rtol=1e-4, atol=1e-4)


def released_adapter(folder, prefixes=("base_model.model.", ""), both=False):
    """Like those released with the paper: 65 rows for a model of 64. Returns the merged weights."""
    generator = torch.Generator().manual_seed(1)

    def like(*shape):
        return torch.randn(shape, generator=generator) / 5

    weights, lora, full = tiny().state_dict(), {}, {}
    head = weights["lm_head.weight"]
    weights["lm_head.weight"] = torch.cat([head, head.mean(0, keepdim=True)])
    for name, w in list(weights.items()):
        if re.search(r"[qkvo]_proj", name):
            layer = name.removesuffix(".weight")
            A, B = like(8, w.shape[1]), like(w.shape[0], 8)
            lora |= {f"{prefixes[0]}{layer}.lora_A.weight": A,
                     f"{prefixes[0]}{layer}.lora_B.weight": B}
            weights[name] = w + 16 / 8 * B @ A
        elif "norm" in name or "embed" in name:
            full[prefixes[1] + name] = weights[name] = like(65 if w.dim() > 1 else 32, *w.shape[1:])
    folder.mkdir()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
             "model.extra.weight": torch.ones(4)} if both else {}
    torch.save({**lora, **(full if both else {})}, folder / "adapter_model.bin")
    torch.save({**full, **(lora if both else {}), **extra}, folder / "trainable_params.bin")
    formats.write_json(folder / "adapter_config.json", {
        "base_model_name_or_path": "/a/strangers/path", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": 16, "lora_dropout": 0.0,
        "modules_to_save": None, "peft_type": "LORA", "r": 8, "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    return weights


@pytest.mark.filterwarnings("ignore:.* are left out")
@pytest.mark.parametrize("prefixes, both", [
    (("base_model.model.", ""), False), (("", ""), False), (("", "base_model.model."), True)])
def test_released_adapters_load_and_merge(prefixes, both, tmp_path):
    """Rows that only the embedding brought are the mean of the others in the head."""
    longlora.save_model(tiny(), tmp_path / "base")
    expected = released_adapter(tmp_path / "adapter", prefixes, both)
    model = longlora.load_model(tmp_path / "base")
    with pytest.warns(UserWarning) as warned:  # of the context, and of what is left out
        longlora.load_adapter(model, tmp_path / "adapter")
    assert len(warned) == 1 + both and model.config.interpolation_factor == 1
    longlora.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", context=40)
    merged = longlora.load_model(tmp_path / "merged")
    torch.testing.assert_close(merged.state_dict(), expected)
    assert merged.config == tiny(vocab_size=65).config.extended(40)
    model.extend(40)
    tokens = TOKENS + (TOKENS == 5) * 59  # the new row is read too
    assert (tokens == 64).any()
    torch.testing.assert_close(model(tokens), merged(tokens), rtol=1e-4, atol=1e-4)
    if "transformers" in sys.modules:
        theirs = sys.modules["transformers"].AutoModelForCausalLM.from_pretrained(
            tmp_path / "merged", dtype="float32")
        torch.testing.assert_close(theirs(tokens).logits, merged(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("most, files", [(5_000_000, 1), (20_000, 2)])
def test_merge_writes_a_whole_folder_or_none(most, files, dtype, tmp_path, monkeypatch):
    """The base's dtype or another, its tokenizer and the adapter's; what exists is not touched."""
    monkeypatch.setattr(longlora, "SHARD_BYTES", most)
    base, adapter, out = (tmp_path / name for name in ("base", "adapter", "out"))
    longlora.save_model(tiny(tie_word_embeddings=True).bfloat16(), base)
    tuned = lora_model(tie_word_embeddings=True)
    tuned.extend(64)
    longlora.save_adapter(tuned, adapter)
    for name, text in (("base/tokenizer.model", "a"), ("base/generation_config.json", "b"),
                       ("base/notes.txt", "c"), ("adapter/tokenizer.model", "d")):
        (tmp_path / name).write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr(longlora, "copy_companions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            longlora.merge(base, adapter, out, dtype)
    assert sorted(os.listdir(tmp_path)) == ["adapter", "base"]
    longlora.merge(base, adapter, out, dtype)
    written = sorted(os.listdir(out))
    assert len([name for name in written if name.endswith(".safetensors")]) == files
    assert written[0] == "config.json" and written[-1] == "tokenizer.model"
    assert (out / "tokenizer.model").read_text() == "d" and "notes.txt" not in written
    config = formats.read_json(out / "config.json")
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    assert config["max_position_embeddings"] == 64 and config["tie_word_embeddings"] is False
    merged, expected = longlora.load_model(out), longlora.load_model(base).float()
    assert {p.dtype for p in merged.parameters()} == {dtype or torch.bfloat16}
    longlora.load_adapter(expected, adapter)
    longlora.merge_lora(expected)
    expected = {name: w.to(dtype or torch.bfloat16) for name, w in expected.state_dict().items()}
    torch.testing.assert_close(merged.state_dict(), expected, rtol=0, atol=0)
    with pytest.raises(ValueError, match="exists"):
        longlora.merge(base, None, out)
    assert sorted(os.listdir(out)) == written and sorted(os.listdir(tmp_path))[-1] == "out"


MEMORY = """
import re, sys, threading, torch, longlora
def held(kind):
    return int(re.search(kind + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
def watch():
    while not done.wait(0.001):
        anonymous.append(held("RssAnon"))
model, out, dtype = sys.argv[1], sys.argv[2], getattr(torch, sys.argv[3])
longlora.merge(sys.argv[4], None, out + "-small")  # everything is imported
done, anonymous, before = threading.Event(), [held("RssAnon")], held("VmRSS")
thread = threading.Thread(target=watch)
thread.start()
if out.endswith("merged"):
    longlora.merge(model, None, out, dtype)
else:
    loaded = longlora.load_model(model, dtype)
    sum(p.sum() for p in loaded.parameters())
done.set()
thread.join()
print(max(anonymous) - anonymous[0], held("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("dtype, out, anonymous, total", [
    ("bfloat16", "loaded", 0.1, 1.15), ("float16", "loaded", 1.1, 1.15),
    ("bfloat16", "merged", 0.3, 1.3)])
def test_weights_are_in_memory_once_at_most(form, dtype, out, anonymous, total, tmp_path):
    """Loaded as they are, they belong to the file; converted or merged, they leave one by one."""
    model = tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=20).bfloat16()
    longlora.save_model(tiny(), tmp_path / "small")
    longlora.save_model(model, tmp_path / "model")
    size = sum(p.nbytes for p in model.parameters())
    if form == "bin":
        (tmp_path / "model" / "model.safetensors").unlink()
        write_weights(model.state_dict(), tmp_path / "model", form)
    arguments = [tmp_path / "model", tmp_path / out, dtype, tmp_path / "small"]
    run = subprocess.run([sys.executable, "-c", MEMORY, *arguments], cwd=ROOT, check=True,
                         stdout=subprocess.PIPE, text=True)
    own, most = map(int, run.stdout.split())
    assert own <= anonymous * size and most <= total * size, (own / size, most / size)


def test_added_tokens_are_single_ids_between_encoded_texts(tmp_path):
    """As added_tokens.json has them, the longest first; also where a text has none of them."""
    (tmp_path / "tokenizer.model").write_bytes(
        (ROOT / "data" / "tiny-llama" / "tokenizer.model").read_bytes())
    formats.write_json(tmp_path / "added_tokens.json", {"[PAD]": 2048, "[P": 2050, "</s>": 2})
    added, ids = prepare.load_tokenizer(tmp_path), TOKENIZER.encode
    assert added.encode("def f()") == ids("def f()") and added.vocab_size() == 2051
    text = "a[PAD]def f()[P[P</s> x"
    assert added.encode(text) == [*ids("a"), 2048, *ids("def f()"), 2050, 2050, 2, *ids(" x")]
    assert added.decode([*ids("a b"), 2048, *ids("c")]) == "a b[PAD]c"
    for bad in ("[1]", "{", '{"x": -1}', '{"": 5}'):
        (tmp_path / "added_tokens.json").write_text(bad)
        with pytest.raises(ValueError, match="added_tokens.json"):
            prepare.load_tokenizer(tmp_path)


class Ran:
    """What a pickle would do to whoever trusted it."""

    def __reduce__(self):
        return (setattr, (sys.modules[__name__].Ran, "code", True))


# Mutated files: so many of each of the 8 forms; FUZZ=250 pytest -k mutated reads 2,000 in seconds.
CASES = int(os.environ.get("FUZZ", 25))


@pytest.fixture(scope="module")
def opened():
    """The real paths of all files opened from now on."""
    paths = []
    sys.addaudithook(lambda event, args: event == "open" and isinstance(args[0], (str, bytes)) and
                     paths.append(os.path.realpath(os.fsdecode(args[0]))))
    return paths


def mutate(path, rng):
    """Break one file in one way; the header and the pickle, where little means much, most often."""
    data = bytearray(path.read_bytes())
    near = min(len(data), 400 if rng.random() < 0.7 else len(data))
    kind = rng.choice(["bits", "cut", "zeros", "length", "swap", "splice", "json", "code", "gone"])
    if kind == "bits":
        for _ in range(rng.integers(1, 9)):
            data[rng.integers(near)] ^= 1 << int(rng.integers(8))
    elif kind == "cut":
        data = data[:rng.integers(len(data))]
    elif kind == "zeros":
        start = rng.integers(near)
        data[start:start + 9] = bytes(9)
    elif kind == "length":
        value = rng.choice([0, 1, 7, len(data), len(data) - 8, 10**8, 2**62])
        data[:8] = (int(value) << int(rng.integers(2))).to_bytes(8, "little")
    elif kind == "swap":  # offsets overlap or leave the file, names occur twice, dtypes are wrong
        digits = [m.start() for m in re.finditer(rb"[0-9a-zA-Z_]", data[:near])]
        for at in rng.choice(digits, 3) if digits else ():
            data[at] = data[rng.choice(digits)]
    elif kind == "splice":
        start, stop = sorted(rng.integers(near, size=2))
        data[start:stop] = data[start:stop] * int(rng.integers(3))
    elif kind == "json":
        values = [b"null", b"-1", b"1e999", b"NaN", b"[" * 50_000, b"9" * 5000, b'"../../x"', b"{}"]
        found = list(re.finditer(rb'(?<=: )[^,{}\[\]]+', data))
        if found:
            at = found[rng.integers(len(found))]
            data[at.start():at.end()] = values[rng.integers(len(values))]
    elif kind == "code" and path.suffix in (".bin", ".pth"):
        tensors = torch.load(path, weights_only=True) | {"x": Ran()}
        torch.save(tensors, path, _use_new_zipfile_serialization=bool(rng.integers(2)))
        return
    elif kind == "gone":
        path.unlink()
        return
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore:.* does not say for what context")
@pytest.mark.parametrize("form", [*FORMS, "Meta", "adapter", "adapter, released"])
def test_mutated_files_are_refused_in_one_line_or_loaded(form, opened, tmp_path):
    """No crash, no code run, nothing outside the folder opened, no weight left without a value."""
    model, base, folder = tiny(num_key_value_heads=4), tmp_path / "base", tmp_path / "files"
    longlora.save_model(model, base)
    if form == "Meta":
        meta_folder(model, folder, 2, False)
    elif form == "adapter, released":
        released_adapter(folder)
    elif form == "adapter":
        longlora.save_adapter(lora_model(num_key_value_heads=4), folder)
    else:
        longlora.save_model(model, folder)
        (folder / "model.safetensors").unlink()
        write_weights(model.state_dict(), folder, form)
    whole = {path: path.read_bytes() for path in folder.iterdir()}
    for case in range(CASES):
        for path, data in whole.items():
            path.write_bytes(data)
        rng = np.random.default_rng((len(form), case))
        mutate(list(whole)[rng.integers(len(whole))], rng)
        opened.clear()
        try:
            loaded = longlora.load_model(base if "adapter" in form else folder)
            if "adapter" in form:
                longlora.load_adapter(loaded, folder)
            assert not any(p.is_meta for p in loaded.parameters())
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error) and len(str(error)) < 600, error
        data = [name for name in opened if Path(name).suffix not in (".py", ".pyc", ".so")]
        assert all(name.startswith((str(folder), str(base))) for name in data), data
        assert not hasattr(Ran, "code")


# data/prepare.py and eval.py ----------------------------------------------------------------------


def test_splits_are_fixed_and_disjoint_and_hold_out_no_tests():
    splits = {"os.py": "train", "json/decoder.py": "train", "ast.py": "valid", "runpy.py": "test"}
    assert {name: prepare.split_of(name) for name in splits} == splits
    training, valid, test = (set(prepare.library_files(split, tests=True))
                             for split in ("train", "valid", "test"))
    assert valid and test and not (training & valid | training & test | valid & test)
    names = {x for path in valid | test for x in path.relative_to(Path(os.__file__).parent).parts}
    assert not {"test", "tests", "idle_test", "site-packages"} & names


@pytest.mark.parametrize("size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_documents_are_joined_by_eos(size, dtype, tmp_path):
    """Text files, JSON lines and folders of them; every document is followed by one `</s>`."""
    letters = SimpleNamespace(encode=lambda text: list(map(ord, text)), eos_id=lambda: 2,
                              vocab_size=lambda: size)
    text = "".join(f"line {i}\n" for i in range(100_000))  # read in several pieces
    records = '{"text": "x\\ny"}\n\n{"text": ""}\n{"text": "z", "n": 1}\n'
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "deep" / "b.jsonl").write_text(records)
    files, out = prepare.text_files([tmp_path]), tmp_path / "out" / "tokens.bin"
    count, tokens = prepare.write_texts(files, letters, out), np.fromfile(out, dtype)
    assert "".join(map(chr, tokens)) == text + "\2x\ny\2\2z\2" and count == len(tokens)
    for bad in ("{", '"text"', '{"text": 5}'):  # is named, and leaves no half-written file
        files[1].write_text(records + bad)
        with pytest.raises(ValueError, match="b.jsonl, line 5"):
            prepare.write_texts(files, letters, out.with_name("x.bin"))
        assert os.listdir(out.parent) == ["tokens.bin"]


def parsed(prompt):
    """Of a passkey prompt with its answer: the key, and the filler before and behind it."""
    _, before, told, behind, asked = prompt.split("\n")
    key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", told)[1]
    assert asked.endswith(f"The pass key is {key}") and 1 <= int(key) <= 50_000
    return int(key), before, behind


def test_passkey_documents():
    """They fill their length, end in the key, and held-out keys and depths are never trained on."""
    rng, drawn = np.random.default_rng(0), {False: [], True: []}
    for i in range(200):
        held_out, length = bool(i % 2), int(rng.integers(100, 400))
        ids, n = prepare.passkey_document(TOKENIZER, length, rng, held_out)
        assert length - 32 <= len(ids) <= length and ids[0] == TOKENIZER.bos_id()
        key, before, _ = parsed(TOKENIZER.decode(ids))
        assert TOKENIZER.decode(ids[-n:]).strip() == str(key)
        drawn[held_out].append((key, len(before)))
    for trained, tested in zip(zip(*drawn[False]), zip(*drawn[True])):
        assert not set(trained) & set(tested) and len(set(tested)) > 50


@pytest.mark.parametrize("length, seed, characters", [
    (200, 0, 0), (600, 1, 2048), (1024, 2, 3072), (3000, 77, 10240)])
def test_official_passkeys_are_those_of_the_official_evaluation(length, seed, characters):
    """Python's generator draws the depth, then the key; the filler starts anew behind the key."""
    ids, n, depth = prepare.official_passkey(TOKENIZER, length, seed)
    (key, before, behind), draw = parsed(TOKENIZER.decode(ids)), random.Random(seed)
    assert (len(before), key) == (draw.randint(0, characters), draw.randint(1, 50_000))
    assert len(before + behind) == characters and depth * characters == pytest.approx(len(before))
    assert all((prepare.FILLER * 120).startswith(part) for part in (before, behind))
    assert ids[0] == TOKENIZER.bos_id() and TOKENIZER.decode(ids[-n:]).strip() == str(key)


def test_training_reads_passkey_documents_end_to_end():
    """As many as find room, half of them shorter than the geometric mean of least and most."""
    lengths = []
    for seed in range(60):
        room = 128 + 1920 * (seed % 2)
        ids = prepare.passkey_documents(TOKENIZER, room, np.random.default_rng(seed))
        ends = [i + 1 for i, token in enumerate(ids) if token == TOKENIZER.eos_id()]
        parts = [ids[a:b] for a, b in zip([0, *ends], ends)]
        assert ends[-1] == len(ids) and room - 128 < len(ids) <= room + 1
        for part in parts:
            assert part[0] == TOKENIZER.bos_id() and part.count(TOKENIZER.bos_id()) == 1
            assert TOKENIZER.decode(part).endswith(tuple("012456789"))  # no held-out key
        lengths += [len(parts[0])] * (room > 128)
    assert 8 <= sum(length < 512 for length in lengths) <= 22


@torch.no_grad()
def reference_perplexity(model, tokens, context, protocol, stride, stretches=1, attention=()):
    """Token by token for "once", window by window for "official", from all logits: perplexity, its
    standard error, how many tokens, and perplexity by position."""
    def losses(window):
        window = torch.from_numpy(window.astype(np.int64))
        logits = model(window[None, :-1], None, *attention)[0]
        return -logits.log_softmax(-1).gather(1, window[1:, None]).squeeze(1)

    starts, each = range(0, len(tokens), stride), []  # a window's start, a place in it, the loss
    if protocol == "official":
        each = [(s, i, loss) for s in starts if s + context <= len(tokens)
                for i, loss in enumerate(losses(tokens[s:s + context]).tolist())]
    else:
        for t in range(1, len(tokens)):
            s = next(s for s in starts if s + context > t)  # of the first window that holds t
            each.append((s, t - s - 1, losses(tokens[s:t + 1])[-1].item()))
    mean = np.mean([loss for *_, loss in each])
    own = [[loss for s, _, loss in each if s == start] for start in {s for s, *_ in each}]
    spread, n = sum((sum(w) - mean * len(w)) ** 2 for w in own), len(own)
    error = math.exp(mean) * math.sqrt(n / (n - 1) * spread) / len(each) if n > 1 else None
    parts = np.array_split(range(context - 1), stretches)
    by_position = [np.exp(np.mean([loss for _, i, loss in each if i in part])) for part in parts]
    return math.exp(mean), error, len(each), by_position


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("protocol", ["once", "official"])
@pytest.mark.parametrize("length, context, stride", [(40, 8, 4), (43, 12, 11), (9, 9, 1)])
def test_perplexity_is_its_definition(protocol, length, context, stride, name, monkeypatch):
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 3 * context)  # three windows at a time
    tokens = TOKENS[0, :length].numpy().astype(np.uint16)
    asked = tiny(), tokens, context, protocol, stride
    found = evaluation.perplexity(*asked, torch.float32, *ATTENTIONS[name], stretches=3)
    value, error, scored, by_position = reference_perplexity(*asked, 3, ATTENTIONS[name])
    assert found.tokens == scored and found.value == pytest.approx(value, rel=1e-5)
    assert found.error == (error and pytest.approx(error, rel=1e-4))
    assert found.by_position == pytest.approx(by_position, rel=1e-5)


def test_perplexity_never_makes_all_logits(monkeypatch):
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 7)
    model = tiny(vocab_size=500)
    with Recorder() as recorder:
        evaluation.perplexity(model, TOKENS.flatten().numpy(), 32)
    assert max(math.prod(shape) for shape in recorder.shapes if 500 in shape) == 7 * 500


@pytest.mark.parametrize("protocol", ["once", "official"])
@torch.no_grad()
def test_perplexity_is_that_of_transformers(protocol, tmp_path):
    transformers = pytest.importorskip("transformers")
    longlora.save_model(tiny(), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    tokens, losses = TOKENS.reshape(1, -1), []
    for start, stop, new in evaluation.windows(128, 12, protocol, 5):
        labels = tokens[:, start:stop].clone()
        labels[:, :-new] = -100
        losses += [theirs(tokens[:, start:stop], labels=labels).loss.item()] * new
    found = evaluation.perplexity(tiny(), tokens[0].numpy(), 12, protocol, 5)
    assert found.tokens == len(losses) == (127 if protocol == "once" else 24 * 11)
    assert found.value == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)


def oracle(wrong):
    """A model that knows each next token but one: the `wrong(text)`th, from the end as -1."""
    def hidden(tokens):
        known = tokens.roll(-1, dims=1)
        known[:, wrong(TOKENIZER.decode(tokens[0].tolist())) - 1] += 1
        return F.one_hot(known % 2048, 2048).float()

    model = SimpleNamespace(model=hidden, lm_head=torch.nn.Linear(2048, 2048, bias=False))
    torch.nn.init.eye_(model.lm_head.weight)
    return model


@pytest.mark.parametrize("wrong, accuracy", [(-1, 0.0), (-2, 0.0), (-9, 1.0)])
def test_a_passkey_is_retrieved_when_every_answer_token_is_the_arg_max(wrong, accuracy):
    found = evaluation.passkey(oracle(lambda text: wrong), TOKENIZER, 100, 5)
    assert found["accuracy"] == accuracy and found["by_depth"] == [accuracy]


def test_passkeys_are_counted_where_they_lie():
    """So many in each stretch of the filler, held-out ones; the official ones where they fall."""
    seen = []

    def deep(text):
        key, before, behind = parsed(text)
        seen.append((len(before) / len(before + behind), len(before) % 10, key % 10))
        return -1 if seen[-1][0] > 0.4 else -9

    found = evaluation.passkey(oracle(deep), TOKENIZER, 300, trials=6, depths=5)
    assert found["by_depth"] == [1, 1, 0, 0, 0] and (found["trials"], found["accuracy"]) == (30, .4)
    for i, (depth, *digits) in enumerate(sorted(seen)):
        assert i // 6 - 0.05 <= 5 * depth <= i // 6 + 1.05 and digits == [3, 3]
    odd, cells = oracle(lambda text: -1 - parsed(text)[0] % 2 * 8), [[] for _ in range(5)]
    for draw in map(random.Random, range(1, 5)):
        cells[draw.randint(0, 3072) * 5 // 3072].append(draw.randint(1, 50_000) % 2)
    found = evaluation.passkey(odd, TOKENIZER, 1024, 4, depths=5, seed=1, official=True)
    assert found["by_depth"] == [np.mean(cell) if cell else None for cell in cells]
    assert found["trials"] == 4 and 0 < found["accuracy"] == np.mean(sum(cells, [])) < 1
    lengths = [len(prepare.official_passkey(TOKENIZER, 1024, seed)[0]) for seed in range(1, 5)]
    assert None in found["by_depth"] and found["tokens"] == round(np.mean(lengths))


@each_shape
def test_generating_with_a_cache_is_generating_without(shape, monkeypatch):
    """Token for token; the prompt is read in parts of PREFILL, and no token is read twice."""
    model, seen = tiny(max_position_embeddings=64, **shape), []
    prompt = TOKENS[0, :17].tolist()
    expected = list(prompt)
    for _ in range(40):
        expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
    assert len(set(expected[17:])) > (1 if model.config.tie_word_embeddings else 5)
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for prefill in (1024, 7, 3):
        monkeypatch.setattr(chat, "PREFILL", prefill)
        seen.clear()
        ids = chat.generate(model, prompt, 40, torch.float32, set())
        assert [*prompt, *ids] == expected
        assert seen == [len(part) for part in torch.arange(17).split(prefill)] + [1] * 39


@pytest.mark.parametrize("name", ["random", "tiny-llama"])
def test_generation_is_that_of_transformers(name, tmp_path, monkeypatch):
    """200 tokens, of a Llama that was interpolated too."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(chat, "PREFILL", 16)
    model, prompt = tiny(max_position_embeddings=256), TOKENS[0, :40].tolist()
    if name == "tiny-llama":
        model = longlora.load_model(ROOT / "data" / name, torch.float32)
        model.extend(400)
        prompt = [1, *TOKENIZER.encode("def f(x):\n    return x * 2\n\n\nclass A:\n" * 5)]
    longlora.save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=200)[0]
    got = [*prompt, *chat.generate(model, prompt, 200, torch.float32, set())]
    assert got == expected.tolist() and len(got) == len(prompt) + 200


def test_generation_ends_at_a_stop_token_and_with_the_window():
    def generated(n, most=99, stop=()):  # after n tokens, in a window of 16
        prompt = TOKENS[0, :n].tolist()
        return list(chat.generate(tiny(), prompt, most, torch.float32, set(stop)))

    whole = generated(6)
    assert len(whole) == 10 and generated(6, 4) == whole[:4] and len(generated(15)) == 1
    assert all(generated(6, 99, [id, 64]) == whole[:whole.index(id)] for id in whole)
    for n, says in ((0, "empty"), (16, "model reads 16"), (17, "model reads 16")):
        with pytest.raises(ValueError, match=says):
            generated(n)
    for eos, stop in ((None, {2}), (7, {2, 7}), ([2, 7, 9], {2, 7, 9})):
        assert chat.stops(tiny(eos_token_id=eos), TOKENIZER) == stop


def likeliest(logits, top_p):
    """At temperature 0.5: the fewest tokens that have a share of top_p, and each one's of that."""
    p, ids = (logits / 0.5).softmax(-1).sort(descending=True)
    n = next(n for n in range(1, 65) if p[:n].sum() >= top_p)
    return dict(zip(ids[:n].tolist(), (p[:n] / p[:n].sum()).tolist()))


@torch.no_grad()
def test_tokens_are_drawn_from_the_likeliest_that_have_the_share():
    """As often as each one's share says; a seed gives one text, another another."""
    model, prompt = tiny(max_position_embeddings=64), TOKENS[0, :9].tolist()

    def drawn(most, top_p, seed):
        how = torch.float32, set(), 0.5, top_p, seed
        return list(chat.generate(model, prompt, most, *how))

    for top_p in (0, 0.4, 0.6, 0.9999):
        shares = likeliest(model(TOKENS[:1, :9])[0, -1], top_p)
        ids = [drawn(1, top_p, seed)[0] for seed in range(150)]
        often = {id for id, share in shares.items() if share > 0.05}
        assert often <= set(ids) <= shares.keys() and (len(often) > 1) == (top_p > 0)
        assert all(abs(ids.count(id) / 150 - share) < 0.12 for id, share in shares.items())
    text = drawn(40, 0.6, 5)
    assert text == drawn(40, 0.6, 5) != drawn(40, 0.6, 6)
    for logits, id in zip(model(torch.tensor([prompt + text]))[0, 8:], text):
        assert id in likeliest(logits, 0.6)


@pytest.mark.parametrize("answer, topics, named", [
    ("\n It was The Art of Bread. ", ["the art of BREAD", "sleep"], True), ("", ["sleep"], False),
    ("sleep, then Bread", ["sleep", "bread"], False), ("sleep, bread", ["bread"], True),
    ("the art of x", ["the art of x", "x"], True), ("the art of x", ["x", "the art of x"], False),
    ("sleep\nand bread", ["sleep", "bread"], True), ("sleep\nand bread", ["bread"], False)])
def test_an_answer_names_the_first_topic_and_no_other(answer, topics, named):
    assert evaluation.names_topic(answer, topics) == named


def test_topic_files_are_read_or_refused_by_line(tmp_path):
    """LongChat's fields; U+2028 ends no line."""
    case = {"test_id": 1, "prompt": "A\u2028record", "topics": ["the sea", "x"], "prompt_length": 9}
    path, line = tmp_path / "topics.jsonl", json.dumps(case, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\n", encoding="utf-8")
    assert evaluation.read_topic_cases(path) == [case, case]
    for bad in ("{", "5", '{"prompt": "x"}', '{"prompt": "x", "topics": []}', "[" * 100_000,
                '{"prompt": "x", "topics": "sleep"}', '{"prompt": 5, "topics": ["x"]}'):
        path.write_text(f"{line}\n\n{bad}\n{line}", encoding="utf-8")
        with pytest.raises(ValueError, match="topics.jsonl, line 3"):
            evaluation.read_topic_cases(path)


def test_the_paper_makes_each_run_once_and_prints_means_with_their_spread(tmp_path, monkeypatch,
                                                                          capsys):
    calls, status = [], 0

    def fake(words, env, stdout, stderr, pass_fds):
        """Perplexity: 10 at 2,048 tokens, 20 as trained, plus the seed."""
        calls.append(words)
        value = dict(zip(words, words[1:]))
        stdout.write("it broke\n")
        if words[1].endswith("train.py"):
            Path(value["--out"]).mkdir(exist_ok=True)
            (Path(value["--out"]) / "results.json").write_text("{}")
        elif words[2] == "passkey":
            rows = [{"length": int(n), "accuracy": 0.5, "by_depth": [0.0, 1.0]}
                    for n in value["--length"].split(",")]
        else:
            model = value.get("--adapter", value.get("--model", "seed-0"))
            first = (20 if "--attention" in words else 10) + int(model[-1])
            rows = [{"context": int(c), "perplexity": float(first)}
                    for c in value["--context"].split(",")]
        if "--json" in words:
            Path(value["--json"]).write_text(json.dumps({"rows": rows}))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(paper, "subprocess", SimpleNamespace(run=fake))  # matplotlib runs others
    paper.run(tmp_path, None, 3, jobs=4)
    trained = [words for words in calls if words[1].endswith("train.py")]
    assert len(trained) == 9 + 5 * 3 + 2 + 1 + 4  # full fine-tuning, LoRA+ and T/2 are shared
    assert len({str(words) for words in calls}) == len(calls)
    printed = capsys.readouterr().out
    assert re.search(r"S2-Attn +12.00 ± 1.00 +12.00 ± 1.00 +22.00 ± 1.00", printed)
    assert re.search(r"stretched +0.50 +0.50", printed) and re.search(r"base +10.00", printed)
    rows = json.loads((tmp_path / "table-2.json").read_text())["rows"]
    assert {(row["variant"], row["seed"], row["2048"]) for row in rows} == {
        (name, seed, 10 + seed) for name in paper.TABLE_2 for seed in (1, 2, 3)}

    calls.clear()
    paper.run(tmp_path, [1, 5], 3, jobs=2)
    assert not calls and (tmp_path / "table-2.json").exists()
    status = 2
    monkeypatch.setitem(paper.DEFAULTS, "lr", 1e-4)  # other settings are another run
    with pytest.raises(ValueError, match="train.py .* ended with status 2: it broke"):
        paper.run(tmp_path, [3], 1, jobs=2)
    with open(tmp_path / "lock") as lock, pytest.raises(ValueError, match="another run works"):
        fcntl.flock(lock, fcntl.LOCK_EX)
        paper.run(tmp_path, [1], 3, jobs=2)
    with pytest.raises(ValueError, match="tables 1 to 5"):
        paper.run(tmp_path, [2, 6], 3, jobs=2)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_figures_are_drawn_and_the_same_each_time(suffix, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"figure{suffix}"
    cells = [{"length": n, "by_depth": [0.0, None, 1.0]} for n in (128, 256)]
    series = {"a": ([256, 512], [8.0, 9.5], [0.1, None]), "b": ([256, 1000], [300.0, 9.0], None)}
    for draw in (lambda: plots.curve(path, series, "title", "perplexity", {"window": 256}),
                 lambda: plots.heatmaps(path, {"base": cells, "extended": cells[:1]}),
                 lambda: plots.dots(path, {"LoRA": [3.0, 4.0], "full": [2.0]}, "title", "x"),
                 lambda: plots.pattern(path), lambda: plots.reach(path)):
        draw()
        first = path.read_bytes()
        draw()
        assert path.read_bytes() == first and len(first) > 5000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_the_drawn_pattern_is_the_definition():
    for T, G in ((16, 4), (14, 6)):
        t, u = torch.arange(T)[:, None], torch.arange(T)
        for half, shift in ((0, 0), (1, G // 2)):
            expected = (u <= t) & ((t + shift) // G == (u + shift) // G)
            assert torch.equal(plots.seen(T, G)[half], expected)


# train.py, and the command lines in a folder of small and of broken files -------------------------


def test_a_batch_is_a_function_of_seed_and_step():
    """Slices of the data; a share of them, no more, opens with a passkey document."""
    tokens = np.arange(3, 5000, dtype=np.uint16)

    def batch(step, context=20, batch_size=6, passkey=0.0, **more):
        run = train.Run(context=context, batch_size=batch_size, passkey=passkey, **more)
        return batches.make_batch(run, tokens, TOKENIZER, step)

    rows = batch(7)
    assert rows.shape == (6, 21) and (rows.diff(dim=1) == 1).all() and len(rows[:, 0].unique()) > 1
    assert torch.equal(rows, batch(7, micro_batch=3))
    assert not torch.equal(rows, batch(8)) and not torch.equal(rows, batch(7, seed=1))
    for share in (0, 0.3, 1):
        rows = batch(0, context=160, batch_size=200, passkey=share)
        assert rows.shape == (200, 161)
        assert abs((rows[:, 0] == TOKENIZER.bos_id()).float().mean() - share) < 0.1


def test_learning_rate_rises_stays_and_falls():
    run = train.Run(lr=2.0, warmup=4, steps=12, decay=0.5)
    expected = [0.5, 1, 1.5, 2, 2, 2, 2, 10 / 6, 8 / 6, 1, 4 / 6, 2 / 6]
    assert [train.learning_rate(run, step) for step in range(12)] == pytest.approx(expected)


RUN = ("--model model --data tokens.bin --context 64 --steps 7 --batch-size 2 --warmup 1 --lr 0.01 "
       "--micro-batch 1 --rank 2 --dtype float32 --eval-tokens 200").split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    for name in ("model", "broken", "no-json"):
        longlora.save_model(tiny(), root / name)
    os.truncate(root / "broken" / "model.safetensors", 1000)
    longlora.save_model(tiny(vocab_size=2048, max_position_embeddings=4096), root / "reader")
    shutil.copy(ROOT / "data" / "tiny-llama" / "tokenizer.model", root / "reader")
    (root / "no-json" / "config.json").write_text("{")
    tokens = np.random.default_rng(0).integers(3, 64, 6000).astype(np.uint16)
    for name, ids in ("tokens", tokens), ("short", tokens[:50]), ("beyond", tokens + 1):
        ids.tofile(root / f"{name}.bin")
    (root / "half.bin").write_bytes(b"123")
    lines = "\n".join(map(json.dumps, instructions(60, seed=1)))
    (root / "questions.jsonl").write_text(lines)
    return root


@pytest.fixture
def command(files, monkeypatch, capfd):
    """Run a script in this process: its exit status and what it wrote to stderr."""
    def run(script, *arguments):
        monkeypatch.chdir(files)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        handler, status = signal.getsignal(signal.SIGINT), 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except (SystemExit, MemoryError) as error:
            status = getattr(error, "code", "crash")
        signal.signal(signal.SIGINT, handler)
        return status, capfd.readouterr().err

    return run


def refused(status, err):
    """Exit status 2 and one line, no traceback; argparse puts its usage before the line. Of a bar a
    terminal shows what stands behind the last carriage return: nothing, when it is gone."""
    lines = [line.rpartition("\r")[2] for line in err.removesuffix("\n").split("\n")]
    lines = [line for line in lines if not re.match("usage:|  ", line)]
    return status == 2 and len(lines) == 1 and ": error: " in lines[0]


def test_train_and_eval_as_a_user_runs_them(files, tmp_path):
    out = tmp_path / "out"
    subprocess.run([sys.executable, ROOT / "train.py", *RUN, "--out", out], cwd=files, check=True)
    assert set(os.listdir(out)) == {"adapter_config.json", "adapter_model.safetensors",
                                    "longlora.json", "log.jsonl", "results.json", "states"}
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    table = json.loads((out / "results.json").read_text())["perplexity"]
    fields = {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "peak_memory_bytes"}
    assert all(line.keys() == fields for line in log)
    assert [(x["step"], x["tokens"]) for x in log] == [(n, n * 2 * 64) for n in range(1, 8)]
    model, tokens = tiny(), np.fromfile(files / "tokens.bin", np.uint16)
    model.extend(64)  # the first loss is the interpolated base's, in groups of half a window
    run = train.Run(context=64, batch_size=2, passkey=0)
    batch = batches.make_batch(run, tokens[:5400], None, 0)
    assert log[0]["loss"] == pytest.approx(model(batch[:, :-1], batch[:, 1:], 32).item(), rel=1e-5)
    assert list(table) == ["base", "interpolated", "extended"]
    assert all(list(row) == ["16", "32", "64"] for row in table.values())
    more = "--data tokens.bin --context 16,64 --max-tokens 500 --dtype float32".split()
    longlora.load_adapter(model := tiny(), out)
    expected = []
    for context in (16, 64):
        value, error, n, _ = reference_perplexity(model, tokens[:500], context, "once",
                                                  context // 2)
        expected.append({"context": context, "protocol": "once", "stride": context // 2,
                         "perplexity": pytest.approx(value, rel=1e-4),
                         "error": pytest.approx(error, rel=1e-3), "tokens": n})
    for processes in (1, 2):
        launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes}".split()
        rows, launcher = tmp_path / f"{processes}.json", launcher if processes > 1 else []
        printed = subprocess.run(
            [sys.executable, *launcher, ROOT / "eval.py", "perplexity", "--model", "model",
             "--adapter", out, *more, "--json", rows], cwd=files, check=True, text=True,
            stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}).stdout
        assert formats.read_json(rows)["rows"] == expected
        assert len(printed.splitlines()) == 3 and "perplexity" in printed  # the table, once


def run_eval(monkeypatch, out, *arguments):
    """The rows of eval.py, run in this process and as this process has changed it."""
    monkeypatch.setattr(sys, "argv", list(map(str, ["eval.py", *arguments, "--json", out])))
    evaluation.main()
    return formats.read_json(out)["rows"]


TEXT, QUESTION = "def naïve(☃):\n  # 🎉", ["--question", "Who?"]


@pytest.mark.parametrize("given", [["--prompt", TEXT], ["--file", "text", *QUESTION], QUESTION])
def test_generate_reads_a_text_and_streams_its_end(given, files, tmp_path, monkeypatch, capfd):
    """A question is put as the paper's chat models read it; no half characters are written."""
    answer, calls, shown = " naïve ☃ 🎉🎉 end", [], []
    asked = f"[INST]{TEXT}\nWho?[/INST]" if "Who?" in given else TEXT
    prompt, whole = (TOKENIZER.encode(x) for x in (asked, asked + answer))

    def generate(model, *how):
        calls.append(how)
        for id in whole[len(prompt):]:
            yield id
            shown.append(capfd.readouterr().out)

    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO(TEXT))
    monkeypatch.setattr(chat, "generate", generate)
    flags = "--temperature 1.5 --top-p 0.7 --seed 5 --dtype float32 --model".split()
    row, = run_eval(monkeypatch, tmp_path / "rows", "generate", *given, *flags, files / "reader")
    assert calls == [([1, *prompt], 512, torch.float32, {2}, 1.5, 0.7, 5, None)]
    assert "".join(shown) == answer == row["text"] and {" ", "ï", "☃", "🎉"} <= set(shown)
    assert (row["prompt_tokens"], row["tokens"]) == (1 + len(prompt), len(whole) - len(prompt))


def test_topics_are_counted_by_their_number(files, tmp_path, monkeypatch):
    """Of a model that names the first topic where the name's length is even, else the second."""
    cases = [prepare.topic_case(n, np.random.default_rng((n, i))) for i in range(6) for n in (8, 2)]
    (tmp_path / "cases").write_text("\n".join(map(json.dumps, cases)))

    def generate(model, prompt, *_):
        text = TOKENIZER.decode(prompt)
        topics = re.findall(r"\nUSER: I would like to discuss the topic of (.*)\.\n", text)
        assert any(case["topics"] == topics for case in cases) and len(topics) == len(set(topics))
        assert text.startswith("{}[INST]Below is") and text.endswith("ASSISTANT:[/INST]")
        return iter(TOKENIZER.encode(topics[len(topics[0]) % 2]))

    monkeypatch.setattr(evaluation, "generate", generate)
    rows = run_eval(monkeypatch, tmp_path / "rows", "topics", "--model", files / "reader",
                    "--template", "{}[INST]{prompt}[/INST]", "--file", tmp_path / "cases")
    topics = [case["topics"] for case in cases]
    shares = [np.mean([len(x[0]) % 2 == 0 for x in topics if len(x) == n]) for n in (2, 8)]
    assert [(row["topics"], row["cases"], row["accuracy"]) for row in rows] == [
        (2, 6, shares[0]), (8, 6, shares[1])] and len({0, 1, *shares}) == 4


@pytest.mark.parametrize("end, says, steps, more", [
    ("Ctrl-C", "--resume continues", 5, "--attention local"), ("NaN", "norm nan", 4, ""),
    ("crash", "crash", 4, "--init random --trainable full --context 16 --attention full"),
    ("crash", "crash", 4, "--model reader --data questions.jsonl --epochs 0.26")])
def test_a_resumed_run_is_the_whole_run(end, says, steps, more, tmp_path, monkeypatch, command):
    """Bit for bit. Ctrl-C in step 5 saves; a crash or a NaN there leaves the save of step 3."""
    whole, parts, calls, clip = tmp_path / "1", tmp_path / "2", [], torch.nn.utils.clip_grad_norm_

    def fifth_ends(*arguments):
        calls.append(end if len(calls) == 4 else "")
        if calls[-1] == "crash":
            raise MemoryError
        if calls[-1] == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments) * (math.nan if calls[-1] == "NaN" else 1)

    words = RUN if "epochs" not in more else [x for x in RUN if x not in ("--steps", "7")]

    def run(out, *flags):
        return command("train.py", *words, *more.split(), "--out", out, "--save-every", 3, *flags)

    def result(out):
        log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        lines = [(x["step"], x["loss"], x["grad_norm"], x["lr"]) for x in log]
        return lines, next(out.glob("*model.safetensors")).read_bytes()

    assert run(whole)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", fifth_ends)
        assert says in run(parts)[0] and len(result(parts)[0]) == steps
    assert run(parts, "--resume")[0] == 0 and result(parts) == result(whole)
    assert run(parts, "--resume")[0] == 0 and result(parts) == result(whole)  # it was finished
    assert refused(*run(parts)) and refused(*run(parts, "--resume", "--seed", 1))
    assert result(parts) == result(whole)
    assert run(parts, "--overwrite", "--seed", 1)[0] == 0 and result(parts) != result(whole)


@pytest.mark.parametrize("more", [[], ["--overwrite"], ["--resume"]])
def test_a_model_that_is_no_run_is_never_overwritten(more, tmp_path, command):
    longlora.save_model(tiny(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert refused(*command("train.py", *RUN, "--out", tmp_path, *more))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


BAD_INPUT = {
    "train.py": """--model nowhere | --model broken | --model no-json | --data nowhere.bin
        | --data beyond.bin | --data half.bin | --data short.bin | --data model | --group-size 7
        | --lr nan | --trainable lora,head | --attention x | --out tokens.bin | --passkey 0.1
        | --out model --overwrite | --resume --overwrite | --context-parallel 2 | --epochs 2
        | --model reader --data questions.jsonl --passkey 0.1
        | --model reader --data questions.jsonl --group-size 7
        | --model reader --data questions.jsonl --context 2
        | --model reader --data questions.jsonl --eval-tokens 9""",
    "eval.py perplexity": """--adapter nowhere | --adapter model | --data short.bin --context 64
        | --context 16,x | --stride 16 | --attention shifted --group-size 7 | --json nowhere/x
        | --by-position 16 | --by-position -1 | --max-tokens 15 | --plot x.pdf""",
    "eval.py passkey --model reader": """--model model | --depths 0 | --length 9 | --length 64,0
        | --trials 0 | --seed -1 | --plot x.jpg | --plot nowhere/x.png""",
    "eval.py answers --model reader --data questions.jsonl": """--data nowhere.json | --data stdlib
        | --data tokens.bin | --data model | --context 1 | --max-tokens 1 | --model model""",
    "eval.py topics --model reader": """--model model | --file nowhere | --file tokens.bin
        | --topics 97 | --topics 2,90 | --cases 0 | --template [INST] | --template {0}""",
    "eval.py generate --model reader": """--file nowhere | --file model | --file tokens.bin
        | --prompt x --file tokens.bin | --prompt x --top-p 2 | --prompt x --top-p nan
        | --prompt x --temperature -1 | --prompt x --max-new-tokens 0 | --prompt x --model model
        | --prompt x --chat | --file nowhere --chat
        | --prompt x WORLD_SIZE=2""",
    "eval.py": "",  # no command
    "data/prepare.py": """nowhere.txt --out x.bin | tokens.bin --out x.bin | model --out x.bin
        | tokens.bin | questions.jsonl | questions.jsonl tokens.bin --out x.bin
        | questions.jsonl nowhere.json --out x.bin | --tokenizer nowhere
        | questions.jsonl --questions --out x.bin
        | --tokenizer tokens.bin""",
}


@pytest.mark.parametrize("line, bad", [
    (line, case.strip()) for line, cases in BAD_INPUT.items() for case in cases.split("|")])
def test_bad_input_is_one_line_and_exit_status_2(line, bad, files, command, monkeypatch):
    good = {"train.py": RUN, "eval.py perplexity": RUN[:4] + ["--context", "16"]}.get(line, [])
    before = sorted(os.listdir(files))
    if "WORLD_SIZE=2" in bad:  # as torchrun sets it
        monkeypatch.setenv("WORLD_SIZE", "2")
        bad = bad.replace("WORLD_SIZE=2", "")
    assert refused(*command(*line.split(), *good, *bad.split()))
    assert sorted(os.listdir(files)) == before


# Instructions: data/instruct.py, data/batches.py, data/chat.py -----------------------------------


def instructions(n=200, seed=0):
    """Records with odd spacing, other alphabets, inputs that are empty or missing, long prompts and
    answers, and fields that nobody asked for."""
    rng = np.random.default_rng(seed)
    words = ["def", "  ", "\n\n", "\t", "naïve", "你好", "שלום", "☃", "🎉", " ]", "(x)", "a.b", ""]

    def text(most):
        return " ".join(words[i] for i in rng.integers(len(words), size=rng.integers(most + 1)))

    records = []
    for i in range(n):
        record = {"instruction": text([5, 90][i % 5 == 0]), "output": text([5, 60][i % 7 == 0])}
        record |= [{}, {"input": ""}, {"input": text(4)}, {"input": None, "id": 5}][i % 4]
        records.append(record)
    return records


def transformers_tokenizer():
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        ROOT / "data" / "tiny-llama")


@pytest.mark.parametrize("ids_of", [
    lambda: TOKENIZER.encode,
    lambda: partial(transformers_tokenizer(), add_special_tokens=False)], ids=["ours", "theirs"])
@pytest.mark.parametrize("form", ["list", "indented list", "lines"])
def test_instructions_are_what_a_plain_loop_makes_of_them(form, ids_of, tmp_path, monkeypatch):
    """Ids, labels and lengths, read in pieces; the prompt's middle goes where a sample is too long,
    and an answer that does not fit alone is left out."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(prepare, "PIECE", 37)
    records, context, encode, expected, cut = instructions(), 150, ids_of(), [], 0
    for record in records:
        prompt = "[INST]" + record["instruction"]
        if record.get("input"):
            prompt += "\n" + record["input"]
        prompt += "[/INST]"
        both, alone = (getattr(x, "input_ids", x) for x in map(encode, (
            prompt + record["output"], prompt)))
        ids, n = [1, *both, 2], 1 + len(alone)
        labels = [-100] * n + ids[n:]
        if over := max(0, len(ids) - context):
            if len(ids) - n >= context:
                continue
            first = n - over - (n - over) // 2
            del ids[first:first + over], labels[first:first + over]
            cut += 1
        expected.append((ids, labels))
    path = tmp_path / "data.json"
    path.write_text("\n\n".join(map(json.dumps, records)) if form == "lines" else
                    json.dumps(records, indent=1 if "indented" in form else None,
                               ensure_ascii=False), encoding="utf-8")
    samples = instruct.open_samples(str(path), ROOT / "data" / "tiny-llama", 2048, context)
    assert [tuple(x.tolist() for x in sample) for sample in samples] == expected
    assert samples.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert samples.left_out == 200 - len(expected) > 3 and samples.cut == cut > 9
    assert all(set(labels) - {-100} for _, labels in expected)  # there is always something to learn
    out = tmp_path / "prepared.bin"
    assert instruct.write_samples([path], TOKENIZER, out) == 200 and instruct.is_instructions(out)
    where = str(out), "no tokenizer is needed", 2048, context
    parts, again = instruct.open_splits(*where), instruct.open_samples(*where)
    assert all(np.array_equal(x, y) for a, b in zip(samples, again) for x, y in zip(a, b))
    assert [len(part) + part.left_out for part in parts] == [180, 10, 10]
    assert [sum(getattr(part, name) for part in parts) for name in ("left_out", "cut")] == [
        samples.left_out, samples.cut]


def test_json_is_read_in_pieces_as_it_is_as_a_whole(tmp_path, monkeypatch):
    rng, path = np.random.default_rng(0), tmp_path / "x.json"

    def value(depth):
        kind = rng.integers(8 if depth else 5)
        if kind > 5:
            return {f"k{i}": value(depth - 1) for i in range(rng.integers(4))}
        if kind > 4:
            return [value(depth - 1) for _ in range(rng.integers(4))]
        texts = ['"', "\\", "\\u00e9", "é☃🎉", "[", "],", "{", "", "\n", "\u2028"]
        return [None, True, -1.5e-9, 10**20, "".join(rng.choice(texts, 5))][kind]

    for piece in (1, 2, 7, 1 << 20):
        monkeypatch.setattr(prepare, "PIECE", piece)
        for indent in (None, 2):
            values = [{"x": value(3)} for _ in range(rng.integers(12))]
            path.write_text(" \n" + json.dumps(values, indent=indent) + "\n ", "utf-8-sig")
            assert [(place, x) for place, x, _ in prepare.records(path)] == [
                (f"record {i}", x) for i, x in enumerate(values, 1)]


GOOD = '{"instruction": "x", "output": "y"}'
BAD_RECORDS = {  # what a file has, and what the refusal names
    "[]": "no instructions", "": "no instructions", "[": "record 1", f"[{GOOD}": "record 1",
    f"[{GOOD},]": "record 2", f"[{GOOD} {GOOD}]": "record 1", f"[{GOOD}] x": "behind the list",
    f"[{GOOD}, {{": "record 2", f'[{GOOD}, {{"instruction": "': "record 2",
    f"[{GOOD}, 5]": "record 2: expected an object .* got int",
    f"[{GOOD}, {GOOD[:-1]}, ]": "record 2", f"[{GOOD},\u00a0{GOOD}]": "record 2",
    f'[{GOOD}, {{"instruction": "x"}}]': 'record 2: expected a text as "output", got none',
    f"[{GOOD}, {GOOD.replace('x', '')[:16]} 5, {GOOD[20:]}]": 'record 2: .*"instruction", got int',
    f'[{GOOD[:-1]}, "input": ["a"]}}]': 'record 1: .*"input", got list',
    f"[{GOOD}, {'[' * 100_000}": "record 2", f"{GOOD}\n\n{{": "line 3",
    f"{GOOD}\n{GOOD[:-3]}": "line 2: .*column 32",
    f'{GOOD}\n{{"text": "x"}}': 'line 2: .*"instruction", got none', "\0\1[": "line 1",
    f"[{GOOD}, {{\"output\": {'9' * 5000}}}]": "record 2",
}


@pytest.mark.parametrize("text", BAD_RECORDS)
def test_a_broken_record_is_named_in_one_line(text, files, tmp_path, command):
    path = tmp_path / "data.json"
    path.write_text(text)
    for words in (["train.py", "--rank", 2, "--model", "reader", "--data", path],
                  ["data/prepare.py", path, "--out", tmp_path / "out.bin"],
                  ["eval.py", "answers", "--model", "reader", "--data", path]):
        status, err = command(*words)
        assert refused(status, err) and re.search(f"error: .*data.json.*{BAD_RECORDS[text]}", err)
    assert os.listdir(tmp_path) == ["data.json"]


def test_instructions_in_another_encoding_are_refused(files, tmp_path, command):
    path, good = tmp_path / "data.jsonl", GOOD.encode() + b"\n"
    for before in (0, 5000):
        path.write_bytes(good * before + GOOD.replace("y", "Stra\xdfe").encode("latin-1"))
        status, err = command("train.py", "--rank", 2, "--model", "reader", "--data", path)
        assert refused(status, err) and re.search(r"data.jsonl: not UTF-8 (behind|at) ", err)


def test_instructions_are_known_by_what_is_in_them(tmp_path):
    kinds = {"a.jsonl": ('{"text": "x"}', False), "b.jsonl": (GOOD, True), "c.json": ("5", True),
             "d": (f"[{GOOD}]", False), "e.txt": (GOOD, False), "f.bin": (GOOD, False),
             "g": ("\0\xff", False), "h.jsonl": ("{", False), "i.jsonl": (f" [ {GOOD}", True)}
    for name, (text, expected) in kinds.items():
        (tmp_path / name).write_text(text)
        assert instruct.is_instructions(tmp_path / name) == expected, name
    assert instruct.is_instructions("stdlib-questions") and not instruct.is_instructions("stdlib")
    assert not instruct.is_instructions(tmp_path / "nowhere.json")


def test_an_index_that_is_broken_or_anothers_is_refused(tmp_path):
    path, index = tmp_path / "x.bin", tmp_path / "x.samples"
    np.arange(10, dtype=np.uint16).tofile(path)
    good = np.array([[4, 1], [10, 5]])
    for array in (good[:1], good + [[0, 4], [0, 0]], good - [[0, 1], [0, 0]], good[::-1],
                  good[:, 0], good.astype(float), good[:0], good.flatten()[:3],
                  good + [[0, 2**63 - 3], [0, 0]], good - [[2**63 - 3, 0], [0, 0]], np.arange(30), np.array(["PK", "\x93NUMPY"])):
        array.tofile(index)
        with pytest.raises(ValueError, match="x.samples does not describe"):
            instruct.open_samples(str(path), "", 64, 8)
    good.tofile(index)
    assert len(instruct.open_samples(str(path), "", 64, 8)) == 2
    (tmp_path / "a.txt").write_text("x")  # a corpus in its place is no file of instructions
    prepare.write_texts([tmp_path / "a.txt"], TOKENIZER, path)
    assert not index.exists() and not instruct.is_instructions(path)


def test_samples_that_share_a_row_fit_and_are_spread_over_processes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        room, teams = int(rng.integers(1, 100)), int(rng.integers(1, 9))
        lengths = rng.integers(1, room + 1, rng.integers(1, 40)).tolist()
        rows = batches.packs(lengths, room, teams)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        sums = [sum(lengths[i] for i in row) for row in rows]
        assert len(rows) % teams == 0 and max(sums) <= room and sums == sorted(sums)[::-1]
        fewest = math.ceil(sum(lengths) / room / teams) * teams
        assert len(rows) <= 2 * fewest + teams and (len(lengths) < len(rows) or min(sums))


def questions(files, member=team.Team(), **changes):
    """Instructions of 60 records as train.py would train on them."""
    run = train.Run(model=str(files / "reader"), data=str(files / "questions.jsonl"), context=100,
                    batch_size=7, micro_batch=1, rank=2, **changes)
    config = longlora.load_config(files / "reader")
    train.resolve(run, longlora.load_model(files / "reader"))
    return batches.Instructions(run, config, member, 4)


@pytest.mark.parametrize("contexts, group_size, fits", [
    (2, None, True), (4, 2, True), (8, None, False), (2, 8, True), (2, 64, False)])
def test_samples_are_split_over_processes_where_their_lengths_allow(contexts, group_size, fits,
                                                                    files):
    """Into whole groups, and each token is some process's."""
    class Member(team.Team):
        def first_one_first(self):
            return contextlib.nullcontext()

    teams = [Member(rank, contexts, contexts) for rank in range(contexts)]
    if not fits:
        with pytest.raises(ValueError, match="a sample has .* tokens, in groups of .* these are ."):
            questions(files, teams[0], group_size=group_size)
        return
    parts = [questions(files, one, group_size=group_size).step(0)[0] for one in teams]
    whole = questions(files, group_size=group_size).step(0)[0]
    for micro, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        each = zip(micro.how["lengths"], *(part.how["lengths"] for part in pieces))
        starts = zip(*(part.how["start"] for part in pieces))
        for (n, *lengths), G, start in zip(each, micro.how["group_size"], starts):
            assert sum(lengths) == n and min(lengths) > 0
            assert start == tuple(np.cumsum([0, *lengths[:-1]])) and not any(s % G for s in start)
        tokens = [part.tokens[0].split(part.how["lengths"]) for part in pieces]
        assert torch.equal(torch.cat([x for xs in zip(*tokens) for x in xs]), micro.tokens[0])


def test_an_epoch_reads_every_sample_once_in_an_order_of_its_own(files):
    data, other = questions(files), questions(files, seed=1)
    N = data.samples
    orders = [data.order(i * N, (i + 1) * N) for i in range(3)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in [*orders, other.order(0, N)]}) == 4
    drawn = np.concatenate(orders)
    for step in range(3 * N // 7):
        assert np.array_equal(data.order(step * 7, step * 7 + 7), drawn[step * 7:step * 7 + 7])
        assert data.tokens_until(step) == data.train.lengths[drawn[:step * 7]].sum()
    run = SimpleNamespace(**vars(data.run))
    assert run.epochs == train.RECIPES["small"]["epochs"] and run.steps is None
    held_out = {tuple(part[i][0]) for part in (data.valid, data.test) for i in range(len(part))}
    assert held_out and not held_out & {tuple(data.train[i][0]) for i in range(N)}


@pytest.mark.parametrize("attention, group_size", [("full", None), ("shifted", None), ("local", 6)])
def test_the_loss_of_a_step_is_that_of_its_samples_one_by_one(attention, group_size, files):
    """Over all answer tokens, not a mean of means; G is a quarter of each sample's length."""
    data = questions(files, attention=attention, group_size=group_size)
    model = tiny(vocab_size=2048)
    longlora.set_trainable(model, "embed,norm")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    data.run.clip = 1e9
    for step in range(3):
        micro_steps, count = data.step(step)
        loss, norm = train.optimizer_step(data.run, model, optimizer, micro_steps, count,
                                          torch.float32, team.Team(), contextlib.nullcontext())
        sums = 0
        for i in data.order(step * 7, step * 7 + 7):
            ids, labels = (torch.from_numpy(x)[None] for x in data.train[i])
            G = group_size or 2 * math.ceil(ids.shape[1] / 8)
            logits = model(ids[:, :-1], None, None if attention == "full" else G,
                           attention == "shifted")
            sums = sums + F.cross_entropy(logits[0], labels[0, 1:], reduction="sum")
        assert count == sum((data.train[i][1] != -100).sum()
                            for i in data.order(step * 7, step * 7 + 7))
        assert loss == pytest.approx((sums / count).item(), rel=1e-5)
        (sums / count).backward()
        gradients = [p.grad.square().sum() for p in model.parameters() if p.requires_grad]
        assert norm == pytest.approx(sum(gradients).sqrt().item(), rel=1e-4)
        model.zero_grad()
        assert 1 < len(micro_steps) < 7 and all(m.tokens.shape[1] <= 100 for m in micro_steps)


def test_answers_are_exact_where_greedy_text_is(files):
    """And their perplexity is that of their tokens; by powers of two of the length."""
    model = longlora.load_model(files / "reader")
    plain = questions(files).train
    tokens, places = [], []
    for i in range(len(plain)):  # every third answer becomes what the model says
        ids, labels = plain[i]
        prompt = ids[labels == -100].tolist()
        answer = ids[labels != -100].tolist()
        if i % 3 == 0:
            answer = list(chat.generate(model, prompt, len(answer), torch.float32, set()))
        places.append((len(tokens), len(prompt), len(prompt) + len(answer)))
        tokens += prompt + answer
    samples = instruct.Samples(np.array(tokens), np.array(places), 100)
    rows, expected = evaluation.answers(model, samples), {}
    for i in range(len(samples)):
        ids, labels = samples[i]
        n = int((labels == -100).sum())
        text = list(chat.generate(model, ids[:n].tolist(), len(ids) - n, torch.float32, set()))
        loss = F.cross_entropy(model(torch.from_numpy(ids)[None])[0, n - 1:-1],
                               torch.from_numpy(ids[n:]), reduction="none").tolist()
        most = next(2 ** k for k in range(9) if 2 ** k >= len(ids))
        for key in (most, None):
            expected.setdefault(key, []).append((text == ids[n:].tolist(), loss))
    assert [row["tokens"] for row in rows] == [*sorted(k for k in expected if k), None]
    for row in rows:
        exact, losses = zip(*expected[row["tokens"]])
        assert row["samples"] == len(exact) and row["exact_match"] == pytest.approx(np.mean(exact))
        assert row["perplexity"] == pytest.approx(np.exp(np.mean(sum(losses, []))), rel=1e-5)
    assert 0.3 < rows[-1]["exact_match"] < 0.5


def test_library_questions_are_answered_by_the_excerpt_alone_and_hold_out_files(tmp_path,
                                                                                monkeypatch):
    """By regular expressions, where the questions were made from syntax trees."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    monkeypatch.setattr(instruct, "COUNTS", {"train": 60, "valid": 30, "test": 30})
    few = {split: prepare.library_files(split)[-12:] for split in ("train", "valid", "test")}
    monkeypatch.setattr(prepare, "library_files", few.__getitem__)
    sources = {split: "".join(path.read_text() for path in files) for split, files in few.items()}
    for split, files in few.items():
        path = instruct.library_questions(ROOT / "data" / "tiny-llama", split)
        records, kinds = json.loads(path.read_text()), set()
        assert len(records) == (60 if split == "train" else 30)
        for record in records:
            assert record.keys() == {"instruction", "output"}
            excerpt, question = record["instruction"].rsplit("\n", 1)
            assert excerpt in sources[split]
            kind, name = re.fullmatch(r"(Which class|What is the default of \w+) \w+ (\w+)\?",
                                      question).groups()
            definitions = re.findall(rf"^ *(?:async )?def {name}\(", excerpt, re.M)
            assert len(definitions) == 1
            if kind == "Which class":
                body = excerpt[:excerpt.index(definitions[0])]
                assert re.search(rf"^ *{record['output']}\b", body, re.M)
                assert len(re.findall("^ *class ", excerpt, re.M)) > 1
            else:
                argument, value = record["output"].split("=", 1)
                assert question.startswith(f"What is the default of {argument} in")
                signature = excerpt[excerpt.index(definitions[0]):]
                assert re.search(rf"\b{argument}(:[^=]*)?\s*=\s*{re.escape(value)}", signature)
            kinds.add(kind[:5])
        assert kinds == {"Which", "What "}
    splits = instruct.open_splits("stdlib-questions", ROOT / "data" / "tiny-llama", 2048, 2048)
    assert [(len(samples), samples.cut, samples.left_out) for samples in splits] == [
        (60, 0, 0), (30, 0, 0), (30, 0, 0)]


@pytest.mark.parametrize("call", [3, 9, 12])  # of a layer, of two: while reading, while writing
def test_an_answer_that_is_interrupted_stays_as_far_as_it_came(call, files, monkeypatch):
    model, calls, asked = longlora.load_model(files / "reader"), [], iter(["Why?", "And then?"])
    how = 9, torch.float32, 0, 1, 0
    monkeypatch.setattr(chat, "PREFILL", 4)

    def interrupt(*_):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    def ask(_):
        for text in asked:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", ask)
    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    first, second = chat.talk(model, TOKENIZER, None, None, *how)
    hook.remove()
    prompt = [1, *TOKENIZER.encode("[INST]Why?[/INST]")]
    answer = list(chat.generate(model, prompt, 9, torch.float32, {2}))[:first["tokens"]]
    assert first["tokens"] == max(0, call - math.ceil(len(prompt) / 4))
    prompt += [*answer, 2, *TOKENIZER.encode("[INST]And then?[/INST]")]
    expected = list(chat.generate(model, prompt, 9, torch.float32, {2}))
    assert second["prompt_tokens"] == len(prompt) and second["tokens"] == len(expected)
    assert second["text"].strip() == TOKENIZER.decode(expected).strip()


def test_facts_are_those_of_the_lines_that_python_counts():
    """A form feed ends none; what is defined twice is said; defaults that could be guessed are not
    asked for."""
    source = ("class A:\n    def f(self, x=7, *, y='é', z=None): pass\n\f\nclass B:\n"
              "    def f(self): pass\n\f\ndef g(w=\n  2.5): pass\n")
    assert [tuple(fact) for fact in instruct.facts(source)] == [
        ("What is the default of w in g?", "w=2.5", 7, 8, []),
        ("Which class defines f?", "class A", 1, 2, [5]),
        ("What is the default of x in f?", "x=7", 2, 2, [5]),
        ("What is the default of y in f?", "y='é'", 2, 2, [5]),
        ("Which class defines f?", "class B", 4, 5, [2])]


@pytest.mark.parametrize("about", [None, "A text."])
def test_a_conversation_is_read_once_in_the_form_of_training(about, files, monkeypatch, capfd):
    """Each turn behind the others, with one BOS; a turn that does not fit is left out."""
    model = longlora.load_model(files / "reader")
    longlora.set_trainable(model, "norm")
    window, seen, asked = 120, [], iter(["Why?", "  ", "long " * 60, "And then?", "So?"])
    model.config = model.model.config = dataclasses.replace(model.config,
                                                            max_position_embeddings=window)

    def answer(_):
        for text in asked:
            return text
        raise EOFError

    monkeypatch.setattr("builtins.input", answer)
    model.model.register_forward_pre_hook(lambda _, x: seen.extend(x[0][0].tolist()))
    rows = chat.talk(model, TOKENIZER, about, "Who?" if about else None, 9, torch.float32, 0, 1, 0)
    questions = ["Who?"] * bool(about) + ["Why?", "And then?", "So?"]
    assert len(rows) == len(questions) and "left out" in capfd.readouterr().err
    ids = [1]
    for i, (question, row) in enumerate(zip(questions, rows)):
        asked = f"{about}\n{question}" if about and not i else question
        ids += TOKENIZER.encode(f"[INST]{asked}[/INST]")
        assert row["prompt_tokens"] == len(ids)
        read = len(seen)
        answer = list(chat.generate(model, ids, 9, torch.float32, {2}))
        del seen[read:]
        assert row["tokens"] == len(answer)
        ids += [*answer, 2]
    assert seen == ids[:len(seen)] and len(ids) - 2 <= len(seen) < len(ids)


# Several processes, and runs that survive ---------------------------------------------------------


def evaluated():
    """Numbers of perplexity in 1 and in 11 batches, of 5 passkeys, 7 official ones, and a sum."""
    tokens, shares, sums = TOKENS.flatten().numpy(), evaluation.Shares(7), np.zeros(7)
    sums[shares.mine] += 2 ** np.array(shares.mine)
    numbers = [*shares.total(sums)]
    for n in (12, 128):
        *found, by_position = evaluation.perplexity(tiny(), tokens[:n], 12, stretches=3)
        numbers = [*found, *by_position, *numbers]
    model = oracle(lambda text: -9 if parsed(text)[0] % 4 == 1 else -1)
    for trials, depths, official in ((1, 5, False), (7, 3, True)):
        found = evaluation.passkey(model, TOKENIZER, 300, trials, depths, official=official)
        numbers = [*found.pop("by_depth"), *found.values(), *numbers]
    return np.array(numbers, float)  # None: NaN


def worker(rank, size, store, one):
    """What `size` processes evaluate, against `one`; and shifted attention, each a part of T."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    evaluation.BATCH_TOKENS = 24
    np.testing.assert_allclose(evaluated(), one, rtol=1e-6)
    sent, batch = [], dist.batch_isend_irecv

    def counted(works):
        sent.extend(work.tensor.numel() for work in works if work.op is dist.isend)
        return batch(works)

    dist.batch_isend_irecv = counted
    for H, H_kv, T, G in [(4, 4, 16, 8), (4, 2, 64, 8), (6, 3, 32, 16), (4, 1, 16, 4)]:
        torch.manual_seed(0)
        whole = [x.detach().requires_grad_() for x in qkv(2, H, H_kv, size * T, 6)]
        weight = torch.randn(2, H, size * T, 6)
        expected = shifted_sparse_attention(*whole, G)
        wanted = torch.autograd.grad(expected, whole, weight)
        piece = team.Team(rank, size, size).piece(size * T, G)
        assert piece == slice(rank * T, (rank + 1) * T)
        part = [x[:, :, piece].detach().requires_grad_() for x in whole]
        sent.clear()
        out = shifted_sparse_attention(
            *part, G, before=lambda x, n: team.Halo.apply(x, n, dist.group.WORLD))
        forward = sum(sent)
        got = torch.autograd.grad(out, part, weight[:, :, piece])
        for x, y in zip([out, *got], [expected, *wanted]):
            torch.testing.assert_close(x, y[:, :, piece], rtol=0, atol=1e-5)
        rows = 2 * 2 * (G // 2) * ((H_kv + 1) // 2) * 6  # of two batch rows, whatever T is
        assert forward == (rows if rank + 1 < size else 0), (forward, rows)
        assert sum(sent) == rows * (rank + 1 < size) + rows * (rank > 0)
    for T, G in [(9, 4), (17, 4), (14, 6), (11, 4), (12, 4), (2 * size * 8 - 7, 8)]:  # a rest
        whole = [x.detach().requires_grad_() for x in qkv(1, 4, 2, T, 6)]
        expected = shifted_sparse_attention(*whole, G)
        wanted = torch.autograd.grad(expected, whole, expected.detach())
        piece = team.Team(rank, size, size).piece(T, G)
        assert piece.start < piece.stop and (piece.stop == T or piece.stop % G == 0)
        part = [x[:, :, piece].detach().requires_grad_() for x in whole]
        out = shifted_sparse_attention(
            *part, G, before=team.Team(rank, size, size, group=dist.group.WORLD).before)
        got = torch.autograd.grad(out, part, expected.detach()[:, :, piece])
        for x, y in zip([out, *got], [expected, *wanted]):
            torch.testing.assert_close(x, y[:, :, piece], rtol=0, atol=1e-5)
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [3])
def test_processes_attend_and_evaluate_as_one_does(size, tmp_path, monkeypatch):
    """What they cannot share evenly; and context-parallel attention in value and gradients, whose
    traffic is 2 * (G/2) * (H_kv/2) * D elements a row and way."""
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 24)
    one = evaluated()
    assert one[-7:].tolist() == [1, 2, 4, 8, 16, 32, 64] and np.isnan(one).sum() == 1
    torch.multiprocessing.spawn(worker, (size, tmp_path / "store", one), size)


def torchrun(files, out, *flags, launchers=1, processes=2, wait=True, elastic=()):
    """train.py as torchrun starts it, on one machine or (on the loopback address) several."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    port = 29500 + os.getpid() % 1000
    several = ["--nnodes", launchers, "--rdzv-backend", "c10d", "--rdzv-id", "test",
               "--rdzv-endpoint", f"127.0.0.1:{port}"] if launchers > 1 else ["--standalone"]
    command = [sys.executable, "-m", "torch.distributed.run", *several, *elastic,
               "--nproc-per-node", processes, ROOT / "train.py", *RUN, "--out", out, *flags]
    runs = [subprocess.Popen(list(map(str, command)), cwd=files, env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for _ in range(launchers)]
    if not wait:
        return runs[0]
    printed = [run.communicate()[0] for run in runs]
    assert not any(run.returncode for run in runs), printed
    return printed


def losses(out):
    log = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return np.array([(line["loss"], line["grad_norm"]) for line in log])


def weights(out):
    return dict(formats.read_safetensors(next(out.glob("*model.safetensors"))))


def same_run(a, b, loss=1e-5, norm=1e-3):
    """The same losses and gradient norms, and the same adapter in norm."""
    np.testing.assert_allclose(losses(a), losses(b), rtol=loss)
    difference = sum((weights(a)[name] - w).square().sum() for name, w in weights(b).items())
    assert difference.sqrt() <= norm * sum(w.square().sum() for w in weights(b).values()).sqrt()


@pytest.mark.parametrize("processes, contexts, launchers, more", [
    (3, 1, 1, "--trainable full --checkpointing --offload"),
    (4, 2, 1, "--checkpointing --quantize nf4"), (1, 2, 2, "--micro-batch 2"),
    (4, 2, 1, "--checkpointing --quantize nf4 --model reader --data questions.jsonl"),
    (2, 1, 1, "--trainable full --offload --model reader --data questions.jsonl --attention full")])
def test_processes_give_what_one_gives(processes, contexts, launchers, more, files, tmp_path):
    """Over 10 steps of micro-batches, with rows that the processes cannot share evenly."""
    flags = ["--steps", 10, "--batch-size", 5, "--eval-every", 5, *more.split()]
    flags += ["--group-size", 16] if "questions" not in more else []
    one, many = tmp_path / "one", tmp_path / "many"
    subprocess.run(list(map(str, [sys.executable, ROOT / "train.py", *RUN, "--out", one, *flags])),
                   cwd=files, check=True)
    flags += ["--context-parallel", contexts]
    printed = torchrun(files, many, *flags, processes=processes, launchers=launchers)
    same_run(one, many)
    a, b = (formats.read_json(out / "results.json") for out in (one, many))
    if "questions" in more:
        for x, y in zip(a["answers"]["trained"], b["answers"]["trained"], strict=True):
            assert x == y | {"perplexity": pytest.approx(y["perplexity"], rel=1e-4)}
    else:
        assert a["perplexity"]["extended"] == pytest.approx(b["perplexity"]["extended"], rel=1e-4)
    assert sum(text.count("Written to") for text in printed) == 1  # one process speaks


SHARD = """
import re, sys, torch
import longlora
from data.team import *
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
device, team = join(1)
place(longlora.load_model(sys.argv[1]), "lora,embed,norm", 2, device, torch.bfloat16, team)
before, model = anonymous(), longlora.load_model(sys.argv[2])
place(model, "lora,embed,norm", 2, device, torch.bfloat16, team)
assert not any(p.is_meta for p in model.parameters())
shard = sum(p.to_local().nbytes for p in model.parameters())
share = shard / sum(p.nbytes for p in model.parameters())
sys.stdout.write(f"held {(anonymous() - before) / shard:.3f} {share:.3f}\\n")
sys.stdout.flush()
dist.barrier()
del model
leave()
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_each_process_holds_its_shard(files, tmp_path):
    """Of a model in mapped files: no more than that in memory of its own."""
    model = tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=20).bfloat16()
    longlora.save_model(model, tmp_path / "model")
    (tmp_path / "shard.py").write_text(SHARD)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "3", tmp_path / "shard.py", files / "model", tmp_path / "model"]
    run = subprocess.run(list(map(str, command)), text=True, stdout=subprocess.PIPE, check=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    held = [(float(own), float(part)) for own, part in re.findall(r"held (\S+) (\S+)", run.stdout)]
    assert len(held) == 3 and all(own < 1.15 and part < 0.34 for own, part in held), run.stdout


def test_a_run_continues_on_another_number_of_processes(files, tmp_path, command):
    """One takes 6 of 7 steps, two the last: as one alone, within rounding."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert command("train.py", *RUN, "--out", whole, "--save-every", 3)[0] == 0
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "states" / "step-0000007")
    printed = torchrun(files, parts, "--save-every", 3, "--resume")
    assert "after step 6 of 7" in printed[0]
    same_run(whole, parts)


@pytest.mark.parametrize("harm", ["cut", "lost", "manifest", "both"])
def test_a_torn_state_is_passed_over_for_an_older_one(harm, files, tmp_path, command, capfd):
    out = tmp_path / "out"
    assert command("train.py", *RUN, "--out", out, "--save-every", 2)[0] == 0
    before, (newest, older) = weights(out), states.states(out / "states")
    assert (newest.name, older.name) == ("step-0000007", "step-0000006")
    if harm in ("cut", "both"):
        os.truncate(newest / "__0_0.distcp", 100)
    if harm == "lost":
        (newest / ".metadata").unlink()
    if harm in ("manifest", "both"):
        ((older if harm == "both" else newest) / "manifest.json").write_text("{")
    capfd.readouterr()
    assert command("train.py", *RUN, "--out", out, "--save-every", 2, "--resume")[0] == 0
    torch.testing.assert_close(weights(out), before, rtol=0, atol=0)
    assert [path.name for path in states.states(out / "states")] == [newest.name, older.name]


# So many kills here; of KILLS=50 pytest -k killed_runs (six minutes) 50 came out the same.
KILLS = int(os.environ.get("KILLS", 2))


def test_killed_runs_end_as_if_they_had_not_been(files, tmp_path):
    """kill -9 at a random moment, from before the first save to the end, then --resume."""
    command = [sys.executable, ROOT / "train.py", *RUN, "--save-every", "1", "--out"]
    began = time.monotonic()
    subprocess.run([*command, tmp_path / "whole"], cwd=files, check=True)
    lasts, rng = time.monotonic() - began, np.random.default_rng(0)
    for kill in range(KILLS):
        out = tmp_path / f"{kill}"
        run = subprocess.Popen([*command, out], cwd=files)
        time.sleep(rng.uniform(0.4, 1) * lasts)
        run.kill()
        run.wait()
        subprocess.run([*command, out, "--resume"], cwd=files, check=True)
        assert np.array_equal(losses(out), losses(tmp_path / "whole"))
        torch.testing.assert_close(weights(out), weights(tmp_path / "whole"), rtol=0, atol=0)
        assert not list(out.glob("*.partial"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
def test_torchrun_restarts_a_run_whose_process_was_killed(files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = ["--save-every", 1, "--resume", "--steps", 20]
    torchrun(files, whole, *flags)
    run = torchrun(files, out, *flags, wait=False, elastic=["--max-restarts", "2"])
    while len(states.states(out / "states")) < 2:
        assert run.poll() is None
        time.sleep(0.01)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed = run.communicate()[0]
    assert run.returncode == 0 and "resuming from" in printed, printed
    same_run(whole, out, loss=0, norm=0)


# 4-bit weights ------------------------------------------------------------------------------------


def nf4_reference(W):
    """QLoRA's NF4 with double quantisation by its text, in float64, a number at a time."""
    flat, scales = W.double().flatten().tolist(), []
    for i in range(0, len(flat), 64):
        scales.append(max(abs(w) for w in flat[i:i + 64]))
    mean, rebuilt = sum(scales) / len(scales), []
    for i in range(0, len(scales), 256):
        step = max(abs(s - mean) for s in scales[i:i + 256]) / 127 or 1
        rebuilt += [round((s - mean) / step) * step + mean for s in scales[i:i + 256]]
    out = []
    for i, w in enumerate(flat):
        code = min(nf4.NF4, key=lambda c: abs(c - w / scales[i // 64]))
        out.append(code * rebuilt[i // 64])
    return torch.tensor(out, dtype=torch.float64).view_as(W)


@pytest.mark.parametrize("shape", [(48, 32), (5, 7), (160, 128)])
def test_nf4_is_the_nearest_code_times_the_double_quantised_scale(shape):
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    linear = nf4.NF4Linear(W, torch.float32)
    torch.testing.assert_close(linear.weight.double(), nf4_reference(W), rtol=1e-4, atol=1e-7)
    assert linear.bfloat16().weight.equal(nf4.NF4Linear(W, torch.float32).weight)


def test_the_nf4_codes_are_the_papers_quantiles():
    """Appendix E: of a normal distribution, 8 steps below zero and 9 above it from the same
    offset, zero shared, scaled to 1. bitsandbytes published the numbers."""
    normal, offset = torch.distributions.Normal(0, 1), 0.9677083
    above = normal.icdf(torch.linspace(offset, 0.5, 9).double())[:-1]
    below = -normal.icdf(torch.linspace(offset, 0.5, 8).double())[:-1]
    codes = torch.cat([below, torch.zeros(1), above.flip(0)]) / above.max()
    torch.testing.assert_close(torch.tensor(nf4.NF4).double(), codes.sort().values,
                               rtol=0, atol=1e-6)


def test_nf4_takes_about_4_bits_and_errs_as_on_normal_weights():
    W = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    linear = nf4.NF4Linear(W, torch.float32)
    bits = 8 * sum(b.nbytes for b in linear.buffers()) / W.numel()
    assert bits == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, abs=1e-3)
    error = (linear.weight - W).square().mean().sqrt()
    assert 0.08 < error < 0.1  # 0.093 of the standard deviation in theory


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_4_bit_model_computes_with_its_dequantised_weights(checkpointing):
    """Losses and gradients are those of a Llama that holds the dequantised weights, and autograd
    keeps none of these."""
    plain, quantized = tiny(), tiny()
    longlora.quantize(quantized, torch.float32)
    weights = {name: m.weight for name, m in quantized.named_modules()
               if isinstance(m, nf4.NF4Linear)}
    assert len(weights) == 2 * 7
    for name, W in weights.items():
        plain.get_submodule(name).weight.data = W
    results = []
    for model in plain, quantized:
        torch.manual_seed(0)
        longlora.add_lora(model, rank=3, alpha=12)
        longlora.set_trainable(model, "lora,embed,norm")
        model.model.checkpointing = checkpointing
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = model(TOKENS[:, :16], TOKENS[:, 1:17], 6)
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(*results)
    assert longlora.count_weights(plain) == longlora.count_weights(quantized)
    if not checkpointing:  # `kept` is the quantised model's
        assert not any(x.shape == W.shape and x.equal(W) for x in kept for W in weights.values())


def test_an_adapter_trained_in_4_bits_merges_into_the_original(files, tmp_path, command,
                                                               monkeypatch):
    out, merged = tmp_path / "out", tmp_path / "merged"
    assert refused(*command("train.py", *RUN, "--quantize", "nf4", "--trainable", "full"))
    assert command("train.py", *RUN, "--quantize", "nf4", "--out", out)[0] == 0
    longlora.load_adapter(model := longlora.load_model(files / "model"), out)
    said = []
    monkeypatch.setattr("builtins.print", lambda text, **_: said.append(text))
    merge = command("longlora.py", "merge", "--model", "model", "--adapter", out, "--out", merged)
    assert merge[0] == 0 and "in 4 bits (nf4); it is merged into the original" in said[0]
    torch.testing.assert_close(longlora.load_model(merged)(TOKENS), model(TOKENS))
    longlora.quantize(four := tiny(), torch.float32)
    for refuse in (lambda: longlora.save_model(four, tmp_path / "four"),
                   lambda: longlora.merge_lora(four)):
        with pytest.raises(ValueError, match="4-bit"):
            refuse()


# data/plan.py -------------------------------------------------------------------------------------


LLAMA_2_70B = LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64,
                          num_key_value_heads=8, intermediate_size=28672)
PLANNED = dict(context=32768, group_size=8192, trainable="lora,embed,norm", rank=8, batch_size=8,
               micro_batch=1, checkpointing=True, offload=False, dtype=torch.bfloat16)


def test_a_plan_has_the_papers_parameters_and_says_what_to_do():
    numbers = plan(LlamaConfig(vocab_size=32001), **PLANNED)
    assert numbers["lora"] == 8_388_608
    assert numbers["trained"] - numbers["lora"] == 131_342_336
    # Forward and backward through 6.6 billion linear weights, attention over a quarter of 32,768.
    linear, heads = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 4096 * 32001, 32 * 4096
    flops = 4 * linear + 6 * 8_388_608 + 3 * 4 * heads * 8193 / 2
    assert numbers["flops"] == 8 * 32768 * flops
    assert "do not suffice" in report(numbers, 24) and "--offload" in report(numbers, 24)
    assert " suffice" in report(numbers, 80) and "do not" not in report(numbers, 80)


# One forward and backward pass in a process of its own: by how much its memory peaks over what it
# was with the model built, and the plan's peak less what was built.
MEASURE = """
import json, sys
import torch
import longlora
from data.plan import plan
from data.recompute import CHUNK
from data.team import autocast
torch.set_num_threads(1)
CHUNK["cpu"] = CHUNK["cuda"]  # a plan is for GPUs

def memory(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))

def step(config, context, group_size, trainable, checkpointing, dtype):
    model = longlora.Llama(config)
    model.reset_parameters()
    if trainable != "full":
        longlora.add_lora(model.to(dtype), 8, 16, dtype=dtype)
    longlora.set_trainable(model, trainable)
    model.model.checkpointing = checkpointing
    tokens = torch.randint(config.vocab_size, (1, context))
    open("/proc/self/clear_refs", "w").write("5")  # the peak from here on
    before = memory("VmRSS")
    with autocast(torch.device("cpu"), dtype):
        loss = model(tokens, tokens, group_size)
    loss.backward()
    return memory("VmHWM") - before

# What the libraries allocate once does not count.
step(longlora.LlamaConfig(64, 64, 64, 2, 4), 64, 32, "lora,embed", True, torch.float32)
config = longlora.LlamaConfig(vocab_size=8000, hidden_size=512, intermediate_size=1408,
                              num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
for settings in json.loads(sys.argv[1]):
    settings["dtype"] = getattr(torch, settings["dtype"])
    numbers = plan(config, rank=8, batch_size=1, micro_batch=1, offload=False, **settings)
    planned = numbers["peak"] - numbers["weights"] - numbers["optimizer"]
    print(step(config, **settings), planned)
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_the_planned_memory_is_what_a_step_takes():
    usual = {"context": 2048, "group_size": 512, "trainable": "lora,embed,norm",
             "checkpointing": True, "dtype": "float32"}
    cases = [usual | {"checkpointing": False, "dtype": "bfloat16"},
             usual | {"trainable": "full", "group_size": None, "context": 1024}]
    # Large blocks go back to the system at once, or the allocator's habits are measured.
    env = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
           "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(cases)], env=env,
                          capture_output=True, text=True, check=True)
    for line in done.stdout.splitlines():
        measured, planned = map(int, line.split())
        assert abs(planned / measured - 1) < 0.1


def test_70b_on_8_gpus_is_planned_as_arithmetic_says():
    numbers = plan(LLAMA_2_70B, gpus=8, **PLANNED)
    # q, k, v, o and the MLP; the head in bfloat16; embedding, norms and LoRA in float32
    C, I, kv = 8192, 28672, 1024
    frozen = 80 * (2 * C * C + 2 * C * kv + 3 * C * I) + 32000 * C
    lora = 80 * 8 * (2 * (C + C) + 2 * (C + kv))
    trained = lora + 32000 * C + (2 * 80 + 1) * C
    assert numbers["weights"] == (2 * frozen + 4 * trained) // 8
    assert numbers["optimizer"] == 8 * trained // 8
    # Each layer's input, and attention's output with the float32 denominators of its heads.
    assert numbers["kept"] == 80 * 32768 * (C * 2 + C * 2 + 64 * 4)
    least = plan(LLAMA_2_70B, gpus=8, recompute_attention=True, **PLANNED)
    assert least["kept"] == 80 * 32768 * C * 2
    assert numbers["reduce"] == 7 * 4 * trained // 8


def test_what_gpus_share_falls_with_their_number(monkeypatch):
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 8192)  # fewer steps to count
    config = LlamaConfig(num_hidden_layers=4, num_key_value_heads=8)
    two, four = (plan(config, gpus=gpus, **PLANNED) for gpus in (2, 4))
    for name in ("weights", "optimizer"):
        assert two[name] == 2 * four[name]
    assert two["gathered"] == four["gathered"] and two["kept"] == four["kept"]
    assert two["parameters"] == four["parameters"] and two["halo"] == 0
    one, halves = (plan(config, gpus=4, contexts=contexts, **PLANNED | {"context": 65536})
                   for contexts in (1, 2))
    assert one["kept"] == pytest.approx(2 * halves["kept"], rel=0.05)  # dummies before the first
    assert halves["layer"] < 0.7 * one["layer"]  # a chunk of the MLP is as large in both
    # keys and values of 4 heads of 128 and half a group, three times, in bf16; 4 rows a process
    assert halves["halo"] == 3 * 2 * 4 * 4 * 4096 * 4 * 128 * 2
    offload = plan(config, gpus=4, **PLANNED | {"offload": True})
    assert offload["kept"] == 0  # each layer's input is away, and the final norm's
    assert offload["host"] == pytest.approx(5 * 32768 * 4096 * 2, rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"checkpointing": False}, {"trainable": "full"}])
def test_two_and_three_layers_tell_what_seven_take(changes):
    """What is alive at the peak of a step through all seven, made of fake tensors too."""
    settings = PLANNED | {"context": 1024, "group_size": 256, "batch_size": 1} | changes
    config = LlamaConfig(vocab_size=512, hidden_size=256, intermediate_size=512,
                         num_hidden_layers=7, num_attention_heads=4)
    numbers, full = plan(config, **settings), settings["trainable"] == "full"
    with torch.device("meta"):
        model = Llama(config).to(torch.float32 if full else torch.bfloat16)
        if not full:
            longlora.add_lora(model, dtype=torch.bfloat16)
        longlora.set_trainable(model, settings["trainable"])
    model.model.checkpointing = settings["checkpointing"]
    live = micro_step(model, (1, 1024), torch.bfloat16, False, True, group_size=256)
    expected = max(most for most, _ in live.peaks)
    assert numbers["peak"] - numbers["weights"] - numbers["optimizer"] == expected


# data/bench.py ------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not limited")
def test_a_bench_is_train_pys_own_log_and_goes_on_after_what_does_not_fit(files, tmp_path, command,
                                                                          monkeypatch):
    """A context whose embedded tokens alone take a quarter of the memory that there is said
    to be is reported, and the next one still runs."""
    call, logs, flags = bench.call, [], []

    def spy(*words, env, **more):
        if "train.py" not in words:  # the speed of matrix products
            return '{"device": "cpu", "name": "", "dtype": "float32", "matmul": 1e9}', None
        found = call(*words, env=env, **more)
        flags.append(dict(word[2:].split("=") for word in words if "=" in word))
        log = Path(flags[-1]["out"]) / "log.jsonl"
        logs.append([json.loads(x) for x in log.read_text().splitlines()] if log.exists() else None)
        return found

    monkeypatch.setattr(bench, "call", spy)
    monkeypatch.setattr(bench, "free_memory", lambda: float(1 << 30))
    path = tmp_path / "rows.json"
    wanted = "--context 40,2097152,64 --steps 2 --device cpu --trainable lora,embed --rank 2"
    status, err = command("eval.py", "bench", "--model", "model", *wanted.split(), "--json", path)
    assert (status, err) == (0, "")
    rows = json.loads(path.read_text())["rows"]
    assert [(row["context"], row["error"]) for row in rows] == [
        (40, None), (2097152, "out of memory"), (64, None)]
    numbers = ["seconds", "tokens_per_s", "peak_memory_bytes", "flops_per_token", "matmul_share"]
    assert all(rows[1][name] is None for name in numbers)
    for row, log, flag in zip(rows[::2], logs[::2], flags[::2]):
        T, G = row["context"], row["context"] // 4 + row["context"] // 4 % 2
        assert row.keys() >= {"shape", "context", "attention", *numbers}
        assert (row["shape"], row["attention"]) == ("model", "shifted")
        first, *seconds = (T / line["tokens_per_s"] for line in log)
        assert [line["tokens"] for line in log] == [T, 2 * T, 3 * T]  # a warm-up, two timed
        assert all(math.isfinite(line["loss"]) for line in log)
        assert row["first_step_seconds"] == pytest.approx(first)
        assert row["seconds"] == pytest.approx(sum(seconds) / 2)
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(T)
        assert row["peak_memory_bytes"] == log[-1]["peak_memory_bytes"] > 1 << 20
        assert int(flag["group-size"]) == G
        flops = token_flops(tiny().config, T, G, "lora,embed", 2, "layers")
        assert row["flops_per_token"] == flops["useful"]
        assert row["matmul_share"] == pytest.approx(flops["executed"] * row["tokens_per_s"] / 1e9)
        assert not Path(flag["model"]).exists()  # nothing is left behind


def test_bench_refuses_in_a_sentence_and_says_when_nothing_ran(command, monkeypatch):
    for bad in ("--shape 7b --model model", "--shape 9b", "--model nowhere", "--context 1,64",
                "--trainable head", "--attention local"):
        assert refused(*command("eval.py", "bench", *bad.split())), bad
    monkeypatch.setattr(bench, "call", lambda *words, **_: (
        '{"device": "cpu", "name": "", "dtype": "float32", "matmul": 1e9}',
        "train.py: error: no" if "train.py" in words else None))
    for bad, reason in ("--device cuda", "cuda"), ("--context 64", "train.py: error: no"):
        status, err = command("eval.py", "bench", *bad.split())
        assert refused(status, err) and reason in err


def test_the_machine_that_a_bench_finds_is_train_pys():
    found, device = bench.machine("float32"), team.default_device().type
    assert (found["device"], found["dtype"]) == (device, "float32")
    assert 1e8 < found["matmul"] < 1e16


@pytest.mark.parametrize("words, said, error", [
    ("print('fine')", "fine", None), ("1 / 0", None, "ZeroDivisionError: division by zero"),
    ("x = bytearray(1 << 62)", None, "out of memory"),
    ("import os; os.kill(os.getpid(), 9)", "", "out of memory"),  # the system's own way
    ("import os; os.kill(os.getpid(), 15)", "", "ended by signal 15: it said nothing")])
def test_why_a_process_failed_is_told_from_its_end(words, said, error):
    found = bench.call("-c", words, env=dict(os.environ))
    assert found[1] == error and said in (None, found[0])


def test_forward_flops_are_the_papers(command, tmp_path):
    """Table 11, and the shapes are those of the models whose names they have."""
    path = tmp_path / "rows.json"
    assert command("eval.py", "bench", "--flops", "--shape", "7b", "--context",
                   "8192,16384,32768,65536", "--json", path) == (0, "")
    rows = json.loads(path.read_text())["rows"]
    assert all(row.keys() == {"shape", "context", "full_tflop", "shifted_tflop"} for row in rows)
    full, shifted = ([row[name] for row in rows] for name in ("full_tflop", "shifted_tflop"))
    assert full == pytest.approx([143.5, 357.2, 996.0, 3118.0], rel=0.01)
    assert shifted == pytest.approx([117.1, 251.7, 573.8, 1429.1], rel=0.01)
    sizes = {}
    for name, shape in bench.SHAPES.items():
        with torch.device("meta"):
            model = Llama(LlamaConfig(**dict(zip(bench.SIZES, shape))))
        sizes[name] = sum(p.numel() for p in model.parameters())
    assert sizes | {"1b": 1_100_048_384, "7b": 6_738_415_616, "13b": 13_015_864_320} == sizes


class Products(TorchDispatchMode):
    """FLOPs of the matrix products under it. PyTorch's own counter takes operations apart, and so
    changes what recomputation sees."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("trainable", ["lora,embed,norm", "embed,norm", "full"])
@pytest.mark.parametrize("recomputed", ["nothing", "layers"])
def test_a_tokens_flops_are_those_of_the_matrix_products_that_run(trainable, recomputed):
    """But for attention, whose kernels are one operation each."""
    model, T, G = tiny(), 64, 16
    if trainable != "full":
        longlora.add_lora(model, rank=3, alpha=12)
    longlora.set_trainable(model, trainable)
    model.model.checkpointing = recomputed == "layers"
    with Products() as counter:
        model(TOKENS, TOKENS, G).backward()
    products = counter.flops / TOKENS.numel()
    flops = token_flops(model.config, T, G, trainable, 3, recomputed)
    attention = 4 * (G + 1) / 2 * 32 * 2  # a query sees half of its group; 4 heads of 8, 2 layers
    assert products == flops["executed"] - 3.5 * attention
    if recomputed == "nothing" and trainable != "full":  # a head that trains is computed again
        assert products == flops["useful"] - 3 * attention


def time_attention():
    seconds = {None: [], 2048: []}
    for _, G in [(i, G) for i in range(6) for G in seconds]:
        inputs = qkv(1, 8, 8, 8192, 64)
        began = time.perf_counter()
        out = shifted_sparse_attention(*inputs, G) if G else longlora.causal_attention(*inputs)
        out.backward(torch.ones_like(out))
        seconds[G].append(time.perf_counter() - began)
    full, shifted = (np.median(runs[1:]) for runs in seconds.values())
    print(f"T = 8,192, G = 2,048, H = 8, D = 64, forward and backward, {torch.get_num_threads()} "
          f"threads: full {full:.3f} s, S2-Attn {shifted:.3f} s, ratio {shifted / full:.3f}")


def time_loading(folder):
    longlora.save_model(tiny(hidden_size=2048, intermediate_size=5504, num_hidden_layers=21,
                             num_key_value_heads=4, vocab_size=32000).bfloat16(), folder)
    seconds, file = {"cat": [], "load_model and sums": []}, folder / "model.safetensors"
    for name in [*seconds] * 6:
        began = time.perf_counter()
        if name == "cat":
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
        else:
            sum(p.sum() for p in longlora.load_model(folder).parameters())
        seconds[name].append(time.perf_counter() - began)
    cat, load = (np.median(runs[1:]) for runs in seconds.values())
    print(f"{file.stat().st_size / 1e9:.1f} GB, bfloat16: load_model and a sum over every "
          f"parameter {load:.3f} s, cat {cat:.3f} s")


if __name__ == "__main__":
    time_attention()
    with tempfile.TemporaryDirectory() as folder:
        time_loading(Path(folder))
