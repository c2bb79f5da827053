"""What a step of training takes, by length of the context: `python eval.py bench`.

Each row is a run of train.py in a process of its own, on random weights of a model's shape and
random tokens: the step that is timed is the real one, optimizer included, and nothing of one row is
in the memory of the next. How good a time is shows beside the speed of matrix products alone,
measured in the same run. `--flops` runs nothing and counts as the paper does (Table 11).
"""
import argparse
import dataclasses
import json
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import longlora
from data import plots, prepare
from data.plan import token_flops
from data.team import compute_dtype, default_device

ROOT = Path(__file__).parent.parent
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "vocab_size")
SHAPES = {"tiny": (256, 704, 4, 8, 8, 2048), "small": (512, 1376, 6, 8, 8, 32000),
          "1b": (2048, 5632, 22, 32, 4, 32000), "7b": (4096, 11008, 32, 32, 32, 32000),
          "13b": (5120, 13824, 40, 40, 40, 32000)}
LONGEST = 1 << 24
# TFLOP of 7B's forward pass with full attention and with S2-Attn (Table 11).
PAPER = {8192: (143.5, 117.1), 16384: (357.2, 251.7), 32768: (996.0, 573.8),
         65536: (3118.0, 1429.1)}
NO_MEMORY = ("out of memory", "allocate memory", "memoryerror", "alloc_failed",
             "could not create a memory object")  # of train.py, PyTorch, Python, cuBLAS, oneDNN


def flags(sub: argparse.ArgumentParser, integers, positive) -> None:
    """Add the flags of `run`."""
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--shape", choices=SHAPES, default="tiny", help="the model's sizes")
    which.add_argument("--model", help="take the sizes from this folder's config")
    sub.add_argument("--context", type=integers, default="1024,2048,4096",
                     help="tokens, a row each")
    sub.add_argument("--flops", action="store_true", help="run nothing: print the forward pass's "
                     "FLOPs as the paper counts them, and the paper's own")
    sub.add_argument("--steps", type=positive, default=3, help="timed ones, after one warm-up")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="(as PyTorch chooses)")
    sub.add_argument("--threads", type=positive, help="of the CPU (as PyTorch chooses)")
    sub.add_argument("--attention", default="shifted", choices=("shifted", "full"),
                     help="this and the rest as in train.py")
    sub.add_argument("--group-size", type=positive, help="(a quarter of the context)")
    sub.add_argument("--trainable", default="lora,embed,norm", help="what trains")
    sub.add_argument("--rank", type=positive, default=8, help="LoRA's")
    sub.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                     help="compute in")
    sub.add_argument("--quantize", choices=("nf4",), help="the frozen weights")
    sub.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True)
    sub.add_argument("--recompute-attention", action="store_true")
    sub.add_argument("--offload", action="store_true", help="a layer's input to host memory")
    sub.add_argument("--compile", action="store_true", help="layers' small operations")


# --------------------------------------------------------------------------------------------------
# The machine


def machine(dtype: str) -> dict:
    """What train.py will compute on and in, and the FLOP/s there of products of large square
    matrices, the best of three stretches of half a second."""
    device = default_device()
    dtype, cuda = compute_dtype(dtype, device), device.type == "cuda"
    n = 8192 if cuda else 1024
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def seconds(times: int) -> float:
        began = time.perf_counter()
        for _ in range(times):
            product = a @ b
        product[0, 0].item()  # waits for it
        return time.perf_counter() - began

    seconds(3)
    times = max(1, round(0.5 / seconds(1)))
    return {"device": device.type, "dtype": str(dtype).removeprefix("torch."),
            "name": torch.cuda.get_device_name() if cuda else f"threads: {torch.get_num_threads()}",
            "matmul": max(2 * n ** 3 * times / seconds(times) for _ in range(3))}


def free_memory() -> float:
    """Bytes that a process can take, by Linux and by its control group; elsewhere infinite."""
    if not os.path.exists("/proc/meminfo"):
        return math.inf
    words = Path("/proc/meminfo").read_text().split()
    limits = [1024 * int(words[words.index("MemAvailable:") + 1])]
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        for group in ("", line.split(":", 2)[2].lstrip("/")):  # a container may see its own as ""
            for file in ("memory.max", "memory.limit_in_bytes"):
                path = Path("/sys/fs/cgroup", "memory" * file.endswith("bytes"), group, file)
                if path.is_file() and (text := path.read_text().strip()) != "max":
                    limits.append(int(text))
    return 0.95 * min(limits)


