"""LongLoRA: extend the context window of a pretrained Llama cheaply.

The paper is Chen et al., ICLR 2024 (arXiv 2309.12307). Three ideas, in the order of this file:

1. Position interpolation (Section 3.1, after Chen et al. 2023): to read T tokens with a model that
   was pretrained on fewer, rotate queries and keys by position / factor, so that no angle is seen
   that pretraining did not see.
2. Shifted sparse attention, S2-Attn (Section 3.2): in training only, attend inside groups of G
   tokens. In half of the heads the groups are shifted by G/2, so information still flows between
   neighbouring groups. Cost grows with T * G, not T * T.
3. LoRA+ (Section 3.3): LoRA on the attention projections, and the embedding and all norms trained
   too. They are 2% of the parameters and close the gap to full fine-tuning.

At inference the model is an ordinary Llama with full attention.

Letters: B batch, T tokens, C width (hidden_size), H heads, D head size, G group size, V vocabulary.
Weights and config fields have Hugging Face's names, so that files load without a table of names.
"""
import argparse
import dataclasses
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.formats import (read_adapter, read_config, read_json, read_model, replace_file,
                          write_json, write_safetensors)
from data.nf4 import NF4Linear
from data.recompute import ChunkedNorm, ChunkedRotation, RecomputedBlock

# --------------------------------------------------------------------------------------------------
# The model's shape


# The numbers of each `rope_scaling` that the model knows.
ROPE_SCALINGS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass
class LlamaConfig:
    """Hugging Face's `LlamaConfig`, as far as this model goes. The defaults are Llama-2-7B's.

    `max_position_embeddings` is the window in tokens. `rope_scaling` is None, {"rope_type":
    "linear", "factor": f}, or Llama 3's own ("llama3"). `sliding_window` is a Mistral's: up to so
    many tokens it is a Llama. Raises ValueError on sizes that do not fit.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: as many as there are heads
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
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            most = 1000 if name == "num_hidden_layers" else 1 << 31
            if type(value) is not int or not 1 <= value < most:
                raise ValueError(f"config: {name} must be a positive integer below {most}, "
                                 f"got {value!r}")
        H, H_kv = self.num_attention_heads, self.num_key_value_heads
        if H % H_kv:
            raise ValueError(f"config: num_attention_heads ({H}) must be a multiple of "
                             f"num_key_value_heads ({H_kv})")
        if self.head_dim is None:
            if self.hidden_size % H:
                raise ValueError(f"config: hidden_size ({self.hidden_size}) must be a multiple of "
                                 f"num_attention_heads ({H}), or head_dim be given")
            self.head_dim = self.hidden_size // H
        D = self.head_dim
        if type(D) is not int or D < 2 or D % 2:
            raise ValueError(f"config: head_dim must be even (rotary pairs), got {self.head_dim!r}")
        if max(H * D, self.hidden_size, self.intermediate_size) >= 1 << 24:
            raise ValueError(f"config: hidden_size {self.hidden_size}, intermediate_size "
                             f"{self.intermediate_size} or {H} heads of {D} are no model's")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < 1e30:
                raise ValueError(f"config: {name} must be a positive number, got {value!r}")
        for name in ("bos_token_id", "eos_token_id"):  # Llama 3 has several of the latter
            value = getattr(self, name)
            ids = value if isinstance(value, list) else [value]
            if not all(id is None or type(id) is int and abs(id) < 1 << 31 for id in ids):
                raise ValueError(f"config: {name} must be a token id, a list of them or null")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError("config: tie_word_embeddings must be true or false, "
                             f"got {self.tie_word_embeddings!r}")
        if self.rope_scaling is not None:
            self.rope_scaling = self.checked_scaling(self.rope_scaling)

    @staticmethod
    def checked_scaling(scaling: dict) -> dict:
        """`rope_scaling` in its newer spelling (`rope_type`, not `type`). Raises ValueError."""
        scaling = scaling if isinstance(scaling, dict) else {"rope_type": scaling}
        kind = scaling.get("rope_type", scaling.get("type"))
        names = ROPE_SCALINGS.get(kind, ()) if isinstance(kind, str) else ()
        values = [scaling.get(name) for name in names]
        if (not names or not all(type(v) in (int, float) and 0 < v < 1e30 for v in values)
                or values[0] < 1 or kind == "llama3" and values[1] >= values[2]):
            raise ValueError('config: rope_scaling must be {"rope_type": "linear", "factor": at '
                             f'least 1}}, Llama 3\'s ("llama3"), or null, got {scaling!r}')
        return {"rope_type": kind, **dict(zip(names, values)), "factor": float(values[0])}

    @property
    def interpolation_factor(self) -> float:
        """How much positions are compressed: the linear factor of `rope_scaling`, 1 without it."""
        linear = self.rope_scaling and self.rope_scaling["rope_type"] == "linear"
        return self.rope_scaling["factor"] if linear else 1.0

    def extended(self, context: int) -> "LlamaConfig":
        """This config with a window of `context` tokens, by position interpolation (Section 3.1).

        The factor is ceil(context / window), times the factor that the model already has. No change
        if it fits already. Raises ValueError beyond a sliding window, and for Llama 3's own
        scaling: nobody could read a file that has both.
        """
        reach = self.sliding_window
        if reach is not None and not (type(reach) is int and context <= reach):
            raise ValueError(f"sliding_window {reach!r} is shorter than a context of {context}, "
                             "and beyond it this is no plain Llama; ask for less")
        if context <= self.max_position_embeddings:
            return self
        if self.rope_scaling and self.rope_scaling["rope_type"] == "llama3":
            raise ValueError(f"this model's positions are scaled already (llama3): it reads "
                             f"{self.max_position_embeddings} tokens and cannot be interpolated "
                             f"to {context}, because no config has words for both")
        factor = math.ceil(context / self.max_position_embeddings) * self.interpolation_factor
        scaling = {"rope_type": "linear", "factor": factor}
        return dataclasses.replace(self, max_position_embeddings=context, rope_scaling=scaling)


def default_group_size(context: int, groups: int = 4) -> int:
    """G for a training context: a quarter (Section 3.2), rounded up to an even number."""
    return 2 * math.ceil(context / (2 * groups))


# --------------------------------------------------------------------------------------------------
# Norm and rotary positions


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The statistics in float32, the result in the residual stream's dtype.
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return ChunkedNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)  # one kernel


def rotary_tables(config: LlamaConfig,
                  positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles at `positions` (T,), both (T, 1, D/2), float32 (Section 3.1).

    Interpolation happens here and nowhere else: positions are divided by the factor. float32
    always: in bf16 the positions 257 and 258 are the same number.
    """
    D, scaling = config.head_dim, config.rope_scaling
    even = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32)
    frequency = config.rope_theta ** (-even / D)
    if scaling and scaling["rope_type"] == "llama3":
        # Llama 3.1 divides slow pairs by the factor, leaves fast ones, and blends in between.
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        fast = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (fast + (1 - fast) / scaling["factor"])
    angle = torch.outer(positions.float() / config.interpolation_factor, frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, H, D) by its positions. Pairs are halves (i, i + D/2), not neighbours
    (2i, 2i + 1) as in Meta's files: a wrong pairing silently ruins loaded weights."""
    if not torch.compiler.is_compiling():
        return ChunkedRotation.apply(x, cos, sin)
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Attention


