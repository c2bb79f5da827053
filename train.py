"""Train: extend a Llama's context window by LongLoRA, or (--init random) make a Llama to extend.

    python train.py                                          # the small Llama, 256 -> 2,048 tokens,
                                                             # minutes on a laptop
    python train.py --model TinyLlama-1.1B --data corpus.bin # 2,048 -> 16,384 tokens
    torchrun --nproc-per-node 8 train.py ...                 # on 8 GPUs
    python train.py --help

What several processes do with each other is in data/team.py.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import longlora
from data import prepare, states
from data.batches import Corpus, Instructions, MicroStep
from data.instruct import is_instructions
from data.team import (HostMemory, Team, autocast, compute_dtype, join, keep_freed_memory, leave,
                       peak_memory, place, print0)
from eval import TINY_LLAMA, attention_pattern

# Where a default depends on the model's size: the paper's recipe (Section 4.1), and what was
# measured for models below 100 million parameters (data/README.md). A small model learns at a
# higher rate, and rank 8 limits one of width 256 more than it saves. No head is trained beyond its
# group, which so few steps do not make up for: groups of half the context (paper, Table 7).
RECIPES = {
    "large": {"steps": 1000, "epochs": 5, "batch_size": 64, "lr": 2e-5, "decay": 0.0, "rank": 8,
              "groups": 4},
    "small": {"steps": 320, "epochs": 1, "batch_size": 2, "lr": 2e-3, "decay": 1.0, "rank": 64,
              "groups": 2},
}
SMALL = 100_000_000


def flag(default, group: str, text: str, **more):
    return dataclasses.field(default=default, metadata={"group": group, "help": text, **more})


@dataclasses.dataclass
class Run:
    """The settings of a run; every flag is a field. None: decided by the model's size or by
    --context, see `resolve`."""

    model: str = flag(TINY_LLAMA, "model and data", "folder of the Llama to extend")
    init: str = flag("pretrained", "model and data", "random: use only its config and tokenizer",
                     choices=("pretrained", "random"))
    data: str = flag("stdlib", "model and data",
                     "stdlib, stdlib+tests, a .bin token file, .txt, .jsonl or a folder of them; "
                     "or instructions: .json, .jsonl, a prepared .bin, stdlib-questions")
    passkey: float | None = flag(None, "model and data",
                                 "share of the sequences that open with a passkey document "
                                 "(a tenth with stdlib, else none)")
    context: int | None = flag(None, "LongLoRA", "tokens to extend to, the one dial: it sets "
                               "interpolation and group size (8 times the model's window; "
                               "with instructions the window)")
    attention: str = flag("shifted", "LongLoRA", "attention in training",
                          choices=("shifted", "local", "full"))
    group_size: int | None = flag(None, "LongLoRA",
                                  "tokens in a group (a quarter of --context or of a sample's "
                                  "length, for a small model half of it, rounded up to even)")
    trainable: str = flag("lora,embed,norm", "LongLoRA",
                          "what trains: full, or some of lora, embed, norm")
    rank: int | None = flag(None, "LongLoRA", "LoRA's rank; alpha is twice the rank")
    epochs: float | None = flag(None, "optimization",
                                "times that the data are read, instead of --steps")
    steps: int | None = flag(None, "optimization", "optimizer steps")
    batch_size: int | None = flag(None, "optimization", "sequences a step, over all micro-steps")
    micro_batch: int | None = flag(None, "optimization",
                                   "sequences a micro-step (as many as make 2,048 tokens, or one)"
                                   "; of instructions as many as fit into so many --context")
    lr: float | None = flag(None, "optimization", "peak learning rate")
    warmup: int = flag(20, "optimization", "steps of linear warm-up")
    decay: float | None = flag(None, "optimization",
                               "share of the steps, at the end, in which the rate falls to zero")
    weight_decay: float = flag(0.0, "optimization", "of matrices; never of norms")
    clip: float = flag(1.0, "optimization", "largest gradient norm")
    seed: int = flag(0, "optimization", "of the batches and of random weights")
    dtype: str = flag("auto", "machine", "compute in; auto: bfloat16 where it is native",
                      choices=("auto", "float32", "bfloat16"))
    quantize: str | None = flag(None, "machine", "nf4: frozen weights in 4 bits (QLoRA)",
                                choices=("nf4",))
    checkpointing: bool = flag(False, "machine",
                               "recompute activations in the backward pass instead of keeping "
                               "them, but for attention's output")
    recompute_attention: bool = flag(False, "machine",
                                     "recompute that too (implies --checkpointing)")
    offload: bool = flag(False, "machine", "keep the inputs of recomputed layers in host memory: "
                         "a copy there and back for each layer, GPU memory for one")
    context_parallel: int = flag(1, "machine", "processes that share a sequence (S2-Attn only)")
    plan: bool = flag(False, "plan", "load nothing: print what a step takes, and whether it fits")
    gpus: int = flag(1, "plan", "GPUs to plan for")
    gpu_memory: float = flag(80.0, "plan", "GiB that each has")
    compile: bool = flag(False, "machine", "torch.compile what is between the layers' "
                         "matrix products (needs a C++ compiler; the first step takes a minute)")
    out: str = flag("out", "output", "folder for the adapter or model, log.jsonl and results.json")
    eval_every: int = flag(0, "output", "steps between held-out losses (0: none)")
    eval_tokens: int | None = flag(None, "output", "held-out tokens for the table at the end; 0: "
                                   "none (32,768; of instructions 128 times --context)")
    save_every: int = flag(100, "output", "steps between saves (0: none)")
    resume: bool = flag(False, "output", "continue the run in --out")
    overwrite: bool = flag(False, "output", "replace the run in --out")


# --------------------------------------------------------------------------------------------------
# Settings


def parse() -> Run:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
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
            group.add_argument(name, type=kind, default=field.default, help=shown,
                               choices=field.metadata.get("choices"))
    return Run(**vars(parser.parse_args()))


def resolve(run: Run, model: longlora.Llama) -> int:
    """Fill in the settings that depend on the model and on the kind of data, and check the numbers;
    returns how many groups a sequence has. Raises ValueError."""
    size, instructions = sum(p.numel() for p in model.parameters()), is_instructions(run.data)
    recipe = RECIPES["small" if size < SMALL else "large"]
    if run.steps is not None and run.epochs is not None:
        raise ValueError("--steps and --epochs exclude each other")
    if run.steps is None and run.epochs is None:  # --epochs become steps when the data are known
        length = "epochs" if instructions else "steps"
        setattr(run, length, recipe[length])
    for name in ("batch_size", "lr", "decay", "rank"):
        if getattr(run, name) is None:
            setattr(run, name, recipe[name])
    if run.context is None:
        run.context = model.config.max_position_embeddings * (1 if instructions else 8)
    if run.eval_tokens is None:
        run.eval_tokens = 128 * run.context if instructions else 32768
    if run.passkey is None:
        library = run.data in ("stdlib", "stdlib+tests")
        run.passkey = 0.1 if library and run.context >= prepare.PASSKEY_TOKENS else 0.0
    if run.group_size is None and not instructions:
        run.group_size = longlora.default_group_size(run.context, recipe["groups"])
    if run.micro_batch is None:
        run.micro_batch = max(1, 2048 // max(1, run.context))
    for name, low, high in (
            ("context", 2, 1 << 31), ("group_size", 2, 1 << 31),
            ("rank", 1, model.config.hidden_size), ("steps", 1, math.inf), ("epochs", 1e-3, 1e6),
            ("batch_size", 1, 1 << 31), ("micro_batch", 1, 1 << 31), ("lr", 0, 1e3),
            ("context_parallel", 1, 1 << 16), ("gpus", 1, 1 << 16), ("gpu_memory", 0, 1 << 20),
            ("warmup", 0, math.inf), ("decay", 0, 1), ("weight_decay", 0, 1e3),
            ("clip", 1e-9, math.inf), ("passkey", 0, 1), ("seed", 0, (1 << 63) - 1),
            ("eval_every", 0, math.inf), ("eval_tokens", 0, math.inf), ("save_every", 0, math.inf)):
        if (value := getattr(run, name)) is not None and not low <= value <= high:
            most = f" and at most {high:g}" * (high < math.inf)
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low:g}{most}, "
                             f"got {value}")
    if "full" in longlora.trainable_parts(run.trainable) and run.quantize:
        raise ValueError("--quantize is for frozen weights: --trainable full has none")
    model.config.extended(run.context)  # refuses what has no interpolation, before any work
    if run.passkey and instructions:
        raise ValueError("--passkey is for a corpus: instructions are trained as they are")
    if run.passkey and run.context < prepare.PASSKEY_TOKENS:
        raise ValueError(f"--passkey needs a --context of {prepare.PASSKEY_TOKENS} tokens at least")
    if run.context_parallel > 1:
        if run.attention == "full":
            raise ValueError("--context-parallel needs --attention shifted or local: full "
                             "attention is not split over processes")
        piece = run.context / run.context_parallel
        if not instructions and piece % run.group_size:
            raise ValueError(f"--context-parallel {run.context_parallel}: its {piece:g} tokens a "
                             f"process are not whole groups of {run.group_size}; take another "
                             "--context or a smaller --group-size")
    attention_pattern(run.attention, run.group_size or 2)  # refuses an odd one
    if run.attention == "shifted" and model.config.num_attention_heads % 2:
        raise ValueError("shifting half of the heads needs an even number of them: "
                         "--attention local or full")
    return recipe["groups"]


def show_plan(run: Run) -> None:
    from data import plan
    with torch.device("meta"):
        model = longlora.Llama(longlora.load_config(run.model, run.context))
    groups = resolve(run, model)
    G = run.group_size or longlora.default_group_size(run.context, groups)  # the longest sample's
    print(plan.of_run(run, model.config, attention_pattern(run.attention, G)))


def learning_rate(run: Run, step: int) -> float:
    """The rate of step 0, 1, ...: linear warm-up, constant, linear decay over the last `decay`
    share of the steps."""
    rising = (step + 1) / run.warmup if run.warmup else 1.0
    falling = (run.steps - step) / (run.decay * run.steps) if run.decay else 1.0
    return run.lr * min(1.0, rising, falling)


# --------------------------------------------------------------------------------------------------
# Saving and resuming

# The log, by which a folder of a run is known, goes last when they are removed.
FILES = ("results.json", "states", "adapter_config.json", "adapter_model.safetensors",
         "longlora.json", "config.json", "model*.safetensors*", *longlora.COMPANIONS, "log.jsonl")


def save(run: Run, model: longlora.Llama, optimizer: torch.optim.Optimizer, step: int,
         dtype: torch.dtype, results: dict, team: Team) -> None:
    """After `step` steps: the adapter (or in `dtype` the model, where all of it trains), and the
    state to continue from."""
    out = Path(run.out)
    to = out if team.rank == 0 else None  # the others only give their shards
    if run.trainable == "full":
        longlora.save_model(model, to, dtype)
        if to:
            longlora.copy_companions(run.model, to)
    else:
        longlora.save_adapter(model, to)
    facts = {"run": dataclasses.asdict(run), "results": results}
    states.save(out / "states", step, model, optimizer, facts)


# May differ between a run and its continuation.
FREE = {"out", "resume", "overwrite", "eval_every", "save_every", "compile", "checkpointing",
        "recompute_attention", "micro_batch", "offload", "context_parallel", "plan", "gpus",
        "gpu_memory"}


def find_state(run: Run, measures: str, team: Team) -> tuple[Path, dict] | None:
    """The newest whole state in --out and its facts, the same for all processes. Raises ValueError
    if other settings made it, or another kind of data, which `measures` tells."""
    found = [states.newest(Path(run.out) / "states") if team.rank == 0 else None]
    if team.size > 1:
        dist.broadcast_object_list(found)
    if found[0] is None:
        print0(f"{run.out} holds nothing to resume: starting fresh")
        return None
    was = found[0][1]["run"]
    for name, value in dataclasses.asdict(run).items():
        if name not in FREE and was.get(name) != value:
            raise ValueError(f"--resume: {run.out} was made with --{name.replace('_', '-')} "
                             f"{was.get(name)}, not {value}")
    if measures not in found[0][1]["results"]:
        raise ValueError(f"--resume: {run.data} is of another kind than when {run.out} was made")
    return found[0]


def restore(run: Run, state: tuple[Path, dict], model: longlora.Llama,
            optimizer: torch.optim.Optimizer, team: Team) -> int:
    """Put back what `save` saved, and cut the log to it; returns the number of steps done."""
    path, step = state[0], state[1]["step"]
    states.load(path, step, model, optimizer)
    if team.rank == 0:
        log = Path(run.out) / "log.jsonl"
        kept = log.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
        longlora.replace_file(log, lambda partial: partial.write_text("".join(kept), "utf-8"))
    print0(f"resuming from {path}, after step {step} of {run.steps}")
    return step


# --------------------------------------------------------------------------------------------------
# The run


def check_out(run: Run) -> None:
    """Raises ValueError if writing to --out would destroy what is there unasked."""
    out = Path(run.out)
    if run.resume and run.overwrite:
        raise ValueError("--resume and --overwrite exclude each other")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file, not a folder")
    if out.resolve() == Path(run.model).resolve():
        raise ValueError(f"--out {out} is the folder of --model: choose another")
    if (out / "log.jsonl").exists():
        if not (run.resume or run.overwrite):
            raise ValueError(f"{out} holds a run already: --resume continues it, "
                             "--overwrite replaces it")
    elif held := [path.name for name in FILES for path in out.glob(name)]:
        raise ValueError(f"{out} holds {held[0]} and is no folder of a run: choose another --out")


def compile_layers(model: longlora.Llama) -> None:
    """Let torch.compile fuse norms, projections with their rotation, and the MLP's middle, once for
    all layers. Attention is a kernel already, and recomputation is not for a compiler to see."""
    for layer in model.model.layers:
        layer.input_layernorm.compile()
        layer.post_attention_layernorm.compile()
        layer.self_attn.project = torch.compile(layer.self_attn.project)
        layer.mlp.hidden = torch.compile(layer.mlp.hidden)


def optimizer_step(run: Run, model: longlora.Llama, optimizer: torch.optim.Optimizer,
                   micro_steps: list[MicroStep], count: int, dtype: torch.dtype, team: Team,
                   activations: contextlib.AbstractContextManager) -> tuple[float, float]:
    """One step, of which this process reads `micro_steps`: the mean loss over all of the `count`
    targets that all processes score, and its gradient's norm. Where one is not finite, nothing is
    updated."""
    device = model.lm_head.weight.device
    loss = 0.0
    for i, (tokens, targets, how) in enumerate(micro_steps, 1):
        share = (targets != -100).sum().item() / count
        if team.size > 1:
            model.set_requires_gradient_sync(i == len(micro_steps))
        with autocast(device, dtype), activations:
            part = model(tokens.to(device), targets.to(device), **how) * share
        (part * team.size).backward()  # FSDP takes the mean over processes, this is a sum
        loss += part.item()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, run.clip)
    if team.size > 1:
        loss = torch.tensor(loss, dtype=torch.float64, device=device)
        dist.all_reduce(loss)
        loss, norm = loss.item(), norm.full_tensor()
    norm = norm.item()
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def main(run: Run) -> None:
    keep_freed_memory()
    device, team = join(run.context_parallel)
    out, main_process = Path(run.out), team.rank == 0
    dtype = compute_dtype(run.dtype, device)
    check_out(run)

    torch.manual_seed(run.seed)
    if run.init == "random":
        config = longlora.load_config(run.model, run.context)
        torch.set_default_dtype(torch.float32 if run.trainable == "full" else dtype)
        with torch.device(device if team.size == 1 else "cpu"):
            model = longlora.Llama(config)
        torch.set_default_dtype(torch.float32)
        model.reset_parameters()
        stored = torch.bfloat16
    else:
        model = longlora.load_model(run.model, context=run.context)
        stored = model.lm_head.weight.dtype
    groups = resolve(run, model)
    data = (Instructions(run, model.config, team, groups) if is_instructions(run.data) else
            Corpus(run, model.config, team))
    if run.steps is None:
        run.steps = max(1, math.ceil(round(run.epochs * data.samples / run.batch_size, 6)))
    state = find_state(run, data.measures, team) if run.resume else None
    if main_process:
        out.mkdir(parents=True, exist_ok=True)
        for left in out.glob("*.partial"):  # by a process that was killed
            if left.is_file():
                left.unlink()
    place(model, run.trainable, run.rank, device, dtype, team, run.quantize)

    # How well the base reads: as it is, and with its positions interpolated but nothing trained.
    results = state[1]["results"] if state else {data.measures: {}}

    def measure(name: str) -> None:
        if run.eval_tokens and name not in results[data.measures]:
            print0(f"held-out {data.measures}: {name}")
            results[data.measures][name] = data.measure(model, dtype)

    if run.init == "pretrained":
        measure("base")
    if run.context > model.config.max_position_embeddings:
        model.extend(run.context)
        measure("interpolated")

    model.model.checkpointing = run.checkpointing or run.recompute_attention or run.offload
    model.model.recompute_attention = run.recompute_attention or run.offload
    if run.compile:
        compile_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in trained if p.dim() > 1], "weight_decay": run.weight_decay},
         {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0}],
        lr=run.lr, betas=(0.9, 0.95), fused=True)

    if state is None and main_process:  # what else is there is replaced by the first save
        for path in [path for name in (FILES if run.overwrite else ["log.jsonl"])
                     for path in out.glob(name)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    first = restore(run, state, model, optimizer, team) if state else 0
    size, some = longlora.count_weights(model), sum(p.numel() for p in trained)
    groups = f" in groups of {data.groups}" * (run.attention != "full")
    several = f" on {team.size} processes" if team.size > 1 else ""
    print0(f"{run.model}: {size:,} parameters, {some:,} train ({run.trainable}); "
           f"{run.context:,} tokens, interpolation by {model.config.interpolation_factor:g}, "
           f"{run.attention} attention{groups}; {device.type}, {str(dtype)[6:]}{several}")
    activations = HostMemory() if run.offload else contextlib.nullcontext()

    interrupted = torch.zeros((), device=device)
    usual = signal.getsignal(signal.SIGINT)

    def on_interrupt(*_) -> None:
        """Ctrl-C ends the run after the step at work; a second one ends it at once."""
        interrupted.fill_(1)
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, on_interrupt)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    held_out, tokens = "", data.tokens_until(first)
    log_file = out / "log.jsonl" if main_process else os.devnull
    with (open(log_file, "a", encoding="utf-8") as log,
          tqdm(total=run.steps, initial=first, unit="step", disable=not main_process) as bar):
        for step in range(first, run.steps):
            began = time.perf_counter()
            rate = learning_rate(run, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, norm = optimizer_step(run, model, optimizer, *data.step(step), dtype, team,
                                        activations)
            if not math.isfinite(loss + norm):
                kept = "keeps the last save" if (out / "states").exists() else "has no save yet"
                sys.exit(f"stopped at step {step + 1}: the loss is {loss}, its gradient's norm "
                         f"{norm}; {out} {kept}. Try a lower --lr than {run.lr:g}, or "
                         "--dtype float32" if main_process else 1)
            seconds = time.perf_counter() - began
            before, tokens = tokens, data.tokens_until(step + 1)
            tokens_per_s = (tokens - before) / seconds

            line = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": rate,
                    "tokens": tokens, "tokens_per_s": tokens_per_s,
                    "peak_memory_bytes": peak_memory(device)}
            if run.eval_every and (step + 1) % run.eval_every == 0:
                line["held_out_loss"] = data.held_out_loss(model, dtype)
                held_out = f", held-out loss {line['held_out_loss']:.3f}"
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.update()
            bar.set_postfix_str(f"loss {loss:.3f}, {tokens_per_s:,.0f} tok/s, "
                                f"{line['peak_memory_bytes'] / 2**30:.2f} GiB{held_out}")
            if team.size > 1:
                dist.all_reduce(interrupted)
            stop = interrupted.item() > 0
            last = step + 1 == run.steps
            if stop or run.save_every and (last or (step + 1) % run.save_every == 0):
                save(run, model, optimizer, step + 1, stored, results, team)
            if stop:
                sys.exit(f"interrupted after step {step + 1}: saved to {out}; --resume continues"
                         if main_process else 1)

    signal.signal(signal.SIGINT, usual)
    measure("extended" if "interpolated" in results[data.measures] else "trained")
    if main_process:
        longlora.write_json(out / "results.json", results)
    if run.eval_tokens:
        print0(f"\n{data.table(results[data.measures])}\n")
    flag = "--model" if run.trainable == "full" else f"--model {run.model} --adapter"
    print0("\n  ".join([f"Written to {out}. Next:", *(
        f"python eval.py {command} {flag} {out}" for command in data.next_commands)]))


if __name__ == "__main__":
    with prepare.one_line_errors():
        try:
            run = parse()
            show_plan(run) if run.plan else main(run)
            leave()
        except torch.OutOfMemoryError as error:
            sys.exit(f"out of memory: {str(error).splitlines()[0]} Try --checkpointing, a smaller "
                     "--micro-batch or a shorter --context")