def call(*words, env: dict, memory: float = math.inf) -> tuple[str, str | None]:
    """Run `python ...` in this repository: what it wrote, and why it failed, if it did. It does not
    outlive an interruption. Allocations beyond `memory` bytes fail, so that a process that is too
    large ends by itself: else the system ends one, perhaps another."""
    usual = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with subprocess.Popen([sys.executable, *map(str, words)], env=env, cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace") as child:
        try:
            unlimited = 2 * (resource.RLIM_INFINITY,)  # else the user has set one: ulimit -d
            if memory < math.inf and resource.getrlimit(resource.RLIMIT_DATA) == unlimited:
                resource.prlimit(child.pid, resource.RLIMIT_DATA, (int(memory), unlimited[1]))
            said = child.communicate()[0].strip()
        except BaseException:
            child.kill()
            raise
        finally:
            signal.signal(signal.SIGTERM, usual)
    last, status = (said or "it said nothing").splitlines()[-1], child.returncode
    if status == -signal.SIGKILL or status and any(text in last.lower() for text in NO_MEMORY):
        return said, "out of memory"
    return said, last if status > 0 else f"ended by signal {-status}: {last}" if status else None


# --------------------------------------------------------------------------------------------------
# The rows


def measure(args: argparse.Namespace, config: longlora.LlamaConfig, context: int, found: dict,
            env: dict) -> dict:
    """The row of `context` tokens on the machine `found`: without numbers, if it has an "error"."""
    G = args.group_size or longlora.default_group_size(context)
    config = dataclasses.replace(config, max_position_embeddings=context)  # nothing interpolated
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        folder = Path(folder)
        longlora.write_json(folder / "config.json",
                            {"model_type": "llama", **dataclasses.asdict(config)})
        tokens = np.random.default_rng(0).integers(  # train.py holds a tenth of them out
            config.vocab_size, size=2 * context, dtype=prepare.token_dtype(config.vocab_size))
        tokens.tofile(folder / "tokens.bin")
        settings = {"model": folder, "init": "random", "data": folder / "tokens.bin",
                    "out": folder / "out", "context": context, "steps": 1 + args.steps,
                    "batch-size": 1, "micro-batch": 1, "eval-tokens": 0, "save-every": 0,
                    "attention": args.attention, "group-size": G, "trainable": args.trainable,
                    "rank": args.rank, "dtype": found["dtype"],
                    **({"quantize": args.quantize} if args.quantize else {})}
        switches = [f"--{k.replace('_', '-')}" for k in (
            "checkpointing", "recompute_attention", "offload", "compile") if vars(args)[k]]
        _, error = call("train.py", *(f"--{k}={v}" for k, v in settings.items()), *switches,
                        env=env, memory=free_memory() if found["device"] == "cpu" else math.inf)
        log = "" if error else (folder / "out" / "log.jsonl").read_text(encoding="utf-8")
    row = {"shape": args.model or args.shape, "context": context, "attention": args.attention}
    row |= dict.fromkeys(("seconds", "tokens_per_s", "peak_memory_bytes", "flops_per_token",
                          "matmul_share", "first_step_seconds"))
    if error:
        return row | {"error": error}
    log = [json.loads(line) for line in log.splitlines()]
    first, *seconds = (context / line["tokens_per_s"] for line in log)
    rate = context / statistics.median(seconds)
    recomputed = ("attention" if args.offload or args.recompute_attention else
                  "layers" if args.checkpointing else "nothing")
    flops = token_flops(config, context, G if args.attention == "shifted" else None,
                        args.trainable, args.rank, recomputed)
    return row | {
        "seconds": context / rate, "tokens_per_s": rate, "first_step_seconds": first,
        "peak_memory_bytes": log[-1]["peak_memory_bytes"], "flops_per_token": flops["useful"],
        "matmul_share": flops["executed"] * rate / found["matmul"], "error": None}


def show(*cells: str, end: str = "\n") -> None:
    print("".join(cell.rjust(13) for cell in cells), end=end, flush=True)


def count(args: argparse.Namespace, config: longlora.LlamaConfig) -> list[dict]:
    """Print the TFLOP of a forward pass over each context; returns them."""
    paper = PAPER if (args.model, args.shape, args.group_size) == (None, "7b", None) else {}
    print("TFLOP of a forward pass, attention as full squares; the paper's 7B: Table 11")
    show("context", "full", "shifted", *("paper: full", "shifted") * bool(paper))
    rows = []
    for T in args.context:
        full, shifted = (token_flops(config, T, G)["forward"] * T / 1e12
                         for G in (None, args.group_size or longlora.default_group_size(T)))
        show(f"{T:,}", f"{full:,.1f}", f"{shifted:,.1f}", *(f"{x:,}" for x in paper.get(T, ())))
        rows.append({"shape": args.model or args.shape, "context": T, "full_tflop": full,
                     "shifted_tflop": shifted})
    return rows


def run(args: argparse.Namespace) -> list[dict]:
    """Measure a row for each context and print it; returns the rows. Raises FileNotFoundError,
    ValueError, also if there is none that fits."""
    if not 2 <= min(args.context) <= max(args.context) <= LONGEST:
        raise ValueError(f"--context takes numbers from 2 to {LONGEST:,}, got {args.context}")
    longlora.trainable_parts(args.trainable)
    config = longlora.LlamaConfig(**dict(zip(SIZES, SHAPES[args.shape])))
    if args.model:  # whose window and scaling of positions do not matter: a row has its own
        config = dataclasses.replace(longlora.load_config(args.model, context=1),
                                     rope_scaling=None, sliding_window=None)
    if args.flops:
        return count(args, config)
    env = os.environ | ({"OMP_NUM_THREADS": str(args.threads)} if args.threads else {})
    env |= {"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {}
    said, error = call("-m", "data.bench", args.dtype, env=env)
    if error:
        raise ValueError(f"matrix products could not be timed: {error}")
    found = json.loads(said.splitlines()[-1])
    if args.device not in (None, found["device"]):
        raise ValueError(f"--device {args.device}: PyTorch finds none here, but {found['device']}")
    with torch.device("meta"):
        size = sum(p.numel() for p in longlora.Llama(config).parameters())
    print(f"{args.model or args.shape}: {size:,} parameters, {args.trainable} train; "
          f"{found['device']} ({found['name']}), {found['dtype']}, "
          f"matrix products {found['matmul'] / 1e12:,.3g} TFLOP/s")
    warm_up = ["first step"] * args.compile  # which compiles
    show("context", "attention", "seconds", "tokens/s", "GiB", "GFLOP/token", "of products",
         *warm_up)
    rows = []
    for context in args.context:
        show(f"{context:,}", args.attention, end="")  # what is at work shows
        rows.append(row := measure(args, config, context, found, env))
        show(*[f"  {row['error']}"] if row["error"] else [
            f"{row['seconds']:,.3f}", f"{row['tokens_per_s']:,.0f}",
            f"{row['peak_memory_bytes'] / 2**30:.2f}", f"{row['flops_per_token'] / 1e9:,.4g}",
            f"{row['matmul_share']:.1%}",
            *(f"{row['first_step_seconds']:,.1f} s" for _ in warm_up)])
    if all(row["error"] for row in rows):
        raise ValueError(f"no row could be measured: {rows[-1]['error']}")
    return rows


def draw(args: argparse.Namespace, rows: list[dict]) -> None:
    """Plot what `run` returned to --plot."""
    names = [f"{args.attention} attention"], ["tokens_per_s"]
    if args.flops:
        names = ["full attention", "S2-Attn"], ["full_tflop", "shifted_tflop"]
    plots.curve(args.plot, {name: (args.context, [row[key] for row in rows], None)
                            for name, key in zip(*names)},
                f"{'A forward pass' if args.flops else 'Training'} of {rows[0]['shape']}, "
                "by context", "TFLOP" if args.flops else "tokens/s", xlabel="tokens in the context")


if __name__ == "__main__":
    print(json.dumps(machine(sys.argv[1])))
