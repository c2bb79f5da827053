"""LongLoRA: extend the context window of a pretrained Llama cheaply.

The paper is Chen et al., ICLR 2024 (arXiv 2309.12307). Three ideas, in the order of this file:

1. Position interpolation (Section 4.1, after Chen et al. 2023): to read T tokens with a model that
   was pretrained on fewer, rotate queries and keys by position / factor. No rotation angle then
   lies outside the range of pretraining. YaRN, a gentler rule, divides only the slow rotations.
2. Shifted sparse attention, S2-Attn (Section 3.2): in training only, attend inside groups of G
   tokens. In half of the heads the groups are shifted by G/2, so that information flows between
   neighbouring groups. The cost grows with T * G instead of T * T.
3. LoRA+, as the paper calls it (Section 3.3): LoRA on the attention projections, and a trainable
   embedding and norms beside it. They are 2% of the parameters and close the gap to full
   fine-tuning.

At inference the model is an ordinary Llama with full attention.

Letters: B batch, T tokens, C width (hidden_size), H heads, D head size, G group size, V vocabulary.
Weights and config fields have Hugging Face's names, so that files load without a table of names.
"""
import argparse
import contextlib
import ctypes
import dataclasses
import functools
import json
import math
import mmap
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# --------------------------------------------------------------------------------------------------
# Config


@dataclasses.dataclass
class LlamaConfig:
    """Hugging Face's `LlamaConfig`; the defaults are Llama-2-7B's. Raises ValueError on bad sizes.

    `max_position_embeddings` is the window in tokens. `rope_scaling` is None, or has a "rope_type"
    of "linear", "yarn" or "llama3" and its fields (`ROPE_FIELDS`). `sliding_window` is Mistral's:
    within this many tokens it behaves like Llama.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        for name, limit in SIZE_LIMITS.items():
            value = getattr(self, name)
            require(type(value) is int and 0 < value < limit,
                    f"{name} must be a whole number from 1 to {limit:,}, got {value!r}")
        C, H, H_kv = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        require(H % H_kv == 0, f"num_attention_heads ({H}) must be a multiple of "
                f"num_key_value_heads ({H_kv})")
        if self.head_dim is None:
            require(C % H == 0, f"hidden_size ({C}) must be a multiple of num_attention_heads "
                    f"({H}), or head_dim be given")
            self.head_dim = C // H
        require(type(self.head_dim) is int and self.head_dim in range(2, 4097, 2),
                f"head_dim must be even (rotary pairs), at most 4,096, got {self.head_dim!r}")
        require(is_positive(self.rms_norm_eps) and is_positive(self.rope_theta) and
                self.rope_theta > 1, "rms_norm_eps must be positive and rope_theta above 1, got "
                f"{self.rms_norm_eps!r} and {self.rope_theta!r}")
        ids = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        require(all(id is None or type(id) is int for id in (self.bos_token_id, *ids)),
                "bos_token_id and eos_token_id must be token ids or null")
        require(type(self.tie_word_embeddings) is bool, "tie_word_embeddings must be true or "
                f"false, got {self.tie_word_embeddings!r}")
        if self.rope_scaling is not None:
            self.rope_scaling = checked_rope_scaling(self.rope_scaling,
                                                     self.max_position_embeddings)

    @property
    def interpolation(self) -> tuple[str | None, float]:
        """The rule of position interpolation, "linear", "yarn" or None, and its factor."""
        scaling = self.rope_scaling or {}
        kind = scaling.get("rope_type")
        return (kind, scaling["factor"]) if kind in INTERPOLATIONS else (None, 1.0)

    def extended(self, context: int, rope: str | None = None) -> "LlamaConfig":
        """This config with a window of `context` tokens, by position interpolation (Section 4.1).

        `rope` is the rule, "linear" or "yarn" (None: the model's own, else linear). The factor is
        ceil(context / window), times the factor that the model already has. A context within the
        window changes nothing. Raises ValueError beyond a sliding window, and for positions that
        another rule has scaled already.
        """
        if self.sliding_window is not None and context > self.sliding_window:
            raise ValueError(f"the model's sliding_window of {self.sliding_window} tokens is "
                             f"shorter than a context of {context}: ask for a shorter context")
        if context <= self.max_position_embeddings:
            return self
        scaling = self.rope_scaling or {"rope_type": rope or "linear", "factor": 1.0}
        kind = scaling["rope_type"]
        if kind != (rope or kind) or self.rope_scaling and kind not in INTERPOLATIONS:
            raise ValueError(f"this model reads {self.max_position_embeddings} tokens and cannot "
                             f"be extended to {context}{' by ' + rope if rope else ''}: its "
                             f"positions are scaled by the {kind} rule, and config.json cannot "
                             "express a second one")
        if kind == "yarn":
            scaling = {"original_max_position_embeddings": self.max_position_embeddings} | scaling
        factor = math.ceil(context / self.max_position_embeddings) * scaling["factor"]
        return dataclasses.replace(self, max_position_embeddings=context,
                                   rope_scaling=scaling | {"factor": factor})


SIZE_LIMITS = {"vocab_size": 1 << 24, "hidden_size": 1 << 20, "intermediate_size": 1 << 24,
               "num_hidden_layers": 1000, "num_attention_heads": 1 << 12,
               "num_key_value_heads": 1 << 12, "max_position_embeddings": 1 << 31}
INTERPOLATIONS = ("linear", "yarn")
# The required and the optional fields of each kind of `rope_scaling`.
ROPE_FIELDS = {
    "linear": (("factor",), ()),
    "yarn": (("factor", "original_max_position_embeddings"),
             ("attention_factor", "beta_fast", "beta_slow", "truncate")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor",
                "original_max_position_embeddings"), ()),
}


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"config: {message}")


def is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < 1e30


def checked_rope_scaling(scaling: dict, window: int) -> dict:
    """`rope_scaling` in its newer spelling (`rope_type`, not `type`). Raises ValueError."""
    given = scaling if isinstance(scaling, dict) else {}
    kind = str(given.get("rope_type", given.get("type")))
    if kind == "yarn" and given.get("original_max_position_embeddings") is None:
        given = given | {"original_max_position_embeddings": window}
    required, optional = ROPE_FIELDS.get(kind, ((), ()))
    values = {name: given[name] for name in required + optional if given.get(name) is not None}
    numbers = {name: value for name, value in values.items() if name != "truncate"}
    low = numbers.get("low_freq_factor", numbers.get("beta_slow", 1))
    high = numbers.get("high_freq_factor", numbers.get("beta_fast", 32))
    require(required and set(required) <= values.keys() and all(map(is_positive, numbers.values()))
            and values["factor"] >= 1 and low < high and not given.get("mscale_all_dim")
            and type(values.get("truncate", True)) is bool,
            'rope_scaling must be {"rope_type": "linear", "factor": at least 1}, "yarn" without '
            f'mscale_all_dim, Llama 3\'s ("llama3"), or null, got {scaling!r}')
    return {"rope_type": kind, **values, "factor": float(values["factor"])}


def default_group_size(context: int) -> int:
    """G for a training context: a quarter (Section 3.2), rounded up to an even number."""
    return 2 * math.ceil(context / 8)


# --------------------------------------------------------------------------------------------------
# Norm and rotary embedding


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, over the last dimension."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Computed in float32, returned in the dtype of the residual stream. Without the switch,
        # CUDA's autocast would return float32, and everything after it would take twice the memory.
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotary_embedding(config: LlamaConfig,
                     positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the rotation angles at `positions` (T,), both (T, 1, D/2), float32: in
    bfloat16 the positions 257 and 258 are the same number."""
    scaling, amplitude = config.rope_scaling, 1.0
    if scaling and scaling["rope_type"] == "yarn":  # sharper attention among more keys
        amplitude = scaling.get("attention_factor", 0.1 * math.log(scaling["factor"]) + 1)
    frequencies = rotary_frequencies(config, positions.device)
    angle = torch.outer(positions.float(), frequencies)[:, None, :]
    return angle.cos() * amplitude, angle.sin() * amplitude


def rotary_frequencies(config: LlamaConfig, device: torch.device) -> torch.Tensor:
    """Radians a token of the rotary pairs (D/2,), fast ones first. Position interpolation happens
    here and nowhere else.

    "linear" (Section 4.1): position / factor, the same as all pairs slower by the factor. No angle
    lies outside the range of pretraining, but neighbouring tokens come closer together.

    "yarn" (Peng et al. 2023) and Llama 3.1's rule: pair by pair. A pair that turned many times
    within the window has seen all of its angles and tells neighbours apart: it stays. One that
    turned less than once would reach new angles: it is slowed down. In between there is a ramp.
    """
    D, scaling = config.head_dim, config.rope_scaling
    pair = torch.arange(D // 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** (-2 * pair / D)
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    window = scaling["original_max_position_embeddings"]
    if scaling["rope_type"] == "llama3":  # a ramp by turns
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        slowed = (high - window * frequency / (2 * math.pi)) / (high - low)
    else:  # a ramp by the index of the pair
        first, last = (D / 2 * math.log(window / (2 * math.pi * turns), config.rope_theta)
                       for turns in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1)))
        if scaling.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, D - 1)
        slowed = (pair - first) / max(last - first, 1e-3)
    slowed = slowed.clamp(0, 1)
    return frequency * (1 - slowed + slowed / scaling["factor"])


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, H, D) by its positions, in float32.

    NOTE: pairs are halves (i, i + D/2), not neighbours (2i, 2i + 1) as in Meta's files. The wrong
    pairing raises no error and ruins loaded weights.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Shifted sparse attention (S2-Attn)


