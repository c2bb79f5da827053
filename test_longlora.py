"""Lesson two: what this project claims, each claim checked against an independent definition of it.

    pytest                    # under three minutes on 2 cores
    pytest -k attention       # one part of it
    pytest -m gpu             # the part that needs CUDA
    python test_longlora.py   # no test: the time of S2-Attn over that of full attention
"""
import ast
import dataclasses
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import eval as evaluation
import longlora
import train
from data import prepare
from longlora import (Llama, LlamaConfig, causal_attention, load_adapter, load_model, merge,
                      read_json, read_tensors, save_adapter, save_model, shifted_sparse_attention,
                      write_json, write_safetensors)

ROOT = Path(__file__).resolve().parent
TINY_LLAMA = ROOT / "data" / "tiny-llama"
TOKENIZER = prepare.load_tokenizer(TINY_LLAMA)
TOKENS = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
ATTENTIONS = {"full": (None, True), "shifted": (6, True), "local": (6, False)}


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
    """tiny() as after training: everything trainable has moved."""
    model = tiny(**changes)
    longlora.add_lora(model, rank=3, alpha=12)
    longlora.set_trainable(model, trainable)
    for p in model.parameters():
        p.data += p.requires_grad * torch.randn(p.shape) / 20
    return model


# ==================================================================================================
# longlora.py: the lesson
# ==================================================================================================

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
NEAR = {"rtol": 1e-5, "atol": 1e-5}
DEVICES = ["cpu", pytest.param("cuda", marks=CUDA)]


# The rooms ----------------------------------------------------------------------------------------

STANDALONE = """
import sys
absent = "numpy transformers peft safetensors sentencepiece tokenizers matplotlib pytest"
sys.modules.update(dict.fromkeys(absent.split()))  # importing one of these fails
import torch, longlora
model = longlora.Llama(longlora.LlamaConfig(64, 32, 48, 2, 4, max_position_embeddings=16))
longlora.add_lora(model)
longlora.set_trainable(model, "lora,embed,norm")
model.extend(64)
tokens = torch.arange(65)[None] % 7
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
for step in range(5):
    loss = model(tokens[:, :-1], tokens[:, 1:], group_size=16)
    loss.backward()
    optimizer.step()
    print(loss.item())
longlora.save_adapter(model, "adapter")
"""


def test_longlora_alone_in_a_folder_trains_and_saves_with_torch_and_tqdm_only(tmp_path):
    (tmp_path / "longlora.py").write_bytes((ROOT / "longlora.py").read_bytes())
    run = subprocess.run([sys.executable, "-c", STANDALONE], cwd=tmp_path, capture_output=True,
                         text=True, env={**os.environ, "PYTHONPATH": ""})
    losses = [float(line) for line in run.stdout.split()]
    assert run.returncode == 0 and losses[-1] < losses[0] - 0.1, run.stderr
    assert sorted(os.listdir(tmp_path / "adapter")) == [
        "adapter_config.json", "adapter_model.safetensors", "longlora.json"]


def test_imports_go_one_way():
    """And data/ holds no code but what prepares data."""
    rooms = {"longlora.py": set(), "data/prepare.py": set(), "eval.py": {"longlora", "prepare"},
             "train.py": {"longlora", "prepare", "eval"}}
    for file, allowed in rooms.items():
        imports = " ".join(ast.unparse(node) for node in ast.walk(ast.parse(
            (ROOT / file).read_text())) if isinstance(node, (ast.Import, ast.ImportFrom)))
        assert set(re.findall(r"\b(longlora|prepare|eval|train)\b", imports)) <= allowed, file
    assert {path.name for path in (ROOT / "data").rglob("*.py")} <= {"prepare.py", "__init__.py"}


# Attention ----------------------------------------------------------------------------------------

