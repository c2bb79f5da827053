"""Text in, token files out.

A token file is raw token ids and nothing else, end to end: uint16, or uint32 where the vocabulary
needs it. Documents are joined by `</s>`, as in the paper (Section 4.1), so that a window of any
length may be cut from anywhere.

    python data/prepare.py                # the standard library -> train.bin, valid.bin, test.bin
    python data/prepare.py --tests        # the same, with the test suites in train+tests.bin
    python data/prepare.py book.txt folder/ --tokenizer llama/tokenizer.model --out corpus.bin
    python data/prepare.py LongAlpaca-12k.json --tokenizer ... --out alpaca.bin  # instructions
    python data/prepare.py --questions    # instructions about the standard library's files
    python data/prepare.py --new-tokenizer 2048 --tokenizer data/tiny-llama/tokenizer.model

The corpus that every machine has is the Python standard library, read in place from the running
interpreter. A hash of its relative path puts each file into training (90%), validation (5%:
settings are chosen on it) or test (5%: results are reported on it), so the split is the same on
every machine and every Python version.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import platform
import random
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

import numpy as np
import sentencepiece
from tqdm import tqdm

HERE = Path(__file__).parent
CACHE = HERE / "tokens"
TESTS = {"test", "tests", "idle_test"}
SKIPPED = {"site-packages", "dist-packages", "__pycache__"}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What the scripts run in: bad input ends in one line and exit status 2, not in a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of a machine's processes one says it
            print(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}",
                  file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted")


# --------------------------------------------------------------------------------------------------
# Documents


def split_of(name: str) -> str:
    """The split of a library file, from its path relative to the library, with forward slashes."""
    twentieth = hashlib.sha256(name.encode()).digest()[0] % 20
    return {0: "valid", 1: "test"}.get(twentieth, "train")


def library_files(split: str, tests: bool = False) -> list[Path]:
    """The standard library's own sources in one split; `tests` adds its test suites (to "train"
    alone), where installed.

    Raises FileNotFoundError where this Python came without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        # _sysconfigdata*.py is written by the build of each machine, and is no source.
        if SKIPPED & set(parts) or parts[-1].startswith("_sysconfigdata"):
            continue
        if TESTS & set(parts[:-1]):
            if tests and split == "train":
                files.append(path)
        elif split_of("/".join(parts)) == split:
            files.append(path)
    if not files:
        raise FileNotFoundError(f"no Python sources in {root}: "
                                "give --data a text or token file of your own")
    return files


def text_files(paths: Iterable[str | Path]) -> list[Path]:
    """The .txt and .jsonl files named, and those in the folders named. Raises FileNotFoundError,
    ValueError."""
    files = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.rglob("*")
                           if p.suffix in (".txt", ".jsonl") and p.is_file())
            if not found:
                raise ValueError(f"{path}: no .txt or .jsonl file in this folder (instructions "
                                 "are given as one file)")
            files += found
        elif not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        elif path.suffix in (".txt", ".jsonl"):
            files.append(path)
        else:
            raise ValueError(f"{path}: not a text; expected .txt, .jsonl, a folder of them, "
                             "a .bin token file, or, where these are asked for, instructions")
    return files


def documents(path: Path) -> Iterator[tuple[str | None, int]]:
    """The documents of a file in pieces, each with the characters read for it; None ends one.

    Each record of a .jsonl is a document ("text"), every other file is one; that comes in pieces of
    whole lines, about a megabyte each: a line must fit into memory.
    """
    if path.suffix != ".jsonl":
        with open(path, encoding="utf-8", errors="replace") as file:
            while lines := file.readlines(1 << 20):
                piece = "".join(lines)
                yield piece, len(piece)
        yield None, 0
        return
    for place, record, read in records(path, errors="replace"):
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f'{path}, {place}: expected an object with a "text" string '
                             "(instructions are given as one file of nothing else)")
        yield text.encode("utf-8", "replace").decode(), read  # JSON may hold half a pair
        yield None, 0


PIECE = 1 << 20  # characters of a JSON list that are read at a time


def records(path: Path, errors: str = "strict") -> Iterator[tuple[str, object, int]]:
    """The values of a JSON list, or of JSON lines: the place of each ("record 3", "line 3"), the
    value, and the characters read for it. One at a time: the whole need not fit into memory. Raises
    ValueError for what is not JSON, naming the place, and (or what `errors` says) not UTF-8."""
    with open(path, encoding="utf-8-sig", errors=errors) as file:
        start = file.read(1024).lstrip()[:1]  # not a line: a whole list may stand in one
        file.seek(0)
        if start == "[":
            yield from list_items(path, file)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                with json_at(path, f"line {number}"):
                    value = json.loads(line)
                yield f"line {number}", value, len(line)