def shifted_sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int,
                             shift: bool = True, halo: Callable | None = None) -> torch.Tensor:
    """S2-Attn (Section 3.2, Figure 3): causal attention inside groups of G tokens; in half of the
    heads the groups are shifted by G/2.

    q (B, T, H, D), k and v (B, T, H_kv, D); returns (B, T, H, D). Any T will do. `shift=False`
    gives local groups in all heads (the paper's ablation, Table 6). Raises ValueError if G or H is
    odd.

        T = 8, G = 4   first half of the heads       second half: shifted by G/2
                       keys 0 1 2 3 4 5 6 7          keys 0 1 2 3 4 5 6 7
            query 0         #                             #
                  1         # #                           # #
                  2         # # #                             #             starts with a group of
                  3         # # # #                           # #           G/2, so that no query
                  4                 #                         # # #         sees the future
                  5                 # #                       # # # #
                  6                 # # #                             #
                  7                 # # # #                           # #

    The official code rolls the tokens around instead: its first G/2 tokens attend to the last G/2.

    If the T tokens are one part of a longer sequence (context parallelism), `halo(x, n)` prepends
    the n tokens before them to a shifted key or value, if there are any.
    """
    H, G = q.shape[2], group_size
    if G < 2 or G % 2:
        raise ValueError(f"the group size must be even and at least 2, got {G}")
    if not shift:
        return grouped_attention(q, k, v, G)
    if H % 2:
        raise ValueError(f"shifting half of the heads needs an even number of them, got {H}")
    if k.shape[2] % 2:  # an odd number of key-value heads has no halves
        k, v = (x.repeat_interleave(H // k.shape[2], dim=2) for x in (k, v))

    # Step 1: half of the heads are shifted by G/2.
    (q1, q2), (k1, k2), (v1, v2) = (x.chunk(2, dim=2) for x in (q, k, v))
    received = 0
    if halo is not None:  # with the G/2 keys before them, these tokens begin with a whole group
        k2, v2 = halo(k2, G // 2), halo(v2, G // 2)
        received = k2.shape[1] - q2.shape[1]  # G/2, or 0 at the beginning of the sequence
        q2 = F.pad(q2, (0, 0, 0, 0, received, 0))  # dummy queries

    # Step 2: all attend in groups.
    out1 = grouped_attention(q1, k1, v1, G)
    out2 = grouped_attention(q2, k2, v2, G, first=G // 2 - received)[:, received:]
    return torch.cat([out1, out2], dim=2)


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, G: int,
                      first: int = 0) -> torch.Tensor:
    """Causal attention inside groups: one of `first` tokens, then groups of G, then the rest.

    All whole groups become part of the batch dimension, a view as long as B is 1: one causal call
    of the flash kernel, without a mask.
    """
    B, T = q.shape[:2]
    first = min(first, T)
    rest = (T - first) % G
    sizes = [n for n in (first, T - first - rest, rest) if n > 0]
    outputs = []
    for q_, k_, v_ in zip(q.split(sizes, 1), k.split(sizes, 1), v.split(sizes, 1)):
        n = max(1, q_.shape[1] // G)  # whole groups, or one shorter group
        # (B, n * g, H, D) -> (B * n, g, H, D)
        q_, k_, v_ = (x.unflatten(1, (n, -1)).flatten(0, 1) for x in (q_, k_, v_))
        outputs.append(causal_attention(q_, k_, v_).unflatten(0, (B, n)).flatten(1, 2))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full causal attention: q (B, T, H, D), k and v (B, S, H_kv, D); returns (B, T, H, D). The T
    queries belong to the last T of S tokens (S > T: with keys from a cache)."""
    T, S, shared = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]  # query heads a key head
    if shared > 1 and q.is_cuda and q.dtype == torch.float32:  # no fused kernel takes this
        k, v = (x.repeat_interleave(shared, dim=2) for x in (k, v))
        shared = 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), views
    mask = None if T == S else causal_lower_right(T, S)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=shared > 1)
    return out.transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# The model


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        H, H_kv = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, H_kv * D, bias=False)
        self.v_proj = nn.Linear(C, H_kv * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor],
                attend: Callable) -> torch.Tensor:
        heads = -1, self.head_dim  # (B, T, H * D) -> (B, T, H, D)
        q = apply_rotary(self.q_proj(x).unflatten(-1, heads), *rotary)
        k = apply_rotary(self.k_proj(x).unflatten(-1, heads), *rotary)
        v = self.v_proj(x).unflatten(-1, heads)
        return self.o_proj(attend(q, k, v).flatten(2))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


MLP_CHUNK = 2048  # tokens whose MLP activations exist at one time, with checkpointing


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attention_block(self, x: torch.Tensor, rotary: tuple, attend: Callable) -> torch.Tensor:
        return x + self.self_attn(self.input_layernorm(x), rotary, attend)

    def mlp_block(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: torch.Tensor, rotary: tuple, attend: Callable, checkpointing: bool,
                keep_attention: bool = False) -> torch.Tensor:
        if not checkpointing:
            return self.mlp_block(self.attention_block(x, rotary, attend))
        # Keep the input of either block, recompute the rest in the backward pass. The MLP is the
        # widest part and treats tokens independently, so it goes through in chunks of them.
        recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        if keep_attention:
            x = self.attention_block(x, rotary, attend)
        else:
            x = recompute(self.attention_block, x, rotary, attend)
        return torch.cat([recompute(self.mlp_block, chunk) for chunk in x.split(MLP_CHUNK, dim=1)],
                         dim=1)


class LlamaModel(nn.Module):
    """Everything below the head: tokens (B, T) to hidden states (B, T, C).

    Two attributes save memory in training. `checkpointing`: the backward pass recomputes each
    layer's activations from the inputs of its two blocks. `offload`: these inputs wait in host
    memory.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = self.offload = False

    def forward(self, tokens: torch.Tensor, group_size: int | None = None, shift: bool = True,
                start: int = 0, halo: Callable | None = None, cache=None) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # A trainable embedding is float32; the residual stream, and every checkpoint, is not.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        positions = torch.arange(start, start + tokens.shape[1], device=x.device)
        rotary = rotary_embedding(self.config, positions)
        attend = causal_attention
        if group_size is not None:
            attend = partial(shifted_sparse_attention, group_size=group_size, shift=shift,
                             halo=halo)
        checkpointing = (self.checkpointing or self.offload) and torch.is_grad_enabled()
        to_host = torch.autograd.graph.save_on_cpu(pin_memory=x.is_cuda)
        with to_host if self.offload else contextlib.nullcontext():
            for i, layer in enumerate(self.layers):
                if cache is not None:
                    attend = partial(cache.attend, i)
                # The last block's backward pass comes first, when no other activations exist.
                last = i == len(self.layers) - 1
                x = layer(x, rotary, attend, checkpointing, last and not self.offload)
        return self.norm(x)


class Llama(nn.Module):
    """Llama. Full attention is the default; S2-Attn is chosen by the call, not by `self.training`.

    `model(tokens)` returns logits (B, T, V). `model(tokens, targets)` returns the mean loss of the
    targets that are not -100, where targets[b, t] is the token that follows tokens[b, t];
    `reduction="sum"` and "none" are those of `F.cross_entropy`. With `logits_to_keep` (a slice or
    an index tensor), logits and targets are of these positions alone.

    `group_size` turns on S2-Attn (with `shift=False`: local groups). If the tokens are one part of
    a longer sequence, `start` is the position of the first, and `halo` as in
    `shifted_sparse_attention`. A `cache` keeps keys and values of earlier calls: its `attend(layer,
    q, k, v)` takes the place of attention.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.model = LlamaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                group_size: int | None = None, shift: bool = True, start: int = 0,
                halo: Callable | None = None, cache=None, logits_to_keep=slice(None),
                reduction: str = "mean") -> torch.Tensor:
        x = self.model(tokens, group_size, shift, start, halo, cache)[:, logits_to_keep]
        if targets is None:
            return self.lm_head(x)
        return chunked_loss(x, self.lm_head.weight, targets, reduction)

    @property
    def config(self) -> LlamaConfig:
        return self.model.config

    def extend(self, context: int, rope: str | None = None) -> None:
        """Interpolate positions so that `context` tokens fit the window (Section 4.1); see
        `LlamaConfig.extended`."""
        self.model.config = self.config.extended(context, rope)

    def reset_parameters(self) -> None:
        """Random weights as in GPT-2: std 0.02, projections into the residual stream scaled down
        with its depth."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers))
            else:
                nn.init.normal_(p, std=0.02)


# --------------------------------------------------------------------------------------------------
# The loss

LOSS_CHUNK = 512  # tokens whose logits exist at one time: 62 MiB in float32 at V = 32,000


def chunked_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                 reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy of the head's logits, in chunks of tokens; the mean of no targets is 0.

    x (B, T, C), weight (V, C), targets (B, T), ignored where -100. All logits at once would be the
    largest tensor of the run by far: at T = 100,000 and V = 32,000 they take 12 GiB in float32, and
    their gradient as much again.
    """
    shape, count = targets.shape, (targets != -100).sum().clamp(min=1)
    x, targets = x.flatten(0, 1), targets.flatten()

    def cross_entropy(x, targets, reduction):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction=reduction)

    chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    if reduction == "none":
        return torch.cat([cross_entropy(*chunk, "none") for chunk in chunks]).view(shape)
    if weight.requires_grad:
        total = sum(checkpoint(cross_entropy, *chunk, "sum", use_reentrant=False)
                    for chunk in chunks)
    else:
        total = FrozenHeadLoss.apply(x, weight, targets)
    return total / count if reduction == "mean" else total


class FrozenHeadLoss(torch.autograd.Function):
    """The summed loss under a frozen head. Its only gradient is dL/dx, so the forward pass computes
    it from each chunk's logits while they exist; checkpointing would compute the logits twice."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = torch.zeros((), device=x.device)
        ctx.grad = torch.empty_like(x) if x.requires_grad else None
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            label, scored = targets[chunk, None].clamp(min=0), targets[chunk, None] != -100
            logits = F.linear(x[chunk], weight).float()
            log_p = torch.log_softmax(logits, -1, out=logits)  # in place: the run's largest tensor
            total += F.nll_loss(log_p, targets[chunk], reduction="sum")  # -100 is ignored
            if ctx.grad is not None:  # softmax - one-hot, through the head
                grad = log_p.exp_().scatter_add_(1, label, -scored.float())
                ctx.grad[chunk] = grad.to(x.dtype) @ weight.to(x.dtype) * scored
        return total

    @staticmethod
    def backward(ctx, scale):
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(scale.to(grad.dtype)), None, None


# --------------------------------------------------------------------------------------------------
# LoRA and LoRA+

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer and a low-rank update: W x + (alpha / r) B A x (Hu et al. 2021).

    A (r, in) is random and B (out, r) zero, so that training starts from the pretrained model. The
    product B A, as large as W, is never formed here: that memory is what LoRA saves.
    """

    def __init__(self, base: "nn.Linear | NF4Linear", rank: int, alpha: float,
                 dtype: torch.dtype | None = None):
        super().__init__()
        self.base = base
        stored = next(iter(base.state_dict().values()))  # the weight, or its 4-bit codes
        place = {"device": stored.device, "dtype": dtype or getattr(base, "dtype", stored.dtype)}
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, **place)  # random, as Linear is
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The base comes last: a backward pass that recomputes this layer's inputs stops before it.
        return self.lora_B(self.lora_A(x) * self.scaling).add_(self.base(x))

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """W + (alpha / r) B A, (out, in), added in float32."""
        A, B = self.lora_A.weight.float(), self.lora_B.weight.float()
        return self.base.weight.float().addmm(B, A, alpha=self.scaling).to(dtype)


def add_lora(model: Llama, rank: int = 8, alpha: float = 16,
             targets: Iterable[str] = ATTENTION_PROJECTIONS,
             dtype: torch.dtype | None = None) -> None:
    """Replace every linear layer below the head whose name is in `targets` by a LoRALinear, in
    place (Section 3.3). A and B have the layer's dtype unless `dtype` is given.

    Raises ValueError if `rank` is below 1, a target matches no layer, or LoRA is there already.
    """
    if rank < 1:
        raise ValueError(f"LoRA's rank must be at least 1, got {rank}")
    refuse_lora(model, "merge_lora(model) first")
    for target in targets:
        parents = [parent for parent in model.model.modules()
                   if isinstance(getattr(parent, target, None), (nn.Linear, NF4Linear))]
        if not parents:
            raise ValueError(f"LoRA target {target!r} matches no linear layer of the model")
        for parent in parents:
            setattr(parent, target, LoRALinear(getattr(parent, target), rank, alpha, dtype))


def merge_lora(model: Llama) -> None:
    """Fold every LoRA update into its weight, in place. Raises ValueError on 4-bit weights."""
    refuse_quantized(model)
    for parent in list(model.modules()):
        for name, lora in list(parent.named_children()):
            if isinstance(lora, LoRALinear):
                lora.base.weight.data = lora.merged(lora.base.weight.dtype)
                setattr(parent, name, lora.base)


def refuse_lora(model: Llama, remedy: str) -> None:
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError(f"the model has LoRA already: {remedy}")


def parse_trainable(trainable: str) -> set[str]:
    """{"full"}, or some of "lora", "embed", "norm", from a text with commas. Raises ValueError."""
    parts = set(trainable.split(","))
    if not parts <= {"lora", "embed", "norm"} and parts != {"full"}:
        raise ValueError('trainable must be "full" or some of lora, embed, norm, joined by commas; '
                         f"got {trainable!r}")
    return parts


def set_trainable(model: Llama, trainable: str) -> None:
    """Choose the trainable parameters: "full", or some of "lora", "embed", "norm" joined by commas
    (LoRA+ is all three; Section 3.3).

    Trainable parameters become float32 (updates of 1e-5 vanish in bfloat16's 8 bits), frozen ones
    keep their dtype. "embed" is the input embedding, not the head; a head that shares its weights
    is untied and frozen, except under "full". Raises ValueError on unknown parts, and on "lora"
    without `add_lora` before.
    """
    parts = parse_trainable(trainable)
    if "lora" in parts and not any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError('trainable has "lora", but the model has no LoRA: add_lora(model) first')
    if "embed" in parts:
        untie_lm_head(model)
    for name, p in model.named_parameters():
        kind = ("lora" if "lora_" in name else "embed" if "embed_tokens" in name else
                "norm" if "norm" in name else "rest")
        p.requires_grad_(kind in parts or parts == {"full"})
        if p.requires_grad:  # always a copy: loaded weights are mapped from their file
            p.data = p.data.to(torch.float32, copy=True)


def untie_lm_head(model: Llama) -> None:
    """Give the head weights of its own if it shares the embedding's, so that one can change."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        model.model.config = dataclasses.replace(model.config, tie_word_embeddings=False)


# --------------------------------------------------------------------------------------------------
# 4-bit frozen weights (QLoRA, Dettmers et al. 2023)

# NF4, "normal float": quantiles of the normal distribution that weights have, and 0 (Appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
BLOCK, SUPERBLOCK = 64, 256  # weights that share a scale, scales that share a scale in turn


class NF4Linear(nn.Module):
    """A frozen linear layer with a weight (out, in) of 4.13 bits a number. Each weight is the
    nearest of 16 values, times the largest of its block of 64. These scales, less their mean, are
    int8 themselves (double quantisation), times the largest of 256 of them.

    All buffers are of integers: no conversion of the model's dtype can touch the scales.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        blocks = padded(weight.detach().float().flatten(), BLOCK)
        scale = blocks.abs().amax(1)
        values = torch.tensor(NF4, device=weight.device)
        codes = torch.bucketize(blocks / scale.clamp(min=1e-30)[:, None],
                                (values[1:] + values[:-1]) / 2, out_int32=True).to(torch.uint8)
        self.register_buffer("codes", codes.view(-1, 2)[:, 0] << 4 | codes.view(-1, 2)[:, 1])
        mean = scale.mean()
        scale = padded(scale - mean, SUPERBLOCK)
        step = scale.abs().amax(1) / 127
        scale = (scale / step.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        self.register_buffer("scales", scale.flatten()[:len(blocks)].clone())
        self.register_buffer("steps", torch.cat([step, mean[None]]).view(torch.int32))

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized matrix (out, in), made anew for each product. In bfloat16 its 16 values
        are rounded before they are scaled, by 0.2% at most: a third of the memory traffic."""
        steps = self.steps.view(torch.float32)  # one a superblock, and the mean
        scale = padded(self.scales.float(), SUPERBLOCK) * steps[:-1, None] + steps[-1]
        W = F.embedding(self.codes.int(), nf4_pairs(self.codes.device, self.dtype)).view(-1, BLOCK)
        W = W.mul_(scale.flatten()[:len(W), None]).flatten()
        return W[:self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NF4Product.apply(x, self)


class NF4Product(torch.autograd.Function):
    """x W^T, without keeping W for the backward pass: that would cost what 4 bits have saved."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, linear.weight)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.weight, None


@functools.cache
def nf4_pairs(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The two values of every byte of codes, (256, 2)."""
    values = torch.tensor(NF4)
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    return pairs.to(device, dtype)


def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (N,) as rows of `size` numbers, the last row filled up with zeros."""
    return F.pad(x, (0, -len(x) % size)).view(-1, size)


def quantize(model: Llama, dtype: torch.dtype, device: str | torch.device | None = None) -> None:
    """Replace every linear layer below the head by an NF4Linear that computes in `dtype`, one after
    the other, on `device` (None: where the weight is). Raises ValueError if the model has LoRA:
    that comes afterwards."""
    refuse_lora(model, "quantize it first, then add_lora(model)")
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, NF4Linear(linear.weight.to(device), dtype))


def is_quantized(model: Llama) -> bool:
    return any(isinstance(module, NF4Linear) for module in model.modules())


def refuse_quantized(model: Llama) -> None:
    if is_quantized(model):
        raise ValueError("4-bit weights are not saved or merged: save the adapter, and merge it "
                         "into the original base")


def count_parameters(model: nn.Module) -> int:
    """Parameters, 4-bit ones included."""
    packed = sum(2 * m.codes.numel() for m in model.modules() if isinstance(m, NF4Linear))
    return packed + sum(p.numel() for p in model.parameters())


# ==================================================================================================
# Files. Nothing below is needed to understand the method.
# ==================================================================================================

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHARD_BYTES = 4_900_000_000  # of tensors, so that a file with its header stays below 5 GB
JSON_LIMIT = 10_000_000  # bytes; the largest model's settings are well below a tenth of it


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Call write(temporary name beside `path`), then rename: `path` is old or new, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # its bytes reach the disk before its name does
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if (size := path.stat().st_size) > JSON_LIMIT:
        raise ValueError(f"{path}: {size:,} bytes are too many for a file of settings")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


# --------------------------------------------------------------------------------------------------
# Files of tensors: safetensors, and pickles by torch.load. Both are mapped, not read: a tensor's
# bytes leave the disk when they are used.

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_tensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a safetensors file, or of one that `torch.save` wrote, mapped.

    Raises FileNotFoundError, and ValueError for a file that is broken or holds anything else. Code
    in a pickle is never run.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        yield from read_safetensors(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type for member in archive.infolist()):
                raise ValueError("compressed")  # it would be mapped as it is
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path}: it holds more than tensors, or is broken") from None
    except Exception as error:  # the loader's kinds of errors are its own
        problem = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise ValueError(f"{path}: not a file of tensors, or broken ({problem})") from None
    if not isinstance(tensors, dict) or not all(
            isinstance(x, torch.Tensor) and x.dtype in DTYPES.values() and
            x.layout == torch.strided and not (x.is_meta or x.is_nested or x.is_neg())
            for x in tensors.values()):
        raise ValueError(f"{path}: expected tensors by name")
    for name, tensor in tensors.items():
        yield str(name), tensor


def read_safetensors(path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """The format: 8 bytes with the header's length N (little endian), N bytes of JSON {name:
    {dtype, shape, data_offsets}}, the data. Raises ValueError if the header does not describe
    exactly this file."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, 10 * JSON_LIMIT):
            raise ValueError(f"{path}: not a safetensors file, or cut short (its header claims "
                             f"{length} bytes of {size})")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = sorted((*entry["data_offsets"], str(name), DTYPES[entry["dtype"]],
                              entry["shape"]) for name, entry in header.items())
            if not all(type(n) is int and 0 <= n < 1 << 62
                       for start, stop, _, _, shape in entries for n in (start, stop, *shape)):
                raise ValueError("offsets and shapes must be whole numbers")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: broken safetensors header ({type(error).__name__}: "
                             f"{str(error)[:200]})") from None
        # Private: writing to a tensor changes nothing in the file.
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    end = 0
    for start, stop, name, dtype, shape in entries:
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name[:200]}: bytes {start} to {stop} do not fit {dtype} of "
                             f"shape {list(shape)[:8]} behind {end} bytes of other tensors")
        end = stop
    if 8 + length + end != size:
        raise ValueError(f"{path}: its tensors end at byte {8 + length + end}, the file at {size}")
    for start, stop, name, dtype, shape in entries:
        if start == stop:
            yield name, torch.empty(shape, dtype=dtype)
            continue
        flat = torch.frombuffer(data, dtype=torch.uint8, offset=8 + length + start,
                                count=stop - start)
        if (8 + length + start) % dtype.itemsize:
            flat = flat.clone()  # misaligned
        yield name, flat.view(dtype).view(shape)


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor],
                      get: Callable[[str], torch.Tensor] | None = None) -> None:
    """Write a safetensors file: larger dtypes first, so that all are aligned, then by name.
    Complete or absent.

    With `get`, `tensors` need only have dtypes and shapes (on the meta device): get(name) computes
    each in its turn, so that they never exist all at once.
    """
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": dtypes[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in tqdm(names, desc=path.name, leave=False, delay=1):
                tensor = get(name) if get else tensors[name]
                tensor = tensor.detach().cpu().contiguous()
                file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))

    replace_file(path, write)