def visible(H, T, G, shift):
    """(H, T, T): query t sees key u iff u <= t, both in one group of that head (G None: all)."""
    t, G = torch.arange(T), G or 2 * T
    groups = [(t + G // 2) // G if shift and h >= H // 2 else t // G for h in range(H)]
    return torch.stack([(g[:, None] == g) & (t[:, None] >= t) for g in groups])


def masked_attention(q, k, v, mask):
    """In float64: q (B, T, H, D), k and v (B, S, H_kv, D), mask (H, T, S)."""
    k, v = (x.double().repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), k) / q.shape[3] ** 0.5
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


def qkv(B, H, H_kv, T, D, **place):
    return [torch.randn(B, T, h, D, requires_grad=True, **place) for h in (H, H_kv, H_kv)]


def with_gradients(out, inputs):
    """`out` and the gradients of the same weighted sum of it at each call, in float64."""
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [x.double() for x in (out, *torch.autograd.grad(out, inputs, weight))]


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("device, dtype, error", [
    ("cpu", torch.float32, 1e-5), pytest.param("cuda", torch.float32, 1e-4, marks=CUDA),
    pytest.param("cuda", torch.bfloat16, 0.02, marks=CUDA)])
def test_attention_is_the_masked_definition_in_value_and_gradient(device, dtype, error, shift):
    """Any T, G and number of key-value heads. Full attention: of fewer queries than keys."""
    rng = random.Random(0)
    torch.manual_seed(0)
    for _ in range(100 if device == "cpu" else 15):  # cuDNN plans every new shape
        H = 2 * rng.randint(1, 4) if shift else rng.randint(1, 8)
        H_kv = rng.choice([n for n in range(1, H + 1) if H % n == 0])
        B, T, G = rng.randint(1, 3), rng.randint(1, 70), 2 * rng.randint(1, 40)
        q, k, v = inputs = qkv(B, H, H_kv, T, 8, device=device, dtype=dtype)
        first = min(T - 1, rng.choice([0, 1, 20]))
        for out, start, groups in ((shifted_sparse_attention(q, k, v, G, shift), 0, G),
                                   (causal_attention(q[:, first:], k, v), first, None)):
            mask = visible(H, T, groups, shift).to(device)
            expected = with_gradients(masked_attention(q, k, v, mask)[:, start:], inputs)
            for x, y in zip(with_gradients(out, inputs), expected):
                assert (x - y).abs().max() < error * max(1, y.abs().max())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shift, calls", [(True, 4), (False, 1)])
@pytest.mark.parametrize("H_kv", [4, 2, 1])
def test_attention_is_flash_on_views(H_kv, shift, calls, device):
    """Whole groups, and two half groups where shifted: a flash call each, no slow math, no copy."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs = qkv(1, 4, H_kv, 256, 64, device=device, dtype=dtype)
    with Recorder() as recorder:
        shifted_sparse_attention(*inputs, 64, shift)
    names = " ".join(name for name, shape in recorder.made if len(shape) == 4 and shape[3] == 64)
    assert len(re.findall("dot_product_(?:flash|cudnn)_attention", names)) == calls
    assert not re.search("softmax|mm", names)
    if not (shift and H_kv == 1):  # there both halves of the heads need the one: it is repeated
        assert not re.search("clone|copy|unsafe_view|pad", names)


# The model ----------------------------------------------------------------------------------------

SHAPES = {"grouped heads": {}, "tied": {"tie_word_embeddings": True},
          "head_dim, one key-value head": {"head_dim": 6, "num_key_value_heads": 1},
          "linear": {"rope_scaling": {"type": "linear", "factor": 4}, "rope_theta": 500.0},
          "yarn": {"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": 2, "beta_slow": 0.1},
                   "rope_theta": 500.0}}


def rotations(config, T):
    """The factors (T, D/2) of the rotary pairs, as complex numbers in float64."""
    D, scaling = config.head_dim, config.rope_scaling
    angle = [config.rope_theta ** (-i / D) for i in range(0, D, 2)]  # a token
    length = 1.0
    if scaling and scaling["rope_type"] == "linear":
        angle = [a / scaling["factor"] for a in angle]
    if scaling and scaling["rope_type"] == "yarn":
        # The (real) index of the pair that turns so often within the window, rounded outwards.
        fast, slow = (D / 2 * math.log(config.max_position_embeddings / (2 * math.pi * turns)) /
                      math.log(config.rope_theta) for turns in (2, 0.1))
        fast, slow, s = max(0, math.floor(fast)), math.ceil(slow), scaling["factor"]
        stays = [min(1, max(0, (slow - i) / (slow - fast))) for i in range(D // 2)]
        angle = [a * w + a / s * (1 - w) for a, w in zip(angle, stays)]
        length = 0.1 * math.log(s) + 1
        assert stays[0] == 1 and 0 < stays[1] < 1 and stays[-1] == 0  # all three kinds occur
    return length * (1j * torch.outer(torch.arange(T).double(), torch.tensor(angle).double())).exp()


def reference_logits(model, tokens, G=None, shift=True):
    """Llama by the book, in float64, its rotary pairs as complex numbers."""
    c, w = model.config, {name: p.double() for name, p in model.state_dict().items()}
    (B, T), D = tokens.shape, c.head_dim
    rotation = rotations(c, T)[:, None]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * w[f"{name}.weight"]

    def rotated(x):
        z = torch.complex(*x.chunk(2, dim=-1)) * rotation
        return torch.cat([z.real, z.imag], dim=-1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in (f"model.layers.{i}." for i in range(c.num_hidden_layers)):
        y = norm(x, layer + "input_layernorm")
        q, k, v = (linear(y, f"{layer}self_attn.{name}_proj").view(B, T, -1, D) for name in "qkv")
        y = masked_attention(rotated(q), rotated(k), v, visible(q.shape[2], T, G, shift))
        x = x + linear(y.flatten(2), layer + "self_attn.o_proj")
        y = norm(x, layer + "post_attention_layernorm")
        gate, up = (linear(y, f"{layer}mlp.{name}_proj") for name in ("gate", "up"))
        x = x + linear(gate * gate.sigmoid() * up, layer + "mlp.down_proj")
    return linear(norm(x, "model.norm"), "lm_head")


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_llama_is_the_reference(shape, name):
    """In all logits, or in some positions', and in their loss; no other logits are made then."""
    model, tokens, attention = tiny(**shape), TOKENS[:, :15], ATTENTIONS[name]
    expected = reference_logits(model, tokens, *attention)
    for keep in (torch.arange(15), torch.tensor([9, 0, 4])):
        with Recorder() as recorder:
            got = [model(tokens, targets, *attention, logits_to_keep=keep).double()
                   for targets in (None, tokens[:, keep])]
        wanted = [expected[:, keep], F.cross_entropy(expected[:, keep].mT, tokens[:, keep])]
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        sizes = [math.prod(shape) for _, shape in recorder.made if shape[-1:] == (64,)]
        assert max(sizes) == 2 * len(keep) * 64


@pytest.mark.parametrize("name", ATTENTIONS)
@torch.no_grad()
def test_a_token_changes_what_two_layers_of_visible_tokens_reach(name):
    """So nothing before it; nothing beyond its group unless shifted."""
    T, attention, model = 24, ATTENTIONS[name], tiny()  # whole groups: a roll would leak
    tokens = TOKENS[:1, :T].expand(T, T)
    changed = (tokens + torch.eye(T, dtype=torch.int64)) % 64  # row t: only token t is another
    difference = model(changed, None, *attention) - model(tokens, None, *attention)
    depends = difference.abs().amax(-1) > 1e-5  # (t, u)
    layer = visible(4, T, *attention).any(0).float()  # (u, t)
    assert torch.equal(depends.T, layer @ layer > 0) and not depends.tril(-1).any()


def test_interpolated_positions():
    """Position t has the angles of t / factor, in float32; extending again multiplies factors, and
    keeps to the rule."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=100)
    with torch.autocast("cpu", torch.bfloat16):
        rotary = longlora.rotary_embedding(config.extended(1000), torch.arange(1000))
    angle = torch.outer(torch.arange(1000) / 10, 10000 ** (-torch.arange(0, 16, 2).double() / 16))
    for table, expected in zip(rotary, (angle.cos(), angle.sin())):  # of the same dtype, too
        torch.testing.assert_close(table, expected.float()[:, None], rtol=0, atol=1e-4)
    for rope, other in (("linear", "yarn"), ("yarn", "linear")):
        model = tiny()
        for context, factor in [(9, 1), (16, 1), (40, 3), (81, 9)]:
            model.extend(context, rope)
            assert model.config == model.model.config
            assert model.config.max_position_embeddings == max(16, context)
            assert model.config.interpolation == (rope if factor > 1 else None, factor)
        model.extend(82)
        assert model.config.interpolation == (rope, 18)
        assert model.config.rope_scaling.get("original_max_position_embeddings", 16) == 16
        with pytest.raises(ValueError, match=f"scaled by the {rope} rule"):
            model.extend(1000, other)


@pytest.mark.parametrize("says, ask", [
    ("must be even", lambda: shifted_sparse_attention(*qkv(1, 4, 4, 16, 8), 7)),
    ("even number of them", lambda: shifted_sparse_attention(*qkv(1, 3, 3, 16, 8), 8)),
    ("no LoRA", lambda: longlora.set_trainable(tiny(), "lora")),
    ("'qq' matches no linear", lambda: longlora.add_lora(tiny(), targets=["q_proj", "qq"])),
    ("quantize it first", lambda: longlora.quantize(lora_model(), torch.float32))])
def test_what_cannot_be_is_refused(says, ask):
    with pytest.raises(ValueError, match=says):
        ask()


# The loss, memory and precision -------------------------------------------------------------------

class Recorder(TorchDispatchMode):
    """What operations make, views aside, as (name, shape); how often products read what."""

    def __init__(self):
        super().__init__()
        self.made, self.reads = [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.__name__.startswith("mm"):
            self.reads.update(x.data_ptr() for x in args)
        outputs = out if isinstance(out, (tuple, list)) else [out]
        self.made += [(function.__name__, tuple(x.shape)) for x in outputs
                      if isinstance(x, torch.Tensor) and not function.is_view]
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
    leaves, count = [x, weight][:1 + head_trains], max(1, int((targets != -100).sum()))
    for reduction, divisor in ("mean", count), ("sum", 1):
        with Recorder() as recorder:
            got = with_gradients(longlora.chunked_loss(x, weight, targets, reduction), leaves)
        assert max(math.prod(shape) for _, shape in recorder.made if 50 in shape) <= 50 * 8
        each = F.cross_entropy((x @ weight.T).mT, targets, reduction="none")
        torch.testing.assert_close(got, with_gradients(each.sum() / divisor, leaves), **NEAR)
    torch.testing.assert_close(longlora.chunked_loss(x, weight, targets, "none"), each)


@pytest.mark.parametrize("saver", ["checkpointing", "offload"])
@pytest.mark.parametrize("trainable", ["lora,embed,norm", "full"])
def test_memory_savers_change_no_gradient(trainable, saver, monkeypatch):
    """The inputs of a layer's two blocks are kept, or moved to the host; all is recomputed but the
    last product of either block and, unless it is on the host, the last attention block."""
    monkeypatch.setattr(longlora, "MLP_CHUNK", 5)
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 7)
    model, inputs, targets = lora_model(trainable), TOKENS[:, :16], TOKENS[:, 1:17]
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = with_gradients(F.cross_entropy(model(inputs, None, 6).mT, targets), trained)
    moved = []  # what goes to the host passes through these hooks
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", lambda pin_memory: (
        torch.autograd.graph.saved_tensors_hooks(lambda x: moved.append(x) or x, lambda x: x)))
    setattr(model.model, saver, True)
    with Recorder() as recorder:
        got = with_gradients(model(inputs, targets, 6), trained)
    torch.testing.assert_close(got, expected, **NEAR)
    blocks = 2 * 2 if saver == "offload" else 0
    assert sum(x.numel() for x in moved) == blocks * inputs.numel() * 32
    for name, p in model.named_parameters():
        if "_proj" in name and "lora_" not in name:
            again = not re.search("o_proj|down_proj", name)
            if saver == "checkpointing" and "layers.1.self_attn" in name:  # the last one
                again = False
            passes = 2 + again
            assert recorder.reads[p.data_ptr()] == passes * (4 if "mlp" in name else 1), name


@pytest.mark.parametrize("device", DEVICES)
def test_residual_stream_and_norms_are_bf16_under_autocast(device):
    """Though embedding and norms are trained in float32; so are their gradients."""
    model, seen, tokens = tiny().to(device, torch.bfloat16), [], TOKENS[:, :9].to(device)
    longlora.set_trainable(model, "embed,norm")
    for module in model.modules():
        if isinstance(module, (longlora.DecoderLayer, longlora.RMSNorm)):
            module.register_forward_hook(lambda _, x, out: seen.extend([x[0].dtype, out.dtype]))
    with torch.autocast(device, torch.bfloat16):
        model(tokens, tokens, 4).backward()
    assert seen == [torch.bfloat16] * 2 * (2 + 2 * 2 + 1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def training_step(device, variant=""):
    """Loss and gradients of a small bfloat16 model: by autocast, but in float32 on the CPU."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig(512, 256, 512, 4, 8, num_key_value_heads=4)).bfloat16()
    if "nf4" in variant:
        longlora.quantize(model, torch.float32 if device == "cpu" else torch.bfloat16)
    longlora.add_lora(model, dtype=torch.bfloat16)
    model.reset_parameters()  # so that LoRA's B is not 0
    longlora.set_trainable(model.float() if device == "cpu" else model, "lora,embed,norm")
    model.to(device).model.checkpointing = "checkpointing" in variant
    model.model.offload = "offload" in variant
    if variant == "compile":
        evaluation.compile_layers(model)
    tokens = torch.randint(512, (2, 513)).to(device)
    with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
        loss = model(tokens[:, :-1], tokens[:, 1:], group_size=128)
    loss.backward()
    return loss.item(), [p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("variant", [
    "", "checkpointing", "offload", "nf4, checkpointing", "compile"])
@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_training_step_in_bf16_on_a_gpu_is_that_of_float32_on_the_cpu(device, variant,
                                                                        monkeypatch):
    monkeypatch.setattr(longlora, "apply_rotary", longlora.apply_rotary)  # compiling replaces it
    expected_loss, expected = training_step("cpu", "nf4" if "nf4" in variant else "")
    loss, gradients = training_step(device, variant)
    assert loss == pytest.approx(expected_loss, rel=1e-2)
    assert min(F.cosine_similarity(x, y, dim=0) for x, y in zip(gradients, expected)) > 0.999


# LoRA and LoRA+, 4-bit weights --------------------------------------------------------------------

def test_lora_adds_the_product_of_its_factors_and_never_forms_it():
    """W x + (alpha / r) B A x, where B starts as zero."""
    linear, x = torch.nn.Linear(24, 40, bias=False).requires_grad_(False), torch.randn(2, 5, 24)
    lora = longlora.LoRALinear(linear, rank=3, alpha=12)
    assert torch.equal(lora(x), linear(x))
    A, B = lora.lora_A.weight, torch.nn.init.normal_(lora.lora_B.weight)
    with Recorder() as recorder:
        (out := lora(x)).sum().backward()
    torch.testing.assert_close(out, x @ (linear.weight + 12 / 3 * B @ A).T, rtol=1e-4, atol=1e-4)
    assert {(3, 24), (24, 40), (40, 24)} & {shape for _, shape in recorder.made} == {(3, 24)}


def test_llama_2_7b_trains_the_papers_parameter_counts():
    with torch.device("meta"):
        longlora.add_lora(model := Llama(LlamaConfig(vocab_size=32001)))
    longlora.set_trainable(model, "lora,embed,norm")
    sizes = Counter()
    for name, p in model.named_parameters():
        sizes["lora_" in name] += p.numel() if p.requires_grad else 0
    assert sizes == {True: 8_388_608, False: 131_342_336}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", ["lora,embed,norm", "lora", "lora,embed", "norm", "full"])
def test_exactly_these_parameters_train_in_float32(trainable, tied):
    """LoRA only on the attention projections; a tied head parts from an embedding that trains."""
    model = tiny(tie_word_embeddings=tied).bfloat16()
    longlora.add_lora(model, rank=3)
    longlora.set_trainable(model, trainable)
    parts = {"lora": r"\.layers\.\d\.self_attn\.[qkvo]_proj\.lora_[AB]", "full": ".*",
             "norm": r"\.(layers\.\d\.(input|post_attention)_layer)?norm", "embed": ".embed_tokens"}
    pattern = "|".join(f"(model|lm_head){parts[part]}.weight" for part in trainable.split(","))
    for name, p in model.named_parameters():
        trained = re.fullmatch(pattern, name) is not None
        assert (p.requires_grad, p.dtype == torch.float32) == (trained, trained), name
    shared = model.lm_head.weight is model.model.embed_tokens.weight
    assert shared == model.config.tie_word_embeddings == (tied and "embed" not in trainable)


def nf4_reference(W):
    """QLoRA's NF4 with double quantisation by its text, in float64, a number at a time. Its codes
    (Appendix E): quantiles of a normal distribution, 8 steps below zero and 9 above it."""
    normal, offset = torch.distributions.Normal(0, 1), 0.9677083
    above, below = (normal.icdf(torch.linspace(offset, 0.5, n).double())[:-1] for n in (9, 8))
    codes = (torch.cat([-below, torch.zeros(1), above]) / above.max()).tolist()
    flat, rebuilt = W.double().flatten().tolist(), []
    scales = [max(abs(w) for w in flat[i:i + 64]) for i in range(0, len(flat), 64)]
    mean = sum(scales) / len(scales)
    for i in range(0, len(scales), 256):
        step = max(abs(s - mean) for s in scales[i:i + 256]) / 127 or 1
        rebuilt += [round((s - mean) / step) * step + mean for s in scales[i:i + 256]]
    out = [min(codes, key=lambda code: abs(code - w / scales[i // 64])) * rebuilt[i // 64]
           for i, w in enumerate(flat)]
    return torch.tensor(out, dtype=torch.float64).view_as(W)


@pytest.mark.parametrize("shape", [(48, 32), (5, 7), (160, 128)])
def test_nf4_is_the_nearest_code_times_the_double_quantised_scale(shape):
    """At 4.13 bits a number, with an error of 0.093 standard deviations of normal weights."""
    W = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    linear = longlora.NF4Linear(W, torch.float32)
    torch.testing.assert_close(linear.weight.double(), nf4_reference(W), rtol=1e-4, atol=1e-7)
    assert linear.bfloat16().weight.equal(longlora.NF4Linear(W, torch.float32).weight)
    if W.numel() > 10_000:
        assert 8 * sum(b.nbytes for b in linear.buffers()) / W.numel() < 4.14
        assert 0.085 < (linear.weight - W).std() / 0.02 < 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_4_bit_model_computes_with_its_dequantised_weights(checkpointing):
    """And autograd keeps none of these."""
    plain, quantized, results = tiny(), tiny(), []
    longlora.quantize(quantized, torch.float32)
    weights = {name: module.weight for name, module in quantized.named_modules()
               if isinstance(module, longlora.NF4Linear)}
    for name, W in weights.items():
        plain.get_submodule(name).weight.data = W
    for model in plain, quantized:
        torch.manual_seed(0)
        longlora.add_lora(model, rank=3, alpha=12)
        longlora.set_trainable(model, "lora,embed,norm")
        model.model.checkpointing, kept = checkpointing, []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            loss = model(TOKENS[:, :16], TOKENS[:, 1:17], 6)
        results.append(with_gradients(loss, [p for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(*results, **NEAR)
    assert longlora.count_parameters(plain) == longlora.count_parameters(quantized)
    assert len(weights) == 2 * 7
    assert not any(x.shape == W.shape and x.equal(W) for x in kept for W in weights.values())


# ==================================================================================================
# longlora.py: files
# ==================================================================================================

MUTANTS = int(os.environ.get("FUZZ", 100))  # FUZZ=1000 pytest -k mutated
TENSORS = {name: torch.arange(15).view(3, 5).to(dtype) for name, dtype in longlora.DTYPES.items()}
TENSORS |= {"scalar": torch.tensor(3.5), "none": torch.zeros(0, 4), "odd": torch.ones(7).byte()}
ONE = ("F32", [2], 0, 8)
EXACT, CLOSE = {"rtol": 0, "atol": 0}, {"rtol": 1e-4, "atol": 1e-4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def packed(header, data=b""):
    """A safetensors file by hand: `header` in bytes, or {name: (dtype, shape, start, stop)}."""
    if isinstance(header, dict):
        header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}
                             for name, (dtype, shape, *offsets) in header.items()}).encode()
    return len(header).to_bytes(8, "little") + header + data


def test_safetensors_round_trip_is_byte_identical(tmp_path):
    a, b, c = (tmp_path / f"{name}.safetensors" for name in "abc")
    write_safetensors(a, TENSORS)
    write_safetensors(b, dict(read_tensors(a)))
    assert a.read_bytes() == b.read_bytes()
    torch.testing.assert_close(dict(read_tensors(b)), TENSORS, **EXACT)  # dtypes and shapes too
    c.write_bytes(packed({"a": ("U8", [1], 0, 1), "b": ("F32", [1], 1, 5)}, b"\1\0\0\xc0\x3f"))
    assert dict(read_tensors(c))["b"].item() == 1.5  # misaligned
    package = pytest.importorskip("safetensors.torch")
    torch.testing.assert_close(package.load_file(a), TENSORS, **EXACT)
    package.save_file(TENSORS, b)
    torch.testing.assert_close(dict(read_tensors(b)), TENSORS, **EXACT)


@pytest.mark.parametrize("content", [
    b"", packed({"a": ONE})[:20], packed(b"{'a': 1}"), b"\xff" * 99, packed(b"[" * 100_000),
    packed({"a": ONE}, bytes(7)), packed({"a": ONE}, bytes(9)),  # cut, too long, dtypes, sizes
    packed({"a": ("F31", [2], 0, 8)}, bytes(8)), packed({"a": ("F32", [3], 0, 8)}, bytes(8)),
    packed({"a": ("U8", [-2, -4], 0, 8)}, bytes(8)),  # negative, overlapping, with a gap
    packed({"a": ONE, "b": ("U8", [4], 4, 8)}, bytes(8)),
    packed({"a": ONE, "b": ("U8", [4], 9, 13)}, bytes(13))])
def test_broken_safetensors_are_refused(content, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        dict(read_tensors(path))


# Model folders ------------------------------------------------------------------------------------

def save_bin(model, folder, shards=1):
    """As older versions of transformers did, by hand: the newest writes no .bin."""
    save_model(model, folder)
    (folder / "model.safetensors").unlink()
    weights = {**model.state_dict(), "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    index = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(weights)}
    if shards > 1:
        write_json(folder / "pytorch_model.bin.index.json", {"weight_map": index})
    for file in set(index.values()):
        part = {name: w.clone() for name, w in weights.items() if index[name] == file}
        torch.save(part, folder / (file if shards > 1 else "pytorch_model.bin"))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_read(shards, here):
    """In the file's dtype or another, all frozen; a shard that is missing is named."""
    save_bin(model := tiny(tie_word_embeddings=shards > 1).bfloat16(), here, shards)
    for dtype in (None, torch.float32):
        loaded, expected = load_model(here, dtype), model.to(dtype or torch.bfloat16)
        torch.testing.assert_close(loaded.state_dict(), expected.state_dict(), **EXACT)
        assert not any(p.requires_grad for p in loaded.parameters())
    if shards > 1:
        Path("pytorch_model-2.bin").unlink()
        with pytest.raises(FileNotFoundError, match="pytorch_model-2.bin"):
            load_model(here)
        write_json(here / "pytorch_model.bin.index.json", {"weight_map": {NORM: "../x.bin"}})
        with pytest.raises(ValueError, match="index.json"):
            load_model(here)


@pytest.mark.parametrize("changes", [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 50.0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0,
                         "original_max_position_embeddings": 16}, "head_dim": 32},
    {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "beta_fast": 3,
                         "original_max_position_embeddings": 16, "attention_factor": 1.3,
                         "beta_slow": 0.2, "truncate": False}, "head_dim": 32},
    {"tie_word_embeddings": True, "head_dim": 12},
    {"model_type": "mistral", "sliding_window": 16}])
def test_logits_are_those_of_transformers(changes, here):
    """Beyond the original window too, in the newer spelling and in the older, which is ours."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**{
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 16, **changes})
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    for p in theirs.parameters():
        p.data += torch.randn(p.shape) / 5
    theirs.save_pretrained("newer")
    save_model(model := load_model("newer"), "older")
    back = transformers.AutoModelForCausalLM.from_pretrained(here / "older", dtype="float32")
    tokens = TOKENS[:, :changes.get("sliding_window")]
    for logits in (model(tokens), load_model("older")(tokens), back(tokens).logits):
        torch.testing.assert_close(logits, theirs(tokens).logits, **CLOSE)


@pytest.mark.parametrize("beyond", [
    {"sliding_window": 12}, {"rope_scaling": LLAMA3, "max_position_embeddings": 12}])
def test_what_cannot_be_extended_is_refused(beyond, here):
    """By merge, and by an adapter's context. A Mistral is read within its window."""
    save_model(tiny(**beyond), "base")
    adapter = lora_model()
    adapter.extend(64)
    save_adapter(adapter, "adapter")
    for adapter, context in ((None, 64), ("adapter", None), ("adapter", 12)):
        with pytest.raises(ValueError, match="sliding_window of 12|llama3"):
            merge("base", adapter, "out", context=context)
    assert load_model("base", context=12).config.max_position_embeddings == 12


@pytest.mark.parametrize("most", [longlora.SHARD_BYTES, 20_000])
def test_saving_what_was_loaded_gives_the_same_bytes(most, here, monkeypatch):
    """Models, in one file or in shards, and adapters; nothing of an earlier save stays behind."""
    monkeypatch.setattr(longlora, "SHARD_BYTES", 8_000)
    save_model(tiny(), "b")
    monkeypatch.setattr(longlora, "SHARD_BYTES", most)
    save_model(tiny(), "a")
    save_adapter(lora_model(), "a")
    save_model(load_model("a"), "b")
    load_adapter(tuned := load_model("a"), "a")
    tuned.name_or_path = None
    save_adapter(tuned, "b")
    a, b = ({path.name: path.read_bytes() for path in Path(name).iterdir()} for name in "ab")
    assert a == b
    sizes = [len(data) for name, data in a.items() if name.startswith("model-")]
    assert not sizes if most > 20_000 else len(sizes) > 3 and max(sizes) < 22_000


# Adapters and merging -----------------------------------------------------------------------------

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [
    {"target_modules": "all-linear", "lora_alpha": 5},
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "k_proj", "up_proj"], "r": 4, "use_rslora": True,
     "rank_pattern": {"layers.0.self_attn.k_proj": 2, "up_proj": 3},
     "alpha_pattern": {"model.layers.1.self_attn.q_proj": 7}},
    {"target_modules": r".*layers\.1\.mlp\.(up|down)_proj"},
    {"target_modules": ["v_proj"], "exclude_modules": ["model.layers.0.self_attn.v_proj"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head", "norm"]}])
def test_adapters_made_by_peft_give_the_same_logits(options, tied, here):
    """Read here; written again by us, and read again by PEFT; merged."""
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    load = partial(transformers.AutoModelForCausalLM.from_pretrained, dtype="float32")
    save_model(tiny(tie_word_embeddings=tied), "base")
    theirs = peft.get_peft_model(load(here / "base"), peft.LoraConfig(**options))
    for p in theirs.parameters():
        p.data += p.requires_grad * torch.randn(p.shape) / 20
    theirs.save_pretrained("adapter")
    load_adapter(model := load_model("base"), "adapter")
    save_adapter(model, "ours")
    merge("base", "adapter", "merged")
    for logits in (model(TOKENS), load(here / "merged")(TOKENS).logits,
                   peft.PeftModel.from_pretrained(load(here / "base"), "ours")(TOKENS).logits):
        torch.testing.assert_close(logits, theirs(TOKENS).logits, **CLOSE)


def released_adapter(folder):
    """Like those released with the paper: two files, 65 rows for 64. Returns merged weights."""
    torch.manual_seed(1)
    weights, lora, full = tiny().state_dict(), {}, {}
    weights[longlora.HEAD] = torch.cat([w := weights[longlora.HEAD], w.mean(0, keepdim=True)])
    for name, w in list(weights.items()):
        if re.search(r"[qkvo]_proj", name):
            layer = name.removesuffix(".weight")
            A, B = torch.randn(8, w.shape[1]) / 5, torch.randn(w.shape[0], 8) / 5
            lora |= {f"{layer}.lora_A.weight": A, f"{layer}.lora_B.weight": B}
            weights[name] = w + 16 / 8 * B @ A
        elif "norm" in name or "embed" in name:
            weights[name] = full[name] = torch.randn(65 if w.dim() > 1 else 32, *w.shape[1:]) / 5
    full |= {"model.extra.weight": torch.ones(4), **lora}
    os.mkdir(folder)
    torch.save({f"base_model.model.{name}": w for name, w in lora.items()},
               f"{folder}/adapter_model.bin")
    torch.save(full, f"{folder}/trainable_params.bin")
    write_json(Path(folder, "adapter_config.json"), {
        "base_model_name_or_path": "/a/strangers/path", "bias": "none", "fan_in_fan_out": False,
        "lora_alpha": 16, "modules_to_save": None, "peft_type": "LORA", "r": 8,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})
    return weights


def test_released_adapters_load_and_merge(here):
    """Rows that only the embedding brought are the mean of the others in the head."""
    save_model(tiny(), "base")
    expected, model = released_adapter("adapter"), load_model("base")
    with pytest.warns(UserWarning) as warned:  # of the context, and of what is left out
        load_adapter(model, "adapter")
        merge("base", "adapter", "merged", context=40)
    assert len(warned) == 2 + 1 and model.config.rope_scaling is None
    merged = load_model("merged")
    torch.testing.assert_close(merged.state_dict(), expected)
    assert merged.config == tiny(vocab_size=65).config.extended(40)
    model.extend(40)
    tokens = TOKENS.masked_fill(TOKENS == 5, 64)  # the new row is read too
    torch.testing.assert_close(model(tokens), merged(tokens), **CLOSE)


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_merge_writes_a_whole_folder_or_none(dtype, here, monkeypatch):
    """In the base's dtype or another, with the window and the tokenizer of the adapter."""
    save_model(tiny(tie_word_embeddings=True).bfloat16(), "base")
    adapter = lora_model(tie_word_embeddings=True)
    adapter.extend(40, "yarn")
    save_adapter(adapter, "adapter")
    for file in ("base/tokenizer.model", "base/notes.txt", "adapter/tokenizer.model"):
        Path(file).write_text(file)
    with monkeypatch.context() as patch:
        patch.setattr(longlora, "copy_companions", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            merge("base", "adapter", "out", dtype)
    assert sorted(os.listdir()) == ["adapter", "base"]
    merge("base", "adapter", "out", dtype)
    assert Path("out/tokenizer.model").read_text() == "adapter/tokenizer.model"
    assert sorted(os.listdir("out")) == ["config.json", "model.safetensors", "tokenizer.model"]
    load_adapter(tuned := load_model("base", torch.float32), "adapter")
    merged, logits = load_model("out"), tuned(TOKENS)
    assert merged.config == tuned.config == adapter.config
    assert {p.dtype for p in merged.parameters()} == {dtype or torch.bfloat16}
    assert (merged.float()(TOKENS) - logits).norm() < (0.003 if dtype else 0.02) * logits.norm()
    longlora.merge_lora(tuned)
    torch.testing.assert_close(tuned(TOKENS), logits, **CLOSE)
    with pytest.raises(ValueError, match="exists"):
        merge("base", None, "out")


def test_an_adapter_trained_in_4_bits_is_for_the_original_base(here):
    save_model(model := tiny(), "base")
    longlora.quantize(model, torch.float32)
    longlora.add_lora(model)
    save_adapter(model, "adapter")
    assert read_json(here / "adapter" / "longlora.json")["quantize"] == "nf4"
    merge("base", "adapter", "merged")
    assert torch.equal(load_model("merged")(TOKENS), tiny()(TOKENS))  # B is 0
    for forbidden in (longlora.merge_lora, partial(save_model, path="never")):
        with pytest.raises(ValueError, match="4-bit"):
            forbidden(model)


@pytest.mark.parametrize("line, says", [
    ("--model nowhere --out new", "no such model folder"), ("--model base --out base", "exists"),
    ("--model base --adapter nowhere --out new", "no such file"),
    ("--model . --out new", "convert"), ("--model base --out new --extend 0", "at least 1"),
    ("--model base --out new --rope yarn", "which is not given")])
def test_bad_input_of_merge_is_one_line_and_status_2(line, says, here, monkeypatch, capsys):
    save_model(tiny(), "base")
    write_json(here / "params.json", {})  # as in Meta's folders
    monkeypatch.setattr(sys, "argv", ["longlora.py", "merge", *line.split()])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "longlora.py"), run_name="__main__")
    assert re.fullmatch(rf"longlora.py: error: .*{says}.*\n", capsys.readouterr().err)
    assert sorted(os.listdir()) == ["base", "params.json"]


def test_longlora_py_alone_says_what_it_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["longlora.py"])
    runpy.run_path(str(ROOT / "longlora.py"), run_name="__main__")
    assert re.search("S2-Attn(.*\n)+.*python train.py", capsys.readouterr().out)


def in_a_new_process(function, *arguments, seconds=60):
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=function, args=arguments, daemon=True)
    process.start()
    process.join(seconds)
    assert process.exitcode == 0  # None: too slow


def merge_within(limit):
    """Fails if merging takes more bytes of memory, beside the pages of mapped files."""

    def watch():
        while not done.wait(0.001):
            held.append(int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1]) * 1024)

    status, held, done = Path("/proc/self/status"), [], threading.Event()
    thread = threading.Thread(target=watch)
    thread.start()
    while not held:
        pass
    merge("model", None, "model-merged")
    merge("bin", None, "bin-merged")
    done.set()
    thread.join()
    assert max(held) - held[0] < limit, (held[0], max(held), limit)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_weights_stay_in_their_file_until_they_are_merged_one_by_one(here):
    model = tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=12).bfloat16()
    save_model(model, "model")
    save_bin(model, here / "bin")
    in_a_new_process(merge_within, 0.3 * sum(p.nbytes for p in model.parameters()))


