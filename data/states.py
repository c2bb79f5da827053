"""The states of a run, to continue from: folders step-NNNNNNN, whole or absent, the last two kept.

`torch.distributed.checkpoint` writes what is inside, each process its shards, and reads it again on
any number of processes. A state is written beside and renamed, with the hashes of its files in
manifest.json, so that one that was torn later is found out. PyTorch's part of it is a pickle:
resume only from folders that you trust.
"""
import hashlib
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from data.formats import read_json, write_json


def tensors_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """What a state holds: the weights that train, and AdamW's two averages of their gradients."""
    tensors = {"weights": {}, "exp_avg": {}, "exp_avg_sq": {}}
    for name, p in model.named_parameters():
        if p.requires_grad:
            tensors["weights"][name] = p.detach()
            for kind in ("exp_avg", "exp_avg_sq"):
                kept = optimizer.state[p]
                tensors[kind][name] = kept.setdefault(kind, torch.zeros_like(p.detach()))
    return tensors


def save(folder: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer,
         facts: dict) -> None:
    """Write the state after `step` steps, with `facts` (for JSON). Every process has to call it.
    Raises OSError if it cannot be written; older states stay as they were."""
    tensors = tensors_of(model, optimizer)
    alone, whole = not dist.is_initialized(), folder / f"step-{step:07}"
    main, partial = alone or dist.get_rank() == 0, folder / f"{whole.name}.partial"
    if main:
        for old in folder.glob("*.partial"):
            shutil.rmtree(old)
        partial.mkdir(parents=True)
    if not alone:
        dist.barrier()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "assuming a single process", of a single process
            dcp.save(tensors, checkpoint_id=partial, no_dist=alone)
        if main:
            write_json(partial / "manifest.json", {**facts, "step": step, "files": hashes(partial)})
            if whole.exists():  # it was torn, or we would have begun behind it
                shutil.rmtree(whole)
            os.replace(partial, whole)
            ahead = [old for old in states(folder) if old.name > whole.name]  # torn, passed over
            for old in ahead + states(folder)[len(ahead) + 2:]:
                shutil.rmtree(old)
    except CheckpointException as error:
        problem = next(iter(error.failures.values()))[0]
        raise OSError(f"{partial} cannot be written: {problem}") from None
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
    if not alone:
        dist.barrier()


def load(path: Path, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put the state `path`, of `step` steps, into a model and its optimizer."""
    tensors = tensors_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dcp.load(tensors, checkpoint_id=path, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            problem = next(iter(error.failures.values()))[0]
            raise ValueError(f"{path} does not fit this model: {problem}") from None
    for p, kept in optimizer.state.items():
        kept["step"] = torch.tensor(float(step), device=p.device)


def newest(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole state and its facts, or None; says which newer ones are broken."""
    for path in states(folder):
        try:
            facts = read_json(path / "manifest.json")
            if facts.pop("files", None) == hashes(path) and {"step", "run"} <= facts.keys():
                return path, facts
            problem = "its files are not those that were written"
        except (ValueError, FileNotFoundError) as error:  # a disk that fails is no torn state
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
