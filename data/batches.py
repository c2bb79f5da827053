"""What a step of train.py reads, and what is held out of it: windows of a corpus, or instructions.

Both are functions of (seed, step) alone, so that any step can be made again, and both say in
micro-steps what this process reads of a step.
"""
import heapq
import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

import longlora
from data import instruct, prepare
from data.team import Team, print0
from eval import answers, attention_pattern, perplexity

HELD_OUT = 32768  # tokens of what --eval-every measures


class MicroStep(NamedTuple):
    tokens: torch.Tensor  # (B, T)
    targets: torch.Tensor  # (B, T), or of the tokens that are scored
    how: dict  # what else the model is told


# --------------------------------------------------------------------------------------------------
# A corpus


def make_batch(run, tokens: np.ndarray, tokenizer, step: int) -> torch.Tensor:
    """The token ids (batch_size, context + 1) of a step."""
    rng = np.random.default_rng((run.seed, step))
    rows = []
    for _ in range(run.batch_size):
        start = int(rng.integers(len(tokens) - run.context))
        row = tokens[start:start + run.context + 1].astype(np.int64)
        if rng.random() < run.passkey:
            row = np.concatenate([prepare.passkey_documents(tokenizer, run.context, rng), row])
            row = row[:run.context + 1]
        rows.append(row)
    return torch.from_numpy(np.stack(rows))


class Corpus:
    """Windows of run.context tokens, cut anywhere; in the table perplexity by context.

    Raises ValueError if there are too few tokens. `samples` is how many windows are an epoch.
    """

    measures, next_commands = "perplexity", ("passkey", "perplexity")

    def __init__(self, run, config: longlora.LlamaConfig, team: Team):
        with team.first_one_first():  # it encodes texts, the others find them encoded
            self.train, valid, test = (
                prepare.open_tokens(run.data, run.model, config.vocab_size, split)
                for split in ("train", "valid", "test"))
        if len(self.train) <= run.context:
            raise ValueError(f"--data {run.data}: {len(self.train):,} tokens to train on are too "
                             f"few for --context {run.context:,}")
        self.valid, self.test = valid[:max(HELD_OUT, run.context)], test[:max(run.eval_tokens,
                                                                             run.context)]
        if run.eval_every and len(self.valid) < run.context or (
                run.eval_tokens and len(self.test) < run.context):
            raise ValueError(f"--data {run.data}: {min(len(self.valid), len(self.test)):,} held-out"
                             f" tokens are too few for --context {run.context:,}; give more text, "
                             "or --eval-every 0 --eval-tokens 0")
        self.tokenizer = None
        if run.passkey:
            self.tokenizer = prepare.load_tokenizer(run.model, config.vocab_size)
            prepare.passkey_document(self.tokenizer, prepare.PASSKEY_TOKENS,  # does one fit?
                                     np.random.default_rng(0), held_out=False)
        self.run, self.team, self.samples = run, team, len(self.train) // run.context
        self.groups = f"{run.group_size:,}"
        self.pattern = attention_pattern(run.attention, run.group_size)
        if team.contexts > 1:
            self.pattern |= {"start": team.piece(run.context, run.group_size).start,
                             "before": team.before}
        self.contexts = [min(config.max_position_embeddings, run.context)]
        while self.contexts[-1] < run.context:
            self.contexts.append(min(2 * self.contexts[-1], run.context))
        print0(f"{run.data}: a corpus, {len(self.train):,} tokens to train on")

    def step(self, step: int) -> tuple[list[MicroStep], int]:
        """This process's part of a step, and how many targets are scored in all of it."""
        batch = make_batch(self.run, self.train, self.tokenizer, step)
        parts = (x.split(self.run.micro_batch) for x in self.team.share(batch, self.run.group_size))
        return [MicroStep(*part, self.pattern) for part in zip(*parts)], batch[:, 1:].numel()

    def tokens_until(self, step: int) -> int:
        """How many are read in the steps before `step`."""
        return step * self.run.batch_size * self.run.context

    def held_out_loss(self, model: longlora.Llama, dtype: torch.dtype) -> float:
        return math.log(perplexity(model, self.valid, self.run.context, dtype=dtype).value)

    def measure(self, model: longlora.Llama, dtype: torch.dtype) -> dict:
        return {str(c): perplexity(model, self.test, c, dtype=dtype).value for c in self.contexts}

    def table(self, rows: dict[str, dict]) -> str:
        """The measurements of some models, by their names."""
        lines = [f"perplexity on {len(self.test):,} held-out tokens, full attention, by tokens in "
                 "a window:", "tokens".rjust(14) + "".join(f"{c:>10,}" for c in self.contexts)]
        lines += [name.rjust(14) + "".join(f"{row[str(c)]:10.2f}" for c in self.contexts)
                  for name, row in rows.items()]
        return "\n".join(lines)


# --------------------------------------------------------------------------------------------------
# Instructions


def packs(lengths: list[int], room: int, teams: int) -> list[list[int]]:
    """Which of the samples of a step share a row, of at most `room` tokens: few rows, as many for
    each of `teams`, and about equally long, the longest first."""
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fewest = max(1, math.ceil(sum(lengths) / room / teams)) * teams
    for n in itertools.count(fewest, teams):
        rows = [(0, i, []) for i in range(n)]  # a heap: tokens, which one, samples
        for i in longest_first:
            tokens, place, row = rows[0]
            heapq.heapreplace(rows, (tokens + lengths[i], place, row + [i]))
        rows.sort(reverse=True)
        if rows[0][0] <= room:
            return [row for _, _, row in rows]