# Files that do not fit, broken files --------------------------------------------------------------

NORM, EXTRA = "model.norm.weight", ("extra.weight", torch.zeros(1))
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
MISFITS = {  # None: not there
    "base/model.safetensors": [(NORM, None), (NORM, torch.ones(31)), EXTRA],
    "base/config.json": [
        ("model_type", "qwen2"), ("quantization_config", {"bits": 4}), ("mlp_bias", True),
        ("rope_scaling", {"type": "dynamic", "factor": 2.0}), ("num_hidden_layers", 10**9),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "beta_slow": 33}), ("rope_theta", 1),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "truncate": 1}), ("sliding_window", 12.5),
        ("rope_scaling", {"type": "yarn", "factor": 2.0, "mscale": 1, "mscale_all_dim": 1})],
    "adapter/adapter_model.safetensors": [
        (LORA, None), (LORA, torch.zeros(3, 31)), EXTRA,
        ("base_model.model.model.embed_tokens.lora_embedding_A", torch.zeros(3, 64))],
    "adapter/adapter_config.json": [
        ("peft_type", "LOHA"), ("r", None), ("r", 4), ("target_modules", ["q"]), ("bias", "all"),
        ("use_dora", True), ("init_lora_weights", "pissa"), ("lora_alpha", float("nan")),
        ("layer_replication", [[0, 2]]), ("modules_to_save", ["x"]), ("rank_pattern", {".*": 3})],
    # The last: the factor of another base.
    "adapter/longlora.json": [("context", None), ("rope", "ntk"), ("factor", 2.0)],
}


@pytest.mark.parametrize("file, name, value", [
    (file, *change) for file, changes in MISFITS.items() for change in changes])
def test_files_that_do_not_fit_are_refused(file, name, value, here):
    """And the model that an adapter does not fit is as before."""
    save_model(tiny(), "base")
    save_adapter(lora_model(), "adapter")
    load_adapter(load_model("base"), "adapter")
    path, model = Path(file), load_model("base")
    content = read_json(path) if path.suffix == ".json" else dict(read_tensors(path))
    content = {n: x for n, x in {**content, name: value}.items() if x is not None}
    (write_json if path.suffix == ".json" else write_safetensors)(path, content)
    with pytest.raises(ValueError, match=f"^{path.parent}"):
        load_adapter(model if "adapter" in file else load_model("base"), "adapter")
    assert model.config == tiny().config and model.state_dict().keys() == tiny().state_dict().keys()


@pytest.mark.parametrize("file", ["base/pytorch_model.bin", "adapter/trainable_params.bin"])
def test_pickles_of_anything_but_dense_tensors_are_refused(file, here):
    """Code never runs. A compressed archive is refused too: mapped, it would pass for weights."""

    class Gadget:
        def __reduce__(self):
            return os.system, ("touch ran",)

    save_bin(tiny(), here / "base")
    released_adapter("adapter")
    tensors = torch.load(file)
    os.rename(file, "whole")
    with zipfile.ZipFile("whole") as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in whole.namelist():
            new.writestr(entry, whole.read(entry))
    for other in (None, torch.empty(9, device="meta"), torch.ones(9).to(torch.float8_e5m2),
                  torch.ones(9).to_sparse(), torch.nested.nested_tensor([TOKENS[0]]), Gadget()):
        if other is not None:
            torch.save({**tensors, next(iter(tensors)): other}, file)
        with pytest.raises(ValueError, match=file):
            load_adapter(load_model("base"), "adapter")
    assert not Path("ran").exists()
    torch.load(file, weights_only=False)
    assert Path("ran").exists()  # so it would have


def mutated(data, rng):
    """`data` broken in one way, near its ends most often, where little means much."""
    start = rng.choice([0, max(0, len(data) - 400), rng.randrange(len(data))])
    a, b = sorted(rng.randrange(start, min(len(data), start + 400)) for _ in range(2))
    return rng.choice([
        data[:a], data[:a] + data[b:], data[:b] + data[a:b] * 100 + data[b:],
        data[:a] + bytes(b - a) + data[b:], data[:a] + data[b:b + 1] + data[a + 1:],
        data[:a] + bytes([data[a] ^ 1 << rng.randrange(8)]) + data[a + 1:],
        rng.choice([b"", b"{}", b"[1]", bytes(999), packed({"a": ONE}, bytes(8))])])


def read_mutants():
    """Each is named before it is read: a crash is that of the last one."""
    files = sorted(path for path in Path().glob("*/*") if path.parent.name != "base")
    for case in range(MUTANTS):
        file = files[case % len(files)]
        whole, folder = file.read_bytes(), file.parent.name
        file.write_bytes(mutated(whole, random.Random(case)))
        print(case, file, flush=True)
        try:
            model = load_model("base" if "adapter" in folder else folder)
            if "adapter" in folder:
                load_adapter(model, folder)
            assert not any(p.is_meta for p in model.parameters())
        except (ValueError, OSError) as error:
            assert "\n" not in str(error), error
        file.write_bytes(whole)


def test_mutated_files_are_refused_in_one_line_or_loaded(here):
    """In a process of their own, which PyTorch's loader of pickles might crash."""
    for name in ("base", "model"):
        save_model(tiny(), name)
    save_bin(tiny(), here / "bin", shards=2)
    save_adapter(lora_model(), "adapter")
    released_adapter("released adapter")
    in_a_new_process(read_mutants, seconds=20 + MUTANTS / 2)


# ==================================================================================================
# data/prepare.py
# ==================================================================================================

# Text, data/prepare.py ----------------------------------------------------------------------------

GOOD = '{"instruction": "x", "output": "y"}'


def test_splits_are_fixed_and_disjoint_and_hold_out_no_tests():
    splits = {"os.py": "train", "json/decoder.py": "train", "ast.py": "valid", "runpy.py": "test"}
    assert {name: prepare.split_of(name) for name in splits} == splits
    train, tests, valid, test = (set(prepare.library_files(split))
                                 for split in ("train", "tests", "valid", "test"))
    assert valid and test and not (train | tests) & (valid | test) and not valid & test
    assert train | tests == set(prepare.library_files("train+tests"))
    assert not {"test", "tests", "idle_test"} & {path.parent.name for path in train | valid | test}


