"""Train: extend a Llama's context window by LongLoRA, or (--init random) make a small Llama to extend.

    python train.py                                                # the small Llama, 256 -> 2,048 tokens, minutes on a laptop
    python train.py --model Llama-2-7b-hf --data corpus.bin        # 4,096 -> 32,768 tokens
    python train.py --help
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import longlora
from data import prepare
from eval import TINY_LLAMA, compute_dtype, default_device, open_tokens, perplexity

# Where a default depends on the model's size: the paper's recipe (Section 4.1), and what was measured to be good for models
# below 100 million parameters (data/README.md). A small model learns at a higher rate, from fewer tokens, and needs a higher rank:
# rank 8 is a fiftieth of a 4,096-wide projection's freedom, but it limits a 256-wide one more than it saves.
RECIPES = {
    "large": {"steps": 1000, "batch_size": 64, "lr": 2e-5, "rank": 8, "decay": 0.0},
    "small": {"steps": 200, "batch_size": 4, "lr": 1.5e-3, "rank": 64, "decay": 0.5},
}
SMALL = 100_000_000


@dataclasses.dataclass
class Run:
    """The settings of a run; every flag is a field. None: decided by the model's size or by --context, see `resolve`."""

    def flag(default, group, text, **more):
        return dataclasses.field(default=default, metadata={"group": group, "help": text, **more})

    model: str = flag(TINY_LLAMA, "model and data", "folder of the Llama to extend")
    init: str = flag("pretrained", "model and data", "random: only the model's config and tokenizer are used",
                     choices=("pretrained", "random"))
    data: str = flag("stdlib", "model and data", "stdlib, stdlib+tests, a .bin token file, .txt, .jsonl or a folder of them")
    passkey: float = flag(0.0, "model and data", "share of the sequences that open with a passkey document")
    context: int | None = flag(None, "LongLoRA", "tokens to extend to, the one dial: it sets interpolation and group size "
                               "(8 times the model's window)")
    attention: str = flag("shifted", "LongLoRA", "attention in training", choices=("shifted", "local", "full"))
    group_size: int | None = flag(None, "LongLoRA", "tokens in a group (a quarter of the context, rounded up to even)")
    trainable: str = flag("lora,embed,norm", "LongLoRA", "what trains: full, or some of lora, embed, norm")
    rank: int | None = flag(None, "LongLoRA", "LoRA's rank; alpha is twice the rank")
    steps: int | None = flag(None, "optimization", "optimizer steps")
    batch_size: int | None = flag(None, "optimization", "sequences a step, over all micro-steps")
    micro_batch: int | None = flag(None, "optimization", "sequences a micro-step (as many as make 8,192 tokens, at least one)")
    lr: float | None = flag(None, "optimization", "peak learning rate")
    warmup: int = flag(20, "optimization", "steps of linear warm-up")
    decay: float | None = flag(None, "optimization", "share of the steps, at the end, in which the rate falls to zero")
    clip: float = flag(1.0, "optimization", "largest gradient norm")
    seed: int = flag(0, "optimization", "of the batches and of random weights")
    dtype: str = flag("auto", "machine", "compute in; auto: bfloat16 where it is native",
                      choices=("auto", "float32", "bfloat16"))
    checkpointing: bool = flag(False, "machine", "recompute activations in the backward pass instead of keeping them")
    compile: bool = flag(False, "machine", "torch.compile the decoder (needs a C++ compiler)")
    out: str = flag("out", "output", "folder for the adapter (or model), log.jsonl and results.json")
    eval_every: int = flag(0, "output", "steps between held-out losses (0: none)")
    eval_tokens: int = flag(65536, "output", "held-out tokens for the table at the end (0: no table)")
    save_every: int = flag(100, "output", "steps between saves")
    resume: bool = flag(False, "output", "continue the run in --out")
    overwrite: bool = flag(False, "output", "replace the run in --out")


# ----------------------------------------------------------------------------------------------------------------------
# Settings


def parse() -> Run:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for field in dataclasses.fields(Run):
        group, text = field.metadata["group"], field.metadata["help"]
        group = groups.setdefault(group, parser.add_argument_group(group))
        name = "--" + field.name.replace("_", "-")
        if field.type is bool:
            group.add_argument(name, action="store_true", help=text)
        else:
            kind = next(k for k in (int, float, str) if k.__name__ in str(field.type))
            shown = text if field.default is None else f"{text} (%(default)s)"
            group.add_argument(name, type=kind, default=field.default, choices=field.metadata.get("choices"), help=shown)
    return Run(**vars(parser.parse_args()))


