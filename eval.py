"""Evaluate a Llama, with or without a LongLoRA adapter; full attention, as at inference, unless
told otherwise.

    python eval.py perplexity --adapter out --context 256,512,1024,2048
    python eval.py passkey --adapter out --length 256,512,1024,2048 --plot passkey.png
    python eval.py topics --model vicuna-16k --file topics_5.jsonl
    python eval.py generate --adapter out --file BOOK --question "Who did it?"  # or --chat
    python eval.py answers --adapter out --data questions.json    # exact matches, by length
    python eval.py bench --shape 7b --context 8192,32768    # what a step of training takes
    python eval.py paper                   # the paper at small scale, in an hour on a laptop
    torchrun --nproc-per-node 8 eval.py perplexity ...      # windows and trials shared out

Perplexity is over windows of L tokens, by one of two protocols:

- once: windows start every `stride` tokens (L/2); each token is scored in the first window that
  holds it, and the last window may be shorter. The honest figure.
- official: windows start every `stride` tokens (256); all L - 1 targets of each whole window are
  scored, and the loss is the mean of the windows' means. The paper's figure (Section 4.2).
"""
import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import longlora
from data import bench, chat, instruct, paper, plots, prepare
from data.chat import generate, stops
from data.team import Team, autocast, compute_dtype, is_main, join, leave, print0

TINY_LLAMA = os.path.relpath(prepare.HERE / "tiny-llama")
BATCH_TOKENS = 8192  # short windows are read together, up to this many tokens


def attention_pattern(attention: str, group_size: int | None) -> dict:
    """What a model's call takes for "full", "local" or "shifted" attention. Raises ValueError if
    the group size is odd."""
    if attention == "full":
        return {}
    if group_size % 2:
        raise ValueError(f"--group-size must be even, got {group_size}")
    return {"group_size": group_size, "shift": attention == "shifted"}


class Shares:
    """What each process of torchrun reads of `count` batches or trials: none is read twice."""

    def __init__(self, count: int):
        joined = dist.is_initialized()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
        self.count, self.mine = count, range(self.rank, count, self.size)

    def in_step(self) -> Iterator[tuple[int, bool]]:
        """The same, and whether it counts: under FSDP processes work in step, so whoever has none
        left reads the first, for nothing."""
        for i in range(self.rank, math.ceil(self.count / self.size) * self.size, self.size):
            yield (i, True) if i < self.count else (0, False)

    def total(self, sums: np.ndarray) -> np.ndarray:
        """The sum over all processes of `sums`."""
        if self.size > 1:
            every = [None] * self.size
            dist.all_gather_object(every, sums)
            sums = sum(every)
        return sums


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


def check_windows(length: int, context: int, protocol: str, stride: int, stretches: int) -> None:
    """Raises ValueError if there is nothing to score."""
    if context < 2 or not 0 < stride < context and protocol == "once":
        raise ValueError(f"windows of {context} tokens cannot start every {stride} tokens")
    if stretches > context - 1:
        raise ValueError(f"{context - 1} targets of a window have no {stretches} stretches")
    if length < context:
        raise ValueError(f"{length:,} tokens are too few for windows of {context:,}")


class Perplexity(NamedTuple):
    value: float
    error: float | None  # standard error, from how much the windows' losses differ
    tokens: int  # how many were scored
    by_position: list[float]  # in equal stretches of the window's positions, if asked