@pytest.mark.parametrize("size, dtype", [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_documents_are_joined_by_eos(size, dtype, tmp_path):
    """Text files, JSON lines and folders of them; every document is followed by one EOS."""
    letters = SimpleNamespace(encode=lambda text: list(map(ord, text)), eos_id=2, vocab_size=size)
    text = "".join(f"line {i}\n" for i in range(100_000))  # read in several pieces
    records = '{"text": "x\\ny"}\n\n{"text": ""}\n{"text": "z", "n": 1}\n'
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "deep" / "b.jsonl").write_text(records)
    files, out = prepare.text_files([tmp_path]), tmp_path / "out" / "tokens.bin"
    count, tokens = prepare.write_texts(files, letters, out), np.fromfile(out, dtype)
    assert "".join(map(chr, tokens)) == text + "\2x\ny\2\2z\2" and count == len(tokens)
    files[1].write_text(records + '{"text": 5}')  # is named, and leaves no half-written file
    with pytest.raises(ValueError, match='b.jsonl, line 5: no "text"'):
        prepare.write_texts(files, letters, out.with_name("x.bin"))
    assert os.listdir(out.parent) == ["tokens.bin"]


def test_the_end_of_a_text_is_held_out(tmp_path, monkeypatch):
    """A text, encoded once, and the token file that is made of it have the same three parts."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    path, out = tmp_path / "a.txt", tmp_path / "a.bin"
    path.write_text(" ".join(map(str, range(1000))))
    prepare.write_texts([path], TOKENIZER, out)
    ids = [*TOKENIZER.encode(path.read_text()), TOKENIZER.eos_id]
    n = len(ids) // 20
    parts = {None: ids, "train": ids[:-2 * n], "valid": ids[-2 * n:-n], "test": ids[-n:]}
    for split, part in parts.items():
        for data, model in ((path, TINY_LLAMA), (out, "no tokenizer is needed")):
            assert prepare.open_tokens(str(data), model, 2048, split).tolist() == part
            monkeypatch.setattr(prepare, "write_tokens", None)  # the first has encoded it


def test_added_tokens_are_single_ids_between_encoded_texts(tmp_path):
    """As added_tokens.json has them, the longest first; also where a text has none of them."""
    shutil.copy(TINY_LLAMA / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer.json").write_text("read only where there is no tokenizer.model")
    beside, ids = tmp_path / "added_tokens.json", TOKENIZER.encode
    beside.write_text('{"[P": 2050, "[PAD]": 2048, "</s>": 2}')
    added = prepare.load_tokenizer(tmp_path, vocab_size=2048)
    assert added.encode("def f()") == ids("def f()")
    text = "a[PAD]def f()[P[P</s> x"
    assert added.encode(text) == [*ids("a"), 2048, *ids("def f()"), 2050, 2050, 2, *ids(" x")]
    assert added.decode([*ids("a b"), 2048, *ids("c")]) == "a b[PAD]c"
    assert added.vocab_size == 2051 and added.key != TOKENIZER.key
    for bad in ("[1]", "{", '{"x": -1}', '{"": 5}', "\xff"):
        beside.write_text(bad, encoding="latin-1")
        with pytest.raises(ValueError, match="added_tokens.json"):
            prepare.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="2,048 pieces, the model only 2,047"):
        prepare.load_tokenizer(TINY_LLAMA, vocab_size=2047)


def byte_level_tokenizer(folder, **configs):
    """A tokenizer.json that adds BOS, cuts and pads, with config files; and one that does not."""
    tokenizers = pytest.importorskip("tokenizers")
    full = tokenizers.ByteLevelBPETokenizer()
    full.train_from_iterator([prepare.FILLER], 265, special_tokens=["<s>", "</s>", "<turn>"])
    full.add_tokens(["[PAD]"])
    plain = tokenizers.Tokenizer.from_str(full.to_str())
    full.post_processor = tokenizers.processors.BertProcessing(("</s>", 1), ("<s>", 0))
    full.enable_truncation(4)
    full.enable_padding(length=9)
    full.save(str(folder / "tokenizer.json"))
    for name, value in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return plain


def test_a_tokenizer_json_is_read_as_by_its_package_or_refused(tmp_path, monkeypatch):
    theirs = byte_level_tokenizer(tmp_path, config={"eos_token_id": 1})
    ours = prepare.load_tokenizer(tmp_path, vocab_size=265)
    for text in ("", "def f(x):\n    return 你好 🎉", " a<turn>b[PAD] c", prepare.FILLER * 9):
        assert ours.encode(text) == theirs.encode(text).ids
        assert ours.decode([0, *ours.encode(text), 1]) == text.replace("<turn>", "")
    assert ours.encode("\ud800") == ours.encode("?")  # JSON may hold half a pair
    byte_level_tokenizer(tmp_path, config={"eos_token_id": ours.vocab_size})  # no token of its own
    whole = (tmp_path / "tokenizer.json").read_text()
    for text in ("", "{}", "[1]", whole[:-9], whole.replace('"BPE"', '"x"'), whole):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="tokenizer.json: no"):
            prepare.load_tokenizer(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # as if it were not installed
    with pytest.raises(ValueError, match="pip install tokenizers"):
        prepare.load_tokenizer(tmp_path)


@pytest.mark.parametrize("configs, ids", [
    ({"tokenizer_config": {"bos_token": "<s>", "eos_token": {"content": "</s>"}},
      "config": {"bos_token_id": 2, "eos_token_id": 2}}, (0, 1)),
    ({"tokenizer_config": {"bos_token": None, "eos_token": "</s>"}}, (1, 1)),
    ({"tokenizer_config": {"eos_token": "<turn>"}, "config": {"bos_token_id": 0}}, (0, 2)),
    ({"config": {"bos_token_id": None}, "generation_config": {"eos_token_id": [2, 1]}}, (2, 2))])
def test_bos_and_eos_of_a_tokenizer_json_are_in_the_config_files(configs, ids, tmp_path):
    byte_level_tokenizer(tmp_path, **configs)
    tokenizer = prepare.load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids


def parsed(ids, n):
    """Of a passkey prompt with its answer: the key, and the filler before and behind it."""
    _, before, told, behind, asked = TOKENIZER.decode(ids).split("\n")
    key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", told)[1]
    assert asked.endswith(f"The pass key is {key}") and TOKENIZER.decode(ids[-n:]).strip() == key
    assert ids[0] == TOKENIZER.bos_id and 1 <= int(key) <= 50_000
    return int(key), before, behind


def test_passkey_documents():
    """They fill their length, end in the key, and held-out keys and depths are never trained on."""
    rng, drawn = np.random.default_rng(0), {False: [], True: []}
    for i in range(200):
        held_out, length = bool(i % 2), int(rng.integers(100, 400))
        ids, n = prepare.passkey_document(TOKENIZER, length, rng, held_out)
        assert length - 32 <= len(ids) <= length
        key, before, _ = parsed(ids, n)
        drawn[held_out].append((key, len(before)))
    for trained, tested in zip(zip(*drawn[False]), zip(*drawn[True])):
        assert not set(trained) & set(tested) and len(set(tested)) > 50
    with pytest.raises(ValueError, match="does not fit into 40 tokens"):
        prepare.passkey_document(TOKENIZER, 40, rng, held_out=True)


def test_training_reads_passkey_documents_end_to_end():
    """As many as find room, half of them shorter than the geometric mean of least and most."""
    lengths = []
    for seed in range(30):
        ids = np.array(prepare.passkey_documents(TOKENIZER, 2048, np.random.default_rng(seed)))
        starts, ends = np.where(ids == TOKENIZER.bos_id)[0], np.where(ids == TOKENIZER.eos_id)[0]
        assert starts.tolist() == [0, *ends[:-1] + 1] and 1920 < ends[-1] + 1 == len(ids) < 2050
        keys = re.findall(r"\? The pass key is (\d+)", TOKENIZER.decode(ids))
        assert len(keys) == len(ends) and not any(key.endswith("3") for key in keys)  # held out
        lengths.append(ends[0])
    assert 8 <= sum(length < 512 for length in lengths) <= 22


def test_instructions_are_what_a_plain_loop_makes_of_them(tmp_path, monkeypatch):
    """The middle of a prompt goes where a sample is too long; too long an answer is left out."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    rng, context, encode = np.random.default_rng(0), 150, TOKENIZER.encode
    words = "def|  |\n\n|\t|naïve|你好|שלום|🎉| ]|(x)|a.b|".split("|")
    inputs = [{}, {"input": ""}, {"input": "(x) 🎉"}, {"input": None, "id": 5}]
    records, expected, cut = [], [], 0
    for i in range(200):
        instruction, answer = (" ".join(rng.choice(words, rng.integers(most)))
                               for most in (91 if i % 5 == 0 else 6, 61 if i % 7 == 0 else 6))
        records.append({"instruction": instruction, "output": answer, **inputs[i % 4]})
        question = "\n(x) 🎉" if i % 4 == 2 else ""
        prompt = f"[INST]{instruction}{question}[/INST]"
        ids, n = [1, *encode(prompt + answer), 2], 1 + len(encode(prompt))
        labels, over = [-100] * n + ids[n:], max(0, len(ids) - context)
        if over < n:
            first = n - over - (n - over) // 2
            del ids[first:first + over], labels[first:first + over]
            expected.append((ids, labels))
            cut += over > 0
    path, out = tmp_path / "data.json", tmp_path / "prepared.bin"
    for text in (json.dumps(records, ensure_ascii=False), " \n" + json.dumps(records, indent=1),
                 "\n\n".join(map(json.dumps, records))):
        path.write_text(text, encoding="utf-8-sig")
        samples = prepare.open_samples(str(path), TINY_LLAMA, 2048, context)
        assert [tuple(x.tolist() for x in sample) for sample in samples] == expected
    assert samples.lengths.tolist() == [len(ids) for ids, _ in expected]
    assert samples.left_out == 200 - len(expected) > 3 and samples.cut == cut > 9
    assert prepare.write_samples([path], TOKENIZER, out) == 200 and prepare.is_instructions(out)
    where = str(out), "no tokenizer is needed", 2048, context
    parts, again = prepare.open_splits(*where), prepare.open_samples(*where)
    assert all(np.array_equal(x, y) for a, b in zip(samples, again) for x, y in zip(a, b))
    assert [len(part) + part.left_out for part in parts] == [180, 10, 10]
    assert f": {cut:,}; left out" in prepare.describe_lost(parts)
    assert 500 < again.some(1000).lengths.sum() <= 1000


@pytest.mark.parametrize("text, says", {  # what a file has, and what the refusal names
    "[]": "no text", "": "no text", f"[{GOOD}": "column 37", "\0\1[": "line 1",
    f"[{GOOD}, {'[' * 100_000}": "not JSON", f"[{'9' * 5000}]": "not JSON",
    f"[{GOOD}, 5]": "record 2: .*got 5", f'[{GOOD[:-1]}, "input": ["a"]}}]': "record 1: .*'input'",
    f'[{GOOD}, {{"instruction": "x"}}]': 'record 2: expected texts as "instruction", "output"',
    f"{GOOD}\n\n{{": "line 3: not JSON", f'{GOOD}\n{{"text": 5}}': "line 2: .*got {'text': 5}",
    f"{GOOD}\n{GOOD.replace('y', 'ß')}": "line 2: not JSON in UTF-8"}.items())  # it is Latin-1
def test_a_broken_record_is_named_in_one_line(text, says, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(text, encoding="latin-1" if "ß" in text else "utf-8")
    with pytest.raises(ValueError, match=f"^[^\n]*data.json[^\n]*{says}[^\n]*$"):
        prepare.write_samples([path], TOKENIZER, tmp_path / "out.bin")
    assert os.listdir(tmp_path) == ["data.json"]


def test_instructions_are_known_by_what_is_in_them(tmp_path):
    yes = {"b.jsonl": GOOD, "c.json": "5", "i.jsonl": f" [ {GOOD}]"}
    no = {"a.jsonl": '{"text": "x"}', "d": GOOD, "e.txt": GOOD, "f.bin": GOOD, "h.jsonl": "{"}
    for name, text in (yes | no).items():
        (tmp_path / name).write_text(text)
        assert prepare.is_instructions(tmp_path / name) == (name in yes), name
    assert prepare.is_instructions("stdlib-questions") and not prepare.is_instructions("stdlib")
    for name in ("a.jsonl", "f.bin", "nowhere.json"):
        with pytest.raises(ValueError, match=f"{name}: no "):
            prepare.open_samples(str(tmp_path / name), "", 64, 8)


def test_an_index_that_is_broken_or_anothers_is_refused(tmp_path):
    path, index = tmp_path / "x.bin", tmp_path / "x.samples"
    np.arange(10, dtype=np.uint16).tofile(path)
    good = np.array([[4, 1], [10, 5]])  # int64: where each sample ends, and its prompt's length
    for array in (good[:1], good + [[0, 4], [0, 0]], good - [[0, 1], [0, 0]], good[::-1], good[:0],
                  good.astype(float), good.flatten()[:3], good + [[0, 2**63 - 3], [0, 0]]):
        array.tofile(index)
        with pytest.raises(ValueError, match="x.samples does not describe"):
            prepare.open_samples(str(path), "", 64, 8)
    good.tofile(index)
    assert prepare.open_samples(str(path), "", 64, 8).lengths.tolist() == [4, 6]
    prepare.write_texts([ROOT / "LICENSE"], TOKENIZER, path)  # a corpus in its place has none
    assert not index.exists() and not prepare.is_instructions(path)


def test_library_questions_are_answered_by_the_excerpt_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CACHE", tmp_path)
    monkeypatch.setattr(prepare, "COUNTS", {"train": 60, "valid": 30, "test": 30})
    few = {split: prepare.library_files(split)[-12:] for split in ("train", "valid", "test")}
    monkeypatch.setattr(prepare, "library_files", few.__getitem__)
    splits = prepare.open_splits("stdlib-questions", TINY_LLAMA, 2048, 2048)
    assert [(len(x), x.cut, x.left_out) for x in splits] == [(60, 0, 0), (30, 0, 0), (30, 0, 0)]
    for split, files in few.items():
        source = "".join(path.read_text() for path in files)
        records = json.loads(prepare.library_questions(TOKENIZER, split).read_text())
        assert {record["output"].startswith("class ") for record in records} == {True, False}
        for record in records:
            excerpt, question = record["instruction"].rsplit("\n", 1)
            name = re.search(r"(\w+)\?$", question)[1]  # all without a syntax tree
            before, behind = re.split(rf"^ *(?:async )?def {name}\(", excerpt, flags=re.M)
            assert excerpt in source
            if question == f"Which class defines {name}?":
                assert re.search(rf"^ *{record['output']}\b", before, re.M)
                assert len(re.findall("^ *class ", excerpt, re.M)) > 1
            else:
                argument, value = record["output"].split("=", 1)
                assert question == f"What is the default of {argument} in {name}?"
                assert re.search(rf"\b{argument}(:[^=]*)?\s*=\s*{re.escape(value)}", behind)


def test_facts_are_those_of_the_lines_that_python_counts():
    source = ("class A:\n    def f(self, x=7, *, y='é', z=None): pass\n\f\nclass B:\n"
              "    def f(self): pass\n\f\ndef g(w=\n  2.5): pass\n")
    assert list(prepare.facts(source)) == [
        ("What is the default of w in g?", "w=2.5", 7, 8, []),
        ("Which class defines f?", "class A", 1, 2, [5]),
        ("What is the default of x in f?", "x=7", 2, 2, [5]),
        ("What is the default of y in f?", "y='é'", 2, 2, [5]),
        ("Which class defines f?", "class B", 4, 5, [2])]


@pytest.mark.parametrize("arguments, says", [
    ("--tokenizer nowhere", "nowhere: no such file"), ("a.txt", "texts take --out FILE.bin")])
def test_prepare_py_says_in_one_line_what_is_wrong(arguments, says, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    run = subprocess.run([sys.executable, ROOT / "data" / "prepare.py", *arguments.split()],
                         cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 2 and re.search(f"^prepare.py: error: {says}.*\n\\Z", run.stderr, re.M)
    assert os.listdir(tmp_path) == ["a.txt"] and "Trace" not in run.stderr


# ==================================================================================================
# eval.py
# ==================================================================================================

# eval.py ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models (reader: with a tokenizer), and token files, whole and broken."""
    root = tmp_path_factory.mktemp("eval")
    longlora.save_model(tiny(), root / "model")
    longlora.save_model(tiny(vocab_size=2048, max_position_embeddings=4096), root / "reader")
    shutil.copy(TINY_LLAMA / "tokenizer.model", root / "reader")
    tokens = np.random.default_rng(0).integers(3, 64, 6000).astype(np.uint16)
    for name, ids in ("tokens", tokens), ("short", tokens[:50]), ("beyond", tokens + 1):
        ids.tofile(root / f"{name}.bin")
    (root / "half.bin").write_bytes(b"123")
    (root / "questions.json").write_text('[{"instruction": "Why?", "output": "So."}]')
    (root / "topics.jsonl").write_text(json.dumps({"prompt": "a" * 5000, "topics": ["x"]}))
    return root


@pytest.fixture
def evaluate(folder, monkeypatch):
    """Run a command of eval.py, as this process has changed it; returns its rows."""
    def run(*arguments):
        monkeypatch.chdir(folder)
        words = ["eval.py", *map(str, arguments), "--json", "rows.json"]
        monkeypatch.setattr(sys, "argv", words)
        evaluation.main()
        return longlora.read_json(Path("rows.json"))["rows"]

    return run


@torch.no_grad()
def reference_perplexity(model, tokens, context, protocol, stride, attention):
    """From all logits of each window: perplexity, its standard error, how many tokens, and
    perplexity of the first and the second half of positions."""
    windows, scored, halves = [], set(), ([], [])
    for start in range(0, len(tokens), stride):
        window = torch.from_numpy(tokens[start:start + context].astype(np.int64))
        if len(window) < (context if protocol == "official" else 2):
            break
        losses = F.cross_entropy(model(window[None, :-1], None, *attention)[0], window[1:],
                                 reduction="none").tolist()
        windows.append([loss for i, loss in enumerate(losses, start) if i not in scored])
        for i, loss in enumerate(losses):
            if start + i not in scored:
                halves[i >= context // 2].append(loss)
        if protocol == "sliding":  # each token once
            scored |= {*range(start, start + len(losses))}
    each, means = sum(windows, []), [np.mean(window) for window in windows if window]
    value = math.exp(np.mean(each))
    error = value * np.std(means, ddof=1) / len(means) ** 0.5 if len(means) > 1 else None
    return value, error, len(each), [math.exp(np.mean(half or [0])) for half in halves]


@pytest.mark.parametrize("name", [*ATTENTIONS, "transformers"])
@pytest.mark.parametrize("protocol", ["sliding", "official"])
@pytest.mark.parametrize("length, context, stride", [(40, 8, 4), (43, 12, 11), (9, 9, 1)])
def test_perplexity_is_its_definition(protocol, length, context, stride, name, monkeypatch,
                                      tmp_path):
    """Of our logits by each attention, and of transformers'."""
    model, attention = tiny(), ATTENTIONS.get(name, ())
    asked = TOKENS[0, :length].numpy().astype(np.uint16), context, protocol, stride
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 3 * context)  # three windows at a time
    found = evaluation.perplexity(model, *asked, torch.float32, *(attention or (None, True)), 2)
    if name == "transformers":
        transformers = pytest.importorskip("transformers")
        longlora.save_model(model, tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
        model = lambda tokens, _: theirs(tokens).logits  # noqa: E731
    value, error, scored, halves = reference_perplexity(model, *asked, attention)
    assert found.tokens == scored and found.value == pytest.approx(value, rel=1e-5)
    assert found.error == (error and pytest.approx(error, rel=1e-4))
    assert found.by_position == pytest.approx(halves, rel=1e-5)


def test_perplexity_never_makes_all_logits(monkeypatch):
    monkeypatch.setattr(longlora, "LOSS_CHUNK", 7)
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        evaluation.perplexity(tiny(vocab_size=5000), TOKENS.flatten().numpy(), 32)
    calls = [call.args for call in linear.call_args_list if len(call.args[1]) == 5000]
    assert max(len(x) for x, _ in calls) == 7


def parsed_prompt(prompt):
    """Of a passkey prompt with its answer: the key, and the filler before and behind it."""
    _, before, told, behind, asked = prompt.split("\n")
    key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", told)[1]
    assert asked.endswith(f"The pass key is {key}") and 1 <= int(key) <= 50_000
    return int(key), before, behind


def oracle(wrong):
    """A model that knows each next token but one: the `wrong(text)`th, from the end as -1."""
    def model(tokens, logits_to_keep):
        known = tokens.roll(-1, dims=1)
        known[:, wrong(TOKENIZER.decode(tokens[0].tolist())) - 1] += 1
        return F.one_hot(known % 2048, 2048).float()[:, logits_to_keep]

    model.lm_head = SimpleNamespace(weight=torch.zeros(()))
    return model


def test_passkeys_are_counted_by_their_depth():
    """So many in each bin of the filler, held-out ones. A key is retrieved when every token of the
    answer is the arg max."""
    for wrong, accuracy in ((-1, 0.0), (-2, 0.0), (-9, 1.0)):
        found = evaluation.passkey(oracle(lambda text: wrong), TOKENIZER, 100, 5)
        assert found["accuracy"] == accuracy and found["by_depth"] == [accuracy]
    seen = []

    def deep(text):
        key, before, behind = parsed_prompt(text)
        seen.append((len(before) / len(before + behind), len(before) % 10, key % 10))
        return -1 if seen[-1][0] > 0.4 else -9

    found = evaluation.passkey(oracle(deep), TOKENIZER, 300, trials=6, depths=5)
    assert found["by_depth"] == [1, 1, 0, 0, 0] and (found["trials"], found["accuracy"]) == (30, .4)
    for i, (depth, *digits) in enumerate(sorted(seen)):
        assert i // 6 - 0.05 <= 5 * depth <= i // 6 + 1.05 and digits == [3, 3]


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 1}, {"rope_scaling": {
    "rope_type": "linear", "factor": 4.0}}], ids=["grouped heads", "one kv head", "interpolated"])
def test_generating_with_a_cache_is_generating_without(shape, monkeypatch):
    """Token for token; the prompt is read in chunks of PREFILL, and no token is read twice."""
    model, seen = tiny(max_position_embeddings=64, **shape), []
    prompt = TOKENS[0, :17].tolist()
    expected = list(prompt)
    for _ in range(40):
        expected.append(model(torch.tensor([expected]))[0, -1].argmax().item())
    model.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for prefill in (1024, 7, 3):
        monkeypatch.setattr(evaluation, "PREFILL", prefill)
        seen.clear()
        ids = evaluation.generate(model, prompt, 40, torch.float32, set())
        assert [*prompt, *ids] == expected
        assert seen == [len(part) for part in torch.arange(17).split(prefill)] + [1] * 39


def test_generation_is_that_of_transformers(tmp_path, monkeypatch):
    """200 tokens of a Llama that was interpolated."""
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(evaluation, "PREFILL", 16)
    model = longlora.load_model(TINY_LLAMA, torch.float32)
    model.extend(400)
    longlora.save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    theirs.generation_config.eos_token_id = None
    prompt = [1, *TOKENIZER.encode("def f(x):\n    return x * 2\n\n\nclass A:\n" * 5)]
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=200)[0]
    got = [*prompt, *evaluation.generate(model, prompt, 200, torch.float32, set())]
    assert got == expected.tolist() and len(got) == len(prompt) + 200


def test_generation_ends_at_a_stop_token_and_with_the_window():
    def generated(n, new=99, stop=()):  # after n tokens, in a window of 16
        ids = evaluation.generate(tiny(), TOKENS[0, :n].tolist(), new, torch.float32, set(stop))
        return list(ids)

    whole = generated(6)
    assert len(whole) == 10 and generated(6, 4) == whole[:4] and len(generated(15)) == 1
    assert all(generated(6, 99, [id, 64]) == whole[:whole.index(id)] for id in whole)
    for n in (0, 16, 17):
        with pytest.raises(ValueError, match=f"has {n} tokens, and the model reads 1 to 16"):
            generated(n)
    for eos, stop in ((None, {2}), (7, {2, 7}), ([2, 7, 9], {2, 7, 9})):
        assert evaluation.stop_ids(tiny(eos_token_id=eos), TOKENIZER) == stop


@torch.no_grad()
def test_tokens_are_drawn_from_the_likeliest_that_have_the_share():
    """As often as each one's share says; a seed gives one text, another another."""
    model, prompt = tiny(max_position_embeddings=64), TOKENS[0, :9].tolist()

    def drawn(n, top_p, seed):
        return list(evaluation.generate(model, prompt, n, torch.float32, set(), 0.5, top_p, seed))

    for top_p in (0, 0.4, 0.6, 0.9999):
        p, order = (model(TOKENS[:1, :9])[0, -1] / 0.5).softmax(-1).sort(descending=True)
        n = next(n for n in range(1, 65) if p[:n].sum() >= top_p)  # the fewest that have the share
        shares = dict(zip(order[:n].tolist(), (p[:n] / p[:n].sum()).tolist()))
        ids = [drawn(1, top_p, seed)[0] for seed in range(150)]
        often = {id for id, share in shares.items() if share > 0.05}
        assert often <= set(ids) <= shares.keys() and (len(often) > 1) == (top_p > 0)
        assert all(abs(ids.count(id) / 150 - share) < 0.12 for id, share in shares.items())
    text = drawn(40, 0.6, 5)
    assert text == drawn(40, 0.6, 5) != drawn(40, 0.6, 6)


TEXT, QUESTION = "def naïve(☃):\n  # 🎉", ["--question", "Who?"]


@pytest.mark.parametrize("given", [["--prompt", TEXT], ["--file", "text", *QUESTION], QUESTION])
def test_generate_reads_a_text_and_streams_its_end(given, folder, evaluate, monkeypatch, capfd):
    """A question is put as the paper's chat models read it; no half characters are written."""
    answer, calls, shown = " naïve ☃ 🎉🎉 end", [], []
    asked = f"[INST]{TEXT}\nWho?[/INST]" if "Who?" in given else TEXT
    prompt, whole = (TOKENIZER.encode(x) for x in (asked, asked + answer))

    def generate(model, *how):
        calls.append(how)
        for id in whole[len(prompt):]:
            yield id
            shown.append(capfd.readouterr().out)

    (folder / "text").write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", (folder / "text").open(encoding="utf-8"))
    monkeypatch.setattr(evaluation, "generate", generate)
    row, = evaluate("generate", *given, *"--temperature 1.5 --top-p 0.7 --seed 5 --dtype float32 "
                    "--model reader".split())
    assert calls == [([1, *prompt], 512, torch.float32, {2}, 1.5, 0.7, 5)]
    assert "".join(shown) == answer == row["text"] and {" ", "ï", "☃", "🎉"} <= set(shown)
    assert (row["prompt_tokens"], row["tokens"]) == (1 + len(prompt), len(whole) - len(prompt))


def test_answers_are_exact_where_greedy_text_is():
    """And their perplexity is that of their tokens; by powers of two of the length."""
    model, rng = tiny(max_position_embeddings=128), np.random.default_rng(0)
    tokens, places, expected = [], [], []

    def greedy(prompt, n):
        return list(evaluation.generate(model, prompt, n, torch.float32, set()))

    for i in range(30):
        prompt, answer = (rng.integers(3, 64, rng.integers(*most)).tolist()
                          for most in ((2, 90), (1, 9)))
        if i % 3 == 0:  # every third answer becomes what the model says
            answer = greedy(prompt, len(answer))
        ids = prompt + answer
        places.append((len(tokens), len(prompt), len(ids)))
        tokens += ids
        losses = F.cross_entropy(model(torch.tensor([ids]))[0, len(prompt) - 1:-1],
                                 torch.tensor(answer), reduction="none").tolist()
        most = 2 ** math.ceil(math.log2(len(ids)))
        expected.append((most, greedy(prompt, len(answer)) == answer, losses))
    rows = evaluation.answers(model, prepare.Samples(np.array(tokens), np.array(places), 100))
    assert [row["tokens"] for row in rows] == [*sorted({most for most, *_ in expected}), None]
    for row in rows:
        _, exact, losses = zip(*(x for x in expected if row["tokens"] in (None, x[0])))
        assert row["samples"] == len(exact) and row["exact_match"] == pytest.approx(np.mean(exact))
        assert row["perplexity"] == pytest.approx(np.exp(np.mean(sum(losses, []))), rel=1e-5)
    assert 0.3 < rows[-1]["exact_match"] < 0.5


ANSWERS_TO_TOPICS = [  # an answer, the topics, and whether it names the first and no other
    ("\n It was The Art of Bread. ", ["the art of BREAD", "sleep"], True), ("", ["sleep"], False),
    ("sleep, then Bread", ["sleep", "bread"], False), ("sleep, bread", ["bread"], True),
    ("the art of x", ["the art of x", "x"], True), ("the art of x", ["x", "the art of x"], False),
    ("sleep\nand bread", ["bread"], False)]


def test_topics_are_counted_by_their_number(evaluate, folder, monkeypatch):
    """LongChat's records, in which U+2028 ends no line; other records are refused by line."""
    def generate(model, prompt, *_):
        i = re.fullmatch("{}\\[INST]case\u2028(.)\\[/INST]", TOKENIZER.decode(prompt))[1]
        return iter(TOKENIZER.encode(ANSWERS_TO_TOPICS[int(i)][0]))

    def topics(*lines):
        (folder / "cases").write_text("\n\n".join(lines), encoding="utf-8")
        return evaluate(*"topics --model reader --file cases --template".split(),
                        "{}[INST]{prompt}[/INST]")

    monkeypatch.setattr(evaluation, "generate", generate)
    cases = [json.dumps({"prompt": f"case\u2028{i}", "topics": asked, "test_id": i},
                        ensure_ascii=False) for i, (_, asked, _) in enumerate(ANSWERS_TO_TOPICS)]
    for row, n in zip(topics(*cases), (1, 2), strict=True):
        right = [named for _, asked, named in ANSWERS_TO_TOPICS if len(asked) == n]
        assert (row["topics"], row["cases"]) == (n, len(right))
        assert row["accuracy"] == pytest.approx(np.mean(right))
    for bad in ("5", '{"prompt": "x", "topics": []}', '{"prompt": 5, "topics": ["x"]}'):
        with pytest.raises(ValueError, match="cases, line 3"):
            topics(cases[0], bad, cases[1])


def evaluated():
    """Perplexity in 1 and in 11 batches, 5 passkeys, and 3 answers."""
    tokens, numbers = TOKENS.flatten().numpy(), []
    for n in (12, 128):
        *found, by_position = evaluation.perplexity(tiny(), tokens[:n], 12, bins=2)
        numbers += [*found, *by_position]
    model = oracle(lambda text: -9 if parsed_prompt(text)[0] % 4 == 1 else -1)
    found = evaluation.passkey(model, TOKENIZER, 300, 1, 5)
    numbers += [*found.pop("by_depth"), *found.values()]
    samples = prepare.Samples(tokens, np.array([(0, 9, 12), (12, 9, 14), (26, 3, 9)]), 16)
    for row in evaluation.answers(tiny(), samples):
        numbers += row.values()
    return np.array(numbers, float)  # None: NaN


def worker(rank, store, one):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    evaluation.BATCH_TOKENS = 24
    np.testing.assert_allclose(evaluated(), one, rtol=1e-6)
    evaluation.destroy_distributed()


def test_processes_evaluate_as_one_does(tmp_path, monkeypatch):
    """All of them get the numbers of one process, also where they cannot share evenly."""
    monkeypatch.setattr(evaluation, "BATCH_TOKENS", 24)
    torch.multiprocessing.spawn(worker, (tmp_path / "store", evaluated()), 2)


def test_a_4_bit_model_is_evaluated_with_an_adapter(folder, evaluate, tmp_path):
    """As one that is quantised by hand, before the adapter comes."""
    longlora.save_adapter(lora_model(), tmp_path)
    words = ("perplexity --model model --data tokens.bin --max-tokens 64 --context 16 --dtype "
             f"float32 --adapter {tmp_path}").split()
    found, plain = (evaluate(*words, *more)[0]["perplexity"]
                    for more in (["--quantize", "nf4"], []))
    longlora.quantize(by_hand := tiny(), torch.float32)
    load_adapter(by_hand, tmp_path)
    tokens = np.fromfile(folder / "tokens.bin", np.uint16)[:64]
    assert found == pytest.approx(evaluation.perplexity(by_hand, tokens, 16).value)
    assert abs(found / plain - 1) > 1e-3


BAD_EVAL_INPUT = {
    "perplexity --model model --data tokens.bin --context 16": """--adapter nowhere
        | --adapter model | --data half.bin | --model nowhere | --data short.bin --context 64
        | --data beyond.bin | --context 16,x | --context 1 | --stride 16 | --attention shifted
        | --attention local --group-size 7 | --max-tokens 15 | --rope yarn | --protocol x
        | --json nowhere/x""",
    "passkey --model reader": """--model model | --length 9 | --length 64,0 | --plot nowhere/x.png
        | --plot x.pdf | --depths 0 | --seed -1""",
    "answers --model reader --data questions.json": """--data nowhere.json | --data stdlib
        | --data tokens.bin | --data model | --context 1 | --max-tokens 1 | --model model""",
    "topics --model reader": """--file nowhere | --file tokens.bin | --file topics.jsonl
        | --file topics.jsonl --template {0} | --file topics.jsonl --model model""",
    "generate --model reader --prompt x": """--file tokens.bin | --top-p nan | --temperature -1
        | --max-new-tokens 0 | --model model | WORLD_SIZE=2""",
    "generate --model reader": "--file nowhere | --file model | --file tokens.bin",
    "bench": """--shape 9b | --model nowhere | --context 0,64 | --trainable head | --group-size 7
        | --device cuda CUDA_VISIBLE_DEVICES=""",
    "paper": "--only 6", "": ""}


@pytest.mark.parametrize("command, bad", [
    (command, case.strip()) for command, cases in BAD_EVAL_INPUT.items()
    for case in cases.split("|")])
def test_bad_input_of_eval_is_one_line_and_exit_status_2(command, bad, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    words = [*command.split(), *bad.split()]
    for variable, value in (word.split("=") for word in words if "=" in word):
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(sys, "argv", ["eval.py", *(word for word in words if "=" not in word)])
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as error:
        runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
    lines = [line.rpartition("\r")[2] for line in capfd.readouterr().err[:-1].split("\n")]
    lines = [line for line in lines if not re.match("usage:|  ", line)]  # argparse's
    assert error.value.code == 2 and len(lines) == 1 and ": error: " in lines[0], lines
    assert sorted(folder.rglob("*")) == before


def test_forward_flops_are_the_papers(evaluate):
    rows = evaluate(*"bench --flops --shape 7b --context 8192,16384,32768,65536".split())
    full, shifted = ([row[name] for row in rows] for name in ("full_tflop", "shifted_tflop"))
    assert full == pytest.approx([143.5, 357.2, 996.0, 3118.0], rel=0.001)
    assert shifted == pytest.approx([117.1, 251.7, 573.8, 1429.1], rel=0.001)


@pytest.mark.parametrize("trainable", ["lora,embed,norm", "full"])
@pytest.mark.parametrize("saver", [None, "checkpointing", "offload"])
def test_step_flops_are_those_of_its_matrix_products(saver, trainable):
    """Counted by hand: layers C -> H D, H_kv D, I; a query sees half of its group."""
    config, T, G, r = tiny(num_hidden_layers=5).config, 64, 16, 3
    full, (C, I, V, L, HD, KD) = trainable == "full", (32, 48, 64, 5, 32, 16)
    layers, head = L * (2 * C * HD + 2 * C * KD + 3 * C * I), C * V
    lora = 0 if full else L * r * ((C + HD) * 2 + (C + KD) * 2)
    flops = 2 * 2 * (layers + lora + head)  # forward, and gradients of inputs
    flops += 2 * (layers + head) if full else 2 * lora  # gradients of weights
    flops += 2 * head if full else 0  # chunked_loss computes the logits again
    again = {None: 0, "checkpointing": L - 1, "offload": L}[saver]  # attention blocks
    if saver:  # all again but each block's last product, whose output nothing needs
        flops += 2 * (again * ((layers + lora) // L - 3 * C * I - C * HD) + L * 2 * C * I)
    flops += HD * G * (7 * L + 2 * again)  # products of half a square of groups
    found = evaluation.step_flops(config, T, {"group_size": G, "shift": False}, trainable, r,
                                  saver == "checkpointing", saver == "offload")
    assert found == pytest.approx(flops * T, rel=1e-9)


def test_bench_goes_on_after_a_row_that_runs_out_of_memory(evaluate, capfd, monkeypatch):
    """Rows in ascending order, whose figures agree with each other. Other errors are raised."""
    loss, seen = longlora.chunked_loss, []
    error = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"

    def fail(x, *rest):
        seen.append(x.shape[1])
        if x.shape[1] == 48:
            raise RuntimeError(error)
        return loss(x, *rest)

    monkeypatch.setattr(longlora, "chunked_loss", fail)
    flags = ("bench --model model --context 64,40,48 --steps 2 --device cpu --rank 2 --offload "
             "--trainable lora,embed --dtype float32").split()
    rows = evaluate(*flags)
    assert [(row["context"], row.get("error")) for row in rows] == [
        (40, None), (48, "out of memory"), (64, None)]
    assert seen == [40, 40, 40, 48, 64, 64, 64]  # one to warm up, two timed
    for row in rows[::2]:
        assert row["tokens_per_s"] * row["seconds"] == pytest.approx(row["context"])
        assert row["peak_memory_bytes"] > 1 << 20 and row["reserved_memory_bytes"] is None
        assert 0 < row["matmul_share"] < 2 and row["flops_per_token"] > 1e5
    assert re.search(r"\n +48 tokens: out of memory\n +64 tokens: \d", capfd.readouterr().out)
    error = "a defect"
    with pytest.raises(RuntimeError, match="a defect"):
        evaluate(*flags)


def test_the_paper_makes_each_run_once_and_prints_means_with_their_spread(evaluate, tmp_path,
                                                                          monkeypatch, capsys):
    calls, status = [], 0

    def fake(words):
        """Perplexity: 10 by full attention, 20 as trained, plus the seed."""
        calls.append(words)
        value = dict(zip(words, words[1:]))
        path = Path(value.get("--json") or f"{value['--out']}/results.json")
        seed = int(value.get("--adapter", value.get("--model", "seed-0"))[-1])
        bins = {f"bin {i}": 3.0 for i in range(1, 33)}
        rows = [{"context": int(n), "perplexity": (20.0 if "--attention" in words else 10.0) + seed,
                 "length": int(n), "accuracy": 0.5, "by_depth": [0.0, 1.0], **bins}
                for n in (value.get("--length") or value.get("--context", "2048")).split(",")]
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"rows": rows}))
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(evaluation, "subprocess", SimpleNamespace(run=fake))
    rows = evaluate("paper", "--out", tmp_path)
    printed, trained = capsys.readouterr().out, [x for x in calls if x[1].endswith("train.py")]
    assert len(trained) == 9 + 5 * 3 + 3 + 4  # LoRA+ is shared by five tables
    assert len({str(words) for words in calls}) == len(calls)
    for line in (r"S2-Attn( +12.00 ± 1.00){4} +22.00 ± 1.00 +8.12 +8.64", "stretched( +0.50){6}",
                 "base( +10.00){4} +-"):
        assert re.search(rf"\b{line}\n", printed)
    assert {(row["variant"], row["seed"], row["2048"]) for row in rows if row["table"] == 2} == {
        (name, seed, 10 + seed) for name in evaluation.VARIANTS[2] for seed in (1, 2, 3)}
    calls.clear()
    rows = evaluate("paper", "--out", tmp_path, "--only", "5,1")
    assert not calls and {row["table"] for row in rows} == {1, 5}
    status = 2
    shutil.rmtree(tmp_path / "seed-1")
    with pytest.raises(ValueError, match="train.py .* ended with status 2"):
        evaluate("paper", "--out", tmp_path, "--only", 3)


def test_figures_are_drawn_and_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    cells = [{"length": n, "by_depth": [0.0, 0.4, 1.0]} for n in (128, 256)]
    curve = {"base": ([8, 9], [3.0, 90.0], [1, None])}
    for path in (tmp_path / "figure.png", tmp_path / "figure.svg"):
        for draw in (lambda: evaluation.plot_heatmaps(path, {"base": cells, "extended": cells[:1]}),
                     lambda: evaluation.plot_curves(path, curve),
                     lambda: evaluation.plot_positions(path, {"local": [3.0, 4.0]}, 8, 4)):
            draw()
            first = path.read_bytes()
            draw()
            assert path.read_bytes() == first and len(first) > 5000
    assert len(list(tmp_path.iterdir())) == 2  # nothing beside them


# ==================================================================================================
# train.py
# ==================================================================================================

# train.py, as a user runs it in a folder of small and of broken files -----------------------------

# Later flags win: a test adds its own. ASK: on instructions.
RUN = ("--model model --data tokens.bin --context 64 --batch-size 2 --warmup 1 --lr 0.01 --rank 2 "
       "--micro-batch 1 --dtype float32 --eval-tokens 200 --save-every 3 --steps 7").split()
ASK = "--model reader --data questions.bin"
ASK_7 = [*ASK.split(), "--context", "60", "--batch-size", "7"]


@pytest.fixture(autouse=True)
def without_gpu(request, monkeypatch):
    """A test that needs no GPU sees none, in this process and in those that it starts."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(evaluation, "default_device", lambda: torch.device("cpu"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Inside a folder of models (reader: with a tokenizer), token files and instructions."""
    root = tmp_path_factory.mktemp("train")
    os.chdir(root)
    for name in ("model", "broken", "no-json"):
        longlora.save_model(tiny(), name)
    os.truncate("broken/model.safetensors", 1000)
    Path("no-json/config.json").write_text("{")
    longlora.save_model(tiny(num_attention_heads=1, num_key_value_heads=1), "odd")
    longlora.save_model(tiny(vocab_size=2048, max_position_embeddings=4096), "reader")
    shutil.copy(TINY_LLAMA / "tokenizer.model", "reader")
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 64, 6000)
    for name, ids in {"tokens": tokens, "short": tokens[:50], "beyond": tokens + 1,
                      "counting": np.arange(3, 2003), "test": tokens[5700:5900]}.items():
        ids.astype(np.uint16).tofile(f"{name}.bin")
    Path("half.bin").write_bytes(b"123")
    text = prepare.FILLER
    Path("a.txt").write_text(text * 60)
    records = [json.dumps({"instruction": text[i:j], "output": text[j:k] or "x"})
               for i, j, k in np.sort(rng.integers(120, size=(60, 3)))]
    Path("questions.jsonl").write_text("\n".join(records))
    Path("bad.jsonl").write_text(records[0] + "\n{")
    prepare.write_samples([Path("questions.jsonl")], TOKENIZER, Path("questions.bin"))
    yield root
    os.chdir(ROOT)