Before = Callable[[torch.Tensor, int], torch.Tensor]


def shifted_sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int,
                             shift: bool = True, before: Before | None = None) -> torch.Tensor:
    """S2-Attn (Section 3.2, Figure 3): causal attention inside groups, shifted by half a group in
    half of the heads.

    q is (B, H, T, D); k and v are (B, H_kv, T, D); returns (B, H, T, D). Query t sees key u iff
    u <= t and both lie in the same group, t // G in the first half of the heads, (t + G/2) // G in
    the second. With `shift=False` all heads are as the first half (the paper's ablation, Table 6).
    T need not be a multiple of G. Where the T tokens are a part of a longer sequence that starts
    with whole groups, `before(x, G/2)` puts in front of a shifted key or value (B, h, T, D) those
    of the G/2 tokens before it, if there are any. Raises ValueError if G or H is odd.

        T = 8, G = 4   heads of the first half       heads of the second half
                       keys 0 1 2 3 4 5 6 7          keys 0 1 2 3 4 5 6 7
            query 0         #                             #
                  1         # #                           # #
                  2         # # #                             #             a group of G/2 opens,
                  3         # # # #                           # #           so nothing wraps around
                  4                 #                         # # #         and no query sees
                  5                 # #                       # # # #       the future
                  6                 # # #                             #
                  7                 # # # #                           # #
    """
    H, H_kv, G = q.shape[1], k.shape[1], group_size
    if G < 2 or G % 2:
        raise ValueError(f"the group size must be even and at least 2, got {G}")
    if not shift:
        return grouped_attention(q, k, v, G, 0)
    if H % 2:
        raise ValueError(f"shifting half of the heads needs an even number of them, got {H}")
    n = (H_kv + 1) // 2  # key-value heads for each half of the heads; they share one if H_kv is odd
    q1, q2 = q.chunk(2, dim=1)
    if H_kv % 2:
        (k1, v1), (k2, v2) = (k[:, :n], v[:, :n]), (k[:, -n:], v[:, -n:])
    else:  # the same, but in the backward pass slices would cost zeros for all heads, and a sum
        (k1, k2), (v1, v2) = k.chunk(2, dim=1), v.chunk(2, dim=1)
    if before:
        k2, v2 = before(k2, G // 2), before(v2, G // 2)
    if H_kv % 2:
        k1, v1 = (x.repeat_interleave(H // H_kv, dim=1)[:, :H // 2] for x in (k1, v1))
        k2, v2 = (x.repeat_interleave(H // H_kv, dim=1)[:, -H // 2:] for x in (k2, v2))
    out = grouped_attention(q1, k1, v1, G, first=0)
    if extra := k2.shape[2] - q2.shape[2]:  # keys before the first query: it gets dummies there
        q2 = F.pad(q2, (0, 0, extra, 0))
    shifted = grouped_attention(q2, k2, v2, G, first=0 if extra else G // 2)[:, :, extra:]
    return joined([out, shifted], dim=1)


def grouped_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, G: int,
                      first: int) -> torch.Tensor:
    """Causal attention inside groups of G tokens; the first group has `first` tokens (0: all are
    whole), the last the rest.

    Groups go to the batch dimension, so that each is one row of a plain causal call and the flash
    kernels run. Inputs that lie in memory as (B, T, H, D) give views there, not copies (as long as
    B is 1 or the groups fill T).
    """
    B, _, T, _ = q.shape
    first = min(first, T)
    whole = (T - first) // G * G
    spans = [t for t in (first, whole, T - first - whole) if t]
    # To split costs a copy in the backward pass: where whole groups fill T, it is left out.
    pieces = zip(*(x.split(spans, dim=2) for x in (q, k, v))) if len(spans) > 1 else [(q, k, v)]
    out = []
    for qkv in pieces:
        n = max(1, qkv[0].shape[2] // G)  # all whole groups at once, or one that is shorter
        # (B, H, n * g, D) -> (B * n, H, g, D)
        o = causal_attention(*(x.unflatten(2, (n, -1)).transpose(1, 2).flatten(0, 1) for x in qkv))
        out.append(o.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3))
    return joined(out, dim=2)


def joined(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
    """torch.cat of (B, H, T, D) that lie in memory as (B, T, H, D), so that the result does too."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([x.transpose(1, 2) for x in parts], dim=3 - dim).transpose(1, 2)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full causal attention: q (B, H, T, D), k and v (B, H_kv, S, D); returns (B, H, T, D). The
    queries are those of the last T of S tokens (S > T: keys that were kept in generation)."""
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda and q.dtype == torch.float32:
        # Flash takes no float32 there, and the kernel that does takes no grouped heads.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        gqa = False
    T, S = q.shape[2], k.shape[2]
    mask = None if T == S else causal_lower_right(T, S)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S, enable_gqa=gqa)


def packed_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int],
                     attentions: list[Callable[..., torch.Tensor]]) -> torch.Tensor:
    """Sequences end to end in one row, each of which attends to itself alone, by an attention of
    its own: no mask, and nothing is padded. q (B, H, T, D), k and v (B, H_kv, T, D); `lengths` add
    up to T; returns (B, H, T, D)."""
    sequences = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), attentions, strict=True)
    return joined([attention(*qkv) for *qkv, attention in sequences], dim=2)


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

    def project(self, x: torch.Tensor, cos: torch.Tensor,
                sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # (B, T, C) -> (B, T, H, D): heads stay behind tokens, so that groups of tokens are views
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        return rotate(q, cos, sin), rotate(k, cos, sin), v

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                attention: Callable[..., torch.Tensor]) -> torch.Tensor:
        out = attention(*(y.transpose(1, 2) for y in self.project(x, cos, sin)))
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(self.gate_proj(x)) * self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.hidden(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
               attention: Callable[..., torch.Tensor]) -> torch.Tensor:
        return x + self.self_attn(self.input_layernorm(x), cos, sin, attention)

    def think(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
                attention: Callable[..., torch.Tensor], keep: bool | None = None) -> torch.Tensor:
        """`keep`: None keeps all activations, else see `RecomputedBlock`."""
        if keep is not None and torch.is_grad_enabled():
            return RecomputedBlock.apply(x, self, cos, sin, attention, keep, *self.parameters())
        return self.think(self.attend(x, cos, sin, attention))


class Decoder(nn.Module):
    """Everything below the head: tokens (B, T) to hidden states (B, T, C). Without `group_size` all
    layers attend by `attention`, one after the other (a cache of keys and values is one)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        # nn.Embedding's own random numbers would cost a second of imports on the meta device.
        table = torch.empty(config.vocab_size, config.hidden_size).uniform_(-1, 1)
        self.embed_tokens = nn.Embedding(*table.shape, _weight=table)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False  # keep each layer's input alone, and attention's output,
        self.recompute_attention = False  # or not even that

    def forward(self, tokens: torch.Tensor, group_size: int | list[int] | None = None,
                shift: bool = True, start: int | list[int] = 0, before: Before | None = None,
                lengths: list[int] | None = None,
                attention: Callable[..., torch.Tensor] = causal_attention) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # A float32 embedding would make the residual stream float32, and so every checkpoint.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        lengths = lengths or [tokens.shape[1]]
        starts, groups = ([value] * len(lengths) if not isinstance(value, list) else value
                          for value in (start, group_size))
        if sum(lengths) != tokens.shape[1]:
            raise ValueError(f"sequences of {lengths} tokens do not make {tokens.shape[1]}")
        cos, sin = rotary_tables(self.config, torch.cat(
            [torch.arange(s, s + n, device=x.device) for s, n in zip(starts, lengths)]))
        attentions = [attention if G is None else partial(
            shifted_sparse_attention, group_size=G, shift=shift, before=before) for G in groups]
        attention = attentions[0] if len(lengths) == 1 else partial(
            packed_attention, lengths=lengths, attentions=attentions)
        keep = not self.recompute_attention if self.checkpointing else None
        for layer in self.layers:
            x = layer(x, cos, sin, attention, keep)
        return self.norm(x)


class Llama(nn.Module):
    """Llama. Full attention is the default; S2-Attn is set by the call, never by `self.training`.

    `model(tokens)` gives logits (B, T, V); `model(tokens, targets)` the mean loss over the targets
    that are not -100, where targets[b, t] is the token that follows tokens[b, t], or with
    `mean=False` the loss of each (B, T), 0 where the target is -100. With `group_size` attention is
    S2-Attn (`shift=False`: local groups). If the tokens are a part of a longer sequence, `start` is
    the first one's position, and `before` as in `shifted_sparse_attention`.

    Rows may be several sequences end to end, of `lengths` tokens each: none sees another, each has
    its own positions, and `group_size` and `start` may be lists with one for each. With
    `logits_to_keep`, places (N,) in a row, logits or losses are of these alone, and so `targets`
    (B, N) are. Raises ValueError if `lengths` do not add up to T.

    With `model.model.checkpointing = True` each layer is computed again in the backward pass
    instead of keeping its activations, but for its attention, or (`model.model.recompute_attention
    = True`) with it.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                group_size: int | list[int] | None = None, shift: bool = True,
                start: int | list[int] = 0, before: Before | None = None, mean: bool = True,
                lengths: list[int] | None = None,
                logits_to_keep: torch.Tensor | None = None) -> torch.Tensor:
        x = self.model(tokens, group_size, shift, start, before, lengths)
        if logits_to_keep is not None:
            x = x[:, logits_to_keep]  # the head is not for the others
        if targets is None:
            return self.lm_head(x)
        return chunked_loss(x, self.lm_head.weight, targets, mean)

    def extend(self, context: int) -> None:
        """Interpolate positions so that `context` tokens fit the window (Section 3.1); see
        `LlamaConfig.extended`."""
        self.config = self.model.config = self.config.extended(context)

    def reset_parameters(self) -> None:
        """Random weights, as GPT-2 has them: std 0.02, the projections into the residual stream
        scaled by its depth."""
        for name, p in self.named_parameters():
            if p.dim() == 1:
                nn.init.ones_(p)
            else:
                deep = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if deep else 0.02
                nn.init.normal_(p, std=std)


