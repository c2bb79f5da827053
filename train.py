"""Train: extend a Llama's context window by LongLoRA, or (--init random) pretrain a Llama.

    python train.py                                          # the small Llama, 256 -> 2,048 tokens,
                                                             # minutes on a laptop
    python train.py --model TinyLlama-1.1B --data corpus.bin # 2,048 -> 16,384 tokens
    torchrun --nproc-per-node 8 train.py ...                 # on 8 GPUs
    python train.py --plan --gpus 8 --gpu-memory 80 ...      # memory of a step, nothing is loaded
    python train.py --plan --model DIR                       # longest contexts, by card
    python train.py --help

Top to bottom: settings, the tokens of a step, the loop. Below the banner: several processes on one
run (FSDP and context parallelism), saving and resuming, and --plan.
"""
import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # less fragmentation

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_state_dict, set_state_dict)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

import longlora
from data import prepare
from eval import (TINY_LLAMA, add_adapter, answers, attention_kwargs, autocast, compile_layers,
                  compute_dtype, destroy_distributed, init_distributed, is_main,
                  local_main_process_first, natural, passkey, peak_memory, perplexity, positive,
                  print0, print_table, within, world)

# --------------------------------------------------------------------------------------------------
# Settings

# Defaults that depend on the model's size: the paper's recipe (Section 4.1), and the best measured
# for models below 100 million parameters (data/README.md). A small model learns at a higher rate,
# and the linear rule would leave it too much to learn again.
RECIPES = {
    "large": {"steps": 1000, "epochs": 5.0, "batch_size": 64, "lr": 2e-5, "cooldown": 0.0,
              "rope": "linear"},
    "small": {"steps": 240, "epochs": 1.0, "batch_size": 2, "lr": 1e-3, "cooldown": 1.0,
              "rope": "yarn"},
}
SMALL = 100_000_000


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings of a run. None: decided by the model's size or by --context, in
    `fill_defaults`."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    share, tokens = within(float, 0, 1), within(int, 2, 1 << 31)
    add = parser.add_argument_group("model and data").add_argument
    add("--model", default=TINY_LLAMA, help="folder of the Llama to extend (%(default)s)")
    add("--init", default="pretrained", choices=("pretrained", "random"), help="random: use only "
        "the folder's config and tokenizer")
    add("--data", default="stdlib", help="stdlib, stdlib+tests, a .bin token file, .txt, .jsonl or "
        "a folder of them; or instructions: .json, .jsonl, a prepared .bin, stdlib-questions")
    add("--passkey", type=share, help="share of sequences that begin with passkey documents (0.1 "
        "with stdlib, else 0)")
    add = parser.add_argument_group("LongLoRA: --context is the one dial").add_argument
    add("--context", type=tokens, help="tokens to extend to; sets interpolation and group size (8 "
        "times the model's window; with instructions the window)")
    add("--attention", default="shifted", choices=("shifted", "local", "full"), help="in training")
    add("--group-size", type=tokens, help="tokens in a group (a quarter of --context or of a "
        "sample's length, rounded up to even)")
    add("--rope", choices=longlora.INTERPOLATIONS, help="rule of position interpolation (linear, "
        "as in the paper; for a small model yarn)")
    add("--trainable", default="lora,embed,norm", help="full, or some of lora, embed, norm")
    add("--rank", type=positive, default=8, help="LoRA's rank (%(default)s); alpha is twice the "
        "rank")
    add = parser.add_argument_group("optimization").add_argument
    add("--steps", type=positive, help="optimizer steps")
    add("--epochs", type=within(float, 1e-3, 1e6), help="passes over the data, instead of --steps")
    add("--batch-size", type=positive, help="sequences a step, over all micro-steps and processes")
    add("--micro-batch", type=positive, help="sequences a micro-step (of a corpus; 2,048 tokens)")
    add("--lr", type=within(float, 0, 1e3), help="peak learning rate")
    add("--warmup", type=natural, default=20, help="steps of linear warm-up (%(default)s)")
    add("--cooldown", "--decay", type=share, help="last share of the steps, of falling rate")
    add("--weight-decay", type=within(float, 0, 1e3), default=0.0, help="of matrices, not of norms")
    add("--grad-clip", "--clip", type=within(float, 1e-9), default=1.0, help="largest norm")
    add("--seed", type=natural, default=0, help="of the batches and of random weights")
    add = parser.add_argument_group("machine").add_argument
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the "
        "computation; auto: bfloat16 where the hardware has it")
    add("--quantize", choices=("nf4",), help="nf4: frozen weights in 4 bits (QLoRA)")
    add("--checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--offload", action="store_true", help="--checkpointing that keeps its inputs on the host")
    add("--compile", action="store_true", help="fuse small operations (needs a C++ compiler)")
    add("--context-parallel", type=positive, default=1, help="processes that share a sequence")
    add("--timeout", type=within(float, 0.01, 1e6), default=60, metavar="MINUTES", help="of "
        "silence, after which a process is taken for lost (%(default)s; one may be encoding text)")
    add = parser.add_argument_group("output").add_argument
    add("--out", default="out", help="folder for the adapter or model, log.jsonl and results.json")
    add("--eval-every", type=natural, default=0, help="steps between held-out losses (0: none)")
    add("--eval-tokens", type=natural, help="held-out tokens of the table at the end; 0: no table "
        "(32,768; of instructions 128 times --context)")
    add("--save-every", type=natural, default=100, help="steps between saves (0: none)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--overwrite", action="store_true", help="replace the run in --out")
    add = parser.add_argument_group("plan").add_argument
    add("--plan", action="store_true", help="print the memory of a step; load nothing. Without "
        "--context: the longest contexts that fit on cards of 8 to 80 GiB")
    add("--gpus", type=positive, default=1, help="GPUs to plan for")
    add("--gpu-memory", type=within(float, 0), help="GiB of each (80)")
    return parser.parse_args(arguments)