@pytest.fixture
def command(files, monkeypatch, capfd):
    """Run train.py in this process: its exit status, and what it wrote to stdout and stderr."""
    def run(*arguments, script="train.py"):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        status, handler = 0, signal.getsignal(signal.SIGINT)
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as error:
            status = error.code
        signal.signal(signal.SIGINT, handler)
        return status, *capfd.readouterr()

    return run


def opened(*flags):
    """The data as train.py opens them; their .args are the settings that it fills in."""
    args = train.parse_args(list(map(str, flags)))
    model = longlora.load_model(args.model)
    train.fill_defaults(args, model)
    kind = train.Instructions if prepare.is_instructions(args.data) else train.Corpus
    return kind(args, model.config)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same(out, expected, loss=0.0, norm=0.0):
    """Two runs, bit for bit, or within relative errors of losses, and of gradients and weights."""
    for name, error in ("loss", loss), ("grad_norm", norm), ("lr", 0):
        found, wanted = ([line[name] for line in log(run)] for run in (out, expected))
        np.testing.assert_allclose(found, wanted, rtol=error)
    found, wanted = (dict(longlora.read_tensors(next(run.glob("*model.safetensors"))))
                     for run in (out, expected))
    error = torch.stack([(found[name] - w).norm() for name, w in wanted.items()]).norm()
    assert error <= norm * torch.stack([w.norm() for w in wanted.values()]).norm()


