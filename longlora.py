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
import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# The model's shape


@dataclasses.dataclass
class LlamaConfig:
    """Hugging Face's `LlamaConfig`, as far as this model goes. The defaults are Llama-2-7B's.

    `max_position_embeddings` is the window in tokens. `rope_scaling` is None or {"rope_type":
    "linear", "factor": f}. Raises ValueError on sizes that do not fit.
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
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2

    def __post_init__(self):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                 "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
        for name in sizes:
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
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
        if type(D) is not int or not 2 <= D < 1 << 31 or D % 2:
            raise ValueError(f"config: head_dim must be even (rotary pairs), got {self.head_dim!r}")
        for name in ("rms_norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(f"config: {name} must be a positive number, got {value!r}")
        if type(self.tie_word_embeddings) is not bool:
            raise ValueError("config: tie_word_embeddings must be true or false, "
                             f"got {self.tie_word_embeddings!r}")
        self.interpolation_factor  # checks rope_scaling

    @property
    def interpolation_factor(self) -> float:
        """How much positions are compressed: the linear factor of `rope_scaling`, 1 without it."""
        if self.rope_scaling is None:
            return 1.0
        scaling = self.rope_scaling if isinstance(self.rope_scaling, dict) else {}
        kind = scaling.get("rope_type", scaling.get("type"))
        factor = scaling.get("factor")
        if kind != "linear" or not isinstance(factor, (int, float)) or not 1 <= factor < math.inf:
            raise ValueError('config: rope_scaling must be {"rope_type": "linear", "factor": '
                             f"at least 1}} or null, got {self.rope_scaling!r}")
        return float(factor)

    def extended(self, context: int) -> "LlamaConfig":
        """This config with a window of `context` tokens, by position interpolation (Section 3.1).

        The factor is ceil(context / window), times the factor that the model already has. No change
        if it fits already.
        """
        if context <= self.max_position_embeddings:
            return self
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
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


def rotary_tables(config: LlamaConfig, T: int,
                  device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of the angles of positions 0..T-1, both (T, 1, D/2), float32 (Section 3.1).

    Interpolation happens here and nowhere else: positions are divided by the factor. float32
    always: in bf16 the positions 257 and 258 are the same number.
    """
    D = config.head_dim
    even = torch.arange(0, D, 2, device=device, dtype=torch.float32)
    frequency = config.rope_theta ** (-even / D)
    position = torch.arange(T, device=device, dtype=torch.float32) / config.interpolation_factor
    angle = torch.outer(position, frequency)[:, None, :]
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x (B, T, H, D) by its positions. Pairs are halves (i, i + D/2), not neighbours
    (2i, 2i + 1) as in Meta's files: a wrong pairing silently ruins loaded weights."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


# --------------------------------------------------------------------------------------------------
# Attention


def shifted_sparse_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group_size: int,
                             shift: bool = True) -> torch.Tensor:
    """S2-Attn (Section 3.2, Figure 3): causal attention inside groups, shifted by half a group in
    half of the heads.

    q is (B, H, T, D); k and v are (B, H_kv, T, D); returns (B, H, T, D). Query t sees key u iff
    u <= t and both lie in the same group, t // G in the first half of the heads, (t + G/2) // G in
    the second. With `shift=False` all heads are as the first half (the paper's ablation, Table 6).
    T need not be a multiple of G. Raises ValueError if G or H is odd.

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
    if H_kv % 2:  # the halves of the query heads share a key-value head
        k, v = (x.repeat_interleave(H // H_kv, dim=1) for x in (k, v))
    (q1, q2), (k1, k2), (v1, v2) = (x.chunk(2, dim=1) for x in (q, k, v))  # halves of the heads
    return torch.cat([grouped_attention(q1, k1, v1, G, first=0),
                      grouped_attention(q2, k2, v2, G, first=G // 2)], dim=1)


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
    return torch.cat(out, dim=2) if len(out) > 1 else out[0]


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Full causal attention: q (B, H, T, D), k and v (B, H_kv, T, D); returns (B, H, T, D)."""
    gqa = q.shape[1] != k.shape[1]
    if gqa and q.is_cuda and q.dtype == torch.float32:
        # Flash takes no float32 there, and the kernel that does takes no grouped heads.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        gqa = False
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)


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

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, group_size: int | None,
                shift: bool) -> torch.Tensor:
        # (B, T, C) -> (B, T, H, D): heads stay behind tokens, so that groups of tokens are views
        projections = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in projections)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        if group_size is None:
            out = causal_attention(q, k, v)
        else:
            out = shifted_sparse_attention(q, k, v, group_size, shift)
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, H * D) -> (B, T, C)


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, group_size: int | None,
                shift: bool) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, group_size, shift)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything below the head: tokens (B, T) to hidden states (B, T, C)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.checkpointing = False

    def forward(self, tokens: torch.Tensor, group_size: int | None = None,
                shift: bool = True) -> torch.Tensor:
        x = self.embed_tokens(tokens)
        if torch.is_autocast_enabled(x.device.type):
            # A float32 embedding would make the residual stream float32, and so every checkpoint.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = rotary_tables(self.config, tokens.shape[1], x.device)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, cos, sin, group_size, shift, use_reentrant=False)
            else:
                x = layer(x, cos, sin, group_size, shift)
        return self.norm(x)


