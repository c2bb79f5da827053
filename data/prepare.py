"""Text in, token files out: the data of training and evaluation.

A token file is a flat array of token ids, uint16, or uint32 for a vocabulary above 65,536.
Documents are joined by the end-of-text token (the paper's Section 4.1): a window of any length may
be cut from anywhere. Instructions have an index beside it, FILE.samples: int64 pairs, where a
sample ends and how long its prompt is.

    python data/prepare.py                # the standard library -> train.bin, valid.bin, test.bin
    python data/prepare.py --tests        # the same, with the test suites in train+tests.bin
    python data/prepare.py --questions    # instructions about the standard library's files
    python data/prepare.py book.txt folder/ --tokenizer llama/tokenizer.model --out corpus.bin
    python data/prepare.py LongAlpaca-12k.json --tokenizer ... --out alpaca.bin  # instructions

The corpus that every machine has is the Python standard library. A hash of its relative path puts
each file into training (90%), validation (5%: settings are chosen on it) or test (5%: results are
reported on it): the same split on every machine and for every Python version.
"""
import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece
from tqdm import tqdm

HERE = Path(__file__).parent
CACHE = HERE / "tokens"


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path`, renamed when written: `path` is complete or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


def parse_json(data: bytes, name: str, errors: str = "strict") -> object:
    """The value of JSON in UTF-8. Raises ValueError, which begins with `name`."""
    try:
        return json.loads(data.decode("utf-8-sig", errors))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not JSON in UTF-8 ({error})") from None


def json_object(path: Path) -> dict:
    """The JSON object in a small file, {} if there is no such file. Raises ValueError."""
    value = parse_json(path.read_bytes(), str(path)) if path.is_file() else {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def json_records(path: Path, errors: str = "strict") -> Iterator[tuple[str, object, int]]:
    """The values of a JSON list ("record 1", value, bytes), which is read as a whole, or of JSON
    lines ("line 1", value, bytes). `errors` as in bytes.decode. Raises ValueError."""
    with open(path, "rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
        file.seek(0)
        if start.startswith(b"["):
            data = file.read()
            values = parse_json(data, str(path), errors)
            for number, value in enumerate(values, 1):
                yield f"record {number}", value, len(data) // len(values)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                value = parse_json(line, f"{path}, line {number}", errors)
                yield f"line {number}", value, len(line)


# --------------------------------------------------------------------------------------------------
# Tokenizers

class SentencePieceTokenizer:
    """A tokenizer.model and the {text: id} of an added_tokens.json beside it. `vocab_size` is the
    highest id + 1; `pieces` counts no added tokens, which may lie beyond a model's vocabulary as
    long as no text has them; `key` names cached files. Raises ValueError."""

    def __init__(self, path: Path):
        model, beside = path.read_bytes(), path.parent / "added_tokens.json"
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError:
            raise ValueError(f"{path}: not a SentencePiece model") from None
        self.bos_id, self.eos_id = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise ValueError(f"{path}: a Llama's tokenizer has <s> and </s>, this one does not")
        self.added = json_object(beside)
        for text, id in self.added.items():
            if not text or type(id) is not int or not 0 <= id < 1 << 31:
                raise ValueError(f"{beside}: expected texts and token ids, got {text!r}: {id!r}")
        self.added_texts = {id: text for text, id in self.added.items()}
        longest_first = sorted(map(re.escape, self.added), key=len, reverse=True)
        self.added_pattern = re.compile(f"({'|'.join(longest_first)})")
        self.pieces = self.processor.vocab_size()
        self.vocab_size = 1 + max([self.pieces - 1, *self.added_texts])
        if self.added:
            model += repr(sorted(self.added.items())).encode()
        self.key = short_hash(model)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS and EOS. Added tokens split it into texts of their own."""
        text, ids = text.encode("utf-8", "replace").decode(), []  # JSON may hold lone surrogates
        for part in self.added_pattern.split(text) if self.added else [text]:
            if part in self.added:
                ids.append(self.added[part])
            else:
                ids += self.processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without BOS and EOS."""
        text, run = "", []
        for id in map(int, ids):
            if id in self.added_texts:
                text += self.processor.decode(run) + self.added_texts[id]
                run = []
            else:
                run.append(id)
        return text + self.processor.decode(run)


class HuggingFaceTokenizer:
    """A tokenizer.json (Llama 3's), read by the optional `tokenizers` package. BOS and EOS come
    from the config files beside it; without a BOS (Qwen's) EOS stands for it. Raises ValueError."""

    def __init__(self, path: Path):
        model = path.read_bytes()
        try:
            import tokenizers
            self.tokenizer = tokenizers.Tokenizer.from_buffer(model)
        except ImportError:
            raise ValueError(f"{path}: to read it, pip install tokenizers") from None
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"{path}: not a tokenizer.json ({error})") from None
        self.tokenizer.no_truncation()  # a tokenizer.json may ask for either
        self.tokenizer.no_padding()
        self.pieces = self.tokenizer.get_vocab_size(with_added_tokens=False)
        self.vocab_size = 1 + max(self.tokenizer.get_vocab().values(), default=-1)
        bos_id, self.eos_id = (self.special_id(name, path.parent) for name in ("bos", "eos"))
        if self.eos_id is None:
            raise ValueError(f'{path}: no "eos_token" in the config files beside it')
        self.bos_id = self.eos_id if bos_id is None else bos_id
        self.key = short_hash(model + repr((self.bos_id, self.eos_id)).encode())

    def special_id(self, name: str, folder: Path) -> int | None:
        """The id of the "bos" or "eos" that a tokenizer's config file names, else a model's."""
        token = json_object(folder / "tokenizer_config.json").get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids = [self.tokenizer.token_to_id(token)] if isinstance(token, str) else []
        for file in ("config.json", "generation_config.json"):
            found = json_object(folder / file).get(f"{name}_token_id")
            ids += found if isinstance(found, list) else [found]
        return next((id for id in ids if type(id) is int and 0 <= id < self.vocab_size), None)

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
Piece = tuple[list[int], int, int]  # ids, how many of them are a prompt, bytes read for them


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in a file or a model folder: its tokenizer.model, else its tokenizer.json.
    Raises FileNotFoundError, ValueError, also for more pieces than the model's `vocab_size`."""
    path = Path(path)
    candidates = (path, path / "tokenizer.model", path / "tokenizer.json")
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no such file, and no folder with a tokenizer.model or "
                                "tokenizer.json, without which only .bin data can be read")
    kind = HuggingFaceTokenizer if file.suffix == ".json" else SentencePieceTokenizer
    tokenizer = kind(file)
    if vocab_size and tokenizer.pieces > vocab_size:
        raise ValueError(f"{file}: {tokenizer.pieces:,} pieces, the model only {vocab_size:,}")
    return tokenizer


# --------------------------------------------------------------------------------------------------
# Corpora: texts, and the Python standard library

def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """The .txt and .jsonl files among `paths` and in the folders among them. Raises ValueError."""
    files = []
    for path in map(Path, paths):
        found = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in found if file.suffix in (".txt", ".jsonl") and file.is_file()]
        if not found:
            problem = "no text" if path.exists() else "no such file or folder"
            raise ValueError(f"{path}: {problem}; expected .txt, .jsonl, a folder of them, a .bin "
                             "token file, or, where these are asked for, a file of instructions")
        files += found
    return files


def documents(path: Path, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The documents in a file, EOS behind each: every "text" of a .jsonl, or the whole of another
    file, which comes in pieces of whole lines, about a megabyte each. Raises ValueError."""
    if path.suffix != ".jsonl":
        with open(path, encoding="utf-8", errors="replace") as file:
            while lines := file.readlines(1 << 20):
                text = "".join(lines)
                yield tokenizer.encode(text), 0, len(text)
        yield [tokenizer.eos_id], 0, 0
        return
    for place, record, size in json_records(path, errors="replace"):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{path}, {place}: no "text"; instructions go into their own file')
        yield [*tokenizer.encode(text), tokenizer.eos_id], 0, size


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def index_of(token_file: Path) -> Path:
    return token_file.with_suffix(".samples")


def write_tokens(files: list[Path], tokenizer: Tokenizer, out: Path,
                 encode: Callable) -> tuple[int, list[tuple[int, int]]]:
    """Write the pieces that `encode` makes of each file to the token file `out`. Returns the number
    of tokens, and of each sample its end and its prompt's length. Raises ValueError for no text."""
    dtype, count, index = token_dtype(tokenizer.vocab_size), 0, []
    size = sum(path.stat().st_size for path in files)
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=out.name, leave=False)
    with bar, new_file(out) as file:
        for ids, prompt, read in (piece for path in files for piece in encode(path, tokenizer)):
            np.asarray(ids, dtype).tofile(file)
            count += len(ids)
            if prompt:
                index.append((count, prompt))
            bar.update(read)
        if not count:
            raise ValueError(f"{', '.join(map(str, files[:3]))}: no text in it")
        index_of(out).unlink(missing_ok=True)  # it describes the file that is replaced now
    return count, index


def write_texts(files: list[Path], tokenizer: Tokenizer, out: Path) -> int:
    """Encode texts into the token file `out`; returns the number of tokens. Raises ValueError."""
    return write_tokens(files, tokenizer, out, documents)[0]


def cached(name: str, files: list[Path], tokenizer: Tokenizer, write: Callable) -> Path:
    """The token file of `files` in their present state, made at the first call, in data/tokens."""
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    out = CACHE / f"{name}-{short_hash(repr(state).encode())}-{tokenizer.key}.bin"
    written_last = out if write is write_texts else index_of(out)
    if not written_last.exists():
        write(files, tokenizer, out)
    return out


def map_tokens(path: Path, dtype: np.dtype, vocab_size: int) -> np.ndarray:
    """The ids (N,) in a token file, memory-mapped. Raises FileNotFoundError, ValueError."""
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path}: not a token file of {dtype.name} ids: it has {size} bytes")
    tokens = np.memmap(path, dtype, mode="r")
    if (highest := int(tokens.max())) >= vocab_size:
        raise ValueError(f"{path}: token id {highest} is beyond the vocabulary of {vocab_size}")
    return tokens


def open_tokens(data: str, model_path: str | Path, vocab_size: int,
                split: str | None = None) -> np.ndarray:
    """The token ids (N,) of `data`: "stdlib", "stdlib+tests", a .bin token file, or texts, which
    are encoded with the model's tokenizer, once. The library is split by file (`split` None:
    "test"); of other data "valid" and "test" are the last two twentieths, a million tokens each at
    most, and None is all. Raises FileNotFoundError, ValueError."""
    library = data in ("stdlib", "stdlib+tests")
    path, dtype = Path(data), token_dtype(vocab_size)
    if path.suffix != ".bin":
        tokenizer = load_tokenizer(model_path, vocab_size)
        dtype = token_dtype(tokenizer.vocab_size)
        if library:
            with_tests = data == "stdlib+tests" and split == "train"
            path = library_tokens(tokenizer, "train+tests" if with_tests else split or "test")
        else:
            path = cached(path.stem, text_files([path]), tokenizer, write_texts)
    tokens = map_tokens(path, dtype, vocab_size)
    if library or split is None:
        return tokens
    held_out = min(len(tokens) // 20, 1_000_000)
    first, second = len(tokens) - 2 * held_out, len(tokens) - held_out
    return {"train": tokens[:first], "valid": tokens[first:second], "test": tokens[second:]}[split]


TESTS = {"test", "tests", "idle_test"}
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


def split_of(name: str) -> str:
    """The split of a library file, from its path relative to the library, with forward slashes."""
    twentieth = hashlib.sha256(name.encode()).digest()[0] % 20
    return {0: "valid", 1: "test"}.get(twentieth, "train")


def library_files(split: str) -> list[Path]:
    """The standard library's source files in one split; "train+tests" is "train" and the library's
    test suites, where installed. Raises FileNotFoundError if this Python has no sources."""
    root, files = Path(sysconfig.get_path("stdlib")), []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIPPED & set(parts) or parts[-1].startswith("_sysconfigdata"):
            continue  # the latter is written by the build of each machine
        own_split = "tests" if TESTS & set(parts[:-1]) else split_of("/".join(parts))
        if own_split in split.split("+"):
            files.append(path)
    if not files:
        raise FileNotFoundError(f"no Python sources in {root}: give --data a file of your own")
    return files


def library_tokens(tokenizer: Tokenizer, split: str) -> Path:
    """The token file of a split of the library, made at the first call, kept in data/tokens."""
    out = CACHE / f"stdlib-{platform.python_version()}-{tokenizer.key}" / f"{split}.bin"
    if not out.exists():
        write_texts(library_files(split), tokenizer, out)
    return out


# --------------------------------------------------------------------------------------------------
# Passkey documents: a number hidden in filler, asked for at the end (Section 4.2)

FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again. ")
PASSKEY_TOKENS = 128  # the shortest passkey document in training


def passkey_prompt(tokenizer: Tokenizer, key: int, before: str,
                   behind: str) -> tuple[list[int], int]:
    """The ids of a prompt with its answer, BOS first, and how many at the end are the answer."""
    prompt = ("A pass key is hidden in the text below. Find it and remember it.\n"
              f"{before}\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
              f"{behind}\nWhat is the pass key? The pass key is")
    ids = [tokenizer.bos_id, *tokenizer.encode(f"{prompt} {key}")]
    return ids, len(ids) - 1 - len(tokenizer.encode(prompt))


def passkey_document(tokenizer: Tokenizer, length: int, rng: np.random.Generator, held_out: bool,
                     depths: tuple[float, float] = (0.0, 1.0)) -> tuple[list[int], int]:
    """A passkey prompt of at most `length` tokens, as `passkey_prompt` gives it. The key (1 to
    50,000) and its depth (characters of filler before it, as a share within `depths`) are drawn
    from `rng`: numbers that end in 3 if `held_out`, others in training. Raises ValueError if the
    prompt does not fit."""
    key = int(rng.integers(1, 50_001))
    while (key % 10 == 3) != held_out:
        key = int(rng.integers(1, 50_001))
    depth, characters = rng.uniform(*depths), 4 * length
    while True:  # with less filler, until the document fits
        filler = FILLER * (characters // len(FILLER) + 1)
        before = int(depth * (characters - 9))
        while (before % 10 == 3) != held_out:
            before += 1
        ids, n = passkey_prompt(tokenizer, key, filler[:before], filler[before:characters])
        if len(ids) <= length:
            return ids, n
        if characters == 10:
            raise ValueError(f"a passkey prompt does not fit into {length} tokens; ask for more")
        characters = max(10, characters - max(1, 2 * (len(ids) - length)))


def passkey_documents(tokenizer: Tokenizer, room: int, rng: np.random.Generator) -> list[int]:
    """Training's passkey documents, joined, as many as fit into `room` tokens. Their lengths are
    drawn evenly on a log scale: the short ones are learned first, and teach the long."""
    ids = []
    while (left := room - len(ids)) >= PASSKEY_TOKENS:
        length = round(math.exp(rng.uniform(math.log(PASSKEY_TOKENS), math.log(left))))
        document, _ = passkey_document(tokenizer, length, rng, held_out=False)
        ids += [*document, tokenizer.eos_id]
    return ids


# --------------------------------------------------------------------------------------------------
# Instructions and their answers, for supervised fine-tuning (the paper's LongAlpaca)
#     a record    {"instruction": "...", "output": "..."} and perhaps "input", in a list or in lines
#     a sample    <s> [INST]{instruction}[/INST] {output} </s>
#     labels      -100 for the prompt ........... and each token of the answer

QUESTIONS = "stdlib-questions"  # as `data`: the instructions made from the standard library


def prompt_text(instruction: str, question: str = "") -> str:
    """The prompt in front of an answer. `question` is a record's "input", or one about a text."""
    text = f"{instruction}\n{question}" if question else instruction
    return f"[INST]{text}[/INST]"


def is_instructions(data: str | Path) -> bool:
    """Whether `data` is instructions: a token file with an index, a .jsonl whose first record has
    an "instruction", a .json (which can be nothing else), or QUESTIONS."""
    path = Path(data)
    if path.suffix == ".bin":
        return index_of(path).is_file()
    if path.suffix == ".jsonl" and path.is_file():
        with contextlib.suppress(ValueError, StopIteration):  # reported when the file is read
            _, record, _ = next(json_records(path, errors="replace"))
            return isinstance(record, dict) and "instruction" in record
    return str(data) == QUESTIONS or (path.suffix == ".json" and path.is_file())


def encode_instructions(path: Path, tokenizer: Tokenizer) -> Iterator[Piece]:
    """The samples in a file of instructions. Raises ValueError, naming the record."""
    for place, record, size in json_records(path):
        fields = record if isinstance(record, dict) else {}
        texts = fields.get("instruction"), fields.get("input") or "", fields.get("output")
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f'{path}, {place}: expected texts as "instruction", "output" and, '
                             f'where there is one, "input", got {repr(record)[:100]}')
        instruction, question, answer = texts
        prompt = prompt_text(instruction, question)
        # Encoded together: a piece on the border, such as "](", is the prompt's; EOS never is.
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt + answer), tokenizer.eos_id]
        yield ids, min(1 + len(tokenizer.encode(prompt)), len(ids) - 1), size


def write_samples(files: list[Path], tokenizer: Tokenizer, out: Path) -> int:
    """Encode instructions into the token file `out` and its index; returns their number."""
    _, index = write_tokens(files, tokenizer, out, encode_instructions)
    with new_file(index_of(out)) as file:  # last: a token file without it is made again
        np.array(index, np.int64).tofile(file)
    return len(index)


class Samples:
    """Instructions as token ids, none longer than `context`: an over-long one keeps its answer and
    loses the middle of its prompt; one whose answer alone does not fit is left out. `samples[i]` is
    ids and labels, both (T,), the prompt's labels -100. `places` (N, 3): where each begins in
    `tokens`, the length of its prompt, and its own. `lengths` (N,) has every T; `cut` and
    `left_out` are the numbers of shortened and of missing samples."""

    def __init__(self, tokens: np.ndarray, places: np.ndarray, context: int):
        _, prompts, lengths = places.T
        fits = lengths - prompts < context  # with one token of the prompt at least
        self.tokens, self.context, self.places = tokens, context, places[fits]
        self.lengths = np.minimum(lengths[fits], context)
        self.left_out = int((~fits).sum())
        self.cut = int((fits & (lengths > context)).sum())

    def __len__(self) -> int:
        return len(self.places)

    def some(self, tokens: int) -> "Samples":
        """A random choice of samples, always the same, of at most `tokens` tokens together."""
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


def describe_lost(parts: list[Samples]) -> str:
    """A line on the samples that do not fit into the context."""
    longest = max((int(part.places[:, 2].max()) for part in parts if len(part)), default=0)
    cut, left_out = sum(part.cut for part in parts), sum(part.left_out for part in parts)
    return (f"the longest has {longest:,}; prompts shortened in the middle: {cut:,}; left out "
            f"because the answer alone does not fit: {left_out:,}")


def read_index(path: Path, tokens: np.ndarray) -> np.ndarray:
    """The `places` (N, 3) of a token file's samples. Raises ValueError for a broken index."""
    index = np.fromfile(index_of(path), np.int64)
    ends, prompts = index[0::2], index[1::2]
    starts = np.append(0, ends)[:-1]
    if not len(ends) or len(ends) != len(prompts) or ends[-1] != len(tokens) or not (
            (starts < ends) & (0 < prompts) & (prompts < ends - starts)).all():
        raise ValueError(f"{index_of(path)} does not describe the samples in {path}: remake both")
    return np.stack([starts, prompts, ends - starts], axis=1)


def open_samples(data: str, model_path: str | Path, vocab_size: int, context: int,
                 split: str | None = None) -> Samples:
    """The instructions in `data`: JSON, which is encoded once, a token file with its index, or
    "stdlib-questions". These are split by file (`split` None: "test"); of every twenty others the
    last two are "valid" and "test", and None is all. Raises FileNotFoundError, ValueError."""
    path, dtype = Path(data), token_dtype(vocab_size)
    if not is_instructions(data):
        problem = "no instructions" if path.exists() else "no such file"
        raise ValueError(f'{data}: {problem}; expected .json or .jsonl with "instruction" and '
                         f'"output", a .bin that data/prepare.py made of it, or {QUESTIONS}')
    if path.suffix != ".bin":
        tokenizer = load_tokenizer(model_path, vocab_size)
        dtype = token_dtype(tokenizer.vocab_size)
        if data == QUESTIONS:
            path = library_questions(tokenizer, split or "test")
        path = cached(f"{path.stem}-samples", [path], tokenizer, write_samples)
    tokens = map_tokens(path, dtype, vocab_size)
    places = read_index(path, tokens)
    if split and data != QUESTIONS:
        twentieths = {"train": list(range(18)), "valid": [18], "test": [19]}[split]
        places = places[np.isin(np.arange(len(places)) % 20, twentieths)]
    return Samples(tokens, places, context)


def open_splits(data: str, model_path: str | Path, vocab_size: int, context: int) -> list[Samples]:
    """The samples to train on, and those held out for validation and for test."""
    return [open_samples(data, model_path, vocab_size, context, split)
            for split in ("train", "valid", "test")]


# --------------------------------------------------------------------------------------------------
# Questions about the standard library's files, from their syntax trees

COUNTS = {"train": 1800, "valid": 200, "test": 250}
SHORTEST, LONGEST, OVERHEAD = 128, 1024, 64  # tokens; the last for question, answer and marks
GUESSABLE = {"None", "True", "False", "0", "1", "''"}  # the most common defaults


def facts(source: str) -> Iterator[tuple[str, str, int, int, list[int]]]:
    """What can be asked about a source: question, answer, the first and the last line (from 1) that
    tell it, and the lines that define the same name again. Raises SyntaxError, ValueError."""
    functions, owners, lines = {}, {}, source.split("\n")  # splitlines() splits at form feeds
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            owners |= dict.fromkeys(node.body, node)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            functions.setdefault(node.name, []).append(node)
    for name, node in ((name, node) for name, nodes in functions.items() for node in nodes):
        others = [other.lineno for other in functions[name] if other is not node]
        if owner := owners.get(node):
            yield (f"Which class defines {name}?", f"class {owner.name}", owner.lineno,
                   node.lineno, others)
        positional = node.args.posonlyargs + node.args.args
        for argument, default in [*zip(positional[::-1], node.args.defaults[::-1]),
                                  *zip(node.args.kwonlyargs, node.args.kw_defaults)]:
            if not default or default.lineno < default.end_lineno:
                continue
            line = lines[default.lineno - 1].encode()  # columns are bytes
            text = line[default.col_offset:default.end_col_offset].decode()
            if len(text) <= 20 and text not in GUESSABLE:
                yield (f"What is the default of {argument.arg} in {name}?",
                       f"{argument.arg}={text}", node.lineno, default.end_lineno, others)


def library_questions(tokenizer: Tokenizer, split: str) -> Path:
    """The instructions about a split of the library, as JSON, made once, kept in data/tokens."""
    settings = repr((COUNTS, SHORTEST, LONGEST, OVERHEAD, sorted(GUESSABLE)))
    name = f"questions-{short_hash(settings.encode())}-{split}.json"
    out = CACHE / f"stdlib-{platform.python_version()}-{tokenizer.key}" / name
    if out.exists():
        return out
    found, rng = [], np.random.default_rng(0)
    for path in tqdm(library_files(split), desc=out.name, unit="file"):
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
        ends = np.cumsum([0, *(len(tokenizer.encode(line)) for line in lines)])
        with contextlib.suppress(SyntaxError, ValueError):  # some files are broken on purpose
            found += [(lines, ends, fact) for fact in facts("".join(lines))]
    records = []
    for i in np.concatenate([rng.permutation(len(found)) for _ in range(3)]):  # three excerpts each
        if len(records) == COUNTS[split]:
            break
        lines, ends, (question, answer, first, last, others) = found[i]
        room = round(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST)))) - OVERHEAD
        earliest = np.searchsorted(ends, ends[last] - room)
        if earliest >= first:
            continue  # class and method are too far apart
        start = int(rng.integers(earliest, first))
        stop = int(np.searchsorted(ends, ends[start] + room, "right")) - 1
        if stop == len(lines):
            start = int(np.searchsorted(ends, ends[-1] - room))
        excerpt = "".join(lines[start:stop])
        guessable = answer.startswith("class ") and len(re.findall(r"^ *class ", excerpt, re.M)) < 2
        if not guessable and not any(start < line <= stop for line in others):
            records.append({"instruction": f"{excerpt}\n{question}", "output": answer})
    with new_file(out) as file:
        file.write((json.dumps(records, indent=2) + "\n").encode())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("texts", nargs="*", type=Path, help=".txt, .jsonl or folders of them (default: the "
        "standard library); or instructions, .json or .jsonl")
    add("--tokenizer", type=Path, default=HERE / "tiny-llama",
        help="tokenizer.model, tokenizer.json or a model folder (data/tiny-llama)")
    add("--out", type=Path, help="token file to write, with texts")
    add("--questions", action="store_true", help="make instructions about the library's files")
    add("--tests", action="store_true", help="add the library's test suites to the training split")
    args = parser.parse_args()
    if args.texts and (args.questions or args.tests or not args.out or args.out.suffix != ".bin"):
        parser.error("texts take --out FILE.bin, and neither --questions nor --tests")
    tokenizer = load_tokenizer(args.tokenizer)
    if args.texts:
        if all(path.suffix != ".bin" and is_instructions(path) for path in args.texts):
            count = write_samples(args.texts, tokenizer, args.out)
            print(f"{args.out}: {count:,} instructions; their index: {index_of(args.out)}")
        else:
            count = write_texts(text_files(args.texts), tokenizer, args.out)
            print(f"{args.out}: {count:,} tokens")
    elif args.questions:
        for split in ("train", "valid", "test"):
            print(library_questions(tokenizer, split))
    else:
        for split in ("train+tests" if args.tests else "train", "valid", "test"):
            path, dtype = library_tokens(tokenizer, split), token_dtype(tokenizer.vocab_size)
            print(f"{path}: {path.stat().st_size // dtype.itemsize:,} tokens")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"prepare.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")
