"""Evaluate a Llama, with or without a LongLoRA adapter.

    python eval.py perplexity --adapter out --context 256,512,1024,2048
    python eval.py passkey --adapter out --length 256,512,1024,2048 --plot passkey.png
    python eval.py answers --adapter out --data questions.json    # exact matches, by length
    python eval.py topics --model vicuna-16k --file topics_5.jsonl     # LongChat's test cases
    python eval.py generate --adapter out --file BOOK --question "Who did it?"
    python eval.py bench --shape 7b --context 8192,32768    # time and memory of a training step
    python eval.py paper                       # the paper's tables at small scale, on a laptop
    torchrun --nproc-per-node 8 eval.py perplexity ...      # windows shared over 8 processes

Attention is full, as at inference, unless --attention chooses another. Perplexity (Section 4.2) has
two protocols. "sliding": a window of L tokens starts every L/2, and each token is scored once, in
the first window that holds it, with at least L/2 tokens of context, but in the very first window.
"official", the paper's: one starts every 256, and all L - 1 targets of each whole window are
scored: most tokens many times, some with little context.
"""
import argparse
import contextlib
import dataclasses
import gc
import math
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import longlora
from data import prepare

ROOT = Path(__file__).resolve().parent
TINY_LLAMA = os.path.relpath(ROOT / "data" / "tiny-llama")

# --------------------------------------------------------------------------------------------------
# The device, and the processes that torchrun started


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def init_distributed(minutes: float = 60) -> torch.device:
    """This process's device. Under torchrun, also join its process group (nccl or gloo), in which a
    process that is silent for `minutes` is taken for lost: so long may one encode a text."""
    device, backend = default_device(), "gloo"
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return device
    if device.type == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", -1)), torch.cuda.device_count()
        if not 0 <= local < gpus:
            raise ValueError(f"LOCAL_RANK {local}, but {gpus} GPUs here: let torchrun start as "
                             "many processes as the machine has GPUs")
        device, backend = torch.device("cuda", local), "nccl"
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    timeout = timedelta(minutes=minutes)
    store, rank, size = next(dist.rendezvous("env://"))
    store.set_timeout(timeout)  # init_process_group would leave it at 30 minutes
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun's store outlives a restart, with the addresses of dead processes.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return device


def destroy_distributed() -> None:
    if dist.is_initialized():
        gc.collect()  # gloo may abort while a model of its shards is alive
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """This process's rank, and the number of processes."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print0(text: str) -> None:
    """Print on the main process alone, and not into a progress bar."""
    if is_main():
        tqdm.write(text)


@contextlib.contextmanager
def local_main_process_first() -> Iterator[None]:
    """The first process of each machine runs the block, then the others do."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if dist.is_initialized() and not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name. "auto" is bfloat16 where the hardware has it, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    # Its cache of casts saves a tenth of the time of a small step. Of FSDP's shards it would keep
    # the gathered weights until the pass is over.
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32,
                          cache_enabled=not dist.is_initialized())


@torch.no_grad()
def shared_map(model: longlora.Llama, dtype: torch.dtype, function: Callable[[int], object],
               count: int, name: str) -> list:
    """[function(0), ..., function(count - 1)], shared among the processes, which all call this.
    They call `function` equally often, since FSDP gathers weights from all of them each time."""
    (rank, size), found = world(), []
    with autocast(model.lm_head.weight.device, dtype):
        for first in tqdm(range(0, count, size), desc=name, leave=False, disable=not is_main()):
            found.append(function(min(first + rank, count - 1)))
    if hasattr(model, "reshard"):  # without a backward pass FSDP's root keeps its weights gathered
        model.reshard()
    shares = [found] * size
    if size > 1:
        dist.all_gather_object(shares, found)
    return [result for results in zip(*shares) for result in results][:count]


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA tensors took since the last reset, or a CPU's process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attention_kwargs(attention: str, group_size: int | None) -> dict:
    """Arguments of `Llama.forward`, for "full", "local" or "shifted". Raises ValueError."""
    if attention == "full":
        return {}
    if not group_size or group_size % 2:
        raise ValueError(f"--attention {attention} needs an even --group-size, got {group_size}")
    return {"group_size": group_size, "shift": attention == "shifted"}


# --------------------------------------------------------------------------------------------------
# Perplexity, passkeys, and answers to instructions

BATCH_TOKENS = 8192  # short windows are read several at a time, up to this many tokens