class Llama(nn.Module):
    """Llama. Full attention is the default; S2-Attn is set by the call, never by `self.training`.

    `model(tokens)` gives logits (B, T, V); `model(tokens, targets)` the mean loss over the targets
    that are not -100, where targets[b, t] is the token that follows tokens[b, t]. With `group_size`
    attention is S2-Attn (`shift=False`: local groups). With `model.model.checkpointing = True` each
    layer is computed again in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None,
                group_size: int | None = None, shift: bool = True) -> torch.Tensor:
        x = self.model(tokens, group_size, shift)
        return self.lm_head(x) if targets is None else chunked_loss(x, self.lm_head.weight, targets)

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


LOSS_CHUNK = 1024  # tokens whose logits exist at one time: 125 MiB in float32 at V = 32,000


def chunked_loss(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the head's logits, in chunks of tokens; 0 where every target is -100.

    x (B, T, C), weight (V, C), targets (B, T). All logits at once would be the largest tensor of
    the run by far: at T = 100,000 and V = 32,000 they take 12 GiB in float32, and their gradient as
    much again.
    """
    x, targets = x.flatten(0, 1), targets.flatten()
    count = (targets != -100).sum().clamp(min=1)
    if not weight.requires_grad:
        return FrozenHeadLoss.apply(x, weight, targets) / count

    def chunk_loss(x, targets):
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
    return sum(checkpoint(chunk_loss, *chunk, use_reentrant=False) for chunk in chunks) / count


class FrozenHeadLoss(torch.autograd.Function):
    """The summed loss under a frozen head. Its only gradient is dL/dx, so the forward pass makes it
    from each chunk's logits while they exist, and nothing is computed twice."""

    @staticmethod
    def forward(ctx, x, weight, targets):
        total = torch.zeros((), device=x.device)
        grad = torch.empty_like(x) if x.requires_grad else None
        for start in range(0, len(x), LOSS_CHUNK):
            chunk = slice(start, start + LOSS_CHUNK)
            logits = F.linear(x[chunk], weight).float()
            log_p = F.log_softmax(logits, dim=-1)
            total += F.nll_loss(log_p, targets[chunk], reduction="sum")
            if grad is not None:  # softmax - one-hot, through the head
                scored = targets[chunk] != -100
                p = log_p.exp_() * scored[:, None]
                p.scatter_add_(1, targets[chunk].clamp(min=0)[:, None], -scored.float()[:, None])
                grad[chunk] = p.to(x.dtype) @ weight.to(x.dtype)
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx, scale):
        (grad,) = ctx.saved_tensors
        return grad * scale.to(grad.dtype), None, None