@contextlib.contextmanager
def json_at(path: Path, place: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, {place}: not JSON ({error})") from None


def list_items(path: Path, file: TextIO) -> Iterator[tuple[str, object, int]]:
    decode, space = json.JSONDecoder().raw_decode, re.compile(r"[ \t\r\n]*")
    text, at, number = "", 0, 0

    def peek() -> str:
        """The next character that is no white space; "" where the file ends."""
        nonlocal text, at
        while (at := space.match(text, at).end()) == len(text) and (piece := file.read(PIECE)):
            text, at = piece, 0
        return text[at:at + 1]

    peek()
    at += 1  # behind "["
    found = "]" if peek() == "]" else ","
    at += found == "]"
    while found != "]":
        number += 1
        peek()
        with json_at(path, f"record {number}"):
            while True:
                try:
                    value, end = decode(text, at)
                    break
                except json.JSONDecodeError as error:
                    # Perhaps only the piece ends here: then what is wrong is at its end.
                    cut = "Unterminated" in error.msg or error.pos > len(text) - 16
                    piece = file.read(max(PIECE, len(text) - at)) if cut else ""
                    if not piece:  # without a position, which would be one in a piece
                        raise ValueError(error.msg) from None
                    text, at = text[at:] + piece, 0
        yield f"record {number}", value, end - at
        at = end
        found = peek()
        at += 1
        if found not in ("]", ","):
            raise ValueError(f"{path}, record {number}: expected , or ] behind it, got "
                             f"{repr(found) if found else 'the end of the file'}")
    if peek():
        raise ValueError(f"{path}: not JSON (there is more behind the list)")


# --------------------------------------------------------------------------------------------------
# Tokens


class Tokenizer:
    """A SentencePiece model and the tokens that its folder adds to it, {text: id}. What stands
    between added tokens is encoded as a text of its own."""

    def __init__(self, proto: bytes, added: dict[str, int]):
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=proto)
        self.added, self.texts = added, {id: text for text, id in added.items()}
        self.bos_id, self.eos_id = self.pieces.bos_id, self.pieces.eos_id
        self.key = short_hash(proto + repr(sorted(added.items())).encode() * bool(added))
        longest_first = sorted(added, key=len, reverse=True)
        self.split = re.compile(f"({'|'.join(map(re.escape, longest_first))})").split

    def vocab_size(self) -> int:
        return max(self.pieces.vocab_size(), *(id + 1 for id in self.texts), 0)

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()  # a str may hold half a pair
        if not self.added:
            return self.pieces.encode(text)
        parts = enumerate(self.split(text))  # every second one is an added token
        ids = [[self.added[part]] if i % 2 else self.pieces.encode(part) for i, part in parts]
        return sum(ids, [])

    def decode(self, ids: list[int]) -> str:
        text, run = "", []
        for id in [*map(int, ids), None]:
            if id is not None and id not in self.texts:
                run.append(id)
                continue
            text += self.pieces.decode(run) + self.texts.get(id, "")
            run = []
        return text