def tensor_files(folder: Path, *names: str) -> list[Path]:
    """The first of `names` that the folder has, whole or as the shards that NAME.index.json lists.
    Raises FileNotFoundError if there is none, and ValueError for an index that is broken or names a
    file outside its folder."""
    for name in names:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) and
                                                       os.path.basename(shard) == shard
                                                       for shard in shards.values()):
                raise ValueError(f'{index}: expected a "weight_map" from tensors to files of this '
                                 "folder")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise FileNotFoundError(f"{folder}: has none of {', '.join(names)}, nor an index of shards")


# --------------------------------------------------------------------------------------------------
# Model folders

# Hugging Face's defaults where an old config.json says nothing.
CONFIG_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
# Any other value is another architecture.
PLAIN_LLAMA = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
               "partial_rotary_factor": 1.0, "quantization_config": None}


def load_config(path: str | Path, context: int | None = None) -> LlamaConfig:
    """The config of a Hugging Face folder.

    A Mistral behaves like Llama within its sliding window: it is accepted if `context` tokens
    (None: the model's window) fit into that. Raises FileNotFoundError, and ValueError for anything
    that is not a plain Llama.
    """
    file = Path(path) / "config.json"
    if not file.is_file() and (Path(path) / "params.json").is_file():
        raise ValueError(f"{path}: a folder in Meta's own format; convert it first, by "
                         "transformers' convert_llama_weights_to_hf.py")
    values = CONFIG_DEFAULTS | read_json(file)
    if (kind := values.get("model_type")) not in ("llama", "mistral"):
        raise ValueError(f'{file}: expected a Llama (model_type "llama"), got {kind!r}')
    rope = {}  # newer files have all of it in `rope_parameters`
    for name in ("rope_parameters", "rope_scaling"):
        value = values.pop(name, None) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{file}: {name} must be an object or null, got {value!r}")
        rope |= value
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            values[name] = rope.pop(name)
    for name, plain in PLAIN_LLAMA.items():
        if values.get(name, plain) not in (plain, None):
            raise ValueError(f"{file}: {name} {values[name]!r} is not supported, only {plain!r}")
    if rope and rope.get("rope_type", rope.get("type")) != "default":
        values["rope_scaling"] = rope
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    try:
        config = LlamaConfig(**{name: value for name, value in values.items() if name in known})
        if config.sliding_window is not None:
            require(type(config.sliding_window) is int and config.sliding_window > 0,
                    f"sliding_window must be tokens or null, got {config.sliding_window!r}")
            config.extended(context or config.max_position_embeddings)  # refused beyond it
            config.max_position_embeddings = min(config.max_position_embeddings,
                                                 config.sliding_window)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return config