# --------------------------------------------------------------------------------------------------
# LoRA and LoRA+

ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class LoRALinear(nn.Module):
    """A linear layer W with a low-rank update: W x + (alpha / r) B A x (Hu et al. 2021).

    A (r, in) is random and B (out, r) zero, so training starts from the pretrained model. B A, as
    large as W, is never formed here: that memory is what LoRA exists to save.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        out_features, in_features = linear.weight.shape
        place = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.weight = linear.weight
        self.lora_A = nn.Linear(in_features, rank, bias=False, **place)  # initialised by nn.Linear
        self.lora_B = nn.Linear(rank, out_features, bias=False, **place)
        nn.init.zeros_(self.lora_B.weight)
        self.scaling = alpha / rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight) + self.lora_B(self.lora_A(x)) * self.scaling


def add_lora(model: Llama, rank: int = 8, alpha: float = 16,
             targets: Iterable[str] = ATTENTION_PROJECTIONS) -> None:
    """Replace every linear layer below the head whose name is in `targets` by a LoRALinear, in
    place (Section 3.3).

    Raises ValueError if `rank` is below 1, a target matches no layer, or LoRA is there already.
    """
    if rank < 1:
        raise ValueError(f"LoRA's rank must be at least 1, got {rank}")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has LoRA already: merge_lora(model) first")
    found = {target: [parent for parent in model.model.modules()
                      if isinstance(getattr(parent, target, None), nn.Linear)]
             for target in targets}
    for target, parents in found.items():
        if not parents:
            raise ValueError(f"LoRA target {target!r} matches no linear layer of the model")
    for target, parents in found.items():
        for parent in parents:
            setattr(parent, target, LoRALinear(getattr(parent, target), rank, alpha))


@torch.no_grad()
def merge_lora(model: Llama) -> None:
    """Fold every LoRA update into its weight, in place: W + (alpha / r) B A, added in float32."""
    for parent in list(model.modules()):
        for name, lora in list(parent.named_children()):
            if isinstance(lora, LoRALinear):
                update = lora.scaling * (lora.lora_B.weight.float() @ lora.lora_A.weight.float())
                out_features, in_features = lora.weight.shape
                linear = nn.Linear(in_features, out_features, bias=False, device="meta")
                merged = (lora.weight.float() + update).to(lora.weight.dtype)
                linear.weight = nn.Parameter(merged, requires_grad=lora.weight.requires_grad)
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
        if p.requires_grad:
            p.data = p.data.float()


def untie(model: Llama) -> None:
    """Give the head weights of its own where it shares the embedding's, so that one can change."""
    if model.config.tie_word_embeddings:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        untied = dataclasses.replace(model.config, tie_word_embeddings=False)
        model.config = model.model.config = untied


# ==================================================================================================
# Files. Nothing below is needed to understand the method.
# ==================================================================================================

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library


def replace_file(path: Path, write) -> None:
    """Call write(temporary name beside `path`), then rename: `path` is old or new, never half."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    text = json.dumps(value, indent=2) + "\n"
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises FileNotFoundError, ValueError."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, mapped: their bytes are read when they are used.

    The form: 8 bytes with the header's length N (little endian), N bytes of JSON {name: {dtype,
    shape, data_offsets}}, the data. Raises FileNotFoundError, and ValueError if the header does not
    describe exactly this file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, HEADER_LIMIT):
            raise ValueError(f"{path}: not a safetensors file, or cut short (its header claims "
                             f"{length} bytes of {size})")
        try:
            header = json.loads(file.read(length), object_pairs_hook=unique_names)
            entries = []
            for name, entry in header.items():
                if name != "__metadata__":
                    start, stop = entry["data_offsets"]
                    numbers = (start, stop, *entry["shape"])
                    if not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
                        raise ValueError(f"{name}: shape and offsets must be whole numbers")
                    entries.append((start, stop, name, DTYPES[entry["dtype"]], entry["shape"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path}: broken safetensors header ({problem})") from None
    data = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length:]
    tensors, end = {}, 0
    for start, stop, name, dtype, shape in sorted(entries, key=lambda entry: entry[:2]):
        if start != end or stop > len(data) or stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path}: {name}: bytes {start} to {stop} do not fit shape {shape} "
                             f"in a file of {size} bytes")
        piece, end = data[start:stop], stop
        if (piece.storage_offset() % dtype.itemsize) != 0:
            piece = piece.clone()
        tensors[name] = piece.view(dtype).view(shape)
    if end != len(data):
        raise ValueError(f"{path}: {len(data) - end} bytes behind the last tensor")
    return tensors


def unique_names(pairs: list) -> dict:
    if len(names := dict(pairs)) != len(pairs):
        raise ValueError("a name occurs twice")
    return names


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file: larger dtypes first, so that all are aligned, then by name.
    Complete or absent."""
    dtypes = {dtype: name for name, dtype in DTYPES.items()}
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": dtypes[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(partial: Path) -> None:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                tensor = tensors[name].detach().cpu().contiguous()
                file.write(tensor.flatten().view(torch.uint8).numpy())

    replace_file(path, write)


