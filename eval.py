"""Evaluate a Llama, with or without a LongLoRA adapter, under full attention as at inference.

    python eval.py perplexity --adapter out --context 256,512,1024,2048
    python eval.py passkey --adapter out --length 128,256,1024,2048

Perplexity over windows of L tokens, by one of two protocols:

- once: windows start every `stride` tokens (default L/2); each token is scored once, in the first window that holds it; the
  last window may be shorter. The honest figure.
- official: windows start every `stride` tokens (default 256); all L - 1 targets of each whole window are scored, and the
  result is the mean over windows. The paper's figure (Section 4.2).
"""
import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import longlora
from data import prepare

ROOT = Path(__file__).resolve().parent
TINY_LLAMA = str(ROOT / "data" / "tiny-llama")
BATCH_TOKENS = 8192  # short windows go together, up to this many tokens


# ----------------------------------------------------------------------------------------------------------------------
# Setting up: shared with train.py


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it natively, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def open_tokens(data: str, model_path: str, vocab_size: int, split: str) -> np.ndarray:
    """The token ids that `data` names, mapped: "stdlib" or "stdlib+tests" (its `split`), a .bin token file, or texts.

    Texts are encoded with the model's tokenizer once and kept in data/tokens. Raises FileNotFoundError, and ValueError for
    an empty file or ids beyond the vocabulary.
    """
    if data in ("stdlib", "stdlib+tests"):
        path = prepare.library_tokens(model_path, split, tests=data.endswith("+tests") and split == "train")
    elif Path(data).suffix == ".bin":
        path = Path(data)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such token file")
    else:
        path = prepare.text_tokens(data, model_path)
    dtype = np.dtype(prepare.token_dtype(vocab_size))
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path}: not a token file: {size} bytes are no whole number of {dtype.name} ids")
    tokens = np.memmap(path, dtype, mode="r")
    for start in range(0, len(tokens), 1 << 24):
        if (highest := int(tokens[start:start + (1 << 24)].max())) >= vocab_size:
            raise ValueError(f"{path}: token id {highest} is beyond the model's vocabulary of {vocab_size}")
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# Perplexity


def windows(length: int, context: int, protocol: str, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, scored) of each window over `length` tokens: its last `scored` tokens are scored."""
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
def perplexity(model: longlora.Llama, tokens: np.ndarray, context: int, protocol: str = "once", stride: int | None = None,
               dtype: torch.dtype = torch.float32, group_size: int | None = None, shift: bool = True) -> tuple[float, int]:
    """Perplexity of `model` on `tokens` (N,) in windows of `context` tokens, and how many tokens were scored.

    Raises ValueError if there is nothing to score.
    """
    stride = stride or (256 if protocol == "official" else max(1, context // 2))
    spans = list(windows(len(tokens), context, protocol, stride))
    if not spans or context < 2 or len(tokens) < 2:
        raise ValueError(f"{len(tokens)} tokens are too few for windows of {context} by the protocol {protocol!r}")
    if stride >= context and protocol == "once":
        raise ValueError(f"the stride ({stride}) must be smaller than the context ({context})")
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with tqdm(total=sum(scored for *_, scored in spans), desc=f"context {context:,}", unit="tok", leave=False,
              unit_scale=True) as bar, torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        while spans:
            most = max(1, BATCH_TOKENS // context)
            batch = [s for s in spans[:most] if s[1] - s[0] == spans[0][1] - spans[0][0]]
            spans = spans[len(batch):]
            ids = torch.from_numpy(np.stack([tokens[a:b].astype(np.int64) for a, b, _ in batch])).to(device)
            targets = ids[:, 1:].clone()
            for row, (_, _, scored) in zip(targets, batch):
                row[:len(row) - scored] = -100
            n = sum(scored for *_, scored in batch)
            total += model(ids[:, :-1], targets, group_size, shift).item() * n
            count += n
            bar.update(n)
    return math.exp(min(total / count, 700)), count
