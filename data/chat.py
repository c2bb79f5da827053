"""Text from a model: generation with kept keys and values, and conversations at a terminal."""
import contextlib
import sys
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

import longlora
from data.instruct import prompt_text
from data.prepare import Tokenizer
from data.team import autocast

PREFILL = 1024  # tokens of a prompt that are read at one time: bounds what is beside the cache


class Cache:
    """Keys and values of the tokens read so far: an `attention` for the model's layers, which call
    it in turn. 2 x L x H_kv x D numbers a token: 0.5 MiB for Llama-2-7B in bfloat16."""

    def __init__(self, config: longlora.LlamaConfig, device: torch.device, dtype: torch.dtype):
        shape = 2, 1, config.num_key_value_heads, 0, config.head_dim  # (2, B, H_kv, S, D)
        self.kv = [torch.empty(shape, device=device, dtype=dtype)
                   for _ in range(config.num_hidden_layers)]
        self.length, self.layer = 0, 0

    def make_room(self, tokens: int) -> None:
        """For so many tokens in all; layer by layer, so that no more than one is there twice."""
        for i, kv in enumerate(self.kv):
            if (more := tokens - kv.shape[3]) > 0:
                self.kv[i] = F.pad(kv, (0, 0, 0, more))

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        T, kv = q.shape[2], self.kv[self.layer]
        end = self.length + T
        kv[:, :, :, self.length:end] = torch.stack((k, v))
        k, v = kv[:, :, :, :end]
        self.layer = (self.layer + 1) % len(self.kv)
        if self.layer == 0:
            self.length = end
        return longlora.causal_attention(q, k, v)


def fits(model: longlora.Llama, prompt: list[int]) -> None:
    """Raises ValueError if nothing can be generated after `prompt`."""
    window = model.config.max_position_embeddings
    if len(prompt) >= window:
        raise ValueError(f"the prompt has {len(prompt):,} tokens and the model reads {window:,} "
                         "with its answer: shorten it, or extend the model")
    if not prompt:
        raise ValueError("the prompt is empty")


@torch.no_grad()
def generate(model: longlora.Llama, prompt: list[int], most: int, dtype: torch.dtype,
             stop: set[int], temperature: float = 0.0, top_p: float = 1.0, seed: int = 0,
             cache: Cache | None = None) -> Iterator[int]:
    """Up to `most` token ids after `prompt`, one by one, until one of `stop` (not given) or the end
    of the model's window. Temperature 0 takes the likeliest; else one is drawn from the likeliest
    that together have a share `top_p`. A `cache` has the beginning of `prompt` as an earlier call
    has read it. Raises ValueError if the prompt does not fit the window."""
    device, window = model.lm_head.weight.device, model.config.max_position_embeddings
    fits(model, prompt)
    random = torch.Generator().manual_seed(seed)
    cache = cache or Cache(model.config, device, dtype)
    cache.make_room(min(len(prompt) + most, window))
    new = prompt[cache.length:]
    for _ in range(min(most, window - len(prompt))):
        for start in tqdm(range(0, len(new), PREFILL), desc="reading", unit_scale=PREFILL,
                          unit="tok", leave=False, disable=len(new) <= PREFILL):
            ids = torch.tensor([new[start:start + PREFILL]], device=device)
            with autocast(device, dtype):
                x = model.model(ids, start=cache.length, attention=cache)
        with autocast(device, dtype):
            logits = model.lm_head(x[0, -1]).float()
        if temperature < 1e-6:  # 0, or so little that the division overflows
            chosen = logits.argmax().item()
        else:
            p, order = (logits / temperature).softmax(-1).cpu().sort(descending=True)
            p[1:][p.cumsum(-1)[:-1] >= top_p] = 0  # the likeliest always stays
            chosen = order[torch.multinomial(p, 1, generator=random)].item()
        if chosen in stop:
            return
        yield chosen
        new = [chosen]


def stops(model: longlora.Llama, tokenizer: Tokenizer) -> set[int]:
    """The ids that end a text: the tokenizer's, and the config's one or several."""
    ids = model.config.eos_token_id
    return {tokenizer.eos_id(), *(ids if isinstance(ids, list) else [ids])} - {None}


def write(model: longlora.Llama, tokenizer: Tokenizer, prompt: list[int], most: int,
          dtype: torch.dtype, temperature: float, top_p: float, seed: int,
          cache: Cache | None = None) -> tuple[list[int], dict]:
    """Print what the model makes of `prompt`, as it comes; returns the ids, and what there is to
    say: {"prompt_tokens", "tokens", "seconds", "text"}. Ctrl-C ends the answer, of a conversation
    alone (it has a `cache`)."""
    began, ids, whole, shown = time.perf_counter(), [], "", ""
    before = tokenizer.decode(prompt[-4:])  # the space before a first word shows only in company
    known = cache.length if cache else 0
    try:
        for id in generate(model, prompt, most, dtype, stops(model, tokenizer), temperature, top_p,
                           seed, cache):
            ids.append(id)
            whole = tokenizer.decode(prompt[-4:] + ids)[len(before):]
            if not whole.endswith("\N{REPLACEMENT CHARACTER}"):  # half a one: wait for the rest
                print(whole[len(shown):], end="", flush=True)
                shown = whole
    except KeyboardInterrupt:
        if not cache:
            raise
        cache.layer = 0  # what only some layers have read is read again
    print(whole[len(shown):])
    seconds = time.perf_counter() - began
    print(f"{len(prompt) - known:,} tokens read and {len(ids):,} written in {seconds:.1f} s",
          file=sys.stderr)
    return ids, {"prompt_tokens": len(prompt), "tokens": len(ids), "seconds": seconds,
                 "text": whole}


def talk(model: longlora.Llama, tokenizer: Tokenizer, text: str | None, question: str | None,
         most: int, dtype: torch.dtype, temperature: float, top_p: float, seed: int) -> list[dict]:
    """A conversation at the terminal, about `text` if there is one; returns a row for each turn.

    Each turn has the form of a sample in training, behind the turns before it, with one BOS at the
    beginning. What was read is not read again. A turn that does not fit the window is left out.
    Raises ValueError if not even `text` fits.
    """
    if text is not None:
        fits(model, [tokenizer.bos_id(), *tokenizer.encode(prompt_text(text, "?"))])
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, input() edits lines by it
    cache = Cache(model.config, model.lm_head.weight.device, dtype)
    ids, rows = [tokenizer.bos_id()], []
    while True:
        try:
            asked = question or input("> ")
        except EOFError:
            print()
            return rows
        question = None
        if not asked.strip():
            continue
        turn = tokenizer.encode(prompt_text(asked) if text is None or rows else
                                prompt_text(text, asked))
        try:
            answer, row = write(model, tokenizer, ids + turn, most, dtype, temperature, top_p,
                                seed + len(rows), cache)
        except ValueError as error:
            print(f"{error} (left out)", file=sys.stderr)
            continue
        ids += [*turn, *answer, tokenizer.eos_id()]
        rows.append(row)