def fill_defaults(args: argparse.Namespace, model: longlora.Llama) -> None:
    """Fill in the settings that depend on the model and on the kind of data. Raises ValueError for
    settings that exclude each other or do not fit the model."""
    instructions = prepare.is_instructions(args.data)
    size = sum(p.numel() for p in model.parameters())
    recipe = RECIPES["small" if size < SMALL else "large"]
    if args.steps and args.epochs:
        raise ValueError("--steps and --epochs exclude each other")
    if args.rank > model.config.hidden_size:
        raise ValueError(f"--rank must be at most the model's width of {model.config.hidden_size}, "
                         f"got {args.rank}")
    if args.steps is None and args.epochs is None:  # epochs become steps when the data are known
        length = "epochs" if instructions else "steps"
        setattr(args, length, recipe[length])
    if args.rope is None:
        args.rope = model.config.interpolation[0] or recipe["rope"]
    for name in ("batch_size", "lr", "cooldown"):
        if getattr(args, name) is None:
            setattr(args, name, recipe[name])
    if args.context is None:
        args.context = model.config.max_position_embeddings * (1 if instructions else 8)
    if args.eval_tokens is None:
        args.eval_tokens = 128 * args.context if instructions else 32768
    if args.passkey is None:
        library = args.data in ("stdlib", "stdlib+tests")
        args.passkey = 0.1 if library and args.context >= prepare.PASSKEY_TOKENS else 0.0
    if args.group_size is None and not instructions:
        args.group_size = longlora.default_group_size(args.context)
    if instructions:
        args.micro_batch = 1  # each has a length of its own
    elif args.micro_batch is None:
        args.micro_batch = max(1, 2048 // args.context)

    if "full" in longlora.parse_trainable(args.trainable) and args.quantize:
        raise ValueError("--quantize is for frozen weights: --trainable full has none")
    model.config.extended(args.context, args.rope)  # refused here, before any work
    if args.passkey and instructions:
        raise ValueError("--passkey is for a corpus, not for instructions")
    if args.passkey and args.context < prepare.PASSKEY_TOKENS:
        raise ValueError(f"--passkey needs a --context of {prepare.PASSKEY_TOKENS} tokens at least")
    if args.context_parallel > 1 and args.attention == "full":
        raise ValueError("--context-parallel needs --attention shifted or local: full attention is "
                         "not split over processes")
    part = args.context / args.context_parallel
    if args.context_parallel > 1 and not instructions and part % args.group_size:
        raise ValueError(f"--context-parallel {args.context_parallel}: the {part:g} tokens of a "
                         f"process are not whole groups of {args.group_size}; choose another "
                         "--context or a smaller --group-size")
    attention_kwargs(args.attention, args.group_size or 2)  # refuses an odd group size
    if args.attention == "shifted" and model.config.num_attention_heads % 2:
        raise ValueError("shifting half of the heads needs an even number of them: choose "
                         "--attention local or full")


def learning_rate(args: argparse.Namespace, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, constant, linear fall over the last `cooldown`
    share of the steps."""
    rising = (step + 1) / args.warmup if args.warmup else 1.0
    falling = (args.steps - step) / (args.cooldown * args.steps) if args.cooldown else 1.0
    return args.lr * min(1.0, rising, falling)


# --------------------------------------------------------------------------------------------------
# The tokens of a step: windows of a corpus, or instructions. Both are functions of (seed, step)
# alone, so that any step can be made again.

HELD_OUT = 32768  # tokens of the loss that --eval-every measures


class Sequence(NamedTuple):
    tokens: np.ndarray  # (T,)
    targets: np.ndarray  # (T,): the token that follows each, -100 where it is not scored
    group_size: int


class Corpus:
    """Windows of args.context tokens, cut anywhere; the table has perplexity by context, and
    passkeys retrieved if they were among the tokens.

    `samples` is the number of windows in an epoch. Raises ValueError if there are too few tokens.
    """

    metric, next_commands = "perplexity", ("passkey", "perplexity")

    def __init__(self, args: argparse.Namespace, config: longlora.LlamaConfig):
        self.args, self.tokenizer, self.groups = args, None, f"{args.group_size:,}"
        with local_main_process_first():  # it encodes texts, the others find them encoded
            self.train, valid, test = (
                prepare.open_tokens(args.data, args.model, config.vocab_size, split)
                for split in ("train", "valid", "test"))
        self.valid = valid[:max(HELD_OUT, args.context)]
        self.test = test[:max(args.eval_tokens, args.context)]
        self.samples = len(self.train) // args.context
        if len(self.train) <= args.context:
            raise ValueError(f"--data {args.data}: {len(self.train):,} training tokens are too few "
                             f"for --context {args.context:,}")
        held_out = min(len(self.valid), len(self.test))
        if (args.eval_every or args.eval_tokens) and held_out < args.context:
            raise ValueError(f"--data {args.data}: {held_out:,} held-out tokens are too few for "
                             f"--context {args.context:,}; give more text, or --eval-every 0 "
                             "--eval-tokens 0")
        if args.passkey:
            self.tokenizer = prepare.load_tokenizer(args.model, config.vocab_size)
            prepare.passkey_document(self.tokenizer, prepare.PASSKEY_TOKENS,  # does one fit?
                                     np.random.default_rng(0), held_out=False)
        self.contexts = [min(config.max_position_embeddings, args.context)]
        while self.contexts[-1] < args.context:
            self.contexts.append(min(2 * self.contexts[-1], args.context))
        print0(f"{args.data}: a corpus, {len(self.train):,} training tokens")

    def sequences(self, step: int) -> list[Sequence]:
        args, rng, found = self.args, np.random.default_rng((self.args.seed, step)), []
        for _ in range(args.batch_size):
            start = int(rng.integers(len(self.train) - args.context))
            ids = self.train[start:start + args.context + 1].astype(np.int64)
            if rng.random() < args.passkey:
                passkeys = prepare.passkey_documents(self.tokenizer, args.context, rng)
                ids = np.concatenate([passkeys, ids])[:args.context + 1]
            found.append(Sequence(ids[:-1], ids[1:], args.group_size))
        return found

    def held_out_loss(self, model: longlora.Llama, dtype: torch.dtype) -> float:
        return math.log(perplexity(model, self.valid, self.args.context, dtype=dtype).value)

    def measure(self, model: longlora.Llama, dtype: torch.dtype) -> dict[str, dict]:
        found = {"perplexity": {str(c): perplexity(model, self.test, c, dtype=dtype).value
                                for c in self.contexts}}
        if self.args.passkey:
            found["passkey"] = {
                str(c): passkey(model, self.tokenizer, c, 4, depths=5, dtype=dtype)["accuracy"]
                for c in self.contexts if c >= prepare.PASSKEY_TOKENS}
        return found

    def table(self, results: dict[str, dict[str, dict]]) -> str:
        titles = {"perplexity": f"perplexity on {len(self.test):,} held-out tokens",
                  "passkey": "share of 20 passkeys retrieved"}
        columns = [f"{c:,}" for c in self.contexts]
        return "\n\n".join(
            table(f"{titles[metric]}, full attention, by tokens in a window", columns,
                  {name: [row.get(str(c), math.nan) for c in self.contexts]
                   for name, row in rows.items()})
            for metric, rows in results.items())


class Instructions:
    """Samples of at most args.context tokens, in a new order each epoch; the table has exact
    matches and perplexity of answers. The loss averages over the answers' tokens of a step.

    Raises ValueError if there are no samples, or --context-parallel cannot split one.
    """

    metric, next_commands = "answers", ("generate --file FILE --question QUESTION",)

    def __init__(self, args: argparse.Namespace, config: longlora.LlamaConfig):
        self.args = args
        self.groups = f"{args.group_size:,}" if args.group_size else "a quarter of a sample"
        with local_main_process_first():
            parts = prepare.open_splits(args.data, args.model, config.vocab_size, args.context)
        self.train, valid, test = parts
        self.valid = valid.some(max(HELD_OUT, args.context))
        self.test, self.samples = test.some(args.eval_tokens), len(self.train)
        if not self.samples:
            raise ValueError(f"--data {args.data}: no answer fits into --context {args.context:,}")
        for flag, wanted, part in (("--eval-every", args.eval_every, self.valid),
                                   ("--eval-tokens", args.eval_tokens, self.test)):
            if wanted and not len(part):
                raise ValueError(f"--data {args.data}: {flag} needs held-out samples, but none of "
                                 f"{sum(map(len, parts)):,} is left for it (every twentieth is); "
                                 f"give more samples or tokens, or {flag} 0")
        for length in map(int, np.unique(self.train.lengths)):
            G = self.group_size(length)
            if math.ceil(length / G) < args.context_parallel:
                raise ValueError(f"--context-parallel {args.context_parallel}: a sample of "
                                 f"{length:,} tokens has only {math.ceil(length / G)} groups of "
                                 f"{G:,}; share a sequence among fewer processes, or give a "
                                 "smaller --group-size")
        print0(f"{args.data}: instructions, {self.samples:,} to train on and {len(valid):,} + "
               f"{len(test):,} held out, at {args.context:,} tokens; "
               f"{prepare.describe_lost(parts)}")

    def group_size(self, length: int) -> int:
        return self.args.group_size or longlora.default_group_size(length)

    def order(self, first: int, last: int) -> np.ndarray:
        """The samples that are drawn as number first, first + 1, ..., last - 1 of the run."""
        n, epochs = self.samples, range(first // self.samples, last // self.samples + 1)
        drawn = [np.random.default_rng((self.args.seed, e)).permutation(n) for e in epochs]
        return np.concatenate(drawn)[first - n * epochs[0]:last - n * epochs[0]]

    def sequences(self, step: int) -> list[Sequence]:
        B = self.args.batch_size
        samples = [self.train[i] for i in self.order(step * B, (step + 1) * B)]
        return [Sequence(ids, np.append(labels[1:], -100), self.group_size(len(ids)))
                for ids, labels in samples]

    def held_out_loss(self, model: longlora.Llama, dtype: torch.dtype) -> float:
        return math.log(answers(model, self.valid, dtype)[-1]["perplexity"])

    def measure(self, model: longlora.Llama, dtype: torch.dtype) -> dict[str, list[dict]]:
        return {"answers": answers(model, self.test, dtype)}

    def table(self, results: dict[str, dict[str, list[dict]]]) -> str:
        results = results["answers"]
        rows = {f"{name}: {metric.replace('_', ' ')}": [row[metric] for row in found]
                for metric in ("exact_match", "perplexity") for name, found in results.items()}
        first = next(iter(results.values()))
        columns = [f"{row['tokens']:,}" if row["tokens"] else "all" for row in first]
        return table(f"answers to {len(self.test):,} held-out samples, full attention, by tokens "
                     "in a sample, up to", columns, rows)


def table(title: str, columns: list[str], rows: dict[str, list[float]]) -> str:
    width = max(map(len, rows)) + 4
    lines = [f"{title}:", " " * width + "".join(f"{column:>10}" for column in columns)]
    return "\n".join(lines + [f"{name:>{width}}" + "".join(f"{x:10.2f}" for x in values)
                              for name, values in rows.items()])


def micro_steps(args: argparse.Namespace, sequences: list[Sequence], parallel: "Parallel"
                ) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict]]:
    """This process's part of a step, --micro-batch sequences at a time: tokens (B, T), targets, and
    further arguments of `Llama.forward`. Of a sample of instructions, only the scored tokens need
    logits, so that its targets are of these alone."""
    mine = parallel.share(sequences)
    for rows in (mine[i:i + args.micro_batch] for i in range(0, len(mine), args.micro_batch)):
        part = parallel.part_of(len(rows[0].tokens), rows[0].group_size)
        tokens = torch.from_numpy(np.stack([row.tokens[part] for row in rows]))
        targets = torch.from_numpy(np.stack([row.targets[part] for row in rows]))
        kwargs = attention_kwargs(args.attention, rows[0].group_size) | parallel.kwargs(part)
        if len(rows) == 1 and (targets == -100).any():
            kwargs["logits_to_keep"] = (targets[0] != -100).nonzero()[:, 0]
            targets = targets[:, kwargs["logits_to_keep"]]
        yield tokens, targets, kwargs


# --------------------------------------------------------------------------------------------------
# The run


def optimizer_step(args: argparse.Namespace, model: longlora.Llama,
                   optimizer: torch.optim.Optimizer, sequences: list[Sequence],
                   parallel: "Parallel", dtype: torch.dtype) -> tuple[float, float]:
    """One step on the sequences of all processes: the mean loss of all their scored targets, and
    its gradient's norm. If one of the two is not finite, nothing is updated."""
    device, world_size = model.lm_head.weight.device, parallel.world_size
    count = sum(int((sequence.targets != -100).sum()) for sequence in sequences)
    total = torch.zeros((), device=device)
    for tokens, targets, kwargs in micro_steps(args, sequences, parallel):
        # FSDP reduces gradients after each micro-step: kept whole until the last, they would take
        # as much memory as all trainable weights.
        with autocast(device, dtype):
            loss = model(tokens.to(device), targets.to(device), **kwargs, reduction="sum") / count
        (loss * world_size).backward()  # FSDP averages gradients over processes, this is a sum
        total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, args.grad_clip)
    if world_size > 1:
        dist.all_reduce(total)
        norm = norm.full_tensor()
    loss, norm = total.item(), norm.item()
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def build_model(args: argparse.Namespace, device: torch.device,
                dtype: torch.dtype) -> longlora.Llama:
    """The model to train, mapped from its files, or with random weights. On several processes all
    draw the same ones."""
    if args.init == "pretrained":
        return longlora.load_model(args.model, context=args.context)
    torch.manual_seed(args.seed)
    with torch.device("cpu" if dist.is_initialized() else device):
        model = longlora.Llama(longlora.load_config(args.model, args.context))
    model.reset_parameters()
    return model if args.trainable == "full" else model.to(dtype)


def prepare_model(model: longlora.Llama, args: argparse.Namespace, device: torch.device,
                  dtype: torch.dtype, parallel: "Parallel") -> None:
    """Add LoRA, choose the trainable parameters (float32), and move the model to the device: whole,
    or this process's shards of it. Frozen weights become `dtype`, or 4-bit, which FSDP does not
    shard. Until then `model` is mapped from its files."""
    if args.trainable == "full":
        dtype = torch.float32
    add_adapter(model, args.trainable, args.rank, dtype, args.quantize, device)
    if parallel.world_size > 1:
        shard_model(model, args.trainable, device, dtype, parallel)
    else:
        longlora.set_trainable(model.to(device, dtype), args.trainable)


def build_optimizer(args: argparse.Namespace, model: longlora.Llama) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() > 1], "weight_decay": args.weight_decay},
         {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}],
        lr=args.lr, betas=(0.9, 0.95), fused=True)