def test_a_batch_is_a_function_of_seed_and_step(files):
    """Slices of the training tokens; a share of them, no more, opens with a passkey document."""
    def batch(step, *flags):
        data = opened("--model", "reader", "--data", "counting.bin", "--context", 20,
                      "--batch-size", 6, "--eval-tokens", 0, *flags)
        rows = np.array([np.append(x.tokens[:1], x.targets) for x in data.sequences(step)])
        assert all(np.array_equal(x.tokens, row[:-1]) for x, row in zip(data.sequences(step), rows))
        return rows

    rows = batch(7)
    assert rows.shape == (6, 21) and (np.diff(rows) == 1).all() and len(np.unique(rows[:, 0])) > 1
    assert np.array_equal(rows, batch(7, "--micro-batch", 3))
    assert not np.array_equal(rows, batch(8)) and not np.array_equal(rows, batch(7, "--seed", 1))
    assert batch(0, "--batch-size", 9999).max() == 1802  # the last 200 tokens are held out
    for share in (0, 0.3, 1):
        rows = batch(0, "--context", 160, "--batch-size", 200, "--passkey", share)
        assert abs((rows[:, 0] == TOKENIZER.bos_id).mean() - share) < 0.1


def test_passkeys_stand_beside_perplexity_where_training_reads_them(files, monkeypatch):
    """Of 20 prompts at each length of the table that is long enough for one."""
    flags = "--model reader --data tokens.bin --context 200 --eval-tokens 300".split()
    model = longlora.load_model("reader", torch.float32)
    for share, expected in (("0", {"perplexity"}), ("0.5", {"perplexity", "passkey"})):
        data = opened(*flags, "--passkey", share)
        data.contexts, asked = [64, 150, 200], []
        monkeypatch.setattr(train, "passkey", lambda model, tokenizer, length, trials, depths,
                            dtype: asked.append((length, trials * depths)) or {"accuracy": 0.25})
        found = data.measure(model, torch.float32)
        assert found.keys() == expected and found["perplexity"].keys() == {"64", "150", "200"}
        assert asked == ([(150, 20), (200, 20)] if "passkey" in found else [])
        text = data.table({metric: {"base": row} for metric, row in found.items()})
        assert text.count("base") == len(expected)
        assert ("nan      0.25      0.25" in text) == ("passkey" in found)


def test_learning_rate_rises_stays_and_falls():
    args = train.parse_args("--lr 2 --warmup 4 --steps 12 --decay 0.5".split())
    expected = [0.5, 1, 1.5, 2, 2, 2, 2, 10 / 6, 8 / 6, 1, 4 / 6, 2 / 6]
    assert [train.learning_rate(args, step) for step in range(12)] == pytest.approx(expected)


@pytest.mark.parametrize("window, flags, expected", [
    (16, "", {"steps": 240, "batch_size": 2, "lr": 1e-3, "cooldown": 1, "rank": 8, "context": 128,
              "group_size": 32, "micro_batch": 16, "passkey": 0.1, "rope": "yarn"}),
    (4096, "--data x.bin", {"steps": 1000, "batch_size": 64, "lr": 2e-5, "cooldown": 0, "rank": 8,
                            "context": 32768, "group_size": 8192, "micro_batch": 1, "passkey": 0,
                            "rope": "linear"}),
    (4096, "--data stdlib-questions --lr 0", {"steps": None, "epochs": 5, "context": 4096, "lr": 0,
                                              "group_size": None, "eval_tokens": 128 * 4096})])
def test_defaults_follow_the_models_size(window, flags, expected):
    """Of a tiny model and of Llama-2-7B; what is given stays."""
    args = train.parse_args(flags.split())
    with torch.device("meta"):
        train.fill_defaults(args, tiny() if window == 16 else Llama(LlamaConfig()))
    assert {name: getattr(args, name) for name in expected} == expected


