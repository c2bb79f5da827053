"""Evaluate a Llama, with or without a LongLoRA adapter; full attention, as at inference, unless
told otherwise.

    python eval.py perplexity --adapter out --context 256,512,1024,2048
    python eval.py passkey --adapter out --length 128,256,1024,2048

Perplexity is over windows of L tokens, by one of two protocols:

- once: windows start every `stride` tokens (L/2); each token is scored in the first window that
  holds it, and the last window may be shorter. The honest figure.
- official: windows start every `stride` tokens (256); all L - 1 targets of each whole window are
  scored, and the loss is the mean of the windows' means. The paper's figure (Section 4.2).
"""
import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import longlora
from data import prepare

TINY_LLAMA = os.path.relpath(prepare.HERE / "tiny-llama")
BATCH_TOKENS = 8192  # short windows are read together, up to this many tokens


# --------------------------------------------------------------------------------------------------
# Setting up: train.py uses these too


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto": bfloat16 where it is native to the hardware, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype, sharded: bool | None = None
             ) -> torch.autocast:
    # Its cache of casts saves a tenth of the time of a small step; of FSDP's shards it would keep
    # the whole weights until the pass is over.
    sharded = dist.is_initialized() if sharded is None else sharded
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32,
                          cache_enabled=not sharded)


def attention_pattern(attention: str, group_size: int) -> dict:
    """What a model's call takes for "full", "local" or "shifted" attention. Raises ValueError if
    the group size is odd."""
    if group_size % 2:
        raise ValueError(f"--group-size must be even, got {group_size}")
    if attention == "full":
        return {}
    return {"group_size": group_size, "shift": attention == "shifted"}


