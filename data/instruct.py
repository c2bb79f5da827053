"""Instructions and their answers, for supervised fine-tuning on long ones (the paper's LongAlpaca).

A file of them is a JSON list or JSON lines of {"instruction", "output"}, with an "input" or
without. It is encoded once, into a token file and beside it an index of where each sample ends and
how many of its tokens are the prompt's (int64 pairs): FILE.bin and FILE.samples.

    a sample    <s> [INST]{instruction}[/INST] {output} </s>
    labels      -100 for the prompt ........... and each token of the answer
"""
import ast
import contextlib
import io
import math
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import prepare
from data.formats import replace_file, write_json

QUESTIONS = "stdlib-questions"


# --------------------------------------------------------------------------------------------------
# The form


def prompt_text(instruction: str, more: str = "") -> str:
    """What stands before an answer, in training and in a chat. `more` is a record's "input", or the
    question about a text."""
    return f"[INST]{instruction}\n{more}[/INST]" if more else f"[INST]{instruction}[/INST]"


def encode(tokenizer: prepare.Tokenizer, prompt: str, output: str) -> tuple[list[int], int]:
    """The ids of a sample, and how many of them are the prompt's. Prompt and answer are encoded
    together, and the prompt's ids are as many as it has alone: a piece that ends the one and begins
    the other, as "](" may be, is the prompt's. `</s>` is always the answer's."""
    ids = [tokenizer.bos_id(), *tokenizer.encode(prompt + output), tokenizer.eos_id()]
    return ids, min(1 + len(tokenizer.encode(prompt)), len(ids) - 1)


# --------------------------------------------------------------------------------------------------
# Files


def is_instructions(data: str | Path) -> bool:
    """Whether `data` is instructions, by what is in it: an index is beside a token file, or a first
    record has an "instruction". (A .json can be nothing else.)"""
    path = Path(data)
    if path.suffix == ".bin":
        return prepare.index_of(path).is_file()
    if not path.is_file() or path.suffix not in (".json", ".jsonl"):
        return str(data) == QUESTIONS
    with contextlib.suppress(ValueError):  # whoever reads it will say so
        for _, record, _ in prepare.records(path, errors="replace"):
            return isinstance(record, dict) and "instruction" in record or path.suffix == ".json"
    return path.suffix == ".json"


def read_instructions(path: Path) -> Iterator[tuple[str, str, int]]:
    """Prompt, answer, and the characters read for them. Raises ValueError, naming the record."""
    place = None
    try:
        for place, record, read in prepare.records(path):
            if not isinstance(record, dict):
                raise ValueError(f'{path}, {place}: expected an object with "instruction" and '
                                 f'"output", got {type(record).__name__}')
            fields = {"input": "", **{k: v for k, v in record.items() if v is not None}}
            for name in ("instruction", "input", "output"):
                if not isinstance(fields.get(name), str):
                    got = (type(fields[name]).__name__ if name in fields else
                           f"none, but {', '.join(map(repr, record))[:100] or 'nothing'}")
                    raise ValueError(f'{path}, {place}: expected a text as "{name}", got {got}')
            yield prompt_text(fields["instruction"], fields["input"]), fields["output"], read
    except UnicodeDecodeError as error:
        where = f"behind {place}" if place else "at the beginning"
        raise ValueError(f"{path}: not UTF-8 {where} ({error.reason})") from None
    if place is None:
        raise ValueError(f"{path}: no instructions in it")


def write_samples(files: list[Path], tokenizer: prepare.Tokenizer, out: Path) -> int:
    """Encode instructions into the token file `out` and its index; returns how many there are.
    Complete or absent: the index comes last."""
    index, end = [], 0

    def samples() -> Iterator[tuple[list[int], int]]:
        nonlocal end
        for path in files:
            for prompt, output, read in read_instructions(path):
                ids, prompt_length = encode(tokenizer, prompt, output)
                end += len(ids)
                index.append((end, prompt_length))
                yield ids, read

    prepare.write_tokens(samples(), files, tokenizer, out)
    replace_file(prepare.index_of(out), np.array(index, np.int64).tofile)
    return len(index)