def load_tokenizer(path: str | Path, vocab_size: int | None = None) -> Tokenizer:
    """A SentencePiece model, with the added tokens beside it; `path` is the file, or a model folder
    with a `tokenizer.model`.

    Raises FileNotFoundError, and ValueError if it has more pieces than `vocab_size`, the model's.
    (Added tokens may be beyond the model, as long as no text has them.)
    """
    path = Path(path)
    if path.is_dir():
        path = path / "tokenizer.model"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; without a SentencePiece tokenizer texts "
                                "cannot be read or written; train.py and eval.py perplexity can "
                                "take a token file, --data FILE.bin")
    added, beside = {}, path.parent / "added_tokens.json"
    if beside.is_file():
        try:
            added = json.loads(beside.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{beside}: not JSON ({error})") from None
        if not isinstance(added, dict) or not all(
                text and type(id) is int and 0 <= id < 1 << 31 for text, id in added.items()):
            raise ValueError(f"{beside}: expected an object of texts and their token ids")
    try:
        tokenizer = Tokenizer(path.read_bytes(), added)
    except RuntimeError:
        raise ValueError(f"{path}: not a SentencePiece model, without which texts cannot be read "
                         "or written; train.py and eval.py perplexity can take a token file, "
                         "--data FILE.bin") from None
    if min(tokenizer.bos_id(), tokenizer.eos_id()) < 0:
        raise ValueError(f"{path}: a Llama's tokenizer has <s> and </s>, this one does not")
    if vocab_size and (pieces := tokenizer.pieces.vocab_size()) > vocab_size:
        raise ValueError(f"{path}: the tokenizer has {pieces} pieces, the model only {vocab_size}")
    return tokenizer


def token_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_tokens(pieces: Iterable[tuple[list[int], int]], files: list[Path], tokenizer: Tokenizer,
                 out: Path) -> int:
    """Write the token file `out` from `pieces`, ids and the characters that were read of `files`
    for them; returns the number of tokens. Complete or absent."""
    dtype, count = token_dtype(tokenizer.vocab_size()), 0
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    size = sum(path.stat().st_size for path in files)
    try:
        with (open(partial, "wb") as sink,
              tqdm(total=size, unit="B", unit_scale=True, desc=out.name, leave=False) as bar):
            for ids, read in pieces:
                np.asarray(ids, dtype).tofile(sink)
                count += len(ids)
                bar.update(read)
        if not count:
            raise ValueError(f"{', '.join(map(str, files[:3]))}: no text in it")
        index_of(out).unlink(missing_ok=True)  # of what was there
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return count


def index_of(path: Path) -> Path:
    """Where the samples in a token file of instructions are: see data/instruct.py."""
    return path.with_suffix(".samples")


def write_texts(files: list[Path], tokenizer: Tokenizer, out: Path) -> int:
    """Encode texts into the token file `out`, `</s>` behind each document; returns the number of
    tokens."""
    pieces = (([tokenizer.eos_id()] if text is None else tokenizer.encode(text), read)
              for path in files for text, read in documents(path))
    return write_tokens(pieces, files, tokenizer, out)


def library_tokens(tokenizer_path: str | Path, split: str, tests: bool = False) -> Path:
    """The token file of one split of the standard library, made at the first call and kept in
    data/tokens."""
    tokenizer = load_tokenizer(tokenizer_path)
    key = f"stdlib-{platform.python_version()}-{tokenizer.key}"
    out = CACHE / key / f"{split}{'+tests' if tests else ''}.bin"
    if not out.exists():
        write_texts(library_files(split, tests), tokenizer, out)
    return out


def text_tokens(path: str | Path, tokenizer_path: str | Path) -> Path:
    """The token file of a text or a folder of texts, made anew when they change and kept in
    data/tokens."""
    files, tokenizer = text_files([path]), load_tokenizer(tokenizer_path)
    out = cached(Path(path).stem, files, tokenizer)
    if not out.exists():
        write_texts(files, tokenizer, out)
    return out


def cached(name: str, files: list[Path], tokenizer: Tokenizer) -> Path:
    """Where the tokens of `files`, as they are now, are kept under a name."""
    state = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return CACHE / f"{name}-{short_hash(repr(state).encode())}-{tokenizer.key}.bin"


def open_tokens(data: str, model_path: str, vocab_size: int,
                split: str | None = None) -> np.ndarray:
    """The token ids (N,) of `data`, mapped: "stdlib", "stdlib+tests", a .bin token file, or texts.

    `split` is "train", "valid" or "test". The library is split by file (None: "test"); of other
    data "valid" and "test" are the last two twentieths, a million tokens each at most, and None is
    all. Texts are encoded with the model's tokenizer, once, into data/tokens. Raises
    FileNotFoundError, and ValueError for an empty file or ids beyond the vocabulary.
    """
    library = data in ("stdlib", "stdlib+tests")
    pieces = vocab_size
    if Path(data).suffix != ".bin":  # as wide as the tokenizer wrote them
        pieces = load_tokenizer(model_path, vocab_size).vocab_size()
    if library:
        tests = data.endswith("tests") and split == "train"
        path = library_tokens(model_path, split or "test", tests)
    elif Path(data).suffix == ".bin":
        path = Path(data)
    else:
        path = text_tokens(data, model_path)
    tokens = map_tokens(path, pieces, vocab_size)
    if split and not library:
        held_out = min(len(tokens) // 20, 1_000_000)
        first, second = len(tokens) - 2 * held_out, len(tokens) - held_out
        part = {"train": slice(first), "valid": slice(first, second), "test": slice(second, None)}
        tokens = tokens[part[split]]
    return tokens


def map_tokens(path: Path, pieces: int, vocab_size: int) -> np.ndarray:
    """The ids in a token file, mapped, that a tokenizer of so many `pieces` wrote. Raises as
    `open_tokens`."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such token file")
    dtype, size = np.dtype(token_dtype(pieces)), path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise ValueError(f"{path}: not a token file of {dtype.name} ids: it has {size} bytes")
    tokens = np.memmap(path, dtype, mode="r")
    for start in range(0, len(tokens), 1 << 24):
        if (highest := int(tokens[start:start + (1 << 24)].max())) >= vocab_size:
            raise ValueError(f"{path}: token id {highest} is beyond the vocabulary of {vocab_size}")
    return tokens


def short_hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:8]


# --------------------------------------------------------------------------------------------------
# Passkey documents: a number hidden in filler, asked for at the end

FILLER = ("The grass is green. The sky is blue. The sun is yellow. Here we go. "
          "There and back again. ")


def passkey_prompt(tokenizer, key: int, first: str, second: str) -> tuple[list[int], int]:
    """The ids of a prompt with its answer, BOS first, and how many at the end are the answer: five
    lines, a number between two stretches of filler (Section 4.2)."""
    question = "\n".join([
        "A pass key is hidden in the text below. Find it and remember it.",
        first,
        f"The pass key is {key}. Remember it. {key} is the pass key.",
        second,
        "What is the pass key? The pass key is",
    ])
    ids = [tokenizer.bos_id(), *tokenizer.encode(f"{question} {key}")]
    return ids, len(ids) - 1 - len(tokenizer.encode(question))


def passkey_document(tokenizer, length: int, rng: np.random.Generator, held_out: bool,
                     depths: tuple[float, float] = (0.0, 1.0)) -> tuple[list[int], int]:
    """A passkey prompt with its answer: at most `length` token ids, BOS first, and how many at the
    end are the answer.

    The key (1 to 50,000) and its depth (characters of filler before it, as a share within `depths`)
    are drawn from `rng`. Those whose last digit is 3 are held out: training draws only others
    (`held_out=False`), evaluation only those. Raises ValueError if `length` is too short for the
    prompt.
    """
    key = int(rng.integers(1, 50_001))
    while (key % 10 == 3) != held_out:
        key = int(rng.integers(1, 50_001))
    low, high = depths
    depth = low + (high - low) * rng.random()
    characters = 4 * length
    while True:
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


def official_passkey(tokenizer, length: int, seed: int) -> tuple[list[int], int, float]:
    """The official evaluation's prompt for a nominal `length` and a seed, as `passkey_document`
    gives it, and the key's depth, 0 to 1. Its filler has 3.75 characters a token, rounded down to
    a multiple of 1,024; its keys are not held out from anybody's training."""
    characters, draw = int(3.75 * length // 1024 * 1024), random.Random(seed)
    filler = FILLER * (characters // len(FILLER) + 1)
    before, key = draw.randint(0, characters), draw.randint(1, 50_000)
    ids, n = passkey_prompt(tokenizer, key, filler[:before], filler[:characters - before])
    return ids, n, before / max(1, characters)


PASSKEY_TOKENS = 128  # the shortest document that training makes


def passkey_documents(tokenizer, room: int, rng: np.random.Generator) -> list[int]:
    """Training's passkey documents end to end, as long as one finds `room` (tokens).

    Their lengths are drawn evenly on a log scale: the short ones are learned first, and teach the
    long. Raises ValueError as `passkey_document`.
    """
    ids = []
    while (left := room - len(ids)) >= PASSKEY_TOKENS:
        length = round(math.exp(rng.uniform(math.log(PASSKEY_TOKENS), math.log(left))))
        document, _ = passkey_document(tokenizer, length, rng, held_out=False)
        ids += [*document, tokenizer.eos_id()]
    return ids


# --------------------------------------------------------------------------------------------------
# Records of conversations, whose first topic is asked for (LongChat's topic retrieval)

ASPECTS = ("history", "future", "science", "beauty", "economics", "dangers", "craft", "language")
SUBJECTS = ("bridges", "bread", "chess", "deserts", "elections", "gardens", "glaciers", "harbours",
            "libraries", "maps", "railways", "sleep")
REMARKS = ("What should one know first?", "Who has shaped it most?", "What do people get wrong?",
           "Where would you begin?", "What has changed lately?")


def topic_case(conversations: int, rng: np.random.Generator) -> dict:
    """A record with the fields of LongChat's test cases: `prompt`, `topics`. Raises ValueError for
    more conversations than there are topics."""
    every = [f"the {aspect} of {subject}" for aspect in ASPECTS for subject in SUBJECTS]
    if conversations > len(every):
        raise ValueError(f"{conversations} conversations: there are only {len(every)} topics")
    topics = [every[i] for i in rng.permutation(len(every))[:conversations]]
    lines = [f"Below is a record of conversations on {conversations} topics between a USER and an "
             "ASSISTANT. Each opens with 'I would like to discuss the topic of <TOPIC>'. "
             "At the end you are asked for the first topic."]
    for topic in topics:
        lines.append(f"USER: I would like to discuss the topic of {topic}.")
        lines.append(f"ASSISTANT: With pleasure, there is much to say about {topic}.")
        for i in rng.permutation(len(REMARKS))[:3]:
            lines.append(f"USER: {REMARKS[i]}")
            lines.append("ASSISTANT: Opinions differ, and the best books start with an example.")
    lines.append("USER: This is the end of the record. What was the first topic? Give only its "
                 "name.\nASSISTANT:")
    return {"prompt": "\n".join(lines), "topics": topics}


# --------------------------------------------------------------------------------------------------
# Command line


def new_tokenizer(vocab_size: int, out: Path) -> None:
    """Train a SentencePiece tokenizer like Llama's (BPE, byte fallback, single digits) on the
    library's training files."""

    def lines() -> Iterator[str]:
        for path in library_files("train"):
            yield from path.read_text(encoding="utf-8", errors="replace").splitlines()
        document = ("A pass key is hidden in the text below. Find it and remember it. "
                    "What is the pass key? " + FILLER)
        yield from [document] * 500

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    try:
        with open(partial, "wb") as sink:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines(), model_writer=sink, vocab_size=vocab_size,
                model_type="bpe", byte_fallback=True, split_digits=True,
                allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
                normalization_rule_name="identity", character_coverage=0.9995,
                max_sentence_length=1 << 16, num_threads=1, minloglevel=1)
        os.replace(partial, out)
    except RuntimeError as error:
        raise ValueError(f"no tokenizer of {vocab_size} pieces can be trained: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help=".txt, .jsonl or folders of them (default: the "
                        "standard library); or instructions, .json or .jsonl")
    parser.add_argument("--tokenizer", help="SentencePiece model (data/tiny-llama's)")
    parser.add_argument("--out", type=Path, help="token file to write, with texts")
    parser.add_argument("--questions", action="store_true",
                        help="make instructions about the standard library's files, .json")
    parser.add_argument("--tests", action="store_true",
                        help="add the library's test suites to the training split")
    parser.add_argument("--new-tokenizer", type=int, metavar="PIECES",
                        help="train the file --tokenizer names, and stop")
    args = parser.parse_args()
    if args.new_tokenizer is not None:
        if not args.tokenizer or args.texts:
            parser.error("--new-tokenizer takes --tokenizer FILE to write, and no texts")
        new_tokenizer(args.new_tokenizer, Path(args.tokenizer))
        return
    args.tokenizer = args.tokenizer or HERE / "tiny-llama" / "tokenizer.model"
    from data import instruct
    if args.texts:
        if args.questions or args.tests:
            parser.error("--questions and --tests are of the standard library: name no texts")
        if not args.out or args.out.suffix != ".bin":
            parser.error("with texts, say where to write: --out FILE.bin")
        tokenizer, files = load_tokenizer(args.tokenizer), list(map(Path, args.texts))
        kinds = {path.suffix != ".bin" and instruct.is_instructions(path) for path in files}
        if len(kinds) > 1:
            raise ValueError("instructions and texts do not go into one token file")
        if True in kinds:
            count = instruct.write_samples(files, tokenizer, args.out)
            print(f"{args.out}: {count:,} instructions; their places: "
                  f"{index_of(args.out)}")
        else:
            count = write_texts(text_files(files), tokenizer, args.out)
            print(f"{args.out}: {count:,} tokens")
    elif args.questions:
        for split in ("train", "valid", "test"):
            print(instruct.library_questions(args.tokenizer, split))
    else:
        width = np.dtype(token_dtype(load_tokenizer(args.tokenizer).vocab_size())).itemsize
        for split in ("train", "valid", "test"):
            path = library_tokens(args.tokenizer, split, args.tests and split == "train")
            print(f"{path}: {path.stat().st_size // width:,} tokens")


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)  # so that `data` is the same package as everywhere
    from data import prepare
    with prepare.one_line_errors():
        prepare.main()