class Instructions:
    """Samples of at most run.context tokens, in an order of their own in each epoch. Those that
    share a row stand end to end: nothing is padded, and none sees another.

    G is a share of each sample's own length, or run.group_size. The table has exact matches and
    perplexity of answers, by length. Raises ValueError if there are none, or --context-parallel
    cannot split one.
    """

    measures, next_commands = "answers", ("generate --file FILE --chat",)

    def __init__(self, run, config: longlora.LlamaConfig, team: Team, groups: int):
        with team.first_one_first():
            parts = instruct.open_splits(run.data, run.model, config.vocab_size, run.context)
        self.train, valid, test = parts
        self.valid = valid.some(max(HELD_OUT, run.context))
        self.test, self.held_out = test.some(run.eval_tokens), len(test)
        self.run, self.team, self.per_sample, self.samples = run, team, groups, len(self.train)
        self.groups = f"{run.group_size:,}" if run.group_size else f"1/{groups} of a sample"
        if not self.samples:
            raise ValueError(f"--data {run.data}: no answer fits into --context {run.context:,}")
        for name, part in (("eval_every", self.valid), ("eval_tokens", self.test)):
            if getattr(run, name) and not len(part):
                name = "--" + name.replace("_", "-")
                raise ValueError(f"--data {run.data}: every twentieth sample is held out for "
                                 f"{name}, but of {sum(map(len, parts)):,} none that fits; give "
                                 f"more samples or tokens, or {name} 0")
        for length in map(int, np.unique(self.train.lengths)):
            G = self.group_size(length)
            if (n := math.ceil(length / G)) < team.contexts:
                raise ValueError(f"--context-parallel {team.contexts}: a sample has {length:,} "
                                 f"tokens, in groups of {G:,} these are {n}; take fewer processes "
                                 "for a sequence, or a smaller --group-size")
        print0(f"{run.data}: instructions, {self.samples:,} to train on and {len(valid):,} + "
               f"{len(test):,} held out, at {run.context:,} tokens; {instruct.lost(parts)}")

    def group_size(self, length: int) -> int:
        return self.run.group_size or longlora.default_group_size(length, self.per_sample)

    def order(self, first: int, last: int) -> np.ndarray:
        """Which samples are drawn first, first + 1, ..., last - 1."""
        n, epochs = self.samples, range(first // self.samples, last // self.samples + 1)
        drawn = [np.random.default_rng((self.run.seed, e)).permutation(n) for e in epochs]
        return np.concatenate(drawn)[first - n * epochs[0]:last - n * epochs[0]]

    def step(self, step: int) -> tuple[list[MicroStep], int]:
        """This process's part of a step, and how many targets are scored in all of it."""
        B, team = self.run.batch_size, self.team
        drawn = [self.train[i] for i in self.order(step * B, (step + 1) * B)]
        rows = packs([len(ids) for ids, _ in drawn], self.run.micro_batch * self.run.context,
                     team.size // team.contexts)
        mine = rows[team.rank // team.contexts::team.size // team.contexts]
        shortest = min((ids for ids, _ in drawn), key=len)
        idle = [(shortest, np.full_like(shortest, -100))]  # for who has none, so that all keep step
        return [self.micro_step([drawn[i] for i in row] or idle) for row in mine], sum(
            int((labels != -100).sum()) for _, labels in drawn)

    def micro_step(self, samples: list[tuple[np.ndarray, np.ndarray]]) -> MicroStep:
        """This process's part of each of `samples`, end to end."""
        tokens, targets, lengths, starts, groups = [], [], [], [], []
        for ids, labels in samples:
            groups.append(self.group_size(len(ids)))
            part = self.team.piece(len(ids), groups[-1])
            tokens.append(ids[part])
            targets.append(np.append(labels[1:], -100)[part])  # what follows each token
            lengths.append(len(tokens[-1]))
            starts.append(part.start)
        tokens, targets = (torch.from_numpy(np.concatenate(x)) for x in (tokens, targets))
        scored = (targets != -100).nonzero()[:, 0]
        how = {"lengths": lengths, "logits_to_keep": scored}
        if self.run.attention != "full":
            how |= {"group_size": groups, "shift": self.run.attention == "shifted"}
        if self.team.contexts > 1:
            how |= {"start": starts, "before": self.team.before}
        return MicroStep(tokens[None], targets[None, scored], how)

    def tokens_until(self, step: int) -> int:
        """How many are read in the steps before `step`."""
        lengths, drawn = self.train.lengths, step * self.run.batch_size
        epochs = drawn // self.samples
        begun = lengths[self.order(epochs * self.samples, drawn)].sum()
        return int(epochs * lengths.sum() + begun)

    def held_out_loss(self, model: longlora.Llama, dtype: torch.dtype) -> float:
        return math.log(answers(model, self.valid, dtype)[-1]["perplexity"])

    def measure(self, model: longlora.Llama, dtype: torch.dtype) -> list[dict]:
        return answers(model, self.test, dtype)

    def table(self, rows: dict[str, list[dict]]) -> str:
        """The measurements of some models, by their names."""
        first = next(iter(rows.values()))
        lengths = [f"{row['tokens']:,}" if row["tokens"] else "all" for row in first]
        lines = [f"answers to {len(self.test):,} of {self.held_out:,} held-out samples, full "
                 "attention, by tokens in a sample:",
                 "up to".rjust(26) + "".join(f"{length:>10}" for length in lengths),
                 "samples".rjust(26) + "".join(f"{row['samples']:10,}" for row in first)]
        for what in ("exact_match", "perplexity"):
            lines += [f"{name}: {what.replace('_', ' ')}".rjust(26)
                      + "".join(f"{row[what]:10.2f}" for row in found)
                      for name, found in rows.items()]
        return "\n".join(lines)