# --------------------------------------------------------------------------------------------------
# The loss


LOSS_CHUNK = 512  # tokens whose logits exist at one time: 125 MiB in float32 at V = 32,000


def chunked_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                 mean: bool = True) -> torch.Tensor:
    """Mean cross-entropy of the head's logits, in chunks of tokens; 0 where every target is -100.
    With `mean=False` that of each token, (B, T), for use without gradients.

    x (B, T, C), weight (V, C), targets (B, T). All logits at once would be the largest tensor of
    the run by far: at T = 100,000 and V = 32,000 they take 12 GiB in float32, and their gradient as
    much again.
    """
    shape, x, targets = targets.shape, x.flatten(0, 1), targets.flatten()

    def chunk_loss(x, targets, reduction):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction=reduction)

    chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    if not mean:
        return torch.cat([chunk_loss(*chunk, "none") for chunk in chunks]).view(shape)
    count = (targets != -100).sum().clamp(min=1)
    if not weight.requires_grad:
        return FrozenHeadLoss.apply(x, weight, targets) / count
    return sum(checkpoint(chunk_loss, *chunk, "sum", use_reentrant=False)
               for chunk in chunks) / count


class FrozenHeadLoss(torch.autograd.Function):
    """The summed loss under a frozen head. Its only gradient is dL/dx, so the forward pass makes it
    from each chunk's logits while they exist, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = torch.zeros((), device=x.device)
        ctx.grad = torch.empty_like(x) if x.requires_grad else None
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            label, scored = targets[chunk].clamp(min=0), targets[chunk] != -100
            logits = F.linear(x[chunk], weight).float()
            top, place = logits.max(-1, keepdim=True)
            right = logits.gather(1, label[:, None])
            p = torch.softmax(logits, -1, out=logits)  # in place: the largest tensor of the run
            total += ((top - right - p.gather(1, place).log())[:, 0] * scored).sum()
            if ctx.grad is not None:  # softmax - one-hot, through the head
                grad = p.to(x.dtype) @ weight.to(x.dtype) - weight[label].to(x.dtype)
                ctx.grad[chunk] = grad * scored[:, None]
        return total

    @staticmethod
    def backward(ctx, scale):
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(scale.to(grad.dtype)), None, None


# --------------------------------------------------------------------------------------------------
# 4-bit weights for what is frozen; what they are is in data/nf4.py


def count_weights(model: nn.Module) -> int:
    """Parameters, those in 4 bits too."""
    packed = sum(2 * m.codes.numel() for m in model.modules() if isinstance(m, NF4Linear))
    return packed + sum(p.numel() for p in model.parameters())


def is_quantized(model: Llama) -> bool:
    return any(isinstance(module, NF4Linear) for module in model.modules())


def refuse_quantized(model: Llama) -> None:
    if is_quantized(model):
        raise ValueError("4-bit weights are only to train on: save the adapter, and merge it into "
                         "the original base")


def quantize(model: Llama, dtype: torch.dtype, device: str | torch.device | None = None) -> None:
    """Replace every linear layer below the head by an NF4Linear that computes in `dtype`, one after
    the other, on `device` (None: where the weight is). Raises ValueError if the model has LoRA:
    that comes afterwards."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA already: quantize it first, then add_lora(model)")
    for parent in list(model.model.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(parent, name, NF4Linear(linear.weight.to(device), dtype))


# --------------------------------------------------------------------------------------------------
# LoRA and LoRA+

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """A linear layer W with a low-rank update: W x + (alpha / r) B A x (Hu et al. 2021).

    A (r, in) is random and B (out, r) zero, so training starts from the pretrained model. B A, as
    large as W, is never formed here: that memory is what LoRA exists to save.
    """

    def __init__(self, linear: nn.Linear | NF4Linear, rank: int, alpha: float,
                 dtype: torch.dtype | None = None):
        super().__init__()
        out_features, in_features = linear.out_features, linear.in_features
        self.quantized = linear if isinstance(linear, NF4Linear) else None
        self.weight = None if self.quantized else linear.weight
        device = next(iter(linear.state_dict().values())).device
        place = {"device": device, "dtype": dtype or linear.weight.dtype}
        self.lora_A = nn.Linear(in_features, rank, bias=False, **place)  # initialised by nn.Linear
        self.lora_B = nn.Linear(rank, out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.quantized(x) if self.quantized else F.linear(x, self.weight)
        low = self.lora_A(x) * self.scaling
        B = self.lora_B.weight.to(out.dtype)  # in place, autocast would not
        return out.flatten(0, -2).addmm_(low.flatten(0, -2), B.T).view_as(out)

    @torch.no_grad()
    def merged(self, dtype: torch.dtype) -> torch.Tensor:
        """W + (alpha / r) B A (out, in), added in float32."""
        return with_update(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling, dtype)


def with_update(W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, scaling: float,
                dtype: torch.dtype) -> torch.Tensor:
    return W.float().addmm(B.float(), A.float(), alpha=scaling).to(dtype)


def add_lora(model: Llama, rank: int = 8, alpha: float = 16,
             targets: Iterable[str] = ATTENTION_PROJECTIONS,
             dtype: torch.dtype | None = None) -> None:
    """Replace every linear layer below the head whose name is in `targets` by a LoRALinear, in
    place (Section 3.3). A and B have the layer's dtype unless told.

    Raises ValueError if `rank` is below 1, a target matches no layer, or LoRA is there already.
    """
    if rank < 1:
        raise ValueError(f"LoRA's rank must be at least 1, got {rank}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA already: merge_lora(model) first")
    found = {target: [parent for parent in model.model.modules()
                      if isinstance(getattr(parent, target, None), (nn.Linear, NF4Linear))]
             for target in targets}
    for target, parents in found.items():
        if not parents:
            raise ValueError(f"LoRA target {target!r} matches no linear layer of the model")
    for target, parents in found.items():
        for parent in parents:
            setattr(parent, target, LoRALinear(getattr(parent, target), rank, alpha, dtype))


def merge_lora(model: Llama) -> None:
    """Fold every LoRA update into its weight, in place. Raises ValueError on 4-bit weights."""
    refuse_quantized(model)
    for parent in list(model.modules()):
        for name, lora in list(parent.named_children()):
            if isinstance(lora, LoRALinear):
                out_features, in_features = lora.weight.shape
                linear = nn.Linear(in_features, out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(lora.merged(lora.weight.dtype),
                                             requires_grad=lora.weight.requires_grad)
                setattr(parent, name, linear)


def trainable_parts(trainable: str) -> set[str]:
    """{"full"}, or some of "lora", "embed", "norm", from a text with commas. Raises ValueError."""
    parts = set(trainable.split(","))
    if not parts <= {"lora", "embed", "norm"} and parts != {"full"}:
        raise ValueError('trainable must be "full" or some of lora, embed, norm, joined by commas; '
                         f"got {trainable!r}")
    return parts


def set_trainable(model: Llama, trainable: str) -> None:
    """Choose what trains: "full", or some of "lora", "embed", "norm" joined by commas (LoRA+ is all
    three; Section 3.3).

    What trains becomes float32 (updates of 1e-5 vanish in bf16's 8 bits), what is frozen keeps its
    dtype. "embed" is the input embedding, not the head; a head tied to a training embedding is
    untied and frozen, except under "full". Raises ValueError on unknown parts, and on "lora"
    without `add_lora` before.
    """
    parts = trainable_parts(trainable)
    if "lora" in parts and not any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError('trainable has "lora", but the model has no LoRA: add_lora(model) first')
    if "embed" in parts:
        untie(model)
    for name, p in model.named_parameters():
        kind = ("lora" if "lora_" in name else "embed" if "embed_tokens" in name else
                "norm" if "norm" in name else "rest")
        p.requires_grad_(kind in parts or parts == {"full"})
        if p.requires_grad:  # a copy always: loaded weights lie in their file
            p.data = p.data.to(torch.float32, copy=True)


def untie(model: Llama) -> None:
    """Give the head weights of its own where it shares the embedding's, so that one can change."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        untied = dataclasses.replace(model.config, tie_word_embeddings=False)
        model.config = model.model.config = untied


# ==================================================================================================
# Files. Nothing below is needed to understand the method; what the files of others look like is
# in data/formats.py.
# ==================================================================================================

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def load_config(path: str | Path, context: int | None = None) -> LlamaConfig:
    """The config of a Hugging Face folder (config.json), or of Meta's (params.json).

    A Mistral is a Llama up to its sliding window: it is taken if `context` tokens (None: the
    model's window) fit in there. Raises FileNotFoundError, and ValueError for what is not a plain
    Llama.
    """
    values = read_config(Path(path))
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    try:
        config = LlamaConfig(**{name: value for name, value in values.items() if name in known})
        window = config.max_position_embeddings
        if config.sliding_window is not None:
            config.extended(context or window)  # refuses what is beyond it
            window = min(window, config.sliding_window)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return dataclasses.replace(config, max_position_embeddings=window)


def load_model(path: str | Path, dtype: torch.dtype | None = None,
               device: str | torch.device = "cpu", context: int | None = None) -> Llama:
    """The Llama in a Hugging Face or Meta folder, in the file's dtype unless told, all frozen.

    On the CPU in the file's dtype the weights stay where they are, mapped: they cost time and
    memory when they are used. `context` as in `load_config`. Raises FileNotFoundError, and
    ValueError for what is not a Llama, is broken, or does not fit its config.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    config = load_config(path, context)
    with torch.device("meta"):
        model = Llama(config)
    expected = dict(model.named_parameters())  # a tied head is no parameter of its own
    loaded = {}
    for name, tensor in read_model(path):
        if name.endswith("rotary_emb.inv_freq") or name == HEAD and config.tie_word_embeddings:
            continue
        if name not in expected or name in loaded:
            problem = "is there twice" if name in loaded else "is no weight of a Llama like this"
            raise ValueError(f"{path}: {name} {problem}")
        if tensor.shape != expected[name].shape or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} should be a float tensor of shape "
                             f"{tuple(expected[name].shape)} by its config, got {tensor.dtype} of "
                             f"{tuple(tensor.shape)}")
        loaded[name] = tensor.to(device, dtype or tensor.dtype)
    if missing := sorted(expected.keys() - loaded.keys()):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first: {missing[0]}")
    model.load_state_dict(loaded, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.name_or_path = str(path)
    return model.requires_grad_(False)


SHARD_BYTES = 4_900_000_000  # of tensors, so that a file with its header stays below 5 GB


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that FSDP has sharded: every process has to ask for it at once."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def save_model(model: Llama, path: str | Path | None, dtype: torch.dtype | None = None,
               progress: bool = False) -> None:
    """Write the model, LoRA merged, as a Hugging Face folder: config.json and model.safetensors, or
    shards of at most 5 GB with their index. In its own dtypes unless told.

    Merging happens tensor by tensor on the way to the file, and changes nothing in `model`. Of a
    sharded model every process has to call it, but one with None as `path`.
    """
    refuse_quantized(model)
    modules, shards = dict(model.named_modules()), [{}]
    weights = {name: p for name, p in model.named_parameters() if "lora_" not in name}
    for name, p in weights.items():
        empty = torch.empty(p.shape, dtype=dtype or p.dtype, device="meta")
        if sum(e.nbytes for e in shards[-1].values()) + empty.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = empty
    total = sum(e.nbytes for shard in shards for e in shard.values())
    bar = tqdm(total=total, desc="saving", unit="B", unit_scale=True, disable=not progress)

    def merged(name: str) -> torch.Tensor:
        module, kind = modules[name.removesuffix(".weight")], dtype or weights[name].dtype
        lora = isinstance(module, LoRALinear)
        tensor = gathered(module.merged(kind) if lora else weights[name]).to(kind)
        bar.update(tensor.nbytes)
        return tensor

    if path:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
    files, n = {}, len(shards)
    if path and n > 1:  # so that a folder is refused while its shards are of two saves
        (path / "model.safetensors.index.json").unlink(missing_ok=True)
    with bar:
        for i, shard in enumerate(shards, 1):
            file = "model.safetensors" if n == 1 else f"model-{i:05}-of-{n:05}.safetensors"
            write_safetensors(shard, path and path / file, merged)
            files |= dict.fromkeys(shard, file)
    if path is None:
        return
    if n > 1:
        write_json(path / "model.safetensors.index.json",
                   {"metadata": {"total_size": total}, "weight_map": files})
    stored = str(dtype or weights["model.norm.weight"].dtype).removeprefix("torch.")
    write_json(path / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        **dataclasses.asdict(model.config), "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "torch_dtype": stored})
    for old in path.glob("model*.safetensors*"):  # of an earlier save in another number of shards
        if old.name not in files.values() and (n == 1 or not old.name.endswith("index.json")):
            old.unlink()


# Beside the weights: the tokenizer, and how to generate.
COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "added_tokens.json",
              "special_tokens_map.json", "chat_template.jinja", "generation_config.json")


def copy_companions(source: str | Path, out: Path) -> None:
    for file in (Path(source) / name for name in COMPANIONS):
        if file.is_file():
            replace_file(out / file.name, lambda partial: shutil.copyfile(file, partial))


def merge(base: str | Path, adapter: str | Path | None, out: str | Path,
          dtype: torch.dtype | None = None, context: int | None = None) -> None:
    """Write the Hugging Face folder `out`: `base` with `adapter` merged, extended to `context` if
    that is given. In the base's dtypes unless told. Complete or absent.

    Raises ValueError if `out` exists, and as `load_model` and `load_adapter` do.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: name a folder that does not")
    model = load_model(base, context=context)
    kept = {name: p.dtype for name, p in model.named_parameters()}
    if adapter is not None:
        load_adapter(model, adapter, context)
    elif context:
        model.extend(context)
    if dtype is None:
        for name, p in model.named_parameters():
            p.data = p.data.to(kept.get(name, p.dtype))
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    try:
        save_model(model, partial, dtype, progress=True)
        for source in filter(None, (base, adapter)):  # what an adapter brings was trained with it
            copy_companions(source, partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# What may train beside LoRA: PEFT's `modules_to_save`.
SAVED_MODULES = {"embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"}


def save_adapter(model: Llama, path: str | Path | None) -> None:
    """Write LoRA and what else trains as a PEFT adapter: adapter_config.json,
    adapter_model.safetensors, and longlora.json.

    The last holds what PEFT has no field for: {"context": tokens, "factor": interpolation factor}.
    Of a sharded model every process has to call it, but one with None as `path`. Raises ValueError
    if the model has no LoRA, or more trains than an adapter holds.
    """
    trained = {name: p for name, p in model.named_parameters()
               if p.requires_grad or "lora_" in name}
    loras = {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}
    others = {name.split(".")[-2] for name in trained if "lora_" not in name}
    if not loras or not others <= SAVED_MODULES:
        raise ValueError("an adapter holds LoRA, embedding and norms; this model trains otherwise: "
                         "save_model(model, path)")
    ranks = {name: len(lora.lora_A.weight) for name, lora in loras.items()}
    alphas = {name: loras[name].scaling * rank for name, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    leaves = {name.split(".")[-1] for name in loras}
    everywhere = all(name in loras for name, _ in model.named_modules()
                     if name.split(".")[-1] in leaves)
    tensors = {f"base_model.model.{name}": p for name, p in trained.items()}
    if path:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path and path / "adapter_model.safetensors",
                      lambda name: gathered(tensors[name]))
    if path is None:
        return
    write_json(path / "longlora.json", {"context": model.config.max_position_embeddings,
                                        "factor": model.config.interpolation_factor,
                                        **({"quantize": "nf4"} if is_quantized(model) else {})})
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None), "r": rank,
        "lora_alpha": alpha, "lora_dropout": 0.0, "bias": "none", "inference_mode": True,
        "rank_pattern": {name: r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {name: a for name, a in alphas.items() if a != alpha},
        "target_modules": sorted(leaves if everywhere else loras),
        "modules_to_save": sorted(others) or None})


def load_adapter(model: Llama, path: str | Path, context: int | None = None) -> None:
    """Put a PEFT adapter, or one released with the paper, onto `model`, in place.

    What it holds becomes float32 and trainable: call a bf16 model under autocast, or convert the
    whole with `model.to(dtype)`. LoRA of the embedding or the head is merged into it. If the
    adapter has more rows of the vocabulary than the model, in one of the two, the other's new rows
    are the mean of its old ones. The window becomes that of longlora.json, then (or without one: a
    released adapter does not tell) is extended to `context` tokens. Raises FileNotFoundError, and
    ValueError for what it cannot honour or does not fit the model; then the model is as it was.
    """
    path = Path(path)
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, (nn.Linear, nn.Embedding))}
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA already: merge_lora(model) first")
    tensors, loras, extra = read_adapter(path, layers)
    extended = adapter_window(path, model.config, context)
    shapes = {name: list(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    rows = max((tensors[name].shape[:1].numel() for name in (EMBED, HEAD) if name in tensors),
               default=0)
    if rows > model.config.vocab_size:
        shapes[EMBED][0] = shapes[HEAD][0] = rows

    updates = {}
    for layer, (rank, scaling) in loras.items():
        out_features, in_features = shapes[f"{layer}.weight"]
        if isinstance(layers[layer], nn.Embedding):  # its update is the transpose of a linear one
            A, B = f"{layer}.lora_embedding_A", f"{layer}.lora_embedding_B"
            shapes |= {A: [rank, out_features], B: [in_features, rank]}
        else:
            A, B = f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"
            shapes |= {A: [rank, in_features], B: [out_features, rank]}
        updates[layer] = A, B, scaling
    needed = {name for A, B, _ in updates.values() for name in (A, B)}
    if missing := sorted(needed - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first: {missing[0]}")
    if ignored := sorted(extra - shapes.keys()):
        warnings.warn(f"{path}: trainable_params.bin has {len(ignored)} weights that are not this "
                      f"model's and are left out, the first: {ignored[0]}", stacklevel=2)
    for name in tensors.keys() - set(ignored):
        tensor, shape = tensors[name], shapes.get(name)
        if shape is None:
            raise ValueError(f"{path}: {name} is no weight of this model and adapter_config.json")
        if list(tensor.shape) != shape or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} is {tensor.dtype} of shape {list(tensor.shape)}, "
                             f"the model's has {shape}")

    # All is checked: from here on the model changes.
    model.config = model.model.config = extended
    if {EMBED, HEAD} & tensors.keys() or {"model.embed_tokens", "lm_head"} & updates.keys():
        untie(model)
    if rows > model.config.vocab_size:
        add_rows(model, rows)
    for layer, (A, B, scaling) in updates.items():
        A, B = (tensors.pop(name).to(layers[layer].weight.device, torch.float32) for name in (A, B))
        if layer.startswith("model.layers."):
            lora = LoRALinear(layers[layer], len(A), scaling * len(A))
            lora.lora_A.weight.data, lora.lora_B.weight.data = A.clone(), B.clone()
            parent, _, leaf = layer.rpartition(".")
            setattr(model.get_submodule(parent), leaf, lora)
            continue
        if isinstance(layers[layer], nn.Embedding):
            A, B = B.T, A.T
        W = tensors.get(f"{layer}.weight", layers[layer].weight).to(A.device)
        tensors[f"{layer}.weight"] = with_update(W, A, B, scaling, torch.float32)
    for name, p in model.named_parameters():
        if name in tensors:
            p.data = tensors[name].to(p.device, torch.float32, copy=True)
        p.requires_grad_(name in tensors or "lora_" in name)


def adapter_window(path: Path, config: LlamaConfig, context: int | None) -> LlamaConfig:
    """`config` with the window of the adapter's longlora.json, extended to `context` if given."""
    file = path / "longlora.json"
    if file.exists():
        values = read_json(file)
        trained, factor = values.get("context"), values.get("factor")
        if type(trained) is not int or not 0 < trained < 1 << 31:
            raise ValueError(f"{file}: expected a context in tokens, got {trained!r}")
        config = config.extended(trained)
        if config.interpolation_factor != factor:
            raise ValueError(f"{file}: trained with positions interpolated by {factor!r}, but "
                             f"{trained} tokens of this model take "
                             f"{config.interpolation_factor:g}: it belongs to another base")
    elif context is None and (path / "trainable_params.bin").exists():
        warnings.warn(f"{path} does not say for what context it was trained: say it, or positions "
                      "stay as the base has them", stacklevel=3)
    return config.extended(context) if context else config


def add_rows(model: Llama, rows: int) -> None:
    """Let embedding and head have `rows` rows, the new ones the mean of the old."""
    for module in (model.model.embed_tokens, model.lm_head):
        W = module.weight.detach()
        mean = W.mean(0, keepdim=True, dtype=torch.float32).to(W.dtype)
        module.weight = nn.Parameter(torch.cat([W, mean.expand(rows - len(W), -1)]))
    config = dataclasses.replace(model.config, vocab_size=rows)
    model.config = model.model.config = config


# ==================================================================================================


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a Llama, with an adapter merged or without "
                                     "one, as a Hugging Face folder.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    sub = commands.add_parser("merge", help="merge an adapter into its base")
    sub.add_argument("--model", required=True, help="folder of the base, Hugging Face's or Meta's")
    sub.add_argument("--adapter", help="folder of the adapter (none: the base is written anew)")
    sub.add_argument("--out", required=True, help="folder to make")
    sub.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                     help="of what is written (as the base has it)")
    sub.add_argument("--extend", type=int, metavar="TOKENS", help="interpolate positions to so "
                     "many tokens (what the adapter says; a released one says nothing)")
    args = parser.parse_args()
    if args.extend is not None and args.extend < 1:
        raise ValueError(f"--extend must be at least 1, got {args.extend}")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    merge(args.model, args.adapter, args.out, dtype, args.extend)
    notes = args.adapter and Path(args.adapter, "longlora.json")
    if notes and notes.exists() and "quantize" in read_json(notes):
        print("The adapter was trained on this base in 4 bits (nf4); it is merged into the "
              "original weights, which differ a little from those")
    print(f"Written to {args.out}. Next:\n  python eval.py perplexity --model {args.out}")


if __name__ == "__main__":
    from data.prepare import one_line_errors
    with one_line_errors():
        main()
