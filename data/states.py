"""The states of a run, to continue from: folders step-NNNNNNN, whole or absent, the last two kept.

`torch.distributed.checkpoint` writes what is inside, each process its shards, and reads it again on
any number of processes. A state is written beside and renamed, with the hashes of its files in
manifest.json, so that one that was torn later is found out. PyTorch's part of it is a pickle: resume
only from folders that you trust.
"""
import hashlib
import os
import shutil
import warnings
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from data.formats import read_json, write_json


def save(folder: Path, step: int, tensors: dict, facts: dict) -> None:
    """Write `tensors` (nested dicts of them) and `facts` (for JSON) as the state after `step`."""
    alone, whole = not dist.is_initialized(), folder / f"step-{step:07}"
    main, partial = alone or dist.get_rank() == 0, folder / f"{whole.name}.partial"
    if main:
        for old in folder.glob("*.partial"):
            shutil.rmtree(old)
        partial.mkdir(parents=True)
    if not alone:
        dist.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "assuming a single process", of a single process
        dcp.save(tensors, checkpoint_id=partial, no_dist=alone)
    if main:
        write_json(partial / "manifest.json", {**facts, "step": step, "files": hashes(partial)})
        if whole.exists():  # it was torn, or we would have begun behind it
            shutil.rmtree(whole)
        os.replace(partial, whole)
        for old in states(folder)[2:]:
            shutil.rmtree(old)
    if not alone:
        dist.barrier()


def load(path: Path, tensors: dict) -> None:
    """Fill `tensors` in place with those of the state `path`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())


def newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole state and its facts, or None; says which newer ones are broken."""
    for path in states(folder):
        try:
            facts = read_json(path / "manifest.json")
            if facts.pop("files", None) == hashes(path) and {"step", "run"} <= facts.keys():
                return path, facts
            problem = "its files are not those that were written"
        except (ValueError, OSError) as error:
            problem = error
        print(f"{path} is broken ({problem}): looking for an older state")
    return None


def states(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted((path for path in folder.glob("step-*") if path.suffix != ".partial"),
                  reverse=True)


def hashes(path: Path) -> dict[str, str]:
    found = {}
    for file in sorted(path.iterdir()):
        if file.name != "manifest.json":
            digest = hashlib.sha256()
            with open(file, "rb") as data:
                while piece := data.read(1 << 24):
                    digest.update(piece)
            found[file.name] = digest.hexdigest()
    return found
