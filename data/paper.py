"""The paper's tables and figures at small scale: `python eval.py paper`.

Every variant is trained from data/tiny-llama (a 256-token window) by train.py and measured by
eval.py on the test half of the standard library, by commands that are printed and that anyone can
give. The settings were chosen on the validation half, with other seeds (data/README.md).
"""
import fcntl
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

import longlora
from data import plots

ROOT = Path(__file__).parent.parent
CONTEXTS = [256, 512, 1024, 2048]
GROUP, LONGEST = 1024, 2048
TOKENS = 32768  # of the test half, in every measurement

# What each variant changes. A step reads 4,096 tokens, whatever the context.
DEFAULTS = {"context": 2048, "attention": "shifted", "group-size": GROUP,
            "trainable": "lora,embed,norm", "rank": 64, "lr": 2e-3, "steps": 150, "batch-size": 2,
            "passkey": 0.1, "seed": 1}
FULL = {"trainable": "full", "lr": 1e-3}  # the paper's Table 1 is of full fine-tuning, too
TABLE_1 = {"full attention": FULL | {"attention": "full"},
           "local groups": FULL | {"attention": "local"}, "S2-Attn": FULL}
LORA_PLUS = "LoRA + both (LoRA+)"
TABLE_2 = {**{f"LoRA, rank {r}": {"trainable": "lora", "rank": r} for r in (8, 64)},
           "LoRA + norms": {"trainable": "lora,norm"},
           "LoRA + embedding": {"trainable": "lora,embed"},
           LORA_PLUS: {}, "full fine-tuning": FULL}
