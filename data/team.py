"""Several processes on one run, on PyTorch's own engine. The model knows nothing of it.

They share the work in two ways. FSDP2 shards parameters, gradients and optimizer over all of them;
each gathers a layer when it needs it. And they share the sequences of a batch; with contexts > 1
every `contexts` neighbours share one sequence, see `Halo`.
"""
import bisect
import contextlib
import ctypes
import gc
import math
import os
import resource
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from tqdm import tqdm

import longlora


class Halo(torch.autograd.Function):
    """One sequence over several processes, each with whole groups. Unshifted heads need nothing of
    each other. Of the shifted ones, a process needs the keys and values of the G/2 tokens before
    its own, and nothing else, whatever T is: attention is causal, so they go in one direction.

        process 0                 process 1                 process 2
        [  G  ][  G  ][  G  ]     [  G  ][  G  ][  G  ]     [  G  ][  G  ][  G  ]     unshifted
        [G/2][  G  ][  G  ][G/2]->[G/2][  G  ][  G  ][G/2]->[G/2][  G  ][  G  ][G/2]  shifted

    `Halo.apply(x, n, group)`: x (B, h, T, D) with the n tokens before it, (B, h, n + T, D). The
    last n go to the next process of `group`; in the backward pass their gradients come back.
    """

    @staticmethod
    def forward(ctx, x, n, group):
        ctx.n, ctx.group = n, group
        before = exchange(x[:, :, -n:], group, 1, n)
        # The first process returns its x, or its backward would not run, and the next one hang.
        return x.view_as(x) if before is None else torch.cat([before, x], dim=2)

    @staticmethod
    def backward(ctx, grad):
        n = ctx.n
        after = exchange(grad[:, :, :n], ctx.group, -1, n)
        grad = grad[:, :, n if ctx.group.rank() else 0:].clone()
        if after is not None:
            grad[:, :, -n:] += after
        return grad, None, None


def exchange(x: torch.Tensor, group: dist.ProcessGroup, step: int, n: int) -> torch.Tensor | None:
    """Give x (B, h, n, D) to the process `step` further on; returns what the one before gives
    (None: no one). Who gives to no one may have fewer than n tokens."""
    rank, size, works, got = group.rank(), group.size(), [], None
    if 0 <= rank + step < size:
        to = dist.get_global_rank(group, rank + step)
        works.append(dist.P2POp(dist.isend, x.contiguous(), to, group))
    if 0 <= rank - step < size:
        got = x.new_empty(*x.shape[:2], n, x.shape[3])
        source = dist.get_global_rank(group, rank - step)
        works.append(dist.P2POp(dist.irecv, got, source, group))
    for work in dist.batch_isend_irecv(works):
        work.wait()
    return got