def load_model(path: str | Path, dtype: torch.dtype | None = None,
               context: int | None = None) -> Llama:
    """The Llama in a Hugging Face folder, in the file's dtype unless `dtype` is given, all frozen.

    In the file's dtype, weights stay mapped to their file: they cost time and memory when they are
    used. `context` as in `load_config`. Raises FileNotFoundError, and ValueError for
    anything that is not a Llama, is broken, or does not fit its config.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    config = load_config(path, context)
    with torch.device("meta"):
        model = Llama(config)
    loaded = {}
    for file in tensor_files(path, "model.safetensors", "pytorch_model.bin"):
        for name, tensor in read_tensors(file):
            if name in loaded:
                raise ValueError(f"{path}: {name[:200]} occurs twice")
            if not name.endswith("rotary_emb.inv_freq") and not (
                    name == HEAD and config.tie_word_embeddings):
                loaded[name] = tensor
    # A tied head is no parameter of its own.
    check_tensors(path, loaded, {name: p.shape for name, p in model.named_parameters()})
    for name, tensor in loaded.items():
        loaded[name] = tensor.to(dtype or tensor.dtype)
    model.load_state_dict(loaded, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.name_or_path = str(path)
    return model.requires_grad_(False)


def check_tensors(path: Path, tensors: Mapping[str, torch.Tensor],
                  shapes: Mapping[str, Iterable[int]], required: Iterable[str] | None = None
                  ) -> None:
    """Raises ValueError if `tensors` has a name or a shape that `shapes` does not have, or lacks
    one of `required` (None: of all)."""
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{path}: {name[:200]!r} is no weight of a model like this")
        if tuple(tensor.shape) != tuple(shapes[name]) or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} should be a float tensor of shape "
                             f"{tuple(shapes[name])}, got {tensor.dtype} of {tuple(tensor.shape)}")
    if missing := sorted(set(shapes if required is None else required) - set(tensors)):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first: {missing[0]}")


def save_model(model: Llama, path: str | Path, dtype: torch.dtype | None = None,
               state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write the model, LoRA merged, as a Hugging Face folder: config.json and model.safetensors, or
    shards of at most 5 GB with their index. In the model's own dtypes unless `dtype` is given.

    Updates are merged tensor by tensor on the way to the file; the model stays as it is.
    `state_dict` has the gathered weights of a model that is sharded over processes.
    """
    refuse_quantized(model)
    path, loras = Path(path), lora_layers(model)
    weights = state_dict or {name.replace(".base.", "."): p for name, p in model.named_parameters()
                             if "lora_" not in name}
    shards = [{}]
    for name, p in weights.items():
        empty = torch.empty(p.shape, dtype=dtype or p.dtype, device="meta")
        if shards[-1] and sum(e.nbytes for e in shards[-1].values()) + empty.nbytes > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = empty

    def get(name: str) -> torch.Tensor:
        lora, kind = loras.get(name.removesuffix(".weight")), dtype or weights[name].dtype
        return weights[name].to(kind) if lora is None else lora.merged(kind)

    path.mkdir(parents=True, exist_ok=True)
    index, files, n = path / "model.safetensors.index.json", {}, len(shards)
    if n > 1:
        index.unlink(missing_ok=True)  # no folder may mix the shards of two saves
    for i, shard in enumerate(shards, 1):
        file = "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"
        write_safetensors(path / file, shard, get)
        files |= dict.fromkeys(shard, file)
    if n > 1:
        total = sum(empty.nbytes for shard in shards for empty in shard.values())
        write_json(index, {"metadata": {"total_size": total}, "weight_map": files})
    stored = str(dtype or weights["model.norm.weight"].dtype).removeprefix("torch.")
    write_json(path / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        **dataclasses.asdict(model.config), "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "torch_dtype": stored})
    for old in path.glob("model*.safetensors*"):  # of an earlier save in another number of shards
        if old.name not in files.values() and (n == 1 or old != index):
            old.unlink()


# Beside the weights: the tokenizer, and settings of generation.
COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
              "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def copy_companions(source: str | Path, out: Path) -> None:
    for file in (Path(source) / name for name in COMPANIONS):
        if file.is_file():
            replace_file(out / file.name, lambda temporary: shutil.copyfile(file, temporary))


def merge(base: str | Path, adapter: str | Path | None, out: str | Path,
          dtype: torch.dtype | None = None, context: int | None = None,
          rope: str | None = None) -> None:
    """Write the Hugging Face folder `out`: `base` with `adapter` merged, extended to `context` by
    `rope` if that is given. In the base's dtypes unless `dtype` is given. Complete or absent.

    Raises ValueError if `out` exists, and as `load_model` and `load_adapter` do.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: name a folder that does not")
    model = load_model(base, context=context)
    stored = {name: p.dtype for name, p in model.named_parameters()}
    if adapter is not None:
        load_adapter(model, adapter, context, rope)
    elif context:
        model.extend(context, rope)
    if dtype is None:
        for name, p in model.named_parameters():
            p.data = p.data.to(stored.get(name, p.dtype))
    temporary = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        save_model(model, temporary, dtype)
        for source in filter(None, (base, adapter)):  # the adapter's own tokenizer comes last
            copy_companions(source, temporary)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# Adapters: PEFT's, and those released with the paper

# PEFT's `modules_to_save`: what may be trainable beside LoRA.
SAVED_MODULES = {"embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"}
# Fields of adapter_config.json that are implemented here or do not change the mathematics. All
# others must be false or empty, or as in HARMLESS.
IMPLEMENTED = set(
    "peft_type r lora_alpha target_modules exclude_modules layers_to_transform layers_pattern "
    "modules_to_save rank_pattern alpha_pattern use_rslora lora_dropout task_type "
    "base_model_name_or_path revision inference_mode auto_mapping peft_version megatron_core "
    "qalora_group_size eva_config".split())
HARMLESS = {"bias": ["none"], "init_lora_weights": [True, "gaussian", "orthogonal", "eva"]}


def lora_layers(model: Llama) -> dict[str, LoRALinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def save_adapter(model: Llama, path: str | Path,
                 state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write LoRA and the other trainable parameters as a PEFT adapter: adapter_config.json,
    adapter_model.safetensors, and longlora.json with what PEFT has no field for: {"context":
    tokens, "factor": interpolation factor, "rope": its rule}.

    `state_dict` has the gathered trainable weights of a model that is sharded over processes.
    Raises ValueError if the model has no LoRA, or trains more than an adapter can hold.
    """
    trained = state_dict or {name: p for name, p in model.named_parameters()
                             if p.requires_grad or "lora_" in name}
    loras = lora_layers(model)
    others = {name.split(".")[-2] for name in trained if "lora_" not in name}
    if not loras or not others <= SAVED_MODULES:
        raise ValueError("an adapter holds LoRA, embedding and norms; this model has other "
                         "trainable parameters: save_model(model, path)")
    ranks = {name: lora.lora_A.out_features for name, lora in loras.items()}
    alphas = {name: loras[name].scaling * rank for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    leaves = {name.split(".")[-1] for name in loras}
    everywhere = all(name in loras for name, _ in model.named_modules()
                     if name.split(".")[-1] in leaves)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(path / "adapter_model.safetensors",
                      {f"base_model.model.{name}": p for name, p in trained.items()})
    rope, factor = model.config.interpolation
    facts = {"context": model.config.max_position_embeddings, "factor": factor, "rope": rope}
    if is_quantized(model):
        facts["quantize"] = "nf4"
    write_json(path / "longlora.json", facts)
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None), "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(leaves if everywhere else loras),
        "modules_to_save": sorted(others) or None})