def main(args: argparse.Namespace) -> None:
    device = init_distributed(args.timeout)
    parallel = Parallel.create(args.context_parallel, device, args.timeout)
    dtype = compute_dtype(args.dtype, device)
    out = Path(args.out)
    check_out(args)

    # The model as it is, and the data.
    model = build_model(args, device, dtype)
    stored = torch.bfloat16 if args.init == "random" else model.lm_head.weight.dtype
    fill_defaults(args, model)
    torch.manual_seed(args.seed)
    instructions = prepare.is_instructions(args.data)
    data = (Instructions if instructions else Corpus)(args, model.config)
    # cuDNN's attention builds a plan for each new length, which takes half a second.
    torch.backends.cuda.enable_cudnn_sdp(not instructions)
    if args.steps is None:
        args.steps = max(1, math.ceil(round(args.epochs * data.samples / args.batch_size, 6)))
    checkpoint = find_checkpoint(args, data.metric, parallel) if args.resume else None
    results = checkpoint.metadata["results"] if checkpoint else {data.metric: {}}
    out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise ValueError(f"--out {out}: no permission to write there")

    # LoRA, the trainable parameters, and the device: whole, or this process's shards.
    prepare_model(model, args, device, dtype, parallel)

    def measure(name: str) -> None:
        """A row of the table at the end."""
        if args.eval_tokens and name not in results[data.metric]:
            print0(f"held-out {data.metric}: {name}")
            for metric, row in data.measure(model, dtype).items():
                results.setdefault(metric, {})[name] = row

    if args.init == "pretrained":
        measure("base")
    if args.context > model.config.max_position_embeddings:
        model.extend(args.context, args.rope)
        measure("interpolated")

    model.model.checkpointing, model.model.offload = args.checkpointing, args.offload
    if args.compile:
        compile_layers(model)
    optimizer = build_optimizer(args, model)
    if is_main():
        clear_out(args, checkpoint)
    first = restore(args, checkpoint, model, optimizer) if checkpoint else 0
    print_summary(args, model, data.groups, device, dtype)

    interrupted = False
    previous_handler = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_) -> None:
        """Ctrl-C ends the run after the current step; a second one ends it at once."""
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, previous_handler)

    signal.signal(signal.SIGINT, on_interrupt)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    held_out, tokens = "", checkpoint.metadata["tokens"] if checkpoint else 0
    with (open(out / "log.jsonl" if is_main() else os.devnull, "a", encoding="utf-8") as log,
          tqdm(total=args.steps, initial=first, unit="step", disable=not is_main()) as bar):
        for step in range(first, args.steps):
            began = time.perf_counter()
            rate = learning_rate(args, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            sequences = data.sequences(step)
            loss, norm = optimizer_step(args, model, optimizer, sequences, parallel, dtype)
            if not math.isfinite(loss + norm):
                saved = "keeps the last save" if (out / "checkpoints").exists() else "has no save"
                sys.exit(f"stopped at step {step + 1}: the loss is {loss}, its gradient's norm "
                         f"{norm}; {out} {saved}. Try a lower --lr than {args.lr:g}, or "
                         "--dtype float32" if is_main() else 1)
            seconds = time.perf_counter() - began
            read = sum(len(sequence.tokens) for sequence in sequences)
            tokens += read

            line = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": rate,
                    "tokens": tokens, "tokens_per_s": read / seconds,
                    "peak_memory_bytes": peak_memory(device)}
            if args.eval_every and (step + 1) % args.eval_every == 0:
                line["held_out_loss"] = data.held_out_loss(model, dtype)
                held_out = f", held-out loss {line['held_out_loss']:.3f}"
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {read / seconds:,.0f} tok/s, "
                                f"{line['peak_memory_bytes'] / 2**30:.2f} GiB{held_out}")
            stop, last = any_process(interrupted, device), step + 1 == args.steps
            if stop or args.save_every and (last or (step + 1) % args.save_every == 0):
                save(args, model, optimizer, stored,
                     {"step": step + 1, "tokens": tokens, "results": results})
            if stop:
                sys.exit(f"interrupted after step {step + 1}: saved to {out}; --resume continues"
                         if is_main() else 1)

    signal.signal(signal.SIGINT, previous_handler)
    measure("extended" if "interpolated" in results[data.metric] else "trained")
    if is_main():
        longlora.write_json(out / "results.json", results)
    if args.eval_tokens:
        print0(f"\n{data.table(results)}\n")
    flags = "--model" if args.trainable == "full" else f"--model {args.model} --adapter"
    print0("\n  ".join([f"Written to {out}. Next:", *(
        f"python eval.py {command} {flags} {out}" for command in data.next_commands)]))


