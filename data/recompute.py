"""Less work and less memory for the same numbers: what a layer recomputes, and what goes through in
chunks of tokens. The model reads the same without it; README.md tells what each part gains.
"""
import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn as nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

# Tokens that are worked on at a time where all would take too much memory: as many as fit a CPU's
# cache, or keep a GPU busy.
CHUNK = {"cpu": 512, "cuda": 8192}


def chunk_size(x: torch.Tensor) -> int:
    return CHUNK.get(x.device.type, CHUNK["cuda"])


class ChunkedNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension: F.rms_norm, in a quarter of its time on a CPU,
    where it is eight passes over memory, and without float32 copies of more than a chunk."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        rows = x.reshape(-1, x.shape[-1])
        out, scale = torch.empty_like(rows), rows.new_empty(len(rows), 1, dtype=torch.float32)
        for x_, y, r in zip(*(t.split(chunk_size(x)) for t in (rows, out, scale))):
            z = x_.float()
            torch.rsqrt(z.square().mean(-1, keepdim=True).add_(eps), out=r)
            y.copy_((z * r).mul_(weight))
        ctx.save_for_backward(rows, weight, scale)
        return out.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        rows, weight, scale = ctx.saved_tensors
        dx, dw = torch.empty_like(rows), torch.zeros_like(weight)
        parts = (t.split(chunk_size(grad)) for t in (rows, scale, grad.reshape(rows.shape), dx))
        for x, r, g, out in zip(*parts):
            z, g = x.float() * r, g.float()
            dw += (g * z).sum(0)
            g = g * weight
            out.copy_(g.sub_(z.mul_((g * z).mean(-1, keepdim=True))).mul_(r))
        return dx.view_as(grad), dw, None


class ChunkedRotation(torch.autograd.Function):
    """`longlora.rotate` of x (B, T, H, D). The backward pass needs the angles alone: it turns
    back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        out, size = torch.empty_like(x), chunk_size(x)
        for x, y, c, s in zip(*(t.split(size, dim=-3) for t in (x, out, cos, sin))):
            a, b = x.float().chunk(2, dim=-1)  # float32 copies of a chunk, never of all
            first, second = y.chunk(2, dim=-1)
            first.copy_((a * c).addcmul_(b, s, value=-1))
            second.copy_((b * c).addcmul_(a, s))
        return out

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return ChunkedRotation.apply(grad, cos, -sin), None, None


# What attention calls, whichever kernel PyTorch chooses.
KERNELS = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention").default
           for name in ("flash", "efficient", "cudnn")]
KERNELS.append(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default)


class RecomputedBlock(torch.autograd.Function):
    """A layer that keeps its input, and in the backward pass is computed again but for attention's
    output (it is kept, with `keep`) and down_proj's (nothing needs it, if it is frozen). The MLP,
    widest of all, goes through both passes in chunks of tokens.

    torch.utils.checkpoint does not do it: to go through a part in chunks it would have to compute
    that part once more.
    """

    @staticmethod
    def forward(ctx, x, block, cos, sin, attention, keep, *parameters):
        device = x.device.type
        ctx.autocast = partial(torch.autocast, device, torch.get_autocast_dtype(device),
                               torch.is_autocast_enabled(device),
                               torch.is_autocast_cache_enabled())
        first, again = ((contextlib.nullcontext(),) * 2 if not keep else
                        create_selective_checkpoint_contexts(KERNELS))
        ctx.again = partial(block.attend, cos=cos, sin=sin, attention=inside(again, attention))
        ctx.block = block
        ctx.save_for_backward(x)
        with held(block):
            with torch.set_grad_enabled(keep):  # or other kernels would run than in the backward
                x = block.attend(x.detach().requires_grad_(), cos, sin, inside(first, attention))
            x = x.detach()
            out = torch.empty_like(x)
            for part, y in zip(*(t.flatten(0, 1).split(chunk_size(x)) for t in (x, out))):
                y.copy_(block.think(part))
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,), block = ctx.saved_tensors, ctx.block
        with held(block):
            x = x.detach().requires_grad_()
            with torch.enable_grad(), ctx.autocast():
                middle = ctx.again(x)
            grad_middle, grads = through_mlp(block, middle.detach(), grad, ctx.autocast)
            trained = [p for p in block.parameters() if p.requires_grad and p not in grads]
            first, *more = torch.autograd.grad(middle, [x, *trained], grad_middle)
        grads |= zip(trained, more)
        return first, None, None, None, None, None, *(grads.get(p) for p in block.parameters())


def through_mlp(block: nn.Module, x: torch.Tensor, grad: torch.Tensor,
                autocast: Callable) -> tuple[torch.Tensor, dict[nn.Parameter, torch.Tensor]]:
    """The gradient of x, what comes before norm and MLP, and those of their parameters."""
    down, grad_x = block.mlp.down_proj, torch.empty_like(x)
    frozen = not hasattr(down, "lora_A") and not down.weight.requires_grad
    trained = [p for module in (block.mlp, block.post_attention_layernorm)
               for p in module.parameters() if p.requires_grad]
    sums = [torch.zeros_like(p) for p in trained]
    for part, g, out in zip(*(t.flatten(0, 1).split(chunk_size(x)) for t in (x, grad, grad_x))):
        part.requires_grad_()
        with torch.enable_grad(), autocast():
            y = block.mlp.hidden(block.post_attention_layernorm(part))
            y, g_y = (y, g @ down.weight) if frozen else (down(y), g)
        first, *more = torch.autograd.grad(y, [part, *trained], g_y)
        torch.add(first, g, out=out)
        for total, one in zip(sums, more):
            total += one
    return grad_x, dict(zip(trained, sums))


def inside(context: contextlib.AbstractContextManager, attention: Callable) -> Callable:
    def call(*qkv: torch.Tensor) -> torch.Tensor:
        with context:
            return attention(*qkv)

    return call


@contextlib.contextmanager
def held(block: nn.Module) -> Iterator[None]:
    """Inside, the block's 4-bit weights are made once, not for every product."""
    layers = [module for module in block.modules() if hasattr(module, "held")]
    try:
        for layer in layers:
            layer.held = layer.weight
        yield
    finally:
        for layer in layers:
            layer.held = None