@torch.no_grad()
def perplexity(model: longlora.Llama, tokens: np.ndarray, context: int, protocol: str = "once",
               stride: int | None = None, dtype: torch.dtype = torch.float32,
               group_size: int | None = None, shift: bool = True,
               stretches: int = 0) -> Perplexity:
    """Perplexity of `model` on `tokens` (N,) in windows of `context` tokens (Section 4.2).

    No place holds the logits of more than longlora.LOSS_CHUNK tokens. The standard error takes
    windows to be independent; where they overlap, as the official ones do, it is too small. Raises
    ValueError if there is nothing to score.
    """
    stride = stride or default_stride(protocol, context)
    check_windows(len(tokens), context, protocol, stride, stretches)
    spans = list(windows(len(tokens), context, protocol, stride))
    device = model.lm_head.weight.device
    batches = []
    while spans:
        most = max(1, BATCH_TOKENS // context)
        batches.append([s for s in spans[:most] if s[1] - s[0] == spans[0][1] - spans[0][0]])
        spans = spans[len(batches[-1]):]
    shares = Shares(len(batches))
    moments, positions = np.zeros(6), np.zeros((2, context - 1))
    bar = tqdm(total=sum(scored for b in batches for *_, scored in b), desc=f"context {context:,}",
               unit="tok", leave=False, unit_scale=True, disable=shares.rank > 0)
    with bar, autocast(device, dtype):
        for i, counts in shares.in_step():
            batch = batches[i]
            rows = [tokens[a:b].astype(np.int64) for a, b, _ in batch]
            ids = torch.from_numpy(np.stack(rows)).to(device)
            targets = ids[:, 1:].clone()
            for row, (_, _, scored) in zip(targets, batch):
                row[:len(row) - scored] = -100
            loss = model(ids[:, :-1], targets, group_size, shift, mean=False)
            if counts:
                loss = loss.cpu().double().numpy()
                scored = (targets != -100).cpu().numpy()
                s, n = loss.sum(1), scored.sum(1)
                moments += [x.sum() for x in (s, n, s * s, s * n, n * n, np.ones(len(s)))]
                positions[:, :loss.shape[1]] += loss.sum(0), scored.sum(0)
                bar.update(int(n.sum()) * shares.size)
    if hasattr(model, "reshard"):  # or FSDP's root goes on without gradients
        model.reshard()
    s, n, ss, sn, nn, count = shares.total(moments)
    positions, mean = shares.total(positions), s / n
    # The windows' sums s_w and counts n_w give a ratio; its variance is that of s_w - mean * n_w.
    variance = max(0.0, ss - 2 * mean * sn + mean * mean * nn) * count / max(1, count - 1) / n ** 2
    parts = [part.sum(1) for part in np.array_split(positions, stretches or 1, axis=1)]
    value = math.exp(min(mean, 700))
    return Perplexity(value, value * math.sqrt(variance) if count > 1 else None, int(n),
                      [math.exp(min(a / b, 700)) for a, b in parts[:stretches]])


# --------------------------------------------------------------------------------------------------
# Passkey retrieval


@torch.no_grad()
def passkey(model: longlora.Llama, tokenizer, length: int, trials: int, depths: int = 1,
            seed: int = 0, dtype: torch.dtype = torch.float32, official: bool = False) -> dict:
    """How many keys hidden in prompts of at most `length` tokens are retrieved, by depth (Section
    4.2): {"length", "tokens" (a prompt's, on average), "trials", "accuracy", "by_depth": for each
    of `depths` equal stretches of the filler, None where no trial fell}.

    A key is retrieved when every token of it is the arg max: one forward pass, no decoding. There
    are `trials` of them in each stretch, and keys and depths are such as training never draws; or
    with `official` `trials` in all, as the official evaluation draws them from seeds seed, seed+1,
    ...
    """
    device, shares = model.lm_head.weight.device, Shares(trials if official else trials * depths)
    sums = np.zeros((3, depths))  # tokens, trials, retrieved
    for i in tqdm(shares.mine, desc=f"length {length:,}", leave=False, disable=shares.rank > 0):
        if official:
            ids, n, depth = prepare.official_passkey(tokenizer, length, seed + i)
            cell = min(int(depth * depths), depths - 1)
        else:
            cell = i % depths
            ids, n = prepare.passkey_document(
                tokenizer, length, np.random.default_rng((seed, length, i)), held_out=True,
                depths=(cell / depths, (cell + 1) / depths))
        tokens = torch.tensor([ids], device=device)
        with autocast(device, dtype):
            logits = model.lm_head(model.model(tokens)[:, -n - 1:-1])
        sums[:, cell] += len(ids), 1, torch.equal(logits.argmax(-1), tokens[:, -n:])
    tokens, tried, right = shares.total(sums)
    return {"length": length, "tokens": round(tokens.sum() / tried.sum()),
            "trials": int(tried.sum()), "accuracy": right.sum() / tried.sum(),
            "by_depth": [r / t if t else None for r, t in zip(right, tried)]}


# --------------------------------------------------------------------------------------------------
# Answers to instructions


@torch.no_grad()
def answers(model: longlora.Llama, samples: instruct.Samples,
            dtype: torch.dtype = torch.float32) -> list[dict]:
    """How well `model` answers, by tokens in a sample (up to 256, 512, ...) and in all (None): rows
    of {"tokens", "samples", "exact_match", "perplexity"}, full attention.

    A match is exact when every token of an answer and its end is the arg max: what greedy decoding
    would write, in one forward pass. Perplexity is over the tokens of all answers.
    """
    device, shares = model.lm_head.weight.device, Shares(len(samples))
    sums = np.zeros((64, 4))  # by the length's logarithm: samples, exact ones, loss, tokens
    bar = tqdm(total=len(samples), desc="answers", leave=False, disable=shares.rank > 0)
    with bar, autocast(device, dtype):
        for i, counts in shares.in_step():
            ids, labels = (torch.from_numpy(x).to(device) for x in samples[i])
            answer = (labels[1:] != -100).nonzero()[:, 0]
            logits = model(ids[None], logits_to_keep=answer)[0].float()
            label = labels[answer + 1]
            if counts:
                sums[(len(ids) - 1).bit_length()] += (
                    1, torch.equal(logits.argmax(-1), label),
                    F.cross_entropy(logits, label, reduction="sum").item(), len(label))
                bar.update(shares.size)
    if hasattr(model, "reshard"):  # or FSDP's root goes on without gradients
        model.reshard()
    sums = shares.total(sums)
    rows = [(1 << bits, row) for bits, row in enumerate(sums) if row[0]] + [(None, sums.sum(0))]
    return [{"tokens": most, "samples": int(n), "exact_match": exact / n,
             "perplexity": math.exp(min(loss / tokens, 700))}
            for most, (n, exact, loss, tokens) in rows]


# --------------------------------------------------------------------------------------------------
# Topic retrieval


def read_topic_cases(path: Path) -> list[dict]:
    """LongChat's test cases: a JSON object a line, with a `prompt` and its `topics`, the one asked
    for first. Raises FileNotFoundError, ValueError."""
    cases = []
    for place, case, _ in prepare.records(path, errors="replace"):
        topics = case.get("topics") if isinstance(case, dict) else None
        if not (isinstance(topics, list) and topics and isinstance(case.get("prompt"), str)
                and all(isinstance(topic, str) for topic in topics)):
            raise ValueError(f'{path}, {place}: expected an object with a text as "prompt" and '
                             'texts as "topics"')
        cases.append(case)
    if not cases:
        raise ValueError(f"{path}: no test cases")
    return cases


def names_topic(answer: str, topics: list[str]) -> bool:
    """Whether an answer's first line names the first of `topics`, letter for letter but for
    capitals, and none of the others."""
    line = answer.strip().split("\n")[0].casefold()
    first, *others = (topic.casefold() for topic in topics)
    return first in line and not any(o in line and o not in first for o in others)


# --------------------------------------------------------------------------------------------------
# Command line


def within(kind: type, low: float, high: float = math.inf):
    """An argument's type: an int or float from low to high."""

    def value(text: str):
        if not low <= (x := kind(text)) <= high:
            most = f" to {high:g}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"expected a number from {low:g}{most}, got {text}")
        return x

    value.__name__ = kind.__name__  # which argparse names
    return value


positive, natural = within(int, 1), within(int, 0)


def integers(text: str) -> list[int]:
    """Positive integers joined by commas."""
    return [positive(part) for part in text.split(",")]


def load(args: argparse.Namespace,
         longest: int | None = None) -> tuple[longlora.Llama, torch.dtype, Team]:
    """The model that was asked for, on this process's device; what to compute in; and with whom."""
    device, team = join(1)
    dtype = compute_dtype(args.dtype, device)
    model = longlora.load_model(args.model, dtype, device, context=longest or args.extend)
    if args.adapter:
        longlora.load_adapter(model, args.adapter, args.extend)
    elif args.extend:
        model.extend(args.extend)
    return model, dtype, team


def print_table(rows: list[dict]) -> None:
    """Rows of the same keys as aligned columns."""

    def text(v) -> str:
        if v is None:
            return "-"
        return f"{v:.3f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v)

    cells = [list(rows[0])] + [[text(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print0("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def stretch_columns(values: list[float]) -> dict:
    return {f"to {(i + 1) / len(values):.0%}": value for i, value in enumerate(values)}


def run_perplexity(args: argparse.Namespace) -> list[dict]:
    if args.attention != "full" and not args.group_size:
        raise ValueError(f"--attention {args.attention} needs --group-size: an adapter does not "
                         "say with which it was trained (train.py prints it)")
    pattern = attention_pattern(args.attention, args.group_size)
    model, dtype, team = load(args, max(args.context))
    with team.first_one_first():  # it encodes texts, the others find them encoded
        tokens = prepare.open_tokens(args.data, args.model,
                                     model.config.vocab_size)[:args.max_tokens]
    strides = [args.stride or default_stride(args.protocol, context) for context in args.context]
    for context, stride in zip(args.context, strides):  # all of them before the work
        check_windows(len(tokens), context, args.protocol, stride, args.by_position)
    rows = []
    for context, stride in zip(args.context, strides):
        found = perplexity(model, tokens, context, args.protocol, stride, dtype, **pattern,
                           stretches=args.by_position)
        rows.append({"context": context, "protocol": args.protocol, "stride": stride,
                     "perplexity": found.value, "error": found.error, "tokens": found.tokens})
        if args.by_position:
            rows[-1]["by_position"] = found.by_position
    print_table([{k: v for k, v in row.items() if k != "by_position"} for row in rows])
    if args.by_position:
        print0("\nby position in the window:")
        print_table([{"context": row["context"], **stretch_columns(row["by_position"])}
                     for row in rows])
    return rows


def plot_perplexity(args: argparse.Namespace, rows: list[dict]) -> None:
    if n := args.by_position:
        series = {f"windows of {row['context']:,}":
                  ([row["context"] * (i + 1) // n for i in range(n)], row["by_position"], None)
                  for row in rows}
        plots.curve(args.plot, series, "Perplexity up to a position in the window", "perplexity",
                    xlabel="position (tokens)")
    else:
        values, errors = ([row[name] for row in rows] for name in ("perplexity", "error"))
        plots.curve(args.plot, {f"{args.attention} attention": (args.context, values, errors)},
                    "Perplexity by context", "perplexity")


def run_passkey(args: argparse.Namespace) -> list[dict]:
    model, dtype, _ = load(args, max(args.length))
    tokenizer = prepare.load_tokenizer(args.model, model.config.vocab_size)
    for seed in range(0 if args.official else 20):  # does the shortest fit?
        prepare.passkey_document(tokenizer, min(args.length), np.random.default_rng(seed), True)
    rows = [passkey(model, tokenizer, length, args.trials, args.depths, args.seed, dtype,
                    args.official) for length in args.length]
    print_table([{k: v for k, v in row.items() if k != "by_depth"}
                 | (stretch_columns(row["by_depth"]) if args.depths > 1 else {}) for row in rows])
    if args.depths > 1:
        print0(f'"to {1 / args.depths:.0%}": keys that lie up to so deep in the filler; '
               "0% is where the prompt begins")
    return rows


def plot_passkey(args: argparse.Namespace, rows: list[dict]) -> None:
    plots.heatmaps(args.plot, {Path(args.adapter or args.model).name: rows})


def run_answers(args: argparse.Namespace) -> list[dict]:
    model, dtype, team = load(args, args.context)
    with team.first_one_first():
        context = args.context or model.config.max_position_embeddings
        where = args.data, args.model, model.config.vocab_size, context
        samples = (instruct.open_splits(*where)[2] if args.held_out else
                   instruct.open_samples(*where))
    print0(f"{args.data}: {len(samples):,} samples at {context:,} tokens; "
           f"{instruct.lost([samples])}")
    if args.max_tokens:
        samples = samples.some(args.max_tokens)
    if not len(samples):
        raise ValueError(f"--data {args.data}: no sample to answer fits --context or --max-tokens")
    rows = answers(model, samples, dtype)
    print_table([row | {"tokens": row["tokens"] or "all"} for row in rows])
    return rows


def run_topics(args: argparse.Namespace) -> list[dict]:
    if "{prompt}" not in args.template:
        raise ValueError(f"--template {args.template}: it has no {{prompt}}")
    if args.file:
        cases = read_topic_cases(args.file)
    else:
        cases = [prepare.topic_case(n, np.random.default_rng((args.seed, n, i)))
                 for n in args.topics for i in range(args.cases)]
    model, dtype, _ = load(args)
    tokenizer = prepare.load_tokenizer(args.model, model.config.vocab_size)
    window = model.config.max_position_embeddings
    prompts = [[tokenizer.bos_id(),
                *tokenizer.encode(args.template.replace("{prompt}", case["prompt"]))]
               for case in cases]
    for case, prompt in zip(cases, prompts):
        if len(prompt) + args.max_new_tokens > window:
            raise ValueError(f"a record of {len(case['topics'])} topics has {len(prompt):,} tokens "
                             f"and its answer up to {args.max_new_tokens}, but the model reads "
                             f"{window:,}: leave it out, or extend the model")
    shares = Shares(len(cases))
    kinds = sorted({len(case["topics"]) for case in cases})
    sums = np.zeros((len(kinds), 3))  # cases, tokens, right
    for i in tqdm(shares.mine, desc="records", leave=False, disable=shares.rank > 0):
        ids = generate(model, prompts[i], args.max_new_tokens, dtype, stops(model, tokenizer))
        answer, topics = tokenizer.decode(list(ids)), cases[i]["topics"]
        sums[kinds.index(len(topics))] += 1, len(prompts[i]), names_topic(answer, topics)
    sums = shares.total(sums)
    rows = [{"topics": n, "cases": int(count), "tokens": round(tokens / count),
             "accuracy": right / count} for n, (count, tokens, right) in zip(kinds, sums)]
    print_table(rows)
    return rows


def one_process(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(f"not under torchrun: python eval.py {command}")


def run_generate(args: argparse.Namespace) -> list[dict]:
    one_process("generate")
    if args.prompt is not None and (args.file or args.chat):
        raise ValueError(f"--prompt and {'--file' if args.file else '--chat'} exclude each other")
    text = args.prompt
    if args.file:
        text = args.file.read_text(encoding="utf-8", errors="replace")
    elif text is None and not args.chat:
        if sys.stdin.isatty():
            print("reading the text from standard input, up to Ctrl-D", file=sys.stderr)
        text = sys.stdin.read()
    model, dtype, _ = load(args)
    tokenizer = prepare.load_tokenizer(args.model, model.config.vocab_size)
    how = args.max_new_tokens, dtype, args.temperature, args.top_p, args.seed
    if args.chat:
        return chat.talk(model, tokenizer, text, args.question, *how)
    if args.question:
        text = instruct.prompt_text(text, args.question)
    return [chat.write(model, tokenizer, [tokenizer.bos_id(), *tokenizer.encode(text)], *how)[1]]


def run_paper(args: argparse.Namespace) -> list[dict]:
    one_process("paper")
    return paper.run(args.out, args.only, args.seeds, args.jobs)


def run_bench(args: argparse.Namespace) -> list[dict]:
    one_process("bench")
    return bench.run(args)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run, text: str, plot: str | None = None,
                draw=None) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text,
                                  formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        sub.set_defaults(run=run, draw=draw, plot=None)
        sub.add_argument("--json", type=Path, help="write the rows to this file too")
        if plot:
            sub.add_argument("--plot", type=Path, help=f"draw {plot} to this .png or .svg "
                             "(needs matplotlib)")
        return sub

    def with_model(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--model", default=TINY_LLAMA, help="folder of the Llama")
        sub.add_argument("--adapter", help="folder of an adapter: train.py's, PEFT's, or released "
                         "with the paper")
        sub.add_argument("--extend", type=positive, metavar="TOKENS",
                         help="interpolate positions to so many tokens (what the adapter says; a "
                         "released one says nothing)")
        sub.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                         help="compute in; auto: bfloat16 where it is native")
        return sub

    sub = with_model(command("perplexity", run_perplexity, "Perplexity over sliding windows.",
                             "perplexity against context, or position,", plot_perplexity))
    sub.add_argument("--data", default="stdlib",
                     help="stdlib (its test split), a .bin token file, .txt, .jsonl or a folder")
    sub.add_argument("--context", type=integers, default="256,512,1024,2048",
                     help="tokens in a window")
    sub.add_argument("--protocol", default="once", choices=("once", "official"),
                     help="see eval.py --help")
    sub.add_argument("--stride", type=positive,
                     help="tokens between windows (once: half a window; official: 256)")
    sub.add_argument("--max-tokens", type=positive, help="read only so many tokens")
    sub.add_argument("--by-position", type=natural, default=0, metavar="N",
                     help="also by N stretches of the window (the first ones are scored in few "
                     "windows by protocol once, in all by official)")
    sub.add_argument("--attention", default="full", choices=("full", "shifted", "local"),
                     help="attention pattern")
    sub.add_argument("--group-size", type=positive,
                     help="tokens in a group, with --attention shifted or local")

    sub = with_model(command("passkey", run_passkey, "Share of passkeys retrieved, by length of "
                             "the prompt and depth of the key.", "the share by length and depth",
                             plot_passkey))
    sub.add_argument("--length", type=integers, default="128,256,512,1024,2048",
                     help="tokens in a prompt, at most")
    sub.add_argument("--depths", type=positive, default=5, help="stretches of depth")
    sub.add_argument("--trials", type=positive, default=20,
                     help="prompts for each length and depth")
    sub.add_argument("--seed", type=natural, default=0, help="of keys and depths")
    sub.add_argument("--official", action="store_true", help="the official evaluation's filler, "
                     "keys and depths: --trials prompts a length, of seeds --seed, --seed + 1, ...")

    sub = with_model(command("answers", run_answers, "Exact matches and perplexity of answers to "
                             "instructions, by tokens in a sample."))
    sub.add_argument("--data", default=instruct.QUESTIONS, help="instructions, as in train.py "
                     "(of stdlib-questions those about the test split's files)")
    sub.add_argument("--held-out", action="store_true", help="of a file that train.py was given, "
                     "those alone that it held out for its table")
    sub.add_argument("--context", type=positive, help="longest sample; of longer ones the prompt's "
                     "middle is left out (the model's window)")
    sub.add_argument("--max-tokens", type=positive, help="read only so many tokens")

    sub = with_model(command("topics", run_topics, "Topic retrieval (LongChat): share of records "
                             "of conversations whose first topic is named."))
    sub.add_argument("--file", type=Path, help="LongChat's test cases, .jsonl (generated ones)")
    sub.add_argument("--topics", type=integers, default="5",
                     help="conversations in a generated record")
    sub.add_argument("--cases", type=positive, default=10, help="generated records of each number")
    sub.add_argument("--template", default="{prompt}",
                     help="what the model is given, such as '[INST]{prompt}[/INST]'")
    sub.add_argument("--max-new-tokens", type=positive, default=50, help="tokens in an answer")
    sub.add_argument("--seed", type=natural, default=0, help="of generated records")

    sub = with_model(command("generate", run_generate, "Continue a prompt, a file or standard "
                             "input; with --question, answer it from that text."))
    sub.add_argument("--prompt", help="text to continue")
    sub.add_argument("--file", type=Path, help="text file to continue (standard input)")
    sub.add_argument("--question", help="ask this about the text, as the paper's chat models were "
                     "trained: [INST]text, question[/INST]")
    sub.add_argument("--chat", action="store_true", help="several turns at the terminal, the first "
                     "one about the text of --file, if given; Ctrl-D ends")
    sub.add_argument("--max-new-tokens", type=positive, default=512, help="tokens to write at most")
    sub.add_argument("--temperature", type=within(float, 0, 100), default=0.6, help="0: greedy")
    sub.add_argument("--top-p", type=within(float, 0, 1), default=0.9,
                     help="draw from the likeliest tokens that have this share")
    sub.add_argument("--seed", type=natural, default=0, help="of what is drawn")

    sub = command("bench", run_bench, "Time, memory and FLOPs of a step of train.py, on random "
                  "weights and tokens.", "tokens/s by context", bench.draw)
    bench.flags(sub, integers, positive)

    sub = command("paper", run_paper, "The paper's tables and figures at small scale: trains the "
                  "variants from data/tiny-llama by train.py and compares them.")
    sub.add_argument("--only", type=integers, help="1: attention in training, 2: what trains, "
                     "3: trained and evaluated length, 4: passkeys, 5: group sizes")
    sub.add_argument("--out", type=Path, default="out-paper", help="folder for runs, figures, "
                     "tables; what is finished there is not repeated")
    sub.add_argument("--seeds", type=positive, default=3, help="of tables 1 and 2")
    cores = 1 if torch.accelerator.is_available() else min(8, os.cpu_count() or 1)
    sub.add_argument("--jobs", type=positive, default=cores,
                     help="runs at one time, which share the CPU's cores")

    args = parser.parse_args()
    if args.json and (args.json.is_dir() or not os.access(args.json.parent, os.W_OK)):
        raise ValueError(f"--json {args.json}: name a file in a folder that can be written to")
    if args.plot:
        plots.check(args.plot)
    rows = args.run(args)
    if args.json and is_main():
        longlora.write_json(args.json, {"rows": rows})
    if args.plot and is_main():
        args.draw(args, rows)
    leave()


if __name__ == "__main__":
    with prepare.one_line_errors():
        try:
            main()
        except torch.OutOfMemoryError as error:
            sys.exit(f"out of memory: {str(error).splitlines()[0]} Try shorter windows or prompts, "
                     "or --dtype bfloat16")