def open_tokens(data: str, model_path: str, vocab_size: int,
                split: str | None = None) -> np.ndarray:
    """The token ids (N,) of `data`, mapped: "stdlib", "stdlib+tests", a .bin token file, or texts.

    `split` is "train", "valid" or "test". The library is split by file (None: "test"); of other
    data "valid" and "test" are the last two twentieths, a million tokens each at most, and None is
    all. Texts are encoded with the model's tokenizer, once, into data/tokens. Raises
    FileNotFoundError, and ValueError for an empty file or ids beyond the vocabulary.
    """
    library = data in ("stdlib", "stdlib+tests")
    pieces = vocab_size
    if Path(data).suffix != ".bin":  # as wide as the tokenizer wrote them
        pieces = load_tokenizer(model_path, vocab_size).vocab_size()
    if library:
        tests = data.endswith("tests") and split == "train"
        path = prepare.library_tokens(model_path, split or "test", tests)
    elif Path(data).suffix == ".bin":
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such token file")
    else:
        path = prepare.text_tokens(data, model_path)
    dtype = np.dtype(prepare.token_dtype(pieces))
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path}: not a token file of {dtype.name} ids: it has {size} bytes")
    tokens = np.memmap(path, dtype, mode="r")
    if split and not library:
        held_out = min(len(tokens) // 20, 1_000_000)
        first, second = len(tokens) - 2 * held_out, len(tokens) - held_out
        part = {"train": slice(first), "valid": slice(first, second), "test": slice(second, None)}
        tokens = tokens[part[split]]
    for start in range(0, len(tokens), 1 << 24):
        if (highest := int(tokens[start:start + (1 << 24)].max())) >= vocab_size:
            raise ValueError(f"{path}: token id {highest} is beyond the vocabulary of {vocab_size}")
    return tokens


def load_tokenizer(model_path: str, vocab_size: int):
    """The tokenizer of a model folder. Raises FileNotFoundError, and ValueError if it has more
    pieces than the model. (Added tokens may be beyond the model, as long as no text has them.)"""
    tokenizer = prepare.load_tokenizer(model_path)
    if (pieces := tokenizer.pieces.vocab_size()) > vocab_size:
        raise ValueError(f"{model_path}: the tokenizer has {pieces} pieces, the model only "
                         f"{vocab_size}")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Perplexity


def default_stride(protocol: str, context: int) -> int:
    return 256 if protocol == "official" else max(1, context // 2)


def windows(length: int, context: int, protocol: str,
            stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, scored) of windows over `length` tokens: the last `scored` of each count."""
    if protocol == "official":
        for start in range(0, length - context + 1, stride):
            yield start, start + context, context - 1
        return
    done = 1  # the first token of all has no context
    for start in range(0, length, stride):
        stop = min(start + context, length)
        if stop > done:
            yield start, stop, stop - done
            done = stop
        if stop == length:
            return


@torch.no_grad()
def perplexity(model: longlora.Llama, tokens: np.ndarray, context: int, protocol: str = "once",
               stride: int | None = None, dtype: torch.dtype = torch.float32,
               group_size: int | None = None, shift: bool = True) -> tuple[float, int]:
    """Perplexity of `model` on `tokens` (N,) in windows of `context` tokens, and how many tokens
    were scored. Raises ValueError if there is nothing to score."""
    stride = stride or default_stride(protocol, context)
    if context < 2 or not 0 < stride < context and protocol == "once" or stride < 1:
        raise ValueError(f"windows of {context} tokens cannot start every {stride} tokens")
    spans = list(windows(len(tokens), context, protocol, stride))
    if len(tokens) < context or not spans:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context}")
    device = model.lm_head.weight.device
    total, count, batches = 0.0, 0, []
    while spans:
        most = max(1, BATCH_TOKENS // context)
        batches.append([s for s in spans[:most] if s[1] - s[0] == spans[0][1] - spans[0][0]])
        spans = spans[len(batches[-1]):]
    # Under FSDP processes work in step: whoever has no batch left reads the first one for nothing.
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    bar = tqdm(total=sum(scored for b in batches for *_, scored in b), desc=f"context {context:,}",
               unit="tok", leave=False, unit_scale=True, disable=rank > 0)
    with bar, autocast(device, dtype):
        for i in range(rank, math.ceil(len(batches) / size) * size, size):
            batch = batches[i if i < len(batches) else 0]
            rows = [tokens[a:b].astype(np.int64) for a, b, _ in batch]
            ids = torch.from_numpy(np.stack(rows)).to(device)
            targets = ids[:, 1:].clone()
            for row, (_, _, scored) in zip(targets, batch):
                row[:len(row) - scored] = -100
            n = sum(scored for *_, scored in batch)
            loss = model(ids[:, :-1], targets, group_size, shift).item()
            if i < len(batches):
                total, count = total + loss * n, count + n
                bar.update(n * size)
    if hasattr(model, "reshard"):  # or FSDP's root goes on without gradients
        model.reshard()
    if size > 1:
        sums = torch.tensor([total, count], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        total, count = sums[0].item(), int(sums[1])
    return math.exp(min(total / count, 700)), count


# --------------------------------------------------------------------------------------------------
# Passkey retrieval


@torch.no_grad()
def passkey_accuracy(model: longlora.Llama, tokenizer, length: int, trials: int, seed: int = 0,
                     dtype: torch.dtype = torch.float32) -> float:
    """Share of `trials` prompts of at most `length` tokens whose every answer token is the arg max
    (Section 4.2).

    One forward pass a trial, no decoding. Keys and depths are those that training never draws.
    """
    rng, device = np.random.default_rng((seed, length)), model.lm_head.weight.device
    right = 0
    for _ in tqdm(range(trials), desc=f"length {length:,}", leave=False):
        ids, n = prepare.passkey_document(tokenizer, length, rng, held_out=True)
        tokens = torch.tensor([ids], device=device)
        with autocast(device, dtype):
            logits = model.lm_head(model.model(tokens)[:, -n - 1:-1])
        right += torch.equal(logits.argmax(-1), tokens[:, -n:])
    return right / trials


# --------------------------------------------------------------------------------------------------
# Command line


def integers(text: str) -> list[int]:
    """Positive integers joined by commas."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected positive integers, got {text}")
    return values


def positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return value


def natural(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or a positive integer, got {text}")
    return value


def load(args: argparse.Namespace, longest: int) -> tuple[longlora.Llama, torch.dtype]:
    device = default_device()
    dtype = compute_dtype(args.dtype, device)
    model = longlora.load_model(args.model, dtype, device, context=longest)
    if args.adapter:
        longlora.load_adapter(model, args.adapter, args.extend)
    elif args.extend:
        model.extend(args.extend)
    return model, dtype


def print_table(rows: list[dict]) -> None:
    """Rows of the same keys as aligned columns."""

    def text(v) -> str:
        return f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)

    cells = [list(rows[0])] + [[text(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def run_perplexity(args: argparse.Namespace) -> list[dict]:
    model, dtype = load(args, max(args.context))
    tokens = open_tokens(args.data, args.model, model.config.vocab_size)[:args.max_tokens]
    if len(tokens) < max(args.context):
        raise ValueError(f"{len(tokens):,} tokens are too few for windows of {max(args.context):,}")
    rows = []
    for context in args.context:
        stride = args.stride or default_stride(args.protocol, context)
        group_size = args.group_size or longlora.default_group_size(context)
        pattern = attention_pattern(args.attention, group_size)
        value, count = perplexity(model, tokens, context, args.protocol, stride, dtype, **pattern)
        rows.append({"context": context, "protocol": args.protocol, "stride": stride,
                     "perplexity": value, "tokens": count})
    return rows


def run_passkey(args: argparse.Namespace) -> list[dict]:
    model, dtype = load(args, max(args.length))
    tokenizer = load_tokenizer(args.model, model.config.vocab_size)
    prepare.passkey_document(tokenizer, min(args.length), np.random.default_rng(0), held_out=True)
    return [{"length": length, "trials": args.trials,
             "accuracy": passkey_accuracy(model, tokenizer, length, args.trials, args.seed, dtype)}
            for length in args.length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run)
        sub.add_argument("--model", default=TINY_LLAMA, help="folder of the Llama")
        sub.add_argument("--adapter", help="folder of an adapter: train.py's, PEFT's, or released "
                         "with the paper")
        sub.add_argument("--extend", type=positive, metavar="TOKENS",
                         help="interpolate positions to so many tokens (what the adapter says; a "
                         "released one says nothing)")
        sub.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                         help="compute in; auto: bfloat16 where it is native")
        sub.add_argument("--json", type=Path, help="write the rows to this file too")
        return sub

    sub = command("perplexity", run_perplexity, "Perplexity over sliding windows.")
    sub.add_argument("--data", default="stdlib",
                     help="stdlib (its test split), a .bin token file, .txt, .jsonl or a folder")
    sub.add_argument("--context", type=integers, default="256,512,1024,2048",
                     help="tokens in a window")
    sub.add_argument("--protocol", default="once", choices=("once", "official"),
                     help="see eval.py --help")
    sub.add_argument("--stride", type=positive,
                     help="tokens between windows (once: half a window; official: 256)")
    sub.add_argument("--max-tokens", type=positive, help="read only so many tokens")
    sub.add_argument("--attention", default="full", choices=("full", "shifted", "local"),
                     help="attention pattern")
    sub.add_argument("--group-size", type=positive,
                     help="tokens in a group (a quarter of the window)")

    sub = command("passkey", run_passkey, "Share of passkeys retrieved, by length of the prompt.")
    sub.add_argument("--length", type=integers, default="128,256,512,1024,2048",
                     help="tokens in a prompt, at most")
    sub.add_argument("--trials", type=positive, default=100, help="prompts at each length")
    sub.add_argument("--seed", type=natural, default=0, help="of keys and depths")

    args = parser.parse_args()
    if args.json and (args.json.is_dir() or not os.access(args.json.parent, os.W_OK)):
        raise ValueError(f"--json {args.json}: name a file in a folder that can be written to")
    rows = args.run(args)
    print_table(rows)
    if args.json:
        longlora.write_json(args.json, {"rows": rows})


if __name__ == "__main__":
    with prepare.one_line_errors():
        main()