TABLE_3 = {f"trained on {T:,}": {"context": T, "group-size": T // 2, "batch-size": 4096 // T}
           for T in CONTEXTS[1:]}
PASSKEY = {"context": 4096, "group-size": 2048, "batch-size": 1, "steps": 720, "passkey": 0.8,
           "lr": 3e-3}
STRETCHED = 8192  # the trained model's positions interpolated once more, by 2
TABLE_5 = {f"G = T/{n}, {name}": FULL | {"attention": attention, "group-size": LONGEST // n}
           for n in (2, 4, 8)
           for attention, name in (("shifted", "shifted"), ("local", "not shifted"))}


LOOK = {
    1: "S2-Attn is near full attention. In the paper local groups are worst by far; at this scale "
       "they are not.",
    2: "LoRA alone is worst; norms, the embedding, and both help in this order. In the paper full "
       "fine-tuning is best; here so few steps are not enough for it.",
    3: "each trained length is read well as far as its groups reach; what extension costs at short "
       "lengths is the first column against the base's.",
    4: "the base retrieves up to twice its window, interpolation alone loses everything, training "
       "brings it back as far as groups reach, interpolating once more stretches that.",
    5: "the smaller the groups, the worse beyond them. In the paper shifting makes up for much of "
       "it; at this scale it does not.",
}


class Lab:
    """Runs of train.py and eval.py below one folder, several at a time; what is finished there is
    not repeated."""

    def __init__(self, out: Path, jobs: int):
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.jobs, self.stopped = out, jobs, False
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.env = os.environ | {"OMP_NUM_THREADS": str(threads)}

    def make(self, result: Path, *words) -> None:
        """Run `python ...`, unless this very command has made `result` before. Raises ValueError
        if it fails."""
        words = [os.path.relpath(ROOT / words[0]), *map(str, words[1:])]
        line = shlex.join(words)
        done, log = result.with_suffix(".done"), result.with_suffix(".log")
        if result.exists() and done.exists() and done.read_text(encoding="utf-8") == line:
            return
        if self.stopped:
            raise ValueError("stopped, because another run failed")
        done.unlink(missing_ok=True)
        log.parent.mkdir(exist_ok=True)
        tqdm.write(f"python {line}")
        with open(log, "w", encoding="utf-8") as sink:
            code = subprocess.run([sys.executable, *words], env=self.env, stdout=sink,
                                  stderr=sink, pass_fds=[self.lock.fileno()]).returncode
        if code:
            said = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise ValueError(f"python {line} ended with status {code}: {said[-1]} (see {log})")
        done.write_text(line, encoding="utf-8")

    def measured(self, result: Path, *words) -> list[dict]:
        """The rows of an evaluation."""
        self.make(result, "eval.py", *words, "--json", result)
        return json.loads(result.read_text(encoding="utf-8"))["rows"]

    def train(self, changes: dict) -> Path:
        """The folder of the run with these changes of DEFAULTS, trained now or before."""
        settings = DEFAULTS | changes
        differ = [f"{k}-{v}" for k, v in settings.items() if v != DEFAULTS[k] and k != "seed"]
        name = "_".join([*differ, f"seed-{settings['seed']}"]).replace(",", "+")
        folder, flags = self.out / name, []
        for key, value in settings.items():
            flags += [f"--{key}", value]
        self.make(folder / "results.json", "train.py", *flags, "--eval-tokens", 0, "--out", folder,
                  "--resume")
        return folder

    def perplexities(self, changes: dict, contexts: list[int]) -> dict[str, float]:
        """Of a run: {"1024": ...} by full attention, and "as trained" in the trained context and
        by the trained attention."""
        settings, folder = DEFAULTS | changes, self.train(changes)
        model = ["--model" if settings["trainable"] == "full" else "--adapter", folder]
        found = self.by_context(folder / "full.json", contexts, *model)
        if settings["attention"] == "full":
            return found | {"as trained": found[str(settings["context"])]}
        trained = self.by_context(folder / "as_trained.json", [settings["context"]], *model,
                                  "--attention", settings["attention"],
                                  "--group-size", settings["group-size"])
        return found | {"as trained": trained[str(settings["context"])]}

    def by_context(self, path: Path, contexts: list[int], *flags) -> dict[str, float]:
        rows = self.measured(path, "perplexity", *flags, "--context",
                             ",".join(map(str, contexts)), "--max-tokens", TOKENS)
        return {str(row["context"]): row["perplexity"] for row in rows}

    def all(self, works: list) -> list:
        """What each of `works`, functions without arguments, gives; `jobs` of them at a time.
        Raises ValueError if another process works in the folder."""
        with (open(self.out / "lock", "w") as self.lock, ThreadPoolExecutor(self.jobs) as pool,
              tqdm(total=len(works), unit="run", desc="paper") as bar):
            try:  # the runs inherit the lock, so it outlives a process that is killed
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"another run works in {self.out}: choose another --out") from None
            futures = [pool.submit(work) for work in works]
            try:
                for future in as_completed(futures):
                    future.result()
                    bar.update()
            except BaseException:
                self.stopped = True
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            return [future.result() for future in futures]


def bases(lab: Lab) -> dict[str, dict[str, float]]:
    """Perplexities of the model that nothing has trained, as it is and interpolated."""
    return {"base": lab.by_context(lab.out / "base.json", CONTEXTS),
            "interpolated": lab.by_context(lab.out / "interpolated.json", CONTEXTS,
                                           "--extend", LONGEST)}


def passkeys(lab: Lab) -> dict[str, list[dict]]:
    """Passkeys retrieved, before and after extension, and stretched beyond what was trained."""
    trained, run = PASSKEY["context"], ["--adapter", lab.train(PASSKEY)]
    maps = {"base": (lab.out, CONTEXTS, []),
            "interpolated": (lab.out, CONTEXTS, ["--extend", trained]),
            "extended": (run[1], [*CONTEXTS, trained], run),
            "stretched": (run[1], [*CONTEXTS, trained, 6144], [*run, "--extend", STRETCHED])}
    return {name: lab.measured(folder / f"passkey-{name}.json", "passkey", *flags, "--length",
                               ",".join(map(str, lengths)), "--depths", 5, "--trials", 10)
            for name, (folder, lengths, flags) in maps.items()}


# --------------------------------------------------------------------------------------------------
# What is printed


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    more = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{more}"


def column(rows: list[dict], table: int, name: str) -> dict[str, list[float]]:
    """{variant: its values, one a seed} of a table's column."""
    values = {}
    for row in rows:
        if row["table"] == table:
            values.setdefault(row["variant"], []).append(row[name])
    return values


def show(title: str, rows: list[list[str]], table: int) -> None:
    """A table whose first row is its head, and what to look for in it."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(cell.rjust(w) if i else cell.ljust(w)
                       for i, (cell, w) in enumerate(zip(row, widths))) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    print("\n".join(["", title, *lines, f"Look for: {LOOK[table]}"]))


def compare(rows: list[dict], table: int, title: str, papers: dict[str, str] = {}) -> None:
    """Perplexities of the variants of a table: by full attention at G and at T tokens, and as
    trained; `papers` are the paper's own figures."""
    paper = ["paper, 7B"] * bool(papers)
    lines = [["", f"{GROUP:,} tokens", f"{LONGEST:,} tokens", "as trained", *paper]]
    values = [column(rows, table, name) for name in (str(GROUP), str(LONGEST), "as trained")]
    for name in values[0]:
        lines.append([name, *(spread(column[name]) for column in values)]
                     + [papers.get(name, "")] * len(paper))
    show(title, lines, table)


def print_tables(rows: list[dict], only: list[int]) -> None:
    if 1 in only:
        compare(rows, 1, "Table 1. Perplexity by attention in training (full fine-tuning)",
                {"full attention": "8.05", "local groups": "9.47", "S2-Attn": "8.08"})
    if 2 in only:
        compare(rows, 2, "Table 2. Perplexity by what trains (S2-Attn; + at rank 64)",
                {"LoRA, rank 8": "11.44", "LoRA + norms": "10.49", "LoRA + embedding": "8.29",
                 LORA_PLUS: "8.12", "full fine-tuning": "8.08"})
    if 3 in only:
        lines = [[row["variant"], *(f"{row[str(T)]:.2f}" for T in CONTEXTS)]
                 for row in rows if row["table"] == 3]
        show("Tables 3 and 4. Perplexity by evaluated length, full attention",
             [["", *(f"{T:,}" for T in CONTEXTS)], *lines], 3)
    if 4 in only:
        cells = {(row["variant"], row["length"]): f"{row['accuracy']:.2f}"
                 for row in rows if row["table"] == 4}
        names, lengths = (dict.fromkeys(part) for part in zip(*cells))
        show("Passkey figure. Share of keys retrieved by tokens in the prompt",
             [["", *(f"{length:,}" for length in lengths)],
              *([name, *(cells.get((name, n), "") for n in lengths)] for name in names)], 4)
    if 5 in only:
        compare(rows, 5, "Tables 6 and 7. Perplexity by group size and shift (full fine-tuning)")


def run(out: Path, only: list[int] | None, seeds: int, jobs: int) -> list[dict]:
    """Train and measure what the tables `only` (None: all five) need, print them, draw the figures.
    Returns the rows of the JSON files. Raises ValueError for a table that there is not."""
    only = sorted(set(only or range(1, 6)))
    if only[-1] > 5:
        raise ValueError(f"--only takes tables 1 to 5, got {only[-1]}")
    lab, began = Lab(out, jobs), time.perf_counter()
    try:
        plots.check(out / "pattern.svg")
        figures = True
    except ValueError as error:
        figures = False
        print(f"tables only: {error}")

    def key(changes: dict) -> str:
        return str(sorted((DEFAULTS | changes).items()))

    tables = {1: TABLE_1, 2: TABLE_2, 3: TABLE_3, 5: TABLE_5}
    wanted = [(table, name, changes | {"seed": seed}) for table in only if table != 4
              for name, changes in tables[table].items()
              for seed in range(1, 1 + (seeds if table < 3 else 1))]
    contexts = {}  # of each run: what several tables show is made once
    for table, _, changes in wanted:
        contexts.setdefault(key(changes), {GROUP, LONGEST}).update(CONTEXTS * (table == 3))
    works = {"passkeys": lambda: passkeys(lab)} if 4 in only else {}  # the longest goes first
    for _, _, changes in wanted:
        works[key(changes)] = lambda changes=changes: lab.perplexities(
            changes, sorted(contexts[key(changes)]))
    if 3 in only:
        works["bases"] = lambda: bases(lab)
    found = dict(zip(works, lab.all(list(works.values()))))

    rows = [{"table": 3, "variant": name} | row for name, row in found.get("bases", {}).items()]
    rows += [{"table": table, "variant": name, "seed": changes["seed"]} | found[key(changes)]
             for table, name, changes in wanted]
    rows += [{"table": 4, "variant": name} | row
             for name, maps in found.get("passkeys", {}).items() for row in maps]
    print_tables(rows, only)
    for table in only:
        longlora.write_json(out / f"table-{table}.json",
                            {"rows": [row for row in rows if row["table"] == table]})
    if figures:
        draw(out, rows, found.get("passkeys"))
    print(f"\n{(time.perf_counter() - began) / 60:.0f} minutes; tables, "
          f"{'figures, ' * figures}runs and logs are in {out}")
    return rows


# --------------------------------------------------------------------------------------------------
# Figures


def draw(out: Path, rows: list[dict], passkey_maps: dict[str, list[dict]] | None) -> None:
    """The figures of the tables that there are, into `out`."""
    plots.pattern(out / "pattern.svg")
    plots.reach(out / "reach.svg")
    if passkey_maps:
        plots.heatmaps(out / "passkey.svg", passkey_maps)
    by_length = {row["variant"]: (CONTEXTS, [row[str(T)] for T in CONTEXTS], None)
                 for row in rows if row["table"] == 3}
    if by_length:
        plots.curve(out / "perplexity.svg", by_length, "Perplexity by context, full attention",
                    "perplexity", {"the base's window": CONTEXTS[0]})
    for table, what in ((1, "attention in training"), (2, "what trains")):
        if groups := column(rows, table, str(LONGEST)):
            plots.dots(out / f"table-{table}.svg", groups, f"By {what}",
                       f"perplexity at {LONGEST:,} tokens, full attention")