def load_adapter(model: Llama, path: str | Path, context: int | None = None,
                 rope: str | None = None) -> None:
    """Put a PEFT adapter, or one released with the paper, onto `model`, in place.

    The adapter's weights become float32 and trainable: call a bfloat16 model under autocast, or
    convert all of it by `model.to(dtype)`. LoRA of the head is merged into it. If the adapter has
    more vocabulary rows than the model in embedding or head, the other's new rows are the mean of
    its old ones. The window becomes that of longlora.json, then it is extended to `context` tokens
    by `rope` if that is given (released adapters do not record their context length). Raises
    FileNotFoundError, and ValueError if the adapter is not supported or does not fit the model; the
    model is then unchanged.
    """
    path = Path(path)
    refuse_lora(model, "merge_lora(model) first")
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, (nn.Linear, NF4Linear))}
    tensors, loras = read_adapter(path, linears)
    config = adapter_window(path, model.config, context, rope)
    rows = max([config.vocab_size] + [tensors[name].shape[:1].numel() for name in (EMBED, HEAD)
                                      if name in tensors])
    shapes = {name: p.shape for name, p in model.named_parameters()}
    shapes |= dict.fromkeys((EMBED, HEAD), (rows, config.hidden_size))
    updates = {}
    for layer, (rank, _) in loras.items():
        out_features = rows if layer == "lm_head" else linears[layer].out_features
        updates[f"{layer}.lora_A.weight"] = (rank, linears[layer].in_features)
        updates[f"{layer}.lora_B.weight"] = (out_features, rank)
    foreign = sorted(tensors.keys() - shapes.keys() - updates.keys())
    if foreign and (path / "trainable_params.bin").is_file():
        warnings.warn(f"{path}: {len(foreign)} weights are not of this model and are left out, the "
                      f"first: {foreign[0][:200]}", stacklevel=2)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in foreign}
    check_tensors(path, tensors, shapes | updates, required=updates)

    # All is checked: from here on the model changes.
    model.model.config = config
    if {EMBED, HEAD} & tensors.keys() or "lm_head" in loras:
        untie_lm_head(model)
    if rows > config.vocab_size:
        resize_token_embeddings(model, rows)
    for layer, (rank, scaling) in loras.items():
        device = next(iter(linears[layer].state_dict().values())).device
        A, B = (tensors.pop(f"{layer}.lora_{x}.weight").to(device, torch.float32, copy=True)
                for x in "AB")
        if layer == "lm_head":
            W = tensors.get(HEAD, model.lm_head.weight).to(device)
            tensors[HEAD] = W.float().addmm(B, A, alpha=scaling)
            continue
        lora = LoRALinear(linears[layer], rank, scaling * rank, torch.float32)
        lora.lora_A.weight.data, lora.lora_B.weight.data = A, B
        parent, _, leaf = layer.rpartition(".")
        setattr(model.get_submodule(parent), leaf, lora)
    for name, p in model.named_parameters():
        plain = name.replace(".base.", ".")
        if plain in tensors:
            p.data = tensors[plain].to(p.device, torch.float32, copy=True)
        p.requires_grad_(plain in tensors or "lora_" in name)


