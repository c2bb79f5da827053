"""What a training run will take, before a machine is rented: `python train.py --plan`.

Nothing is loaded. Weights, gradients and AdamW's averages are arithmetic. Activations are not: a
formula for them would drift from the code, so the model itself runs a micro-step on fake tensors
(shapes without data), and the storages that are alive are counted. Two and three layers suffice: at
each place of the step, what is alive is a line in their number, so 80 layers cost no more.

Left out, a few per cent together: what kernels allocate inside, and rounding by the allocators.
"""
import contextlib
import dataclasses
import math
import weakref
from unittest import mock

import torch
import torch.nn as nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import longlora
from data.recompute import CHUNK
from data.team import HostMemory, autocast

CUDA_GIB, FRAGMENTED = 1, 0.05  # what CUDA itself takes; what its allocator cannot use

# The places of a step where memory can peak: forward pass and loss, backward pass of the last
# layer, that of the first one. In between, kept activations go and gradients come at a steady rate.
LOSS, TOP, BETWEEN, BOTTOM = range(4)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made under it and that are alive, but not of those in
    `known`. `peaks` has the most at each place, and how much of it is gradients: they count only if
    `gradients_count`."""

    def __init__(self, gradients_count: bool):
        super().__init__()
        self.known, self.live, self.gradients, self.host = set(), 0, 0, 0
        self.place, self.peaks, self.gradients_count = LOSS, [(0, 0)] * 4, gradients_count

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:  # else a view, or changed in place
                    self.known.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())
        self.arrive(self.place)
        return out

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size

    def arrive(self, place: int) -> None:
        self.place = max(self.place, place)  # a recomputed layer passes its hooks again
        there = self.gradients * self.gradients_count
        self.peaks[self.place] = max(self.peaks[self.place], (self.live + there, there))

    def keep_gradient(self, p: nn.Parameter) -> None:
        self.live -= p.grad.nbytes
        self.gradients += p.grad.nbytes

    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        if not HostMemory.moves(x):
            return x
        self.host += x.nbytes
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def from_host(x: torch.Tensor) -> torch.Tensor:
    return fake(x) if x.device.type == "meta" else x


def fake(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")


def micro_step(model: longlora.Llama, shape: tuple[int, int], dtype: torch.dtype, offload: bool,
               gradients_count: bool, sharded: bool = False, **pattern) -> LiveBytes:
    """Forward and backward of a model from the meta device on tokens of `shape`, counted."""
    live, hooks = LiveBytes(gradients_count), contextlib.nullcontext()
    if offload:
        hooks = torch.autograd.graph.saved_tensors_hooks(live.to_host, from_host)

    def mark(module: nn.Module, place: int) -> None:
        """The step is at `place` from when the gradient of the module's input is known."""
        def watch(_, inputs: tuple) -> None:
            inputs[0].register_hook(lambda _: live.arrive(place))
        module.register_forward_pre_hook(watch)

    mark(model.model.norm, TOP)
    mark(model.model.layers[-1], BETWEEN)
    mark(model.model.layers[1], BOTTOM)
    with FakeTensorMode(), mock.patch.dict(CHUNK, cpu=CHUNK["cuda"]):
        weights = {name: fake(p) for name, p in model.named_parameters()}
        model.load_state_dict(weights, strict=False, assign=True)
        if model.config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        for name, b in model.named_buffers():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, fake(b))
        for p in (*model.parameters(), *model.buffers()):
            live.known.add(p.untyped_storage()._cdata)
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(live.keep_gradient)
        with live:
            tokens, targets = (torch.empty(shape, dtype=torch.long) for _ in range(2))
            with autocast(torch.device("cpu"), dtype, sharded), hooks:
                loss = model(tokens, targets, **pattern) * 1.0
            loss.backward()
    return live