def resolve(run: Run, model: longlora.Llama) -> None:
    """Fill in the settings that depend on the model, and check the numbers. Raises ValueError."""
    size = sum(p.numel() for p in model.parameters())
    for name, value in RECIPES["small" if size < SMALL else "large"].items():
        if getattr(run, name) is None:
            setattr(run, name, value)
    window = model.config.max_position_embeddings
    run.context = run.context or 8 * window
    if run.group_size is None:
        run.group_size = 2 * math.ceil(run.context / 8)
    if run.group_size % 2 or run.group_size < 2:
        raise ValueError(f"--group-size must be even and at least 2, got {run.group_size}")
    run.micro_batch = min(run.micro_batch or max(1, 8192 // run.context), run.batch_size or 1)
    for name, low in (("context", 2), ("rank", 1), ("steps", 1), ("batch_size", 1), ("micro_batch", 1), ("warmup", 0),
                      ("seed", 0), ("eval_every", 0), ("eval_tokens", 0), ("save_every", 1)):
        if getattr(run, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(run, name)}")
    for name, low, high in (("lr", 0, 1e3), ("decay", 0, 1), ("clip", 0, math.inf), ("passkey", 0, 1)):
        if not low <= getattr(run, name) <= high:
            raise ValueError(f"--{name} must lie between {low} and {high:g}, got {getattr(run, name)}")


def learning_rate(run: Run, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, constant, linear decay over the last `decay` share of the steps."""
    rising = (step + 1) / run.warmup if run.warmup else 1.0
    falling = (run.steps - step) / (run.decay * run.steps) if run.decay else 1.0
    return run.lr * min(1.0, rising, falling)


# ----------------------------------------------------------------------------------------------------------------------
# Batches


def make_batch(run: Run, tokens: np.ndarray, tokenizer, step: int) -> torch.Tensor:
    """The token ids (batch_size, context + 1) of a step: a function of (seed, step) alone, so any step can be made again."""
    rng = np.random.default_rng((run.seed, step))
    rows = []
    for _ in range(run.batch_size):
        start = int(rng.integers(len(tokens) - run.context))
        row = tokens[start:start + run.context + 1].astype(np.int64)
        if rng.random() < run.passkey:
            length = int(rng.integers(min(128, run.context // 2), run.context + 1))
            ids, _ = prepare.passkey_document(tokenizer, length, rng, held_out=False)
            row = np.concatenate([ids, [tokenizer.eos_id()], row])[:run.context + 1]
        rows.append(row)
    return torch.from_numpy(np.stack(rows))


# ----------------------------------------------------------------------------------------------------------------------
# Saving and resuming

FILES = ("log.jsonl", "results.json", "state.pt", "adapter_config.json", "adapter_model.safetensors", "longlora.json",
         "config.json", "model.safetensors", "tokenizer.model")


def save(run: Run, out: Path, model: longlora.Llama, optimizer: torch.optim.Optimizer, step: int) -> None:
    """The adapter (or the model, where all of it trains) for use, and state.pt to continue from: after `step` steps."""
    if run.trainable == "full":
        longlora.save_model(model, out, model.stored_dtype)
        if (tokenizer := Path(run.model) / "tokenizer.model").exists():
            longlora.replace_file(out / "tokenizer.model", lambda partial: shutil.copyfile(tokenizer, partial))
    else:
        longlora.save_adapter(model, out)
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    state = {"run": dataclasses.asdict(run), "step": step, "trained": trained, "optimizer": optimizer.state_dict()}
    longlora.replace_file(out / "state.pt", lambda partial: torch.save(state, partial))


# May differ between a run and its continuation.
FREE = {"out", "resume", "overwrite", "eval_every", "eval_tokens", "save_every", "compile", "checkpointing", "micro_batch"}


def restore(run: Run, out: Path, model: longlora.Llama, optimizer: torch.optim.Optimizer) -> int:
    """Load state.pt; the number of steps done, 0 where there is none. Raises ValueError if other settings made it."""
    file = out / "state.pt"
    if not file.exists():
        print(f"{out} holds nothing to resume: starting fresh")
        return 0
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        trained, was, step = state["trained"], state["run"], state["step"]
    except Exception as error:
        raise ValueError(f"{file}: cannot be read ({type(error).__name__}); --overwrite starts again") from None
    for name, value in dataclasses.asdict(run).items():
        if name not in FREE and was.get(name) != value:
            raise ValueError(f"--resume: {out} was made with --{name.replace('_', '-')} {was.get(name)}, not {value}")
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data.copy_(trained[name])
    optimizer.load_state_dict(state["optimizer"])
    lines = (out / "log.jsonl").read_text().splitlines()[:step]
    longlora.replace_file(out / "log.jsonl", lambda partial: partial.write_text("".join(line + "\n" for line in lines)))
    print(f"resuming after step {step}")
    return step


# ----------------------------------------------------------------------------------------------------------------------
# The run


def build(run: Run, device: torch.device) -> longlora.Llama:
    if run.init == "pretrained":
        model = longlora.load_model(run.model, device=device)
        model.stored_dtype = model.lm_head.weight.dtype
    else:
        torch.manual_seed(run.seed)
        model = longlora.Llama(longlora.load_config(run.model)).to(device)
        model.reset_parameters()
        model.stored_dtype = torch.bfloat16
        model.name_or_path = run.model
    return model


def peak_memory(device: torch.device) -> int:
    """Bytes: the accelerator's allocations, or on the CPU all that the process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(run: Run) -> None:
    out, device = Path(run.out), default_device()
    dtype = compute_dtype(run.dtype, device)
    model = build(run, device)
    resolve(run, model)
    if (out / "log.jsonl").exists():
        if run.overwrite:
            for name in FILES:
                (out / name).unlink(missing_ok=True)
        elif not run.resume:
            raise ValueError(f"{out} holds a run already: --resume continues it, --overwrite replaces it")
    out.mkdir(parents=True, exist_ok=True)

    config = model.config
    tokens = open_tokens(run.data, run.model, config.vocab_size, "train")
    tokenizer = prepare.load_tokenizer(run.model) if run.passkey else None
    valid = open_tokens(run.data, run.model, config.vocab_size, "valid")[:32768]

    model.extend(run.context)
    if run.trainable != "full":
        longlora.add_lora(model, run.rank, 2 * run.rank)
        model.to(dtype)
    longlora.set_trainable(model, run.trainable)
    model.model.checkpointing = run.checkpointing
    if run.compile:
        model.model.compile()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    first = restore(run, out, model, optimizer) if run.resume else 0

    pattern = {"full": {}, "local": {"group_size": run.group_size, "shift": False},
               "shifted": {"group_size": run.group_size}}[run.attention]
    interrupted = []
    signal.signal(signal.SIGINT, lambda *_: interrupted.append(True) or signal.signal(signal.SIGINT, signal.SIG_DFL))
    with open(out / "log.jsonl", "a", encoding="utf-8") as log, tqdm(total=run.steps, initial=first, unit="step") as bar:
        for step in range(first, run.steps):
            began = time.perf_counter()
            batch = make_batch(run, tokens, tokenizer, step)
            loss = 0.0
            for rows in batch.split(run.micro_batch):
                rows = rows.to(device, non_blocking=True)
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    part = model(rows[:, :-1], rows[:, 1:], **pattern) * (len(rows) / run.batch_size)
                part.backward()
                loss += part.item()
            norm = torch.nn.utils.clip_grad_norm_(trained, run.clip).item()
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise SystemExit(f"step {step + 1}: the loss is {loss}, its gradient's norm {norm}")
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(run, step)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - began
            line = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": learning_rate(run, step),
                    "tokens": (step + 1) * run.batch_size * run.context,
                    "tokens_per_s": run.batch_size * run.context / seconds, "peak_memory_bytes": peak_memory(device)}
            if run.eval_every and (step + 1) % run.eval_every == 0:
                line["valid_perplexity"] = perplexity(model, valid, min(run.context, len(valid)), dtype=dtype)[0]
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {line['tokens_per_s']:,.0f} tok/s, "
                                f"{line['peak_memory_bytes'] / 2**30:.2f} GiB")
            if interrupted or (step + 1) % run.save_every == 0 or step + 1 == run.steps:
                save(run, out, model, optimizer, step + 1)
            if interrupted:
                raise SystemExit(f"interrupted after step {step + 1}: saved to {out}, --resume continues")


if __name__ == "__main__":
    main(parse())