def read_adapter(path: Path, linears: Iterable[str]
                 ) -> tuple[dict[str, torch.Tensor], dict[str, tuple[int, float]]]:
    """An adapter's tensors under the model's names; and rank and scaling of those of the model's
    `linears` that have LoRA. Raises FileNotFoundError, and ValueError for what is not supported."""
    file, tensors = path / "adapter_config.json", {}
    config = read_json(file)
    if (kind := config.get("peft_type")) != "LORA":
        raise ValueError(f"{file}: peft_type {kind!r} is not supported, only 'LORA'")
    for name, value in config.items():
        if value and name not in IMPLEMENTED and value not in HARMLESS.get(name, []):
            raise ValueError(f"{file}: {name} {value!r} is not supported")
    files = tensor_files(path, "adapter_model.safetensors", "adapter_model.bin")
    if (released := path / "trainable_params.bin").is_file():
        files.append(released)
    for name, tensor in (pair for each in files for pair in read_tensors(each)):
        # PEFT's names of the adapter and of its wrappers, in files that kept them
        name = re.sub(r"\.(default|modules_to_save|base_layer)(?=\.)", "",
                      name.removeprefix("base_model.model."))
        if "lora_embedding_" in name:
            raise ValueError(f"{path}: LoRA on {name.split('.lora_')[0]} is not supported: merge "
                             "the adapter by PEFT")
        if not name.endswith("rotary_emb.inv_freq"):
            tensors.setdefault(name, tensor)

    found = {name.split(".lora_")[0] for name in tensors if ".lora_" in name}
    targets, saved = config.get("target_modules"), config.get("modules_to_save") or []
    if isinstance(targets, list) and not (
            config.get("layers_to_transform") or config.get("exclude_modules")):
        found = {name for name in linears
                 if any(f".{name}".endswith(f".{target}") for target in targets)}
    loras = {name: rank_and_scaling(file, config, name) for name in linears if name in found}
    if not loras:
        raise ValueError(f"{file}: target_modules {targets!r} names no layer of this model")
    if not isinstance(saved, list):
        raise ValueError(f"{file}: modules_to_save must be a list of names or null")
    for module in saved:
        if type(module) is not str or not any(name.endswith(f"{module}.weight")
                                              for name in tensors):
            raise ValueError(f"{file}: modules_to_save has {module!r}, but no file has its weights")
    return tensors, loras