def test_train_and_eval_as_a_user_runs_them(files, tmp_path):
    """In processes of their own: the files, the log, and a table that eval.py confirms."""
    def run(script, *words):
        return subprocess.check_output([sys.executable, ROOT / script, *words], text=True)

    out, rows = tmp_path / "out", tmp_path / "rows.json"
    assert f"--adapter {out}" in run("train.py", *RUN, "--out", out)
    assert set(os.listdir(out)) == {"adapter_config.json", "adapter_model.safetensors",
                                    "longlora.json", "log.jsonl", "results.json", "checkpoints"}
    assert [(x["step"], x["tokens"]) for x in log(out)] == [(n, n * 2 * 64) for n in range(1, 8)]
    model, batch = tiny(), opened(*RUN).sequences(0)
    model.extend(64, "yarn")  # the first loss is the interpolated base's, in groups of a quarter
    loss = model(*(torch.tensor(np.array([x[i] for x in batch])) for i in (0, 1)), 16).item()
    assert log(out)[0]["loss"] == pytest.approx(loss, rel=1e-5)
    run("eval.py", "perplexity", "--model", "model", "--adapter", out, "--data", "test.bin",
        "--context", "16,32,64", "--dtype", "float32", "--json", rows)
    found = {str(row["context"]): row["perplexity"] for row in longlora.read_json(rows)["rows"]}
    table = longlora.read_json(out / "results.json")["perplexity"]
    assert list(table) == ["base", "interpolated", "extended"]
    assert table["extended"] == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("end, says, steps, more", [
    ("Ctrl-C", "--resume continues", 5, "--attention local"), ("NaN", "norm nan", 4, ""),
    ("crash", "crash", 4, "--init random --trainable full --context 16 --attention full"),
    ("crash", "crash", 4, f"{ASK} --epochs 0.25"),
    pytest.param("crash", "crash", 4, "--offload --quantize nf4 --dtype bfloat16", marks=CUDA)])
def test_a_resumed_run_is_the_whole_run(end, says, steps, more, tmp_path, monkeypatch, command):
    """Bit for bit on a CPU. Ctrl-C in step 5 saves; a crash or a NaN leaves the save of step 3."""
    whole, parts, calls, clip = tmp_path / "1", tmp_path / "2", [], torch.nn.utils.clip_grad_norm_

    def fifth_ends(*arguments):
        calls.append(arguments)
        if len(calls) == 5 and end == "crash":
            sys.exit("crash")
        if len(calls) == 5 and end == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        return clip(*arguments) * (math.nan if len(calls) == 5 and end == "NaN" else 1)

    def run(out, *flags):
        words = RUN[:-2] if "--epochs" in more else RUN  # 7 steps either way
        return command(*words, *more.split(), "--out", out, *flags)

    assert run(whole)[0] == 0 and len(log(whole)) == 7
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", fifth_ends)
        assert says in run(parts)[0] and len(log(parts)) == steps
    same = (0, 0) if evaluation.default_device().type == "cpu" else (1e-3, 1e-2)  # atomic sums
    for _ in range(2):  # the second time it is finished
        assert run(parts, "--resume")[0] == 0
        assert_same(parts, whole, *same)
    assert "--resume continues it" in run(parts)[2]
    assert "--seed 0, not 1" in run(parts, "--resume", "--seed", 1)[2]
    assert_same(parts, whole, *same)
    assert run(parts, "--overwrite", "--seed", 1)[0] == 0
    assert len(log(parts)) == 7 and log(parts)[0]["loss"] != log(whole)[0]["loss"]


BAD_INPUT = f"""--model nowhere | --model broken | --model no-json | --data nowhere.bin
    | --data beyond.bin | --data half.bin | --data short.bin | --data model | --group-size 7
    | --lr nan | --trainable lora,head | --attention x | --out tokens.bin | --passkey 0.1
    | --overwrite --out model | --resume --overwrite | --context-parallel 2 | --epochs 2
    | --out odd | --overwrite --out odd | --resume --out odd | --model odd --attention shifted
    | --context 400 --eval-every 1 | --trainable full --quantize nf4 | --batch-size 0 | --steps 1.5
    | --plan --model nowhere | --plan --gpus 3 --context-parallel 2 | {ASK} --passkey 0.1
    | --plan --gpus 3 --context-parallel 3 | --plan --gpus 2 --context-parallel 2 --attention full
    | --timeout 0 | --rank 1000 | --seed {1 << 63}
    | {ASK} --group-size 7 | {ASK} --context 2 | {ASK} --eval-tokens 9 | {ASK} --data bad.jsonl"""


@pytest.mark.parametrize("bad", [case.strip() for case in BAD_INPUT.split("|")])
def test_bad_input_is_one_line_and_exit_status_2(bad, files, command):
    """The line names the flag or the value. Nothing is written, and no model is overwritten."""
    def contents():
        return {path: path.is_file() and path.read_bytes() for path in files.rglob("*")}

    before = contents()
    status, _, err = command(*RUN, *bad.split())
    # A terminal shows what stands behind the last \r: of a bar nothing. argparse adds its usage.
    lines = [line.rpartition("\r")[2] for line in err.removesuffix("\n").split("\n")]
    line, = (line for line in lines if not re.match("usage:|  ", line))
    assert status == 2 and line.startswith("train.py: error: ")
    assert any(word in line for word in bad.split()[-2:]), line
    assert contents() == before