def load_config(path: str | Path) -> LlamaConfig:
    """The config of a Hugging Face folder. Raises FileNotFoundError, and ValueError for what is not
    a plain Llama."""
    file = Path(path) / "config.json"
    values = read_json(file)
    if (kind := values.get("model_type")) != "llama":
        raise ValueError(f'{file}: expected a Llama (model_type "llama"), got {kind!r}')
    for name, plain in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        if values.get(name, plain) != plain:
            raise ValueError(f"{file}: {name} {values[name]!r} is not supported, only {plain!r}")
    if values.get("quantization_config"):
        raise ValueError(f"{file}: quantised weights are not supported; "
                         "take the folder of the original model")
    if rope := values.get("rope_parameters"):  # the newest spelling: theta and scaling together
        kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "no object"
        values["rope_scaling"] = None if kind == "default" else rope
        if kind in ("default", "linear") and "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
    known = {field.name for field in dataclasses.fields(LlamaConfig)}
    try:
        return LlamaConfig(**{name: value for name, value in values.items() if name in known})
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load_model(path: str | Path, dtype: torch.dtype | None = None,
               device: str | torch.device = "cpu") -> Llama:
    """The Llama in a Hugging Face folder, in the file's dtype unless told, all frozen.

    Raises FileNotFoundError, and ValueError for what is not a Llama, is broken, or does not fit its
    config.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such model folder")
    config = load_config(path)
    tensors = read_safetensors(path / "model.safetensors")
    with torch.device("meta"):
        model = Llama(config)
    expected = dict(model.named_parameters())  # a tied head is no parameter of its own
    tensors = {name: t for name, t in tensors.items()
               if name in expected or "rotary_emb.inv_freq" not in name}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    if missing := sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first: {missing[0]}")
    if unknown := sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{path}: {len(unknown)} weights are no Llama's, the first: {unknown[0]}")
    for name, parameter in expected.items():
        tensor = tensors[name]
        if tensor.shape != parameter.shape or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} should be a float tensor of shape "
                             f"{tuple(parameter.shape)} by config.json, got {tensor.dtype} of "
                             f"{tuple(tensor.shape)}")
        tensors[name] = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
    model.load_state_dict(tensors, assign=True, strict=False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.name_or_path = str(path)
    return model.requires_grad_(False)


def save_model(model: Llama, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json and model.safetensors into the folder `path`. Raises ValueError if LoRA is
    not merged."""
    path = Path(path)
    tensors = {name: p.to(dtype or p.dtype) for name, p in model.named_parameters()}
    if any("lora_" in name for name in tensors):
        raise ValueError("merge_lora(model) before save_model, or save_adapter(model, path)")
    path.mkdir(parents=True, exist_ok=True)
    write_safetensors(tensors, path / "model.safetensors")
    stored = str(tensors["model.norm.weight"].dtype).removeprefix("torch.")
    write_json(path / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama",
        **dataclasses.asdict(model.config), "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "torch_dtype": stored})


# What `modules_to_save` of PEFT calls the modules that LoRA+ trains beside LoRA.
SAVED_MODULES = {"embed_tokens", "input_layernorm", "post_attention_layernorm", "norm"}
PREFIX = "base_model.model."


def save_adapter(model: Llama, path: str | Path) -> None:
    """Write what trains as a PEFT adapter: adapter_config.json, adapter_model.safetensors, and
    longlora.json.

    The last holds what PEFT has no field for: {"context": tokens, "factor": interpolation factor}.
    """
    path = Path(path)
    trained = {name: p for name, p in model.named_parameters()
               if p.requires_grad or "lora_" in name}
    loras = {name.split(".")[-1]: module for name, module in model.named_modules()
             if isinstance(module, LoRALinear)}
    others = {name.split(".")[-2] for name in trained if "lora_" not in name}
    if not loras or not others <= SAVED_MODULES:
        raise ValueError("an adapter holds LoRA, embedding and norms; this model trains otherwise: "
                         "save_model(model, path)")
    lora = next(iter(loras.values()))
    rank = lora.lora_A.weight.shape[0]
    path.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: p for name, p in trained.items()}
    write_safetensors(tensors, path / "adapter_model.safetensors")
    write_json(path / "longlora.json", {"context": model.config.max_position_embeddings,
                                        "factor": model.config.interpolation_factor})
    write_json(path / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model, "name_or_path", None), "r": rank,
        "lora_alpha": lora.scaling * rank, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True, "target_modules": sorted(loras),
        "modules_to_save": sorted(others) or None})