def rank_and_scaling(file: Path, config: dict, layer: str) -> tuple[int, float]:
    """A layer's rank and the scaling of its update: alpha / rank, or alpha / sqrt(rank) (rsLoRA).
    Raises ValueError."""

    def value(field: str, pattern_field: str) -> object:
        patterns = config.get(pattern_field) or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"{file}: {pattern_field} must be an object, got {patterns!r}")
        for pattern, special in patterns.items():
            if not re.fullmatch(r"\^?[\w.]+\$?", pattern):
                raise ValueError(f"{file}: {pattern_field} {pattern[:100]!r} is not supported, "
                                 "only names of layers and their ends")
            if f".{layer}".endswith(f".{pattern.strip('^$')}"):
                return special
        return config.get(field)

    rank, alpha = value("r", "rank_pattern"), value("lora_alpha", "alpha_pattern")
    if type(rank) is not int or not 1 <= rank < 1 << 31 or not (
            type(alpha) in (int, float) and abs(alpha) < 1e30):
        raise ValueError(f"{file}: expected numbers as r and lora_alpha of {layer}, got {rank!r} "
                         f"and {alpha!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapter_window(path: Path, config: LlamaConfig, context: int | None,
                   rope: str | None) -> LlamaConfig:
    """`config` with the window of the adapter's longlora.json, extended to `context` if given."""
    file = path / "longlora.json"
    if file.exists():
        values = read_json(file)
        trained, factor = values.get("context"), values.get("factor")
        if type(trained) is not int or not 0 < trained < 1 << 31:
            raise ValueError(f"{file}: expected a context in tokens, got {trained!r}")
        own_rope = values.get("rope", "linear")  # before there was a choice it was linear
        if own_rope not in (None, *INTERPOLATIONS):
            raise ValueError(f"{file}: expected linear or yarn as rope, got {own_rope!r}")
        config = config.extended(trained, own_rope)
        if config.interpolation[1] != factor:
            raise ValueError(f"{file}: trained with positions interpolated by {factor!r}, but "
                             f"{trained} tokens of this model take "
                             f"{config.interpolation[1]:g}: it belongs to another base")
    elif context is None and (path / "trainable_params.bin").exists():
        warnings.warn(f"{path} does not record its context length: without one, positions stay as "
                      "the base has them", stacklevel=3)
    return config.extended(context, rope) if context else config