def token_flops(config: longlora.LlamaConfig, context: int, group_size: int | None = None,
                trainable: str = "lora,embed,norm", rank: int = 8, recomputed: str = "nothing"
                ) -> dict[str, float]:
    """FLOPs of a token in training on `context` tokens, on average.

    `useful`: forward and backward, gradients of weights only where they train, of attention only
    what is visible, and its backward pass as twice the forward. `executed`: besides, a flash
    kernel's scores in its backward pass, and what is `recomputed`: "nothing", "layers" (but for
    attention, whose output is kept, and a frozen down_proj, whose output nothing needs) or
    "attention" (that as well).
    `forward`: the forward pass without LoRA as the paper counts it (Table 11), attention as full
    squares of groups.
    """
    L, D, C = config.num_hidden_layers, config.head_dim, config.hidden_size
    H, H_kv, I = config.num_attention_heads, config.num_key_value_heads, config.intermediate_size
    G = min(group_size or context, context)
    layers, head = L * C * (2 * (H + H_kv) * D + 3 * I), C * config.vocab_size
    lora = 0 if trainable == "full" else L * rank * (4 * C + 2 * (H + H_kv) * D)
    attention = 4 * (G + 1) / 2 * H * D * L
    linear = 2 * (layers + lora + head)
    by_weights = linear if trainable == "full" else 2 * lora * ("lora" in trainable)
    useful = 2 * linear + by_weights + 3 * attention
    executed = useful + attention / 2 + 2 * head * (trainable == "full")  # by chunked_loss
    if recomputed != "nothing":
        down = 0 if trainable == "full" else L * C * I
        executed += 2 * (layers + lora - down) + attention * (recomputed == "attention")
    return {"useful": useful, "executed": executed,
            "forward": 2 * (layers + head) + 4 * G * H * D * L}