def load_adapter(model: Llama, path: str | Path) -> None:
    """Put a PEFT adapter onto `model`, in place: its LoRA, embedding and norms, and the context of
    longlora.json.

    What it holds becomes float32: call a bf16 model under autocast, or convert the whole with
    `model.to(dtype)`. Raises FileNotFoundError, and ValueError for what it cannot honour or does
    not fit the model; then the model is as it was.
    """
    path = Path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such adapter folder")
    file = path / "adapter_config.json"
    config = read_json(file)
    for name, plain in (("peft_type", "LORA"), ("bias", "none"), ("use_dora", False),
                        ("use_rslora", False), ("fan_in_fan_out", False), ("rank_pattern", {}),
                        ("alpha_pattern", {})):
        if (config.get(name) or plain) != plain:
            raise ValueError(f"{file}: {name} {config[name]!r} is not supported, only {plain!r}")
    rank, alpha, targets = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    numbers = type(rank) is int and isinstance(alpha, (int, float))
    if not (numbers and isinstance(targets, list) and all(isinstance(t, str) for t in targets)):
        raise ValueError(f"{file}: expected r, lora_alpha and a list of target_modules, "
                         f"got {rank!r}, {alpha!r}, {targets!r}")
    tensors = read_safetensors(path / "adapter_model.safetensors")
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    for name, (rows, *columns) in list(shapes.items()):
        layer = name.removesuffix(".weight")
        if layer.split(".")[-1] in targets:
            shapes[f"{layer}.lora_A.weight"] = (rank, *columns)
            shapes[f"{layer}.lora_B.weight"] = (rows, rank)
    if missing := sorted({name for name in shapes if "lora_" in name} - tensors.keys()):
        raise ValueError(f"{path}: {len(missing)} weights are missing, the first: {missing[0]}")
    for name, tensor in tensors.items():
        if name not in shapes:
            raise ValueError(f"{path}: {name} is no weight of this model")
        if shapes[name] != tensor.shape or not tensor.is_floating_point():
            raise ValueError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model's is "
                             f"{shapes[name]}")
    extended = model.config
    if (trained := path / "longlora.json").exists():
        values = read_json(trained)
        context, factor = values.get("context"), values.get("factor")
        if type(context) is not int or not 0 < context < 1 << 40:
            raise ValueError(f"{trained}: expected a context in tokens, got {context!r}")
        extended = model.config.extended(context)
        if extended.interpolation_factor != factor:
            raise ValueError(f"{trained}: trained with positions interpolated by {factor}, but "
                             f"{context} tokens of this model take "
                             f"{extended.interpolation_factor:g}: it belongs to another base")
    try:
        add_lora(model, rank, alpha, targets)  # all checked: from here on the model changes
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    model.config = model.model.config = extended
    if "model.embed_tokens.weight" in tensors:
        untie(model)
    for name, p in model.named_parameters():
        if name in tensors:
            p.data = tensors[name].to(p.device, torch.float32, copy=True)
    model.requires_grad_(False)