def test_an_epoch_reads_every_sample_once_in_an_order_of_its_own(files):
    data, other = opened(*ASK_7), opened(*ASK_7, "--seed", 1)
    N = data.samples
    orders = [data.order(i * N, (i + 1) * N) for i in range(3)]
    assert all(sorted(order) == list(range(N)) for order in orders)
    assert len({tuple(order) for order in [*orders, other.order(0, N)]}) == 4
    drawn = np.concatenate(orders)
    for step in range(3 * N // 7):
        assert np.array_equal(data.order(step * 7, step * 7 + 7), drawn[step * 7:step * 7 + 7])
        read = [len(sequence.tokens) for sequence in data.sequences(step)]
        assert read == list(data.train.lengths[drawn[step * 7:step * 7 + 7]])
    held_out = {tuple(part[i][0]) for part in (data.valid, data.test) for i in range(len(part))}
    assert held_out and not held_out & {tuple(data.train[i][0]) for i in range(N)}


@pytest.mark.parametrize("attention, G", [("full", None), ("shifted", None), ("local", 6)])
def test_the_loss_of_a_step_is_that_of_its_samples_one_by_one(attention, G, files):
    """Over all answer tokens, not a mean of means, and its gradients; G is a quarter of each."""
    data = opened(*ASK_7, "--attention", attention, "--grad-clip", 1e9,
                  *(["--group-size", G] if G else []))
    for step in range(2):
        model, reference, sums, count = tiny(vocab_size=2048), tiny(vocab_size=2048), 0, 0
        longlora.set_trainable(model, "embed,norm")
        for i in data.order(step * 7, step * 7 + 7):
            ids, labels = (torch.from_numpy(x) for x in data.train[i])
            groups = None if attention == "full" else G or 2 * math.ceil(len(ids) / 8)
            logits = reference(ids[None, :-1], None, groups, attention == "shifted")
            sums = sums + F.cross_entropy(logits[0], labels[1:], reduction="sum")
            count += (labels != -100).sum()
        (sums / count).backward()
        pairs = [(p, old) for p, old in zip(model.parameters(), reference.parameters())
                 if p.requires_grad]
        optimizer = torch.optim.SGD([p for p, _ in pairs], lr=1.0)  # subtracts the gradient
        loss, norm = train.optimizer_step(data.args, model, optimizer, data.sequences(step),
                                          train.Parallel(), torch.float32)
        assert loss == pytest.approx((sums / count).item(), rel=1e-5)
        total = torch.stack([old.grad.norm() for _, old in pairs]).norm().item()
        assert norm == pytest.approx(total, rel=1e-5)
        for p, old in pairs:
            torch.testing.assert_close(p, old - old.grad, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n, more", [(8, []), (2, ["--group-size", 64])])
def test_samples_of_fewer_groups_than_processes_are_refused(n, more, files):
    with pytest.raises(ValueError, match="a sample of .* tokens has only . groups of "):
        opened(*ASK_7, *more, "--context-parallel", n)


@pytest.mark.parametrize("data", ["questions.jsonl", "a.txt"])
def test_data_train_as_the_token_file_that_is_made_of_them(data, command, tmp_path, monkeypatch):
    """Here with a folder that has a tokenizer.json and no tokenizer.model."""
    monkeypatch.setattr(prepare, "CACHE", tmp_path / "cache")
    longlora.save_model(tiny(vocab_size=2048, max_position_embeddings=64), llama := tmp_path / "x")
    tokenizer = pytest.importorskip("tokenizers").ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([prepare.FILLER], 300, special_tokens=["?", "<s>", "</s>"])
    tokenizer.save(str(llama / "tokenizer.json"))
    made, out = tmp_path / "made.bin", [tmp_path / "1", tmp_path / "2"]
    prepared = command(data, "--tokenizer", llama, "--out", made, script="data/prepare.py")
    assert prepared[0] == 0
    for path, folder in zip((data, made), out):
        assert command(*RUN, "--model", llama, "--data", path, "--out", folder)[0] == 0
    assert_same(*out)


# Several processes, and runs that survive ---------------------------------------------------------


def as_rank(rank, size, port, function, arguments):
    """Call `function` as in one of torchrun's processes."""
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{size}",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
    function(*arguments)
    evaluation.destroy_distributed()


def spawn(size, function, *arguments, kill_after=None):
    """Call `function` in `size` processes; raises an error if one fails. They are forked from one
    that has imported everything, so that they start at once."""
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # which that one imports from
    multiprocessing.set_forkserver_preload([__name__])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = torch.multiprocessing.start_processes(
        as_rank, (size, port, function, arguments), size, False, start_method="forkserver")
    if kill_after is not None:
        time.sleep(kill_after)
        context.processes[0].kill()
        context.processes[0].join()
    while kill_after is None and not context.join():
        pass


def training(folder, *arguments):
    """train.py; what it says goes to a file beside --out."""
    os.chdir(folder)
    sys.argv = ["train.py", *RUN, "--out", *map(str, arguments)]
    sys.stdout = sys.stderr = open(f"{arguments[0]}.txt", "a")
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


def exchange_and_shard(size, *models):
    """S2-Attn on parts of a sequence; then shards of models in mapped files."""
    device = evaluation.init_distributed()
    parallel, sent, batch = train.Parallel.create(size, device), [], dist.batch_isend_irecv

    def counted(works):
        sent.extend(work.tensor.numel() for work in works if work.op is dist.isend)
        return batch(works)

    dist.batch_isend_irecv = counted
    for H, H_kv, T, G in [(4, 4, 48, 8), (4, 2, 192, 8), (6, 3, 96, 16), (4, 2, 9, 4),
                          (4, 1, 17, 4), (4, 2, 14, 6), (4, 2, 41, 8)]:  # the last ones with a rest
        torch.manual_seed(0)
        whole = [torch.randn(2, T, h, 6, requires_grad=True) for h in (H, H_kv, H_kv)]
        expected, weight = shifted_sparse_attention(*whole, G), torch.randn(2, T, H, 6)
        wanted, piece = torch.autograd.grad(expected, whole, weight), parallel.part_of(T, G)
        part = [x[:, piece].detach().requires_grad_() for x in whole]
        sent.clear()
        out = shifted_sparse_attention(*part, G, halo=parallel.kwargs(piece)["halo"])
        numbers = 2 * 2 * (G // 2) * (H if H_kv % 2 else H_kv) // 2 * 6  # keys and values, B = 2
        assert sum(sent) == numbers * (parallel.rank + 1 < size)  # whatever T is
        found = torch.autograd.grad(out, part, weight[:, piece])
        assert sum(sent) == numbers * ((parallel.rank + 1 < size) + (parallel.rank > 0))
        for x, y in zip([out, *found], [expected, *wanted]):
            torch.testing.assert_close(x, y[:, piece], rtol=0, atol=1e-5)

    def own_memory():
        return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    args = train.parse_args(["--rank", "2"])
    for path in models:  # what the libraries allocate once does not count: the last is measured
        before, model = own_memory(), longlora.load_model(path)
        train.prepare_model(model, args, device, torch.bfloat16, parallel)
        held, shards = own_memory() - before, sum(p.to_local().nbytes for p in model.parameters())
    assert held < 1.15 * shards and size * shards < 1.02 * sum(p.nbytes for p in model.parameters())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_processes_send_half_a_group_and_hold_their_shards_alone(files, tmp_path):
    """Context parallelism: attention is that of the whole sequence, in value and gradients."""
    model = tiny(hidden_size=512, intermediate_size=2048, num_hidden_layers=10).bfloat16()
    longlora.save_model(model, tmp_path / "model")
    spawn(3, exchange_and_shard, 3, files / "model", tmp_path / "model")


@pytest.mark.parametrize("size, context_parallel, more", [
    (2, 2, "--micro-batch 2 --checkpointing"), (3, 1, "--trainable full --offload"),
    (4, 2, f"--quantize nf4 {ASK}"), (3, 3, f"--group-size 2 --checkpointing {ASK}")])
def test_processes_give_what_one_gives(size, context_parallel, more, files, tmp_path, command):
    """Of rows that they cannot share evenly; and so does another number that goes on from there."""
    flags = ["--batch-size", 5, "--eval-every", 7, *more.split()]
    flags += [] if ASK in more else ["--group-size", 16]
    one, many = tmp_path / "one", tmp_path / "many"
    assert command(*RUN, "--out", one, *flags)[0] == 0
    spawn(size, training, files, many, *flags, "--context-parallel", context_parallel)
    said = Path(f"{many}.txt").read_text()
    assert said.count("Written to") == said.count(f"on {size} processes") == 1  # one process speaks
    assert_same(many, one, 1e-5, 1e-3)
    for a, b in zip(*(re.findall(r"[\d.]+", (out / "results.json").read_text()) +
                      [log(out)[-1]["held_out_loss"]] for out in (one, many)), strict=True):
        assert float(a) == pytest.approx(float(b), rel=1e-4)
    shutil.rmtree(many / "checkpoints" / "step-0000007")
    first = log(many)[:6]
    spawn(1 if size > 2 else 3, training, files, many, *flags, "--resume")
    assert log(many)[:6] == first  # with its tokens/s: these were not computed again
    assert_same(many, one, 1e-5, 1e-3)


KILLS = int(os.environ.get("KILLS", 3))  # so many here; KILLS=50 pytest -k killed_runs by hand


def saved_steps(out):
    return sorted(int(path.name[5:]) for path in out.glob("checkpoints/step-???????"))


def wait_for_saves(out, processes):
    began = time.monotonic()
    while len(saved_steps(out)) < 2:
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() - began < 120
        time.sleep(0.01)


def test_killed_runs_end_as_if_they_had_not_been(files, tmp_path):
    """kill -9 at a random moment, from before the first save to the end (or, in run 0, before the
    last save has its name), then --resume. One step is lost at most."""
    def train_on(out, *flags, **kill):
        spawn(1, training, files, out, "--save-every", 1, *flags, **kill)

    train_on(tmp_path / "0")  # the first one, so that the processes' server runs
    began, whole, rng = time.monotonic(), tmp_path / "whole", np.random.default_rng(0)
    train_on(whole)
    lasts = time.monotonic() - began
    for kill in range(1 + KILLS):
        out = tmp_path / f"{kill}"
        if kill:
            train_on(out, kill_after=rng.uniform(0.2, 1) * lasts)
        else:
            (out / "checkpoints" / "step-0000007").rename(out / "checkpoints/step-0000007.partial")
            (out / "adapter_model.safetensors.partial").write_text("half")
        before = log(out) if (out / "log.jsonl").exists() else []
        saved = max(saved_steps(out), default=0)
        assert saved >= len(before) - 1
        train_on(out, "--resume")
        assert log(out)[:saved] == before[:saved]  # with its tokens/s: not computed again
        assert_same(out, whole)
        assert saved_steps(out) == [6, 7] and not list(out.rglob("*.partial"))


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux")
def test_torchrun_restarts_a_run_whose_process_was_killed(files, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    flags = ["--save-every", "1", "--resume", "--steps", "20"]
    spawn(2, training, files, whole, *flags)
    torchrun = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "--max-restarts", "2", ROOT / "train.py", *RUN, "--out", out, *flags],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for_saves(out, [torchrun])
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    printed = torchrun.communicate()[0]
    assert torchrun.returncode == 0 and "resuming from" in printed, printed
    assert_same(out, whole)


@pytest.fixture
def two_hosts(files):
    """Network namespaces joined by a cable. Yields a function that starts train.py by a torchrun
    on each, whose output goes to host1.txt and host2.txt beside --out; and one that cuts the
    cable."""
    if os.geteuid() or not shutil.which("ip"):
        pytest.skip("network namespaces need root and iproute2")
    hosts, started = [f"longlora-{os.getpid()}-{host}" for host in (1, 2)], []

    def ip(words):
        subprocess.run(["ip", *words.split()], check=True, capture_output=True, text=True)

    def start(out, *flags, restarts=0):
        started.extend(subprocess.Popen(
            ["ip", "netns", "exec", name, "env", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
             f"GLOO_SOCKET_IFNAME=cable{host}", sys.executable,
             "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.9.8.1:29500", "--local-addr",
             f"10.9.8.{host}", "--rdzv-conf", f"is_host={host % 2},read_timeout=10",
             "--max-restarts", f"{restarts}", ROOT / "train.py", *RUN, "--out", out, *flags],
            stdout=open(out.parent / f"host{host}.txt", "w"), stderr=subprocess.STDOUT, cwd=files)
            for host, name in enumerate(hosts, 1))
        return started

    try:
        for host, name in enumerate(hosts, 1):
            ip(f"netns add {name}")
            ip(f"netns exec {name} ip link set lo up")
        ip(f"link add cable1 netns {hosts[0]} type veth peer name cable2 netns {hosts[1]}")
        for host, name in enumerate(hosts, 1):
            ip(f"netns exec {name} ip addr add 10.9.8.{host}/24 dev cable{host}")
            ip(f"netns exec {name} ip link set cable{host} up")
        yield start, partial(ip, f"netns exec {hosts[0]} ip link set cable1 down")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr}")
    finally:
        for process in started:  # the second may wait for the first one's store, for long
            process.kill()
            process.wait()
        for name in hosts:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def test_a_process_killed_on_the_second_of_two_hosts_is_started_again(files, tmp_path, two_hosts):
    """By both torchruns; the run ends as one process alone would have ended it."""
    start, _ = two_hosts
    one, out, flags = tmp_path / "one", tmp_path / "out", ["--save-every", "1", "--steps", "20"]
    spawn(1, training, files, one, *flags)
    hosts = start(out, *flags, "--resume", restarts=2)
    wait_for_saves(out, hosts)
    children = Path(f"/proc/{hosts[1].pid}/task/{hosts[1].pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    ended, said = [host.wait(120) for host in hosts], (tmp_path / "host1.txt").read_text()
    assert ended == [0, 0] and "resuming from" in said, said
    assert_same(out, one, 1e-5, 1e-3)


def test_a_cable_cut_between_two_hosts_ends_both_and_one_can_go_on(files, tmp_path, two_hosts):
    """Within the time that the run has stated. The two share each sequence."""
    start, cut = two_hosts
    one, out = tmp_path / "one", tmp_path / "out"
    flags = ["--save-every", "1", "--steps", "60", "--group-size", "16"]
    spawn(1, training, files, one, *flags)
    hosts = start(out, *flags, "--context-parallel", "2", "--timeout", "0.25")
    wait_for_saves(out, hosts)
    cut()
    said, began = "", time.monotonic()
    while said.count("stopped: no connection to another process") < 2:
        assert time.monotonic() - began < 90, said
        time.sleep(0.1)
        said = "".join((tmp_path / f"host{host}.txt").read_text() for host in (1, 2))
    assert "2 processes (--timeout 0.25 minutes)" in said
    assert 2 <= len(log(out)) < 60
    spawn(1, training, files, out, *flags, "--resume")
    assert_same(out, one, 1e-5, 1e-3)


def test_an_adapter_trained_in_4_bits_merges_into_the_original(files, tmp_path, command):
    assert command(*RUN, "--quantize", "nf4", "--out", tmp_path / "out")[0] == 0
    longlora.merge("model", tmp_path / "out", tmp_path / "merged")
    longlora.load_adapter(model := tiny(), tmp_path / "out")
    torch.testing.assert_close(longlora.load_model(tmp_path / "merged")(TOKENS), model(TOKENS))


# What the README tells its readers to type --------------------------------------------------------


def readme(heading):
    """The section of that heading."""
    return (ROOT / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("lesson", range(1, 7))
def test_the_readmes_lessons_can_be_followed(lesson, tmp_path, monkeypatch, command):
    """Their changes of longlora.py fit, and their commands run, on a small model."""
    text = readme("Six things to try").split(f"**{lesson}. ")[1].split("\n**")[0]
    change = re.search("```diff\n(.*?)```", text, re.S)
    text = re.sub("```.*```", "", text, flags=re.S)
    commands = re.findall("^    (?:python )?(\\S+) (.*)", text, re.M)
    assert commands
    if change:
        old, new = ("".join(line[1:] for line in change[1].splitlines(True) if line[0] in signs)
                    for signs in (" -", " +"))
        source = (ROOT / "longlora.py").read_text()
        assert source.count(old) == 1
        (tmp_path / "longlora.py").write_text(source.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        for module in ("longlora", "eval"):
            monkeypatch.delitem(sys.modules, module)
    for script, flags in commands:
        if script == "pytest":
            for name in ("train.py", "eval.py", "test_longlora.py", "pytest.ini"):
                shutil.copy(ROOT / name, tmp_path)
            (tmp_path / "data").symlink_to(ROOT / "data")
            run = subprocess.run([sys.executable, "-m", "pytest", *flags.split()], cwd=tmp_path,
                                 capture_output=True, text=True)
            assert "1 failed, 2 passed" in run.stdout  # full attention and local groups are right
        if script in ("pytest", "git"):
            continue
        small = RUN if script == "train.py" else (
            "--model model --data test.bin --context 64 --group-size 16 --stride 64".split())
        assert command(*flags.split(), *small, script=script)[0] == 0
        used = tmp_path if change else ROOT
        assert sys.modules["longlora"].__file__ == str(used / "longlora.py")


def small_llama(path):
    """Of a window of 128 tokens, with a tokenizer; by transformers where it is installed."""
    sizes = {"vocab_size": 2048, "max_position_embeddings": 128}
    if find_spec("transformers"):
        import transformers
        config = transformers.LlamaConfig(
            **sizes, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, torch_dtype="bfloat16")
        transformers.LlamaForCausalLM(config).save_pretrained(path)
    else:
        longlora.save_model(tiny(**sizes), path)
    shutil.copy(TINY_LLAMA / "tokenizer.model", path)


def test_the_readmes_recipes_can_be_followed(files, tmp_path, monkeypatch, command):
    """Every command as printed, but with shorter contexts and fewer steps, on small models."""
    recipes = readme("A model of your own").split("**What fits")[0]
    lines = re.findall("^    python (.*)", recipes, re.M)
    assert len(lines) == 12
    monkeypatch.chdir(tmp_path)
    small_llama("TinyLlama-1.1B")
    small_llama("Llama-2-7b")
    os.mkdir("folder")
    for name in ("book.txt", "folder/a.txt", "another-book.txt", "chapter.txt"):
        Path(name).write_text(prepare.FILLER * (10 if name == "chapter.txt" else 400))
    Path("posts.jsonl").write_text(json.dumps({"text": prepare.FILLER}))
    shutil.copy(files / "questions.jsonl", "LongAlpaca-12k.json")
    shorter = {"16384": "512", "32768": "512", "2048": "128", "4096": "256", "200": "2", "8": "2"}
    less = {"passkey": ["--trials", "1"], "generate": ["--max-new-tokens", "3"]}
    for line in lines:
        script, *words = shlex.split(line, comments=True)
        words = [",".join(shorter.get(x, x) for x in word.split(",")) for word in words]
        status, said, error = command(*words, *less.get(words[0], []), script=script)
        assert status == 0, (line, error)
        assert "--plan" not in words or "GiB a GPU suffice:" in said


# --plan, and GPUs ---------------------------------------------------------------------------------


def planned(config, *flags):
    """The settings, and the bytes of a step by their kind."""
    args = train.parse_args(["--data", "x.bin", *flags])
    with torch.device("meta"):
        train.fill_defaults(args, Llama(config))
    return args, train.plan(args, config)


def peak_of(function, device):
    """The most bytes that tensors of `function` take; on a CPU as PyTorch's profiler counts."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return np.cumsum([event.nbytes() for event in events]).max()


@pytest.mark.parametrize("device, C, context, flags", [
    *(("cpu", 256, 512, flags) for flags in (
        "--dtype bfloat16", "--dtype bfloat16 --offload", "--dtype float32 --checkpointing",
        "--dtype float32 --trainable full --attention full", "--dtype float32 --quantize nf4")),
    *(pytest.param("cuda", 2048, context, f"--dtype bfloat16 {flags}", marks=CUDA)
      for context in (8192, 32768) for flags in ("", "--checkpointing", "--offload"))])
def test_the_planned_memory_is_what_a_step_takes(device, C, context, flags, monkeypatch):
    """Beside the weights. What comes back from host memory is still there while it is used."""
    config = LlamaConfig(vocab_size=8 * C, hidden_size=C, intermediate_size=11 * C // 4,
                         num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8)
    args, sizes = planned(config, "--context", f"{context}", *flags.split())
    if device == "cpu":  # there, what is offloaded takes the same memory, and the norm more
        monkeypatch.setattr(longlora.RMSNorm, "forward", lambda self, x: F.layer_norm(
            x, self.weight.shape, self.weight.to(x.dtype)))
    else:
        sizes["host"] = 0
    with torch.device(device):
        model, dtype = Llama(config), getattr(torch, args.dtype)
    model.reset_parameters()
    train.prepare_model(model, args, torch.device(device), dtype, train.Parallel())
    model.model.checkpointing, model.model.offload = args.checkpointing, args.offload
    optimizer, tokens = train.build_optimizer(args, model), np.zeros(context, np.int64)
    batch = [train.Sequence(tokens, tokens, args.group_size)] * 2 * args.micro_batch

    def two_steps():  # the optimizer has its state from the first one on
        for _ in range(2):
            train.optimizer_step(args, model, optimizer, batch, train.Parallel(), dtype)

    error = 0.1 if device == "cuda" or args.offload else 0.01
    expected = sum(sizes.values()) - sizes["weights"]
    assert peak_of(two_steps, device) == pytest.approx(expected, abs=error * sizes["activations"])


def test_70b_on_8_gpus_is_planned_as_arithmetic_says(command):
    """Two and three of its eighty layers; and what GPUs share is twice as much on half of them."""
    C, I, kv, V, T = 8192, 28672, 1024, 32000, 32768

    def sizes(layers, *flags):
        config = LlamaConfig(hidden_size=C, intermediate_size=I, num_hidden_layers=layers,
                             num_attention_heads=64, num_key_value_heads=8)
        return planned(config, "--checkpointing", "--dtype", "bfloat16", *flags)[1]

    two, three = (sizes(layers, "--gpus", "8", "--context", f"{T}") for layers in (2, 3))
    frozen = 2 * (2 * C * C + 2 * C * kv + 3 * C * I) + V * C  # q, o; k, v; the MLP; the head
    trained = 2 * 8 * (2 * (C + C) + 2 * (C + kv)) + V * C + (2 * 2 + 1) * C
    assert two["weights"] == (2 * frozen + 4 * trained) / 8  # bfloat16 and float32
    assert two["gradients"] == 4 * trained / 8 and two["optimizer"] == 2 * two["gradients"]
    inputs = 2 * T * C * 2  # a layer keeps that of attention and that of the MLP, in bfloat16
    assert three["activations"] - two["activations"] == pytest.approx(inputs, rel=0.01)
    half = sizes(2, "--gpus", "4", "--context", f"{2 * T}", "--context-parallel", "2")
    for name, size in two.items():
        times = 2 if name in ("weights", "gradients", "optimizer") else 1
        assert half[name] == pytest.approx(times * size, rel=0.01)
    for memory, says in (("80", " suffice: "), ("1", " do not suffice: .*--offload"),
                         ("0", "^0 GiB a GPU do not suffice: ")):
        status, said, _ = command("--plan", "--model", "model", "--context", "64",
                                  "--gpu-memory", memory)
        assert status == 0 and re.search(says, said, re.S | re.M)


def test_the_longest_context_planned_for_a_card_is_the_longest_that_fits(monkeypatch, command):
    """By a plan of its own for that context, and for a longer one; Llama 3.1 keeps its window."""
    monkeypatch.setattr(train, "CARDS", (1.01, 3.0))
    for chunk in ("MLP_CHUNK", "LOSS_CHUNK"):  # fewer, larger operations
        monkeypatch.setattr(longlora, chunk, 1 << 13)
    args = train.parse_args(["--plan", "--dtype", "bfloat16"])
    config = LlamaConfig(vocab_size=2048, hidden_size=1024, intermediate_size=2048,
                         num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16)
    with torch.device("meta"):
        model = Llama(config)
    rows = train.longest_contexts(args, model)
    assert [row["1.01 GiB"] for row in rows] == [None, None, None, None]
    for row in rows[::3]:
        for T, fits in ((row["3 GiB"], True), (int(1.03 * row["3 GiB"]), False)):
            flags = ["--context", f"{T}", "--dtype", "bfloat16", *row["flags"].split()]
            sizes = planned(config, *flags)[1]
            assert (sum(sizes.values()) - sizes["host"] < 2.01 * 2**30 / 1.05) == fits
        assert bool(row["host MB a token"]) == ("offload" in row["flags"])
    model.model.config = dataclasses.replace(config, rope_scaling=LLAMA3,
                                             max_position_embeddings=131072)
    monkeypatch.setattr(train, "plan", lambda args, config: {"all": args.context, "host": 0})
    args.trainable = "full"  # no weight is frozen, to be quantized
    rows = train.longest_contexts(args, model)
    assert [row["3 GiB"] for row in rows] == [131072] * 2
    status, said, _ = command("--plan", "--model", "model", "--gpu-memory", "12")
    assert status == 0 and re.search("flags +12 GiB +host MB a token\n", said)


# ==================================================================================================


def time_attention(T: int = 8192, G: int = 2048) -> None:
    """Forward and backward of S2-Attn over those of full attention, H = 8, D = 64, float32."""
    q, k, v = (torch.randn(1, T, 8, 64, requires_grad=True) for _ in range(3))

    def seconds(attention) -> float:
        times = []
        for _ in range(6):
            began = time.perf_counter()
            attention(q, k, v).sum().backward()
            times.append(time.perf_counter() - began)
        return min(times)

    ratio = seconds(lambda q, k, v: shifted_sparse_attention(q, k, v, G)) / seconds(
        longlora.causal_attention)
    print(f"S2-Attn takes {ratio:.2f} of full attention's time, T = {T:,}, G = {G:,}")


if __name__ == "__main__":
    time_attention()