def plan(config: longlora.LlamaConfig, *, context: int, group_size: int | None, trainable: str,
         rank: int, batch_size: int, micro_batch: int, checkpointing: bool, offload: bool,
         dtype: torch.dtype, gpus: int = 1, contexts: int = 1, shift: bool = True,
         recompute_attention: bool = False, quantize: str | None = None) -> dict:
    """What a step of train.py takes: memory and communication (received) in bytes per GPU, FLOPs
    over all GPUs. `group_size` None: full attention.

    The parts of the memory are those at the moment of the peak, and add up to `peak`; of `layer`
    and `loss` the larger counts. `gathered` is FSDP's; `host` is in host memory. FLOPs are the
    useful ones: no recomputation, gradients of weights only where they train, of attention only
    what is visible, and its backward pass as twice the forward (a flash kernel does 2.5 times).
    """
    L, D = config.num_hidden_layers, config.head_dim
    H_kv = config.num_key_value_heads
    rows = math.ceil(batch_size / (gpus // contexts))
    micro_steps = math.ceil(rows / micro_batch)
    pattern = {"group_size": group_size, "shift": shift}
    if contexts > 1:  # keys and values as team.Halo makes them
        pattern["before"] = lambda x, n: torch.cat([x[:, :, -n:], x], dim=2)

    counted = []
    for layers in (2, 3):
        with torch.device("meta"):  # as train.place does it
            model = longlora.Llama(dataclasses.replace(config, num_hidden_layers=layers))
            model.to(torch.float32 if trainable == "full" else dtype)
            if quantize:
                longlora.quantize(model, dtype)
            if trainable != "full":
                longlora.add_lora(model, rank, dtype=dtype)
            longlora.set_trainable(model, trainable)
        model.model.checkpointing = checkpointing or recompute_attention or offload
        model.model.recompute_attention = recompute_attention or offload
        shape = min(rows, micro_batch), context // contexts
        counted.append(micro_step(model, shape, dtype, offload, micro_steps == 1, gpus > 1,
                                  **pattern))

    def at_depth(two: int, three: int) -> int:
        return two + (three - two) * (L - 2)

    # A layer, and the rest, are what FSDP gathers at a time: weights, those that train, bytes.
    layer, rest = [0, 0, 0], [0, 0, 0]
    lora = 0
    for name, p in model.named_parameters():
        if ".layers." not in name or ".layers.0." in name:
            part = layer if ".layers." in name else rest
            for i, n in enumerate((p.numel(), p.numel() * p.requires_grad, p.nbytes)):
                part[i] += n
            lora += L * p.numel() * ("lora_" in name)
    layer[0] = longlora.count_weights(model.model.layers[0])  # 4-bit ones too
    per_layer = sum(b.nbytes for b in model.model.layers[0].buffers())  # 4-bit, whole on each GPU
    parameters, trained, stored = (L * one + other for one, other in zip(layer, rest))

    # Gradients are float32. In a single micro-step they come as the backward pass goes: they were
    # counted, and FSDP has no more than the shards of all, and whole a layer's, the buffer that
    # these are sent from, and the rest's. With more micro-steps all are kept, by FSDP whole too.
    most = 4 * (trained // gpus + 2 * layer[1] + rest[1]) if gpus > 1 else 4 * trained
    totals = {}  # at each place: bytes, of these what grows with the layers, and gradients
    for place in (LOSS, TOP, BOTTOM):
        (two, some), (three, more) = (live.peaks[place] for live in counted)
        two, three = two - some, three - more
        there = 4 * trained if micro_steps > 1 else min(at_depth(some, more), most)
        totals[place] = at_depth(two, three) + there, L * (three - two), there
    _, kept, there = max(totals.values())
    memory = {"weights": stored // gpus + L * per_layer, "optimizer": 8 * trained // gpus,
              "gathered": 2 * layer[2] + rest[2] if gpus > 1 else 0,
              "gradients": there, "kept": kept,
              "layer": max(0, max(totals[TOP], totals[BOTTOM])[0] - kept - there),
              "loss": max(0, totals[LOSS][0] - kept - there)}
    peak = sum(memory.values()) - min(memory["layer"], memory["loss"])

    received = (gpus - 1) / gpus  # of what is gathered: the rest is a process's own
    halo = 0
    if contexts > 1 and shift:  # keys and values, again where recomputed, and gradients back
        halo = 2 * rows * L * (group_size // 2) * math.ceil(H_kv / 2) * D * dtype.itemsize
        halo *= 3 if checkpointing or recompute_attention or offload else 2
    return {"parameters": parameters, "trained": trained, "lora": lora, **memory, "peak": peak,
            "host": at_depth(*(live.host for live in counted)),
            "flops": round(batch_size * context * token_flops(
                config, context, group_size, trainable, rank)["useful"]),
            "gather": round(received * micro_steps * (2 * L * layer[2] + rest[2])),
            "reduce": round(received * 4 * trained), "halo": halo,
            "tokens": batch_size * context, "micro_steps": micro_steps}


TABLE = {
    "parameters": {"parameters": "all", "trained": "that train", "lora": "of them LoRA's"},
    "GiB in each GPU at its peak": {
        "weights": "weights", "optimizer": "AdamW's averages", "gathered": "weights gathered",
        "gradients": "gradients", "kept": "activations kept", "layer": "one layer at work",
        "loss": "or the loss, if more", "peak": "peak", "host": "besides, in host memory"},
    "TFLOP in a step, over all GPUs": {"flops": "useful work"},
    "GB received by each GPU in a step": {
        "gather": "weights", "reduce": "gradients", "halo": "keys and values"}}


def report(numbers: dict, gpu_memory: float) -> str:
    """The numbers of `plan` as a table, and whether GPUs of `gpu_memory` GiB suffice."""
    lines = [f"A step has {numbers['tokens']:,} tokens, in micro-steps: {numbers['micro_steps']}"]
    for title, names in TABLE.items():
        unit = {"GiB": 2**30, "TFLOP": 1e12, "GB": 1e9}.get(title.split()[0], 1)
        lines += ["", title]
        for name, text in names.items():
            value = numbers[name] / unit
            lines.append(f"    {text:<24}{value:>18,.{0 if unit == 1 else 2}f}")
    needed = numbers["peak"] / 2**30 * (1 + FRAGMENTED) + CUDA_GIB
    verdict = "suffice" if needed <= gpu_memory else "do not suffice"
    remedies = (" Try more GPUs, --checkpointing, --offload, --context-parallel or a smaller "
                "--micro-batch.") * (needed > gpu_memory)
    return "\n".join(lines) + (
        f"\n\n{gpu_memory:g} GiB a GPU {verdict}: {needed:.1f} are needed, with {FRAGMENTED:.0%} "
        f"for fragmentation and {CUDA_GIB} GiB for CUDA itself.{remedies}")


def of_run(run, config: longlora.LlamaConfig, pattern: dict) -> str:
    """The report for train.py's settings. Raises ValueError if they do not fit together."""
    if run.gpus % run.context_parallel:
        raise ValueError(f"--context-parallel {run.context_parallel} does not divide --gpus "
                         f"{run.gpus}")
    dtype = torch.float32 if run.dtype == "float32" else torch.bfloat16
    numbers = plan(config, context=run.context, trainable=run.trainable, rank=run.rank,
                   batch_size=run.batch_size, micro_batch=run.micro_batch,
                   checkpointing=run.checkpointing, offload=run.offload, dtype=dtype, gpus=run.gpus,
                   recompute_attention=run.recompute_attention, quantize=run.quantize,
                   contexts=run.context_parallel, **{"group_size": None} | pattern)
    return (f"{run.model} at {run.context:,} tokens, {run.attention} attention, {run.trainable} "
            f"train, {str(dtype)[6:]}; GPUs: {run.gpus}\n\n" + report(numbers, run.gpu_memory))