class Samples:
    """Instructions as token ids, none longer than `context`: an over-long one keeps its answer and
    loses the middle of its prompt, one whose answer alone does not fit is left out.

    `places` (N, 3) is where in `tokens` each begins, the length of its prompt, and its own.
    `samples[i]` is ids and labels, both (T,); the labels of the prompt are -100. `lengths` has
    every T; `cut` and `left_out` count.
    """

    def __init__(self, tokens: np.ndarray, places: np.ndarray, context: int):
        _, prompts, lengths = places.T
        fits = lengths - prompts < context  # behind one token at least
        self.tokens, self.context, self.places = tokens, context, places[fits]
        self.lengths = np.minimum(lengths[fits], context)
        self.left_out = int((~fits).sum())
        self.cut = int((fits & (lengths > context)).sum())

    def __len__(self) -> int:
        return len(self.places)

    def some(self, tokens: int) -> "Samples":
        """As many, drawn at random but always the same, as have so many tokens together."""
        order = np.random.default_rng(0).permutation(len(self))
        drawn = np.sort(order[np.cumsum(self.lengths[order]) <= tokens])
        return Samples(self.tokens, self.places[drawn], self.context)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        start, prompt, length = map(int, self.places[i])
        ids = self.tokens[start:start + length].astype(np.int64)
        if length > self.context:
            kept = prompt - (length - self.context)
            ids = np.concatenate([ids[:(kept + 1) // 2], ids[prompt - kept // 2:]])
            prompt = kept
        labels = ids.copy()
        labels[:prompt] = -100
        return ids, labels


def lost(parts: list[Samples]) -> str:
    """What of some samples does not fit, in words."""
    cut, left_out = (sum(getattr(x, name) for x in parts) for name in ("cut", "left_out"))
    longest = max((int(x.places[:, 2].max()) for x in parts if len(x)), default=0)
    return (f"the longest has {longest:,}; prompts that lose their middle: {cut:,}; left out, as "
            f"the answer alone does not fit: {left_out:,}")


def read_index(path: Path, tokens: np.ndarray) -> np.ndarray:
    """The `places` (N, 3) of the samples in a token file. Raises ValueError if its index is broken
    or another file's."""
    index = np.fromfile(prepare.index_of(path), np.int64)
    ends, prompts = index[:len(index) // 2 * 2].reshape(-1, 2).T
    starts = np.append(0, ends[:-1])
    if len(index) % 2 or not len(ends) or ends[-1] != len(tokens) or not (
            (starts < ends) & (0 < prompts) & (prompts < ends - starts)).all():
        raise ValueError(f"{prepare.index_of(path)} does not describe the samples in {path}: make "
                         "both again by data/prepare.py")
    return np.stack([starts, prompts, ends - starts], axis=1)


def open_places(data: str, model_path: str | Path, vocab_size: int,
                split: str) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the instructions in `data`, and their `places`: see `open_samples`."""
    path, pieces = Path(data), vocab_size
    if not is_instructions(data):
        if not path.exists():
            raise FileNotFoundError(f"{data}: no such file")
        raise ValueError(f'{data}: no instructions; expected .json or .jsonl with "instruction" '
                         f'and "output", a .bin that data/prepare.py made of it, or {QUESTIONS}')
    if data == QUESTIONS:
        path = library_questions(model_path, split)
    if path.suffix != ".bin":
        tokenizer = prepare.load_tokenizer(model_path, vocab_size)
        source, pieces = path, tokenizer.vocab_size()
        path = prepare.cached(f"{path.stem}-samples", [path], tokenizer)
        if not prepare.index_of(path).exists():
            write_samples([source], tokenizer, path)
    tokens = prepare.map_tokens(path, pieces, vocab_size)
    return tokens, read_index(path, tokens)


def open_samples(data: str, model_path: str | Path, vocab_size: int, context: int) -> Samples:
    """The instructions in `data`: JSON, a token file with its index, or "stdlib-questions" (those
    about the test split's files). JSON is encoded with the model's tokenizer, once, into
    data/tokens. Raises FileNotFoundError, ValueError."""
    return Samples(*open_places(data, model_path, vocab_size, "test"), context)


def open_splits(data: str, model_path: str | Path, vocab_size: int, context: int) -> list[Samples]:
    """The same, but in three parts: to train on, and held out for validation and for test. Of the
    library's questions these are about other files, of other data the last two of every twenty."""
    splits, where = ("train", "valid", "test"), (data, model_path, vocab_size)
    if data == QUESTIONS:
        return [Samples(*open_places(*where, split), context) for split in splits]
    tokens, places = open_places(*where, "")
    part = np.clip(np.arange(len(places)) % 20 - 17, 0, 2)
    return [Samples(tokens, places[part == i], context) for i in range(3)]


# --------------------------------------------------------------------------------------------------
# Questions about the standard library's files, from their syntax trees

COUNTS = {"train": 1800, "valid": 200, "test": 250}
SHORTEST, LONGEST, FORM = 128, 1024, 64  # tokens; the last for question, answer and marks
GUESSED = {"None", "True", "False", "0", "1", "''"}  # defaults so common that they could be guessed


class Fact(NamedTuple):
    question: str
    answer: str
    first: int  # line (from 1) that one needs to see to answer
    last: int
    others: list[int]  # lines that must not be there: they define the same name again


def lines_of(source: str) -> list[str]:
    """As Python counts them: str.splitlines would also split at form feeds."""
    return list(io.StringIO(source))


def facts(source: str) -> Iterator[Fact]:
    """What can be asked about a Python source, from its syntax tree: which class defines a method,
    what an argument's default is."""
    functions, owners, lines = {}, {}, lines_of(source)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            owners |= dict.fromkeys(node.body, node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions.setdefault(node.name, []).append(node)
    for name, node in ((name, node) for name, nodes in functions.items() for node in nodes):
        others = [other.lineno for other in functions[name] if other is not node]
        if owner := owners.get(node):
            yield Fact(f"Which class defines {name}?", f"class {owner.name}", owner.lineno,
                       node.lineno, others)
        positional = node.args.posonlyargs + node.args.args
        for argument, default in [*zip(positional[::-1], node.args.defaults[::-1]),
                                  *zip(node.args.kwonlyargs, node.args.kw_defaults)]:
            if not default or default.lineno < default.end_lineno:
                continue
            line = lines[default.lineno - 1].encode()  # columns are bytes
            text = line[default.col_offset:default.end_col_offset].decode()
            if len(text) <= 20 and text not in GUESSED:
                yield Fact(f"What is the default of {argument.arg} in {name}?",
                           f"{argument.arg}={text}", node.lineno, default.end_lineno, others)


def library_questions(tokenizer_path: str | Path, split: str) -> Path:
    """The instructions about the library's files in one split, as JSON, made at the first call and
    kept in data/tokens: an excerpt of a file and a question that it answers somewhere. Their
    lengths are drawn evenly on a log scale, 128 to 1,024 tokens."""
    tokenizer = prepare.load_tokenizer(tokenizer_path)
    settings = prepare.short_hash(repr((COUNTS, SHORTEST, LONGEST, FORM, sorted(GUESSED))).encode())
    out = (prepare.CACHE / f"stdlib-{platform.python_version()}-{tokenizer.key}" /
           f"questions-{settings}-{split}.json")
    if out.exists():
        return out
    found, samples, rng = [], [], np.random.default_rng(0)
    for path in tqdm(prepare.library_files(split), desc=out.name, unit="file"):
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = lines_of(source)
        ends = np.cumsum([0, *(len(tokenizer.encode(line)) for line in lines)])  # in tokens
        with contextlib.suppress(SyntaxError, ValueError):  # some are meant to be broken
            found += [(lines, ends, fact) for fact in facts(source)]
    for i in np.concatenate([rng.permutation(len(found)) for _ in range(3)]):  # other excerpts
        lines, ends, (question, answer, first, last, others) = found[i]
        room = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST)))) - FORM
        earliest = np.searchsorted(ends, ends[last] - room)
        if earliest >= first:
            continue  # class and method are too far apart
        start = int(rng.integers(earliest, first))
        stop = int(np.searchsorted(ends, ends[start] + room, "right")) - 1
        if stop == len(lines):
            start = int(np.searchsorted(ends, ends[-1] - room))
        excerpt = "".join(lines[start:stop])
        if any(start < line <= stop for line in others) or (
                answer.startswith("class ") and len(re.findall(r"^ *class ", excerpt, re.M)) < 2):
            continue  # not the only answer, or the only class
        samples.append({"instruction": f"{excerpt}\n{question}", "output": answer})
        if len(samples) == COUNTS[split]:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, samples)
    return out