def print_summary(args: argparse.Namespace, model: longlora.Llama, groups: str,
                  device: torch.device, dtype: torch.dtype) -> None:
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    attention = f"{args.attention} attention"
    if args.attention != "full":
        attention += f" in groups of {groups}"
    where = f"{device.type}, {str(dtype)[6:]}"
    if dist.is_initialized():
        where += f" on {dist.get_world_size()} processes (--timeout {args.timeout:g} minutes)"
    rope, factor = model.config.interpolation
    print0(f"{args.model}: {longlora.count_parameters(model):,} parameters, {trained:,} trainable "
           f"({args.trainable}); {args.context:,} tokens, positions interpolated by {factor:g} "
           f"({rope}), {attention}; {where}")


# ==================================================================================================
# Several processes on one run. FSDP2 shards parameters, gradients and optimizer over all processes;
# each gathers a layer when it computes it. With --context-parallel N, every N neighbours share each
# sequence. The model knows nothing of either.
# ==================================================================================================


class HaloExchange(torch.autograd.Function):
    """Context parallelism for S2-Attn: each process holds whole groups of the sequence. Unshifted
    heads need nothing from other processes. Shifted heads need the keys and values of the G/2
    tokens before their own, whatever T is: attention is causal, so that they go one way.

        process 0                 process 1                 process 2
        [  G  ][  G  ][  G  ]     [  G  ][  G  ][  G  ]     [  G  ][  G  ][  G  ]     unshifted
        [G/2][  G  ][  G  ][G/2]->[G/2][  G  ][  G  ][G/2]->[G/2][  G  ][  G  ][G/2]  shifted

    `apply(x, n, group)`: x (B, T, h, D) with the previous process's last n tokens before it,
    (B, n + T, h, D). The backward pass returns their gradients.
    """

    @staticmethod
    def forward(ctx, x, n, group):
        ctx.n, ctx.group = n, group
        received = exchange(x[:, -n:], group, 1, n)
        # The first process returns its x too: without a backward pass, the next would wait forever.
        return x.view_as(x) if received is None else torch.cat([received, x], dim=1)

    @staticmethod
    def backward(ctx, grad):
        n = ctx.n
        received = exchange(grad[:, :n], ctx.group, -1, n)
        grad = grad[:, n if ctx.group.rank() else 0:].clone()
        if received is not None:
            grad[:, -n:] += received
        return grad, None, None