def windows(length: int, context: int, protocol: str,
            stride: int | None = None) -> list[tuple[int, int, int]]:
    """(start, stop, scored) of the windows over `length` tokens; the last `scored` tokens of each
    are scored. The last sliding window may be shorter. Raises ValueError if there are none."""
    stride = stride or (256 if protocol == "official" else max(1, context // 2))
    if not 2 <= context <= length or (stride >= context and protocol == "sliding"):
        raise ValueError(f"{length:,} tokens have no {protocol} windows of {context:,} tokens that "
                         f"begin every {stride:,}")
    spans, done = [], 1  # the first token of all has no context
    for start in range(0, length, stride):
        stop = min(start + context, length)
        if protocol == "sliding" and stop > done:
            spans.append((start, stop, stop - done))
        elif protocol == "official" and stop == start + context:
            spans.append((start, stop, context - 1))
        done = stop
    return spans


class Perplexity(NamedTuple):
    value: float
    error: float | None  # standard error; None for a single window
    tokens: int  # how many were scored
    by_position: list[float]  # in equal bins of the position in the window


def perplexity(model: longlora.Llama, tokens: np.ndarray, context: int, protocol: str = "sliding",
               stride: int | None = None, dtype: torch.dtype = torch.float32,
               group_size: int | None = None, shift: bool = True, bins: int = 0) -> Perplexity:
    """Perplexity of `model` on `tokens` (N,) in windows of `context` tokens (Section 4.2).

    The standard error takes windows to be independent; where they overlap, as the official ones do,
    it is too small. Under torchrun every process has to call this. Raises as `windows` does.
    """
    spans = windows(len(tokens), context, protocol, stride)
    device, B = model.lm_head.weight.device, max(1, BATCH_TOKENS // context)

    def losses(i: int) -> tuple[np.ndarray, np.ndarray]:  # of the windows in batch i
        batch = spans[i * B:(i + 1) * B]
        # A shorter window is filled up at its end, which causal attention does not see.
        ids = np.zeros((len(batch), context), np.int64)
        targets = np.full((len(batch), context - 1), -100)
        for row, (start, stop, count) in enumerate(batch):
            n = stop - start
            ids[row, :n] = tokens[start:stop]
            targets[row, n - 1 - count:n - 1] = ids[row, n - count:n]
        loss = model(torch.from_numpy(ids[:, :-1]).to(device), torch.from_numpy(targets).to(device),
                     group_size, shift, reduction="none")
        loss = loss.cpu().double().numpy()
        positions = np.stack([loss.sum(0), (targets != -100).sum(0)])
        parts = np.array_split(positions, max(1, bins), axis=1)
        return loss.sum(1), np.stack([part.sum(1) for part in parts])

    batches = math.ceil(len(spans) / B)
    found = shared_map(model, dtype, losses, batches, f"context {context:,}")
    loss, parts = np.concatenate([x for x, _ in found]), sum(x for _, x in found)  # (bins, 2)
    scored = np.array([count for _, _, count in spans])
    value, error = exp(loss.sum() / scored.sum()), None
    if len(spans) > 1:  # of the mean loss, times the derivative of exp
        error = (loss / scored).std(ddof=1) / math.sqrt(len(spans)) * value
    return Perplexity(value, error, int(scored.sum()), [exp(a / max(1, b)) for a, b in parts])


def exp(loss: float) -> float:
    return math.exp(min(loss, 700))  # a diverged model's perplexity is finite, too


def passkey(model: longlora.Llama, tokenizer: prepare.Tokenizer, length: int, trials: int,
            depths: int = 1, seed: int = 0, dtype: torch.dtype = torch.float32) -> dict:
    """Share of the keys, hidden in prompts of at most `length` tokens, that are retrieved (Section
    4.2): {"length", "tokens" (mean of the prompts), "trials", "accuracy", "by_depth" (in `depths`
    equal bins of the filler)}.

    A key is retrieved when every token of it is the arg max: one forward pass, no decoding. Each
    bin has `trials` of them, with keys and depths that training never draws.
    """
    def trial(i: int) -> tuple[int, int, bool]:
        at, rng = i % depths, np.random.default_rng((seed, length, i))
        ids, n = prepare.passkey_document(tokenizer, length, rng, held_out=True,
                                          depths=(at / depths, (at + 1) / depths))
        tokens = torch.tensor([ids], device=model.lm_head.weight.device)
        logits = model(tokens, logits_to_keep=slice(-n - 1, -1))
        return at, len(ids), torch.equal(logits.argmax(-1), tokens[:, -n:])

    count = trials * depths
    found = shared_map(model, dtype, trial, count, f"length {length:,}")
    at, tokens, right = (np.array(column) for column in zip(*found))
    return {"length": length, "tokens": round(tokens.mean()), "trials": count,
            "accuracy": right.mean(),
            "by_depth": [right[at == i].mean() for i in range(depths)]}


def answers(model: longlora.Llama, samples: prepare.Samples,
            dtype: torch.dtype = torch.float32) -> list[dict]:
    """Exact matches and perplexity of the answers in `samples`: rows of {"tokens", "samples",
    "exact_match", "perplexity"} for samples of up to 256, 512, ... tokens, and for all (None).

    A match is exact when every token of an answer and its end is the arg max: what greedy decoding
    would write, in one forward pass. Under torchrun every process has to call this.
    """
    def answer(i: int) -> tuple[int, bool, float, int]:
        ids, labels = (torch.from_numpy(x).to(model.lm_head.weight.device) for x in samples[i])
        before = (labels[1:] != -100).nonzero()[:, 0]  # positions that predict the answer
        logits, label = model(ids[None], logits_to_keep=before)[0].float(), labels[before + 1]
        return (1 << (len(ids) - 1).bit_length(), torch.equal(logits.argmax(-1), label),
                F.cross_entropy(logits, label, reduction="sum").item(), len(label))

    found, rows = shared_map(model, dtype, answer, len(samples), "answers"), []
    for length in [*sorted({row[0] for row in found}), None]:
        part = [row[1:] for row in found if length in (row[0], None)]
        exact, loss, tokens = np.sum(part, axis=0)
        rows.append({"tokens": length, "samples": len(part), "exact_match": exact / len(part),
                     "perplexity": exp(loss / tokens)})
    return rows


# --------------------------------------------------------------------------------------------------
# Generation

PREFILL = 1024  # tokens of a prompt that are read at one time: bounds the memory beside the cache


class KVCache:
    """Keys and values of up to `tokens` tokens, of which `length` are in it: 2 x L x H_kv x D
    numbers a token, 0.5 MiB for Llama-2-7B in bfloat16."""

    def __init__(self, config: longlora.LlamaConfig, tokens: int, device: torch.device,
                 dtype: torch.dtype):
        shape = 2, 1, tokens, config.num_key_value_heads, config.head_dim  # (2, B, S, H_kv, D)
        self.layers = [torch.empty(shape, device=device, dtype=dtype)
                       for _ in range(config.num_hidden_layers)]
        self.length = 0

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of T new tokens (1, T, heads, D) to those in the cache and to themselves."""
        keys, values = self.layers[layer]
        end = self.length + q.shape[1]
        keys[:, self.length:end], values[:, self.length:end] = k, v
        if layer == len(self.layers) - 1:
            self.length = end
        return longlora.causal_attention(q, keys[:, :end], values[:, :end])


@torch.no_grad()
def generate(model: longlora.Llama, prompt: list[int], max_new_tokens: int, dtype: torch.dtype,
             stop_ids: set[int], temperature: float = 0.0, top_p: float = 1.0,
             seed: int = 0) -> Iterator[int]:
    """Token ids after `prompt`, one by one, until one of `stop_ids` (not yielded), `max_new_tokens`
    or the end of the window. Each is drawn from the likeliest that together have the share `top_p`;
    temperature 0 takes the likeliest. Raises ValueError if the prompt is empty or fills the window.
    """
    device, window = model.lm_head.weight.device, model.config.max_position_embeddings
    if not 0 < len(prompt) < window:
        raise ValueError(f"the prompt has {len(prompt):,} tokens, and the model reads 1 to "
                         f"{window:,} with its answer: shorten it, or extend the model")
    longest = min(len(prompt) + max_new_tokens, window)
    cache = KVCache(model.config, longest, device, dtype)
    generator, new = torch.Generator().manual_seed(seed), prompt
    for _ in range(longest - len(prompt)):
        parts = range(0, len(new), PREFILL)
        for start in tqdm(parts, "reading", leave=False, disable=len(parts) == 1):
            ids = torch.tensor([new[start:start + PREFILL]], device=device)
            with autocast(device, dtype):
                logits = model(ids, start=cache.length, cache=cache, logits_to_keep=slice(-1, None))
        logits = logits[0, -1].float().cpu()
        token = logits.argmax().item()
        if temperature > 1e-6:  # a division by less would overflow
            p, order = (logits / temperature).softmax(-1).sort(descending=True)
            p[1:][p.cumsum(-1)[:-1] >= top_p] = 0  # the likeliest always stays
            token = order[torch.multinomial(p, 1, generator=generator)].item()
        if token in stop_ids:
            return
        yield token
        new = [token]


def stop_ids(model: longlora.Llama, tokenizer: prepare.Tokenizer) -> set[int]:
    """The ids that end a text: the tokenizer's, and the config's one or several."""
    ids = model.config.eos_token_id
    return {tokenizer.eos_id, *(ids if isinstance(ids, list) else [ids])} - {None}


# --------------------------------------------------------------------------------------------------
# Bench: what a training step takes

# V, C, width of the MLP, layers, H, H_kv
SHAPES = {"tiny": (2048, 256, 704, 4, 8, 8), "small": (32000, 512, 1376, 6, 8, 8),
          "1b": (32000, 2048, 5632, 22, 32, 4), "7b": (32000, 4096, 11008, 32, 32, 32),
          "13b": (32000, 5120, 13824, 40, 40, 40)}


def compile_layers(model: longlora.Llama) -> None:
    """Fuse small operations: norms, rotation, the MLP's middle. Attention is one kernel already."""
    longlora.apply_rotary = torch.compile(longlora.apply_rotary)
    for layer in model.model.layers:
        for module in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            module.compile()


def add_adapter(model: longlora.Llama, trainable: str, rank: int, dtype: torch.dtype,
                quantize: str | None, device: torch.device | None = None) -> None:
    """What train.py adds before training: 4-bit weights, if asked for, and LoRA, unless all of the
    model is trainable."""
    if quantize:
        longlora.quantize(model, dtype, device)
    if trainable != "full":
        longlora.add_lora(model, rank, 2 * rank, dtype=dtype)


def random_model(config: longlora.LlamaConfig, device: torch.device, dtype: torch.dtype,
                 trainable: str, rank: int, quantize: str | None = None) -> longlora.Llama:
    """A model of random weights, as train.py would train it."""
    with torch.device("meta"):
        model = longlora.Llama(config).to(torch.float32 if trainable == "full" else dtype)
    model.to_empty(device=device).reset_parameters()
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    add_adapter(model, trainable, rank, dtype, quantize)
    longlora.set_trainable(model, trainable)
    return model


def count_flops(config: longlora.LlamaConfig, context: int, attention: dict, trainable: str = "",
                rank: int = 0, checkpointing: bool = False, offload: bool = False) -> np.ndarray:
    """FLOPs of a forward pass; if something is `trainable`, of the backward pass too. Two numbers:
    of attention, as full squares, and of all other matrix products."""
    found = []
    for layers in (1, 2):  # all are alike
        # Tensors without data; attention as plain products, which are the only batched ones.
        with (FakeTensorMode(), sdpa_kernel(SDPBackend.MATH),
              FlopCounterMode(display=False) as counter):
            model = longlora.Llama(dataclasses.replace(config, num_hidden_layers=layers))
            model.model.checkpointing, model.model.offload = checkpointing, offload
            if trainable not in ("", "full"):
                longlora.add_lora(model, rank)
                longlora.set_trainable(model, trainable)
            logits = model(torch.zeros(1, context, dtype=torch.long), **attention)
            if trainable:
                logits.sum().backward()
        counts = counter.get_flop_counts()["Global"]
        found.append(np.array([counts.pop(torch.ops.aten.bmm), sum(counts.values())], float))
    return found[0] + (config.num_hidden_layers - 1) * (found[1] - found[0])


def step_flops(config: longlora.LlamaConfig, context: int, attention: dict, trainable: str,
               rank: int, checkpointing: bool, offload: bool) -> float:
    """FLOPs that a training step on one sequence executes, recomputation included."""
    forward_squares, _ = count_flops(config, context, attention)
    squares, products = count_flops(config, context, attention, trainable, rank, checkpointing,
                                    offload)
    if trainable == "full":  # chunked_loss computes the logits again
        products += 2 * context * config.hidden_size * config.vocab_size
    # A causal flash kernel computes half of each square. Its forward pass has 2 products, its
    # backward pass 5, one more than plain attention.
    return products + (squares + forward_squares / 2) / 2


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of products of large square matrices, at their fastest within a second."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n ** 3 / min(timer.blocked_autorange(min_run_time=1).times)


def train_step_cost(model: longlora.Llama, optimizer: torch.optim.Optimizer, context: int,
                    attention: dict, steps: int, dtype: torch.dtype) -> dict:
    """Median seconds of `steps` training steps on one sequence, after one to warm up, and their
    peak memory in bytes."""
    device, seconds = model.lm_head.weight.device, []
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(model.config.vocab_size, (1, context + 1), device=device)
    for _ in range(1 + steps):
        began = time.perf_counter()
        with autocast(device, dtype):
            loss = model(ids[:, :-1], ids[:, 1:], **attention)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return {"seconds": statistics.median(seconds[1:]), "peak_memory_bytes": peak_memory(device),
            "reserved_memory_bytes": torch.cuda.max_memory_reserved() if cuda else None}


# --------------------------------------------------------------------------------------------------
# Figures, .png or .svg. matplotlib is optional; the same numbers give the same file.

STYLE = {"axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
         "font.sans-serif": ["DejaVu Sans", "Arial", "sans-serif"],
         "savefig.dpi": 150, "svg.fonttype": "none", "svg.hashsalt": "longlora"}  # text stays text


@contextlib.contextmanager
def figure(path: Path, width: float, height: float, panels: int = 1, **options) -> Iterator:
    """The axes of a figure (inches; a README is 8 wide), written when the block ends."""
    import matplotlib.figure  # not pyplot, which keeps every figure
    with matplotlib.rc_context(STYLE):
        fig = matplotlib.figure.Figure((width, height), layout="constrained")
        yield fig.subplots(1, panels, **options)
        longlora.replace_file(path, lambda partial: fig.savefig(
            partial, format=path.suffix[1:], metadata={"Date": None}))


def plot_curves(path: Path, series: dict[str, tuple]) -> None:
    """Perplexity by tokens in the window: a line of contexts, values and errors (or None) each."""
    with figure(path, 8, 4.5) as ax:
        for i, (name, (contexts, values, errors)) in enumerate(series.items()):
            errors = None if errors is None else np.array(errors, float)  # None becomes nan
            ax.errorbar(contexts, values, errors, label=name, marker="osD^vPX*"[i % 8], capsize=3)
        ax.set_xscale("log", base=2)
        ax.set_xticks(contexts, [f"{x:,}" for x in contexts])
        if len(series) > 1:  # before and after extension: far apart
            ax.set_yscale("log", subs=(2, 3, 5))
            ax.yaxis.set(major_formatter="{x:,g}", minor_formatter="{x:,g}")
        ax.set(title="Perplexity by context", xlabel="tokens in the window", ylabel="perplexity")
        ax.grid(True, which="both")
        ax.figure.legend(loc="outside lower center", ncols=4, frameon=False)


def plot_positions(path: Path, series: dict[str, list[float]], context: int, G: int) -> None:
    """Perplexity by position in the window, in equal bins, and where groups begin."""
    with figure(path, 8, 3.5) as ax:
        for name, values in series.items():
            ax.stairs(values, np.linspace(0, context, len(values) + 1), baseline=None, label=name,
                      linewidth=1.5)
        for border in range(G // 2, context, G // 2):
            ax.axvline(border, color="0.6", linestyle=":" if border % G else "-", linewidth=0.8)
        ax.set(title="Perplexity by position, by the attention of training", xlim=(0, context),
               xlabel="position (lines: groups begin; dotted: shifted groups)",
               ylabel="perplexity", xticks=range(0, context + 1, G // 2))
        ax.figure.legend(loc="outside lower center", ncols=4, frameon=False)


def plot_heatmaps(path: Path, maps: dict[str, list[dict]]) -> None:
    """Passkeys retrieved by length and depth: each of `maps` has rows of `passkey`."""
    columns = [len(rows) for rows in maps.values()]
    with figure(path, max(5, 1.1 + 0.4 * sum(columns)), 3, len(maps), sharey=True, squeeze=False,
                width_ratios=columns) as (axes,):
        for ax, (name, rows) in zip(axes, maps.items()):
            share = np.array([row["by_depth"] for row in rows], float).T  # (depths, lengths)
            edges = np.linspace(0, 100, len(share) + 1)
            image = ax.pcolormesh(range(len(rows) + 1), edges, share, cmap="Blues", vmin=0, vmax=1)
            for (i, j), value in np.ndenumerate(share):
                ax.text(j + 0.5, (edges[i] + edges[i + 1]) / 2, f"{value:.2f}", size=9,
                        ha="center", va="center", color="w" if value > 0.5 else "k")
            ax.set_xticks(np.arange(len(rows)) + 0.5, [f"{row['length']:,}" for row in rows],
                          rotation=45, ha="right", rotation_mode="anchor")
            ax.set(title=name, ylim=(100, 0))
        axes[0].set_ylabel("depth of the key (%)")
        ax.figure.supxlabel("tokens in the prompt", size=10)
        ax.figure.colorbar(image, ax=axes, label="share retrieved", pad=0.02, aspect=15)


# --------------------------------------------------------------------------------------------------
# The paper's tables at small scale. Every variant is trained from data/tiny-llama (a 256-token
# window) and measured on the test half of the standard library, by commands that are printed.

CONTEXTS = "256,512,1024,2048"
# A step reads 4,096 tokens. Settings were chosen on the validation half (data/README.md).
DEFAULTS = {"context": 2048, "attention": "shifted", "group-size": 512, "rope": "yarn",
            "trainable": "lora,embed,norm", "rank": 8, "lr": 1e-3, "steps": 100, "batch-size": 2,
            "passkey": 0.1, "eval-tokens": 0, "seed": 1}
FULL = {"trainable": "full", "lr": 3e-4}
ATTENTIONS = {"full attention": {"attention": "full"}, "local groups": {"attention": "local"},
              "S2-Attn": {}}
VARIANTS = {
    1: ATTENTIONS,
    2: {"LoRA, rank 8": {"trainable": "lora"}, "LoRA, rank 64": {"trainable": "lora", "rank": 64},
        "LoRA + norms": {"trainable": "lora,norm"}, "LoRA + embedding": {"trainable": "lora,embed"},
        "LoRA + both (LoRA+)": {}, "full fine-tuning": FULL},
    3: {f"trained on {T:,}": {"context": T, "group-size": T // 4, "batch-size": 4096 // T}
        for T in (512, 1024, 2048)} | {"2,048, linear": {"rope": "linear"}},
    5: {f"G = T/{n}, {name}": {"attention": attention, "group-size": 2048 // n}
        for n in (2, 4, 8)
        for attention, name in (("shifted", "shifted"), ("local", "not shifted"))}}

# 7B at 32,768 tokens, by full attention and as trained. Table 1 has one of them for S2-Attn, 8.08,
# and the other for groups without shift, 9.47; these are from Table 6 (LoRA+), which has both.
PAPER = {"full attention": ("8.04", "8.04"), "local groups": ("8.39", "9.17"),
         "S2-Attn": ("8.12", "8.64"), "LoRA, rank 8": ("11.44", None),
         "LoRA, rank 64": ("11.96", None), "LoRA + norms": ("10.49", None),
         "LoRA + embedding": ("8.29", None), "LoRA + both (LoRA+)": ("8.12", "8.64"),
         "full fine-tuning": ("8.08", None)}
TITLES = {
    1: "Tables 1 and 6. Perplexity by attention in training",
    2: "Table 2. Perplexity by trainable parameters (S2-Attn; rank 8 unless noted)",
    3: "Tables 3 and 4. Perplexity by evaluated length, full attention",
    4: "Passkey figure. Share of keys retrieved, by tokens in the prompt",
    5: "Table 7. Perplexity by group size and shift"}


def run_script(result: Path, script: str, *flags) -> dict:
    """The JSON file `result` of the command `python SCRIPT FLAGS`, which is run unless the file
    exists. Raises ValueError if the command fails."""
    if not result.exists():
        words = [os.path.relpath(ROOT / script), *map(str, flags)]
        print(f"\npython {shlex.join(words)}", flush=True)
        status = subprocess.run([sys.executable, *words]).returncode
        if status:
            raise ValueError(f"python {shlex.join(words)} ended with status {status}")
    return longlora.read_json(result)


def measure(out: Path, settings: dict, name: str, *command) -> list[dict]:
    """The rows of an eval.py command on the model trained with these settings, or on the base."""
    folder, model = out, []
    if settings:
        names = [f"{k}-{v}" for k, v in settings.items() if v != DEFAULTS[k] or k == "seed"]
        folder = out / "_".join(names).replace(",", "+")
        flags = [word for key, value in settings.items() for word in (f"--{key}", value)]
        run_script(folder / "results.json", "train.py", *flags, "--out", folder, "--resume")
        model = ["--model" if settings["trainable"] == "full" else "--adapter", folder]
    result = folder / f"{name}.json"
    return run_script(result, "eval.py", *command, *model, "--json", result)["rows"]


def perplexities(out: Path, settings: dict, name: str, contexts: str, *flags) -> dict[str, float]:
    """{"1024": perplexity, ...}"""
    rows = measure(out, settings, name, "perplexity", "--context", contexts, "--max-tokens", 32768,
                   *flags)
    return {str(row["context"]): row["perplexity"] for row in rows}


def run_table(out: Path, table: int, seeds: int) -> list[dict]:
    """The rows of a table of perplexities: {"variant", "seed", "256", ... by full attention, "as
    trained": at the trained context by the attention of training}."""
    rows = []
    if table == 3:
        rows = [{"variant": name} | perplexities(out, {}, name, CONTEXTS, *flags)
                for name, flags in (("base", []), ("linear", ["--extend", 2048]),
                                    ("yarn", ["--extend", 2048, "--rope", "yarn"]))]
    for variant, changes in VARIANTS[table].items():
        for seed in range(1, 1 + (seeds if table < 3 else 1)):
            settings = DEFAULTS | changes | {"seed": seed}
            row, context = perplexities(out, settings, "full", CONTEXTS), str(settings["context"])
            own = perplexities(out, settings, "as-trained", context, "--attention",
                               settings["attention"], "--group-size", settings["group-size"])
            rows.append({"variant": variant, "seed": seed} | row | {"as trained": own[context]})
    return rows


def run_positions(out: Path) -> dict[str, list[float]]:
    """Perplexity in 32 bins of a window, as trained, of the runs of table 1."""
    found = {}
    for name, changes in ATTENTIONS.items():
        settings = DEFAULTS | changes
        rows = measure(out, settings, "positions", "perplexity", "--context", 2048, "--protocol",
                       "official", "--stride", 2048, "--by-position", 32, "--attention",
                       settings["attention"], "--group-size", settings["group-size"])
        found[name] = [rows[0][f"bin {i}"] for i in range(1, 33)]
    return found


def run_passkeys(out: Path) -> list[dict]:
    """Passkeys retrieved before and after extension, and stretched beyond the trained length:
    {"variant", "256": accuracy, ..., "maps": rows of `passkey`}."""
    rows, yarn = [], ["--rope", "yarn"]
    for name, settings, lengths, flags in (
            ("base", {}, CONTEXTS, []),
            ("interpolated", {}, CONTEXTS, ["--extend", 2048, *yarn]),
            ("extended", DEFAULTS, f"{CONTEXTS},3072", []),
            ("stretched", DEFAULTS, f"{CONTEXTS},3072,4096", ["--extend", 4096])):
        maps = measure(out, settings, f"passkey-{name}", "passkey", "--length", lengths,
                       "--depths", 5, "--trials", 10, *flags)
        accuracies = {str(row["length"]): row["accuracy"] for row in maps}
        rows.append({"variant": name, "maps": maps} | accuracies)
    return rows


def print_paper_table(table: int, rows: list[dict]) -> None:
    """A line for each variant, mean and standard deviation over seeds, beside the paper's."""
    columns = [name for name in max(rows, key=len) if name not in ("variant", "seed", "maps")]
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        line = {"": variant}
        for name in columns:
            values = [row[name] for row in rows if row["variant"] == variant and name in row]
            line[name] = f"{statistics.mean(values):.2f}" if values else None
            if len(values) > 1:
                line[name] += f" ± {statistics.stdev(values):.2f}"
        if table in (1, 2):
            line["paper"], line["as trained, paper"] = PAPER.get(variant, (None, None))
        lines.append(line)
    print(f"\n{TITLES[table]}\n")
    print_table(lines)


# --------------------------------------------------------------------------------------------------
# Commands: each takes the command line's arguments and returns rows for --json


def within(kind: type, low: float, high: float = math.inf) -> Callable:
    """An argument's type: an int or float from low to high."""
    def value(text: str):
        x = kind(text)
        if not low <= x <= high:
            raise argparse.ArgumentTypeError(f"expected {low:g} to {high:g}, got {text}")
        return x

    value.__name__ = kind.__name__  # which argparse names
    return value


positive, natural = within(int, 1, (1 << 63) - 1), within(int, 0, (1 << 63) - 1)


def integers(text: str) -> list[int]:
    """Positive integers joined by commas."""
    return [positive(part) for part in text.split(",")]


def print_table(rows: list[dict]) -> None:
    """Rows as aligned columns."""
    def text(value) -> str:
        if value is None or isinstance(value, str):
            return value or "-"
        return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"

    lines = [list(rows[-1]), *([text(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print0("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def load(args: argparse.Namespace, context: int = 0) -> tuple[longlora.Llama, torch.dtype]:
    """The model to evaluate, on this process's device, and the dtype to compute in. A sliding
    window shorter than `context` is refused."""
    if args.rope and not args.extend:
        raise ValueError("--rope is the rule of --extend TOKENS, which is not given")
    device = init_distributed()
    # cuDNN's attention builds a plan for each new length, which takes half a second.
    torch.backends.cuda.enable_cudnn_sdp(args.run is run_perplexity)
    dtype = compute_dtype(args.dtype, device)
    model = longlora.load_model(args.model, context=context or args.extend)
    if args.quantize:  # matrix by matrix: the device never holds the model in 16 bits
        longlora.quantize(model, dtype, device)
    model.to(device, dtype)
    if args.adapter:
        longlora.load_adapter(model, args.adapter, args.extend, args.rope)
    elif args.extend:
        model.extend(args.extend, args.rope)
    return model, dtype


def run_perplexity(args: argparse.Namespace) -> list[dict]:
    attention = attention_kwargs(args.attention, args.group_size)
    model, dtype = load(args, max(args.context))
    with local_main_process_first():  # it encodes texts, the others find them encoded
        tokens = prepare.open_tokens(args.data, args.model, model.config.vocab_size)
    tokens, rows = tokens[:args.max_tokens], []
    for context in args.context:  # all are checked before the work
        windows(len(tokens), context, args.protocol, args.stride)
        if args.by_position >= context:
            raise ValueError(f"the {context - 1} targets of a window do not fill "
                             f"{args.by_position} bins")
    for context in args.context:
        found = perplexity(model, tokens, context, args.protocol, args.stride, dtype, **attention,
                           bins=args.by_position)
        rows.append({"context": context, "protocol": args.protocol, "perplexity": found.value,
                     "error": found.error, "tokens": found.tokens})
        if args.by_position:
            rows[-1] |= {f"bin {i}": x for i, x in enumerate(found.by_position, 1)}
    print_table(rows)
    if args.plot and is_main():
        values, errors = [row["perplexity"] for row in rows], [row["error"] for row in rows]
        plot_curves(args.plot, {f"{args.attention} attention": (args.context, values, errors)})
    return rows


def run_passkey(args: argparse.Namespace) -> list[dict]:
    model, dtype = load(args, max(args.length))
    tokenizer = prepare.load_tokenizer(args.model, model.config.vocab_size)
    # In ascending order: one that is too short for the prompt is refused before the long work.
    rows = [passkey(model, tokenizer, length, args.trials, args.depths, args.seed, dtype)
            for length in sorted(args.length)]
    depths = [f"to {(i + 1) / args.depths:.0%}" for i in range(args.depths)]
    print_table([row | {"by_depth": "of the filler:"} | dict(zip(depths, row["by_depth"]))
                 for row in rows])
    if args.plot and is_main():
        plot_heatmaps(args.plot, {Path(args.adapter or args.model).name: rows})
    return rows


def run_answers(args: argparse.Namespace) -> list[dict]:
    model, dtype = load(args, args.context or 0)
    context = args.context or model.config.max_position_embeddings
    with local_main_process_first():
        samples = prepare.open_samples(args.data, args.model, model.config.vocab_size, context,
                                       "test" if args.held_out else None)
    print0(f"{args.data}: {len(samples):,} samples; {prepare.describe_lost([samples])}")
    if args.max_tokens:
        samples = samples.some(args.max_tokens)
    if not len(samples):
        raise ValueError(f"--data {args.data}: no sample to answer fits --context or --max-tokens")
    rows = answers(model, samples, dtype)
    print_table([row | {"tokens": row["tokens"] or "all"} for row in rows])
    return rows


def run_topics(args: argparse.Namespace) -> list[dict]:
    """LongChat's test cases: prompts that ask for the first of their topics. Right is an answer
    whose first line names it, in any capitals, and none of the others."""
    if "{prompt}" not in args.template:
        raise ValueError(f"--template {args.template}: it has no {{prompt}}")
    model, dtype = load(args)
    tokenizer = prepare.load_tokenizer(args.model, model.config.vocab_size)
    room, cases = model.config.max_position_embeddings - args.max_new_tokens, []
    for place, case, _ in prepare.json_records(args.file, errors="replace"):
        match case:
            case {"prompt": str(text), "topics": [str(), *_] as topics}:
                ids = tokenizer.encode(args.template.replace("{prompt}", text))
                cases.append(([tokenizer.bos_id, *ids], topics))
            case _:
                raise ValueError(f'{args.file}, {place}: expected a text as "prompt", and "topics"')
    longest = max((len(prompt) for prompt, _ in cases), default=0)
    if not 0 < longest <= room:
        raise ValueError(f"{args.file}: {len(cases)} prompts, the longest of {longest:,} tokens; "
                         f"beside its answer the model reads 1 to {room:,}")

    def answer(i: int) -> tuple[int, int, bool]:
        prompt, topics = cases[i]
        ids = generate(model, prompt, args.max_new_tokens, dtype, stop_ids(model, tokenizer))
        line = tokenizer.decode(list(ids)).strip().split("\n")[0].casefold()
        first, *others = (str(topic).casefold() for topic in topics)
        named = first in line and not any(o in line and o not in first for o in others)
        return len(topics), len(prompt), named

    found, rows = shared_map(model, dtype, answer, len(cases), "cases"), []
    for n in sorted({row[0] for row in found}):
        tokens, named = zip(*(row[1:] for row in found if row[0] == n))
        rows.append({"topics": n, "cases": len(named), "tokens": round(statistics.mean(tokens)),
                     "accuracy": sum(named) / len(named)})
    print_table(rows)
    return rows


def run_generate(args: argparse.Namespace) -> list[dict]:
    text = args.prompt
    if text is not None and args.file:
        raise ValueError("--prompt and --file exclude each other")
    if args.file:
        text = args.file.read_text("utf-8", "replace")
    elif text is None:
        if sys.stdin.isatty():
            print("reading the text from standard input, up to Ctrl-D", file=sys.stderr)
        text = sys.stdin.read()
    if args.question:
        text = prepare.prompt_text(text, args.question)
    model, dtype = load(args)
    tokenizer = prepare.load_tokenizer(args.model, model.config.vocab_size)
    prompt = [tokenizer.bos_id, *tokenizer.encode(text)]
    ids, whole, shown = [], "", ""
    before = tokenizer.decode(prompt[-4:])  # the space before a first word shows only in company
    for token in generate(model, prompt, args.max_new_tokens, dtype, stop_ids(model, tokenizer),
                          args.temperature, args.top_p, args.seed):
        ids.append(token)
        whole = tokenizer.decode(prompt[-4:] + ids)[len(before):]
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a character: wait for the rest
            print(whole[len(shown):], end="", flush=True)
            shown = whole
    print(whole[len(shown):])
    print(f"{len(prompt):,} tokens read and {len(ids):,} written", file=sys.stderr)
    return [{"prompt_tokens": len(prompt), "tokens": len(ids), "text": whole}]


def run_bench(args: argparse.Namespace) -> list[dict]:
    shape, config = args.shape, longlora.LlamaConfig(*SHAPES[args.shape])
    if args.model:
        shape, config = args.model, longlora.load_config(args.model, context=1)
    contexts, rows = sorted(args.context), []  # peak memory of a CPU's process never falls
    config = dataclasses.replace(config, max_position_embeddings=contexts[-1], rope_scaling=None,
                                 sliding_window=None)  # nothing is interpolated
    groups = [args.group_size or longlora.default_group_size(T) for T in contexts]
    attentions = [attention_kwargs(args.attention, G) for G in groups]
    if args.flops:  # as in Table 11: all groups whole, as the official code rolls them around
        for T, G in zip(contexts, groups):
            shifted = {"group_size": G, "shift": False}
            rows.append({"shape": shape, "context": T,
                         "full_tflop": count_flops(config, T, {}).sum() / 1e12,
                         "shifted_tflop": count_flops(config, T, shifted).sum() / 1e12})
        print_table(rows)
        return rows
    device = torch.device(args.device or default_device())
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    dtype = compute_dtype(args.dtype, device)
    speed = matmul_speed(device, dtype)
    model = random_model(config, device, dtype, args.trainable, args.rank, args.quantize)
    model.model.checkpointing, model.model.offload = args.checkpointing, args.offload
    if args.compile:
        compile_layers(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
    print(f"{shape}: {longlora.count_parameters(model):,} parameters, trainable: {args.trainable}; "
          f"{name}, {str(dtype)[6:]}, matrix products {speed / 1e12:,.3g} TFLOP/s")
    for T, attention in zip(contexts, attentions):
        row = {"shape": shape, "context": T, "attention": args.attention}
        rows.append(row)
        try:
            row |= train_step_cost(model, optimizer, T, attention, args.steps, dtype)
        except RuntimeError as error:
            if "alloc" not in str(error).lower():  # as PyTorch's and cuBLAS's messages have it
                raise
            row["error"] = "out of memory"
            optimizer.zero_grad()  # the gradients of a step that failed
            print(f"{T:9,} tokens: out of memory", flush=True)
            continue
        flops = step_flops(config, T, attention, args.trainable, args.rank, args.checkpointing,
                           args.offload)
        row |= {"tokens_per_s": T / row["seconds"], "flops_per_token": flops / T,
                "matmul_share": flops / row["seconds"] / speed}
        print(f"{T:9,} tokens: {row['seconds']:.3f} s, {row['tokens_per_s']:,.0f} tokens/s, "
              f"{row['peak_memory_bytes'] / 2**30:.2f} GiB, {flops / T / 1e9:.4g} GFLOP/token, "
              f"{row['matmul_share']:.1%} of the speed of matrix products", flush=True)
    return rows


def run_paper(args: argparse.Namespace) -> list[dict]:
    if not set(args.only) <= TITLES.keys():
        raise ValueError(f"--only takes tables 1 to 5, got {args.only}")
    args.out.mkdir(parents=True, exist_ok=True)
    tables = {}
    for table in sorted(set(args.only)):
        rows = run_passkeys(args.out) if table == 4 else run_table(args.out, table, args.seeds)
        longlora.write_json(args.out / f"table-{table}.json", {"rows": rows})
        tables[table] = rows
    for table, rows in tables.items():
        print_paper_table(table, rows)
    if find_spec("matplotlib"):
        if 1 in tables:
            plot_positions(args.out / "positions.svg", run_positions(args.out), 2048, 512)
        if 3 in tables:
            contexts = integers(CONTEXTS)
            plot_curves(args.out / "perplexity.svg", {
                row["variant"]: (contexts, [row[str(T)] for T in contexts], None)
                for row in tables[3]})
        if 4 in tables:
            maps = {row["variant"]: row["maps"] for row in tables[4]}
            plot_heatmaps(args.out / "passkey.svg", maps)
    print(f"\nRuns, tables and figures (these need matplotlib) are in {args.out}")
    return [{"table": table} | row for table, rows in tables.items() for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable, text: str, model: bool = True) -> Callable:
        """Add the command `run_NAME`; returns the function that adds flags to it."""
        sub = commands.add_parser(run.__name__.removeprefix("run_"), help=text, description=text,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run, plot=None)
        add = sub.add_argument
        add("--json", type=Path, help="also write the rows to this file")
        if model:
            add("--model", default=TINY_LLAMA, help="folder of the Llama")
            add("--adapter", help="folder of an adapter: train.py's, PEFT's or the paper's")
            add("--extend", type=positive, metavar="TOKENS", help="interpolate to this window (an "
                "adapter records it, but the paper's do not)")
            add("--rope", choices=longlora.INTERPOLATIONS, help="the rule of --extend (linear)")
            add("--quantize", choices=("nf4",), help="linear layers below the head in 4 bits")
        if run is not run_paper:
            add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                help="to compute in; auto: bfloat16 where the hardware has it")
        return add

    add = command(run_perplexity, "Perplexity over windows of tokens.")
    add("--data", default="stdlib", help="stdlib (its test split), .bin, .txt, .jsonl, or a folder")
    add("--context", type=integers, default="256,512,1024,2048", help="tokens in a window")
    add("--protocol", default="sliding", choices=("sliding", "official"), help="see eval.py --help")
    add("--stride", type=positive, help="tokens between windows (half a window; official: 256)")
    add("--max-tokens", type=positive, help="read only this many tokens")
    add("--by-position", type=natural, default=0, metavar="N", help="also by N bins of the window")
    add("--plot", type=Path, help="draw the curve, .png or .svg (needs matplotlib)")
    add("--attention", default="full", choices=("full", "shifted", "local"), help="to read by")
    add("--group-size", type=positive, help="tokens in a group, for shifted and local attention")

    add = command(run_passkey, "Share of passkeys retrieved, by length of the prompt and depth.")
    add("--length", type=integers, default="128,256,512,1024,2048", help="most tokens in a prompt")
    add("--depths", type=positive, default=5, help="bins of the depth")
    add("--trials", type=positive, default=20, help="prompts for each length and depth")
    add("--seed", type=natural, default=0, help="of keys and depths")
    add("--plot", type=Path, help="draw a heat map, .png or .svg (needs matplotlib)")

    add = command(run_answers, "Exact matches and perplexity of answers, by tokens in a sample.")
    add("--data", default=prepare.QUESTIONS, help="instructions, as in train.py")
    add("--held-out", action="store_true", help="only those that train.py held out of this file")
    add("--context", type=positive, help="longest sample (the window); longer prompts are cut")
    add("--max-tokens", type=positive, help="read only this many tokens")

    add = command(run_topics, "Share of LongChat's conversations whose first topic is named.")
    add("--file", type=Path, required=True, help="LongChat's test cases, .jsonl")
    add("--template", default="{prompt}", help="of the prompt, such as '[INST]{prompt}[/INST]'")
    add("--max-new-tokens", type=positive, default=50, help="longest answer")

    add = command(run_generate, "Continue a text, or answer a question about it.")
    add("--prompt", help="text to continue")
    add("--file", type=Path, help="text file to continue (standard input)")
    add("--question", help="ask this about the text: [INST]text, question[/INST]")
    add("--max-new-tokens", type=positive, default=512, help="longest continuation")
    add("--temperature", type=within(float, 0, 100), default=0.6, help="0: greedy")
    add("--top-p", type=within(float, 0, 1), default=0.9, help="share of the tokens to draw from")
    add("--seed", type=natural, default=0, help="of the drawn tokens")

    add = command(run_bench, "Cost of a training step on random weights and tokens.", model=False)
    add("--shape", choices=SHAPES, default="tiny", help="sizes of the model")
    add("--model", help="take the sizes from this folder's config instead")
    add("--context", type=integers, default="1024,2048,4096", help="tokens, a row each")
    add("--flops", action="store_true", help="only count a forward pass's FLOPs, as the paper does")
    add("--steps", type=positive, default=3, help="timed steps, after one to warm up")
    add("--device", choices=("cpu", "cuda"), help="(a GPU if there is one)")
    add("--threads", type=positive, help="of the CPU (PyTorch's choice)")
    add("--attention", default="shifted", choices=("full", "shifted", "local"), help="in training")
    add("--group-size", type=positive, help="(a quarter of the context)")
    add("--trainable", default="lora,embed,norm", help="trainable parameters")
    add("--rank", type=positive, default=8, help="LoRA's rank")
    add("--quantize", choices=("nf4",), help="the frozen weights")
    add("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="recompute")
    add("--offload", action="store_true", help="keep checkpoints in host memory")
    add("--compile", action="store_true", help="small operations of the layers")

    add = command(run_paper, "The paper's tables and figures at small scale.", model=False)
    add("--only", type=integers, default="1,2,3,4,5", help="tables, see data/README.md")
    add("--out", type=Path, default="out-paper", help="folder; its finished runs are not repeated")
    add("--seeds", type=positive, default=3, help="of tables 1 and 2")

    args = parser.parse_args()
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    if several and args.run in (run_generate, run_bench, run_paper):
        raise ValueError("this command runs in one process: start it by python, not by torchrun")
    for path in filter(None, (args.json, args.plot)):
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path}: name a file in a folder that can be written to")
    if args.plot and (args.plot.suffix not in (".png", ".svg") or not find_spec("matplotlib")):
        raise ValueError(f"--plot {args.plot}: figures are .png or .svg, and need matplotlib")
    rows = args.run(args)
    if args.json and is_main():
        longlora.write_json(args.json, {"rows": rows})
    destroy_distributed()


if __name__ == "__main__":
    with longlora.one_line_errors():
        try:
            main()
        except torch.OutOfMemoryError as error:
            sys.exit(f"out of memory: {str(error).splitlines()[0]} Try shorter windows or prompts")