class Team(NamedTuple):
    """This process among `size`. Every `contexts` neighbours share a sequence, in `group`."""
    rank: int = 0
    size: int = 1
    contexts: int = 1
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

    def share(self, batch: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """This process's tokens and targets of a batch (B, T + 1): of its rows, its part. Where
        there are too few rows for all, one whose targets are all -100, so that all work in step."""
        teams, part = self.size // self.contexts, self.piece(batch.shape[1] - 1, group_size)
        rows = batch[self.rank // self.contexts::teams]
        tokens, targets = rows[:, :-1], rows[:, 1:]  # before T is split, or targets were lost
        if len(rows) < math.ceil(len(batch) / teams):
            tokens = torch.cat([tokens, batch[:1, :-1]])
            targets = torch.cat([targets, torch.full_like(batch[:1, 1:], -100)])
        return tokens[:, part], targets[:, part]

    def piece(self, length: int, group_size: int) -> slice:
        """This process's part of a sequence: whole groups, shared out evenly, but that the last one
        of the sequence may be shorter. Empty if there are too few groups."""
        groups, place = math.ceil(length / group_size), self.rank % self.contexts
        first, last = ((place + i) * groups // self.contexts * group_size for i in (0, 1))
        return slice(first, min(last, length))

    def before(self, x: torch.Tensor, n: int) -> torch.Tensor:
        """x (B, h, T, D) of this process's part of a sequence, behind the n tokens before it."""
        return Halo.apply(x, n, self.group)

    @contextlib.contextmanager
    def first_one_first(self) -> Iterator[None]:
        """The first process of each machine, then the others."""
        others = os.environ.get("LOCAL_RANK", "0") != "0"
        if self.size > 1 and others:
            dist.barrier()
        yield
        if self.size > 1 and not others:
            dist.barrier()


def join(contexts: int) -> tuple[torch.device, Team]:
    """This process's device, and its place among those that torchrun has started."""
    device, size = default_device(), int(os.environ.get("WORLD_SIZE", 1))
    if contexts < 1 or size % contexts:
        raise ValueError(f"--context-parallel {contexts} does not divide {size} processes; "
                         "torchrun --nproc-per-node N starts N")
    if size == 1:
        return device, Team()
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", -1))
        if not 0 <= local < torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK {local}, but {torch.cuda.device_count()} GPUs here: "
                             "start as many processes a machine as it has GPUs, by torchrun")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # On one machine torchrun's store outlives a restart, with the addresses of dead processes.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                            world_size=size, timeout=timedelta(hours=1))  # one encodes or hashes
    mesh = init_device_mesh(device.type, (size,))
    both = init_device_mesh(device.type, (size // contexts, contexts),
                            mesh_dim_names=("data", "context"))
    return device, Team(rank, size, contexts, mesh, both["context"].get_group())


def leave() -> None:
    if dist.is_initialized():
        gc.collect()  # gloo may abort while a model of its shards is alive
        dist.destroy_process_group()


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def print0(text: str) -> None:
    """Print on the first process alone, and not into a progress bar."""
    if is_main():
        tqdm.write(text)


def place(model: longlora.Llama, trainable: str, rank: int, device: torch.device,
          dtype: torch.dtype, team: Team, quantize: str | None = None) -> None:
    """Add LoRA of that rank, choose what trains, and bring the model to the device: whole, or this
    process's shards of it. What is frozen becomes `dtype`, or 4-bit, which is not sharded.

    `model` lies in its mapped files until then, and a process reads only the rows that it keeps.
    """
    if trainable == "full":
        dtype = torch.float32
    else:
        if quantize:
            longlora.quantize(model, dtype, device)
        longlora.add_lora(model, rank, 2 * rank, dtype=dtype)
    if team.size == 1:
        longlora.set_trainable(model.to(device, dtype), trainable)
        return
    weights = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers())
    model.to("meta", dtype)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    longlora.set_trainable(model, trainable)
    for layer in model.model.layers:
        fully_shard(layer, mesh=team.mesh)
    fully_shard(model, mesh=team.mesh)
    model.to_empty(device=device)
    for name, buffer in buffers.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, buffer)
    for name, p in model.named_parameters():
        rows = weights.pop(name).detach().chunk(team.size)  # as FSDP shards: the last may be short
        if team.rank < len(rows):
            p.to_local().detach().copy_(rows[team.rank])


def default_device() -> torch.device:
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; "auto": bfloat16 where it is native to the hardware, else float32."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cpu":
        capabilities = getattr(torch.cpu, "get_capabilities", dict)()
        native = capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    else:
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float32


def autocast(device: torch.device, dtype: torch.dtype, sharded: bool | None = None
             ) -> torch.autocast:
    # Its cache of casts saves a tenth of the time of a small step; of FSDP's shards it would keep
    # the whole weights until the pass is over.
    sharded = dist.is_initialized() if sharded is None else sharded
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32,
                          cache_enabled=not sharded)


class HostMemory(torch.autograd.graph.saved_tensors_hooks):
    """Inside, what the backward pass needs is kept in host memory, but for parameters and what is
    small. PyTorch's own pinned buffers take a power of two each, up to twice what they hold; these
    are as large as what they hold first, and used again for what is no larger."""

    SMALL = 1 << 20  # bytes

    def __init__(self):
        super().__init__(self.pack, self.unpack)
        self.free = []  # buffers (bytes,), the smallest first

    @classmethod
    def moves(cls, x: torch.Tensor) -> bool:
        return x.nbytes >= cls.SMALL and not isinstance(x, torch.nn.Parameter)

    def pack(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.device]:
        if not self.moves(x):
            return x, None, x.device
        place = bisect.bisect_left(self.free, x.nbytes, key=len)
        if place < len(self.free):
            buffer = self.free.pop(place)
        else:
            if self.free:  # micro-steps have grown: its largest is too small, and goes
                register(self.free.pop(), x.device, False)
            register(buffer := torch.empty(x.nbytes, dtype=torch.uint8), x.device, True)
        kept = buffer[:x.nbytes].view(x.dtype).view(x.shape)
        return kept.copy_(x, non_blocking=True), buffer, x.device

    def unpack(self, packed: tuple[torch.Tensor, torch.Tensor | None, torch.device]
               ) -> torch.Tensor:
        x, buffer, device = packed
        if buffer is None:
            return x
        bisect.insort(self.free, buffer, key=len)  # who fills it next stands behind this copy
        return x.to(device, non_blocking=True, copy=True)


def register(buffer: torch.Tensor, device: torch.device, locked: bool) -> None:
    """Page-lock a buffer, so that copies from and to a GPU need not wait for each other; or let go
    of it."""
    if device.type != "cuda":
        return
    cuda, place = torch.cuda.cudart(), buffer.data_ptr()
    if not locked:
        torch.cuda.synchronize(device)  # a copy may still read it
    torch.cuda.check_error(cuda.cudaHostRegister(place, len(buffer), 0) if locked else
                           cuda.cudaHostUnregister(place))


def keep_freed_memory() -> None:
    """Tell glibc to use freed blocks again, up to 32 MiB each, and not to give them back: on a CPU
    a step otherwise spends a tenth of its time on being handed the same pages anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt and not any(name.startswith("MALLOC_") for name in os.environ):
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def peak_memory(device: torch.device) -> int:
    """Bytes: what CUDA's allocator has reserved since training began, else the most that the
    process ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