def exchange(x: torch.Tensor, group: dist.ProcessGroup, step: int, n: int) -> torch.Tensor | None:
    """Send x (B, n, h, D) to the process `step` further on; returns what the one before sends
    (None: there is none). The last process may have fewer than n tokens, but sends to none."""
    rank, size, works, received = group.rank(), group.size(), [], None
    if 0 <= rank + step < size:
        destination = dist.get_global_rank(group, rank + step)
        works.append(dist.P2POp(dist.isend, x.contiguous(), destination, group))
    if 0 <= rank - step < size:
        received = x.new_empty(x.shape[0], n, *x.shape[2:])
        source = dist.get_global_rank(group, rank - step)
        works.append(dist.P2POp(dist.irecv, received, source, group))
    for work in dist.batch_isend_irecv(works):
        work.wait()
    return received


class Parallel(NamedTuple):
    """This process among `world_size`. Every `context_parallel` neighbours share a sequence."""
    rank: int = 0
    world_size: int = 1
    context_parallel: int = 1
    mesh: DeviceMesh | None = None  # of all processes, for FSDP
    group: dist.ProcessGroup | None = None  # of those that share this process's sequences

    @classmethod
    def create(cls, context_parallel: int, device: torch.device,
               minutes: float = 60) -> "Parallel":
        """Raises ValueError if `context_parallel` does not divide the number of processes."""
        rank, size = world()
        if size % context_parallel:
            raise ValueError(f"--context-parallel {context_parallel} does not divide {size} "
                             "processes; torchrun --nproc-per-node N starts N")
        if size == 1:
            return cls()
        mesh = init_device_mesh(device.type, (size,))
        group, _ = dist.new_subgroups(context_parallel, timeout=timedelta(minutes=minutes))
        return cls(rank, size, context_parallel, mesh, group)

    def share(self, sequences: list[Sequence]) -> list[Sequence]:
        """This process's sequences. Where there are fewer than for other processes, one without
        targets is added: collectives have to stay aligned."""
        replicas = self.world_size // self.context_parallel
        mine = sequences[self.rank // self.context_parallel::replicas]
        if len(mine) < math.ceil(len(sequences) / replicas):
            dummy = sequences[0]
            mine.append(dummy._replace(targets=np.full_like(dummy.targets, -100)))
        return mine

    def part_of(self, length: int, group_size: int) -> slice:
        """This process's part of a sequence: whole groups, evenly shared; only the last group of
        the sequence may be shorter."""
        if self.context_parallel == 1:
            return slice(0, length)
        groups, place = math.ceil(length / group_size), self.rank % self.context_parallel
        first, last = ((place + i) * groups // self.context_parallel * group_size for i in (0, 1))
        return slice(first, min(last, length))

    def kwargs(self, part: slice) -> dict:
        """What Llama.forward has to know of a part of a sequence."""
        if self.context_parallel == 1:
            return {}
        return {"start": part.start, "halo": lambda x, n: HaloExchange.apply(x, n, self.group)}


def any_process(value: bool, device: torch.device) -> bool:
    """Whether `value` is true in any process."""
    total = torch.tensor(float(value), device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.item() > 0


def shard_model(model: longlora.Llama, trainable: str, device: torch.device, dtype: torch.dtype,
                parallel: Parallel) -> None:
    """Shard a model that is mapped from its files: each process reads only the rows it keeps."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    model.to("meta", dtype)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    longlora.set_trainable(model, trainable)
    for layer in model.model.layers:
        fully_shard(layer, mesh=parallel.mesh)
    fully_shard(model, mesh=parallel.mesh)
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)
    for name, p in model.named_parameters():
        rows = weights.pop(name).detach().chunk(parallel.world_size)  # as FSDP does
        if parallel.rank < len(rows):
            p.to_local().detach().copy_(rows[parallel.rank])


# --------------------------------------------------------------------------------------------------
# Saving and resuming. A checkpoint is a folder checkpoints/step-NNNNNNN: trainable weights and
# optimizer by torch.distributed.checkpoint, readable on any number of processes, and metadata.json.
# It is written beside and renamed, so that an incomplete one has no final name.

# The log, by which a run's folder is known, is removed last.
RUN_FILES = ("results.json", "checkpoints", "states", "adapter_config.json",
             "adapter_model.safetensors", "longlora.json", "config.json", "model*.safetensors*",
             *longlora.COMPANIONS, "log.jsonl")
# Settings that may differ between a run and its continuation.
RESUMABLE = {"out", "resume", "overwrite", "eval_every", "save_every", "compile", "checkpointing",
             "micro_batch", "offload", "context_parallel", "timeout", "plan", "gpus", "gpu_memory"}


# PyTorch's notes that a single process is one, and its traceback of an error that we report.
warnings.filterwarnings("ignore", "torch.distributed is disabled")
logging.getLogger("torch.distributed.checkpoint").setLevel(logging.CRITICAL)


class Checkpoint(NamedTuple):
    path: Path
    metadata: dict  # {"args", "step", "tokens", "results"}


def check_out(args: argparse.Namespace) -> None:
    """Raises ValueError if writing to --out would destroy its contents unasked."""
    out = Path(args.out)
    if args.resume and args.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    if out.resolve() == Path(args.model).resolve():
        raise ValueError(f"--out {out} is the folder of --model: choose another")
    if args.resume and (out / "states").exists():
        raise ValueError(f"{out} holds a run of an earlier version, which cannot be continued: "
                         "--overwrite replaces it")
    if (out / "log.jsonl").exists():
        if not (args.resume or args.overwrite):
            raise ValueError(f"{out} holds a run already: --resume continues it, "
                             "--overwrite replaces it")
    elif held := [path.name for name in RUN_FILES for path in out.glob(name)]:
        raise ValueError(f"{out} holds {held[0]} and is no folder of a run: choose another --out")


def clear_out(args: argparse.Namespace, checkpoint: Checkpoint | None) -> None:
    """Remove what an interrupted save or a replaced run has left in --out."""
    names = list(RUN_FILES) if args.overwrite else []
    if checkpoint is None and not args.overwrite:
        names = ["log.jsonl"]
    for path in [path for name in names for path in Path(args.out).glob(name)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for path in Path(args.out).glob("*.partial"):
        if path.is_file():
            path.unlink()


def save(args: argparse.Namespace, model: longlora.Llama, optimizer: torch.optim.Optimizer,
         dtype: torch.dtype, progress: dict) -> None:
    """The adapter (or with --trainable full the model, in `dtype`), and a checkpoint to resume
    from, with `progress` in its metadata. Every process has to call it."""
    out, gathered = Path(args.out), None
    if dist.is_initialized():  # tensor by tensor; the main process keeps them
        full = ((name, p.full_tensor().cpu()) for name, p in model.named_parameters()
                if p.requires_grad or "lora_" in name)
        gathered = {name: tensor for name, tensor in full if is_main()}
    if is_main() and args.trainable == "full":
        longlora.save_model(model, out, dtype, gathered)
        longlora.copy_companions(args.model, out)
    elif is_main():
        longlora.save_adapter(model, out, gathered)
    save_checkpoint(out / "checkpoints", model, optimizer, {"args": vars(args)} | progress)


def training_state(model: longlora.Llama, optimizer: torch.optim.Optimizer) -> dict:
    weights, state = get_state_dict(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    return {"model": {name: weights[name] for name in trained}, "optimizer": state}


def save_checkpoint(folder: Path, model: longlora.Llama, optimizer: torch.optim.Optimizer,
                    metadata: dict) -> None:
    """Write the checkpoint after metadata["step"] steps and remove all but the last two. Every
    process has to call it. Raises OSError if it cannot be written; older ones stay."""
    alone, final = not dist.is_initialized(), folder / f"step-{metadata['step']:07}"
    temporary = folder / f"{final.name}.partial"
    if is_main():
        for old in folder.glob("*.partial"):
            shutil.rmtree(old)
        temporary.mkdir(parents=True)
    if not alone:
        dist.barrier()
    try:
        dcp.save(training_state(model, optimizer), checkpoint_id=temporary, no_dist=alone)
        if is_main():
            longlora.write_json(temporary / "metadata.json", metadata)
            os.replace(temporary, final)
            for old in sorted(folder.glob("step-???????"))[:-2]:
                shutil.rmtree(old)
    except CheckpointException as error:
        problem = next(iter(error.failures.values()))[0]
        raise OSError(f"{temporary} cannot be written ({problem!r})") from None
    finally:
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)
    if not alone:
        dist.barrier()


def find_checkpoint(args: argparse.Namespace, metric: str,
                    parallel: Parallel) -> Checkpoint | None:
    """The latest complete checkpoint in --out, the same for all processes. Raises ValueError if
    other settings made it, or another kind of data."""
    found = [None]
    if parallel.rank == 0:
        for path in sorted(Path(args.out).glob("checkpoints/step-???????"))[-1:]:
            found = [Checkpoint(path, longlora.read_json(path / "metadata.json"))]
    if parallel.world_size > 1:
        dist.broadcast_object_list(found)
    if found[0] is None:
        print0(f"{args.out} holds nothing to resume: starting fresh")
        return None
    path, metadata = found[0]
    if not {"args", "step", "tokens", "results"} <= metadata.keys():
        raise ValueError(f"{path}/metadata.json is broken; remove {path} to continue from the one "
                         "before")
    for name, value in vars(args).items():
        if name not in RESUMABLE and metadata["args"].get(name) != value:
            raise ValueError(f"--resume: {args.out} was made with --{name.replace('_', '-')} "
                             f"{metadata['args'].get(name)}, not {value}")
    if metric not in metadata["results"]:
        raise ValueError(f"--resume: {args.data} is of another kind than when {args.out} was made")
    return found[0]


def restore(args: argparse.Namespace, checkpoint: Checkpoint, model: longlora.Llama,
            optimizer: torch.optim.Optimizer) -> int:
    """Load a checkpoint and cut the log to it; returns the number of steps done."""
    path, step = checkpoint.path, checkpoint.metadata["step"]
    state = training_state(model, optimizer)
    try:
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    except CheckpointException as error:
        problem = next(iter(error.failures.values()))[0]
        raise ValueError(f"{path} is broken or does not fit this model ({problem!r}); remove it to "
                         "continue from the one before") from None
    set_state_dict(model, optimizer, model_state_dict=state["model"],
                   optim_state_dict=state["optimizer"], options=StateDictOptions(strict=False))
    if is_main():
        log = Path(args.out) / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
        longlora.replace_file(log, lambda temporary: temporary.write_text("".join(lines), "utf-8"))
    print0(f"resuming from {path}, after {step} of {args.steps} steps")
    return step


# --------------------------------------------------------------------------------------------------
# --plan: the memory of a step, by running it on fake tensors (shapes without data) and counting the
# storages that are alive. Left out, a few per cent together: kernels' workspaces and fragmentation.

CUDA_GIB, FRAGMENTED = 1.0, 0.05  # taken by CUDA itself; share that its allocator cannot use
CARDS = (8, 12, 16, 24, 48, 80)  # GiB


class LiveBytes(TorchDispatchMode):
    """The most bytes alive at one time in storages that operations under it have made."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.host, self.seen = 0, 0, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen:  # else a view, or changed in place
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size


@contextlib.contextmanager
def fake_gpu(live: LiveBytes) -> Iterator[None]:
    """Inside, fake CPU tensors take the memory that they would take on a GPU."""
    def pack(x: torch.Tensor) -> tuple:  # to host memory, out of the count
        live.host += x.nbytes
        return x.shape, x.dtype

    def unpack(packed: tuple) -> torch.Tensor:
        return torch.empty(packed[0], dtype=packed[1])

    def fused_norm(self, x: torch.Tensor) -> torch.Tensor:  # as CUDA's F.rms_norm is
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype))

    hooks = partial(torch.autograd.graph.saved_tensors_hooks, pack, unpack)
    with (mock.patch("torch.autograd.graph.save_on_cpu", lambda **_: hooks()),
          mock.patch.object(longlora.RMSNorm, "forward", fused_norm), live):
        yield


def plan(args: argparse.Namespace, config: longlora.LlamaConfig) -> dict[str, float]:
    """Bytes in each GPU at the peak of a step, by kind; `host` is besides, in host memory."""
    dtype = torch.float32 if args.dtype == "float32" else torch.bfloat16
    frozen_dtype = torch.float32 if args.trainable == "full" else dtype
    T, B = args.context // args.context_parallel, args.micro_batch
    longlora.nf4_pairs.cache_clear()
    with FakeTensorMode():
        torch.set_default_dtype(frozen_dtype)  # fake parameters cannot be converted
        model = longlora.Llama(config)
        torch.set_default_dtype(torch.float32)
        add_adapter(model, args.trainable, args.rank, dtype, args.quantize)
        longlora.set_trainable(model, args.trainable)
        model.model.checkpointing, model.model.offload = args.checkpointing, args.offload
        trained = [p for p in model.parameters() if p.requires_grad]
        live = LiveBytes()
        live.seen = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        for p in trained:  # gradients are counted on their own: FSDP shards them
            p.register_post_accumulate_grad_hook(
                lambda p: setattr(live, "live", live.live - p.grad.nbytes))
        G = args.group_size or longlora.default_group_size(args.context)
        with fake_gpu(live), torch.autocast("cpu", dtype, enabled=dtype != torch.float32,
                                            cache_enabled=args.gpus == 1):
            tokens = torch.zeros(B, T, dtype=torch.long)
            loss = model(tokens, tokens, **attention_kwargs(args.attention, G), reduction="sum")
            (loss / B).backward()
    longlora.nf4_pairs.cache_clear()
    codes = sum(buffer.nbytes for buffer in model.buffers())
    weights = sum(p.nbytes for p in model.parameters())
    gradients = sum(p.nbytes for p in trained)
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    root = weights - layer * config.num_hidden_layers
    gathered = root + 2 * layer if args.gpus > 1 else 0  # FSDP gathers the next layer ahead
    return {"weights": weights / args.gpus + codes, "gathered weights": gathered,
            "gradients": gradients / args.gpus, "optimizer": 2 * gradients / args.gpus,
            "activations": live.peak, "host": live.host}


def longest_contexts(args: argparse.Namespace, model: longlora.Llama) -> list[dict]:
    """For each way to save memory, the longest context that fits on GPUs of each size, a multiple
    of 1,024 (None: not even that). By two plans and the line through them: memory grows evenly."""
    low, high, rows = 16384, 65536, []
    given = {"group_size": args.group_size, "micro_batch": args.micro_batch or 1}
    args.context = model.config.max_position_embeddings
    fill_defaults(args, model)
    ways = ("--checkpointing", "--offload", "--checkpointing --quantize nf4",
            "--offload --quantize nf4")
    for flags in ways[:2] if args.trainable == "full" else ways:
        settings = vars(args) | given | {"checkpointing": True, "offload": "--offload" in flags,
                                         "quantize": "nf4" if "nf4" in flags else None}
        sizes = [plan(argparse.Namespace(**settings | {"context": T}), model.config)
                 for T in (low, high)]
        short, long = (sum(size.values()) - size["host"] for size in sizes)
        row = {"flags": flags}
        for card in CARDS if args.gpu_memory is None else [args.gpu_memory]:
            room = (card - CUDA_GIB) / (1 + FRAGMENTED) * 2**30
            T = int(low + (room - short) * (high - low) / (long - short)) // 1024 * 1024
            try:
                model.config.extended(max(T, 1), args.rope)
            except ValueError:  # Llama 3.1 cannot be extended
                T = model.config.max_position_embeddings
            row[f"{card:g} GiB"] = T if T > 0 else None
        rows.append(row | {"host MB a token": sizes[0]["host"] / low / 1e6})
    return rows


def print_plan(args: argparse.Namespace) -> None:
    """Raises ValueError if the settings do not fit together."""
    with torch.device("meta"):
        model = longlora.Llama(longlora.load_config(args.model, args.context))
    if args.gpus % args.context_parallel:
        raise ValueError(f"--context-parallel {args.context_parallel} does not divide --gpus "
                         f"{args.gpus}")
    if args.context is None:
        rows = longest_contexts(args, model)
        print(f"{args.model}: the most tokens that fit, by the memory of a GPU; GPUs: {args.gpus}")
        print_table(rows)
        return
    fill_defaults(args, model)
    sizes = plan(args, model.config)
    host = sizes.pop("host")
    print(f"{args.model} at {args.context:,} tokens, {args.attention} attention, {args.trainable} "
          f"trainable, GPUs: {args.gpus}. GiB in each at the peak of a step:")
    for name, size in (sizes | {"together": sum(sizes.values())}).items():
        print(f"    {name:<20}{size / 2**30:>10.2f}")
    if host:
        print(f"    {'in host memory':<20}{host / 2**30:>10.2f}")
    needed = sum(sizes.values()) / 2**30 * (1 + FRAGMENTED) + CUDA_GIB
    memory = 80 if args.gpu_memory is None else args.gpu_memory
    verdict = "suffice" if needed <= memory else "do not suffice"
    print(f"{memory:g} GiB a GPU {verdict}: {needed:.1f} are needed, with "
          f"{FRAGMENTED:.0%} for fragmentation and {CUDA_GIB:g} GiB for CUDA itself.")
    if needed > memory:
        print("Try more GPUs, --checkpointing, --offload, --context-parallel or a smaller "
              "--micro-batch.")


if __name__ == "__main__":
    with longlora.one_line_errors():
        try:
            arguments = parse_args()
            if arguments.plan:
                print_plan(arguments)
            else:
                main(arguments)
            destroy_distributed()
        except torch.OutOfMemoryError as error:
            sys.exit(f"out of memory: {str(error).splitlines()[0]} Try --checkpointing, a smaller "
                     "--micro-batch or a shorter --context")
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if os.environ.get("TRACEBACK") or not lost:
                raise
            text = str(error).splitlines()[0][:200]
            sys.exit(f"stopped: no connection to another process, or silence for "
                     f"{arguments.timeout:g} minutes. --resume goes on from the last save, if any "
                     f"({text})" if os.environ.get("LOCAL_RANK", "0") == "0" else 1)