def resize_token_embeddings(model: Llama, rows: int) -> None:
    """Let embedding and head have `rows` rows, the new ones the mean of the old."""
    for module in (model.model.embed_tokens, model.lm_head):
        W = module.weight.detach()
        mean = W.mean(0, keepdim=True, dtype=torch.float32).to(W.dtype)
        module.weight = nn.Parameter(torch.cat([W, mean.expand(rows - len(W), -1)]))
    model.model.config = dataclasses.replace(model.config, vocab_size=rows)


# ==================================================================================================


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Scripts run inside this: bad input ends in one line and exit status 2. With TRACEBACK=1 in
    the environment it ends in a traceback, for those who change the code."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("TRACEBACK"):
            raise
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of a machine says it
            text = " ".join(str(error).split())[:1000]
            print(f"{Path(sys.argv[0]).name}: error: {text}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


def main() -> None:
    if len(sys.argv) == 1:
        print("LongLoRA in one file: S2-Attn, LoRA+, position interpolation, and the Llama that "
              "they change.\nRead it from the top; the method ends at the banner \"Files\". "
              "train.py uses it: python train.py.\nThis file itself can only merge: python "
              "longlora.py merge --help")
        return
    parser = argparse.ArgumentParser(description="Write a Llama, with or without an adapter merged "
                                     "into it, as a Hugging Face folder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("merge", help="merge an adapter into its base")
    sub.add_argument("--model", required=True, help="folder of the base")
    sub.add_argument("--adapter", help="folder of the adapter (without: the base is written anew)")
    sub.add_argument("--out", required=True, help="folder to make")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                     help="dtype of the written weights (as in the base)")
    sub.add_argument("--extend", type=int, metavar="TOKENS", help="interpolate positions to this "
                     "many tokens (as the adapter records; released adapters do not)")
    sub.add_argument("--rope", choices=INTERPOLATIONS, help="the rule of --extend (linear)")
    args = parser.parse_args()
    if args.extend is not None and args.extend < 1:
        raise ValueError(f"--extend must be at least 1, got {args.extend}")
    if args.rope and not args.extend:
        raise ValueError("--rope is the rule of --extend TOKENS, which is not given")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    merge(args.model, args.adapter, args.out, dtype, args.extend, args.rope)
    facts = Path(args.adapter or "", "longlora.json")
    if args.adapter and facts.exists() and "quantize" in read_json(facts):
        print("The adapter was trained on this base in 4 bits (nf4); it is merged into the "
              "original weights, which differ a little from those")
    print(f"Written to {args.out}. Next:\n  python eval.py perplexity --model {args.out}")


if __name__ == "__main__":
    with one_line_errors():
        main()
