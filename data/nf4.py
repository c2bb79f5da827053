"""4-bit weights for what is frozen (QLoRA, Dettmers et al. 2023)."""
import torch
import torch.nn as nn
import torch.nn.functional as F

# NF4, "normal float": quantiles of the normal distribution that weights have, and 0 (Appendix E).
NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
BLOCK, SUPERBLOCK = 64, 256  # weights that share a scale, scales that share one in turn


class NF4Linear(nn.Module):
    """A frozen linear layer of a weight (out, in) in 4.13 bits a number. A weight is the nearest of
    16 values times the largest of its block of 64. These scales less their mean are int8 themselves
    (double quantisation), times the largest of 256 of them.

    `weight` makes the matrix in `dtype`, for the moment that a product needs it. Everything is in
    integer buffers: no conversion of the model's dtype can touch the scales.
    """

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype, self.held = dtype, None
        blocks = padded(weight.detach().float().flatten(), BLOCK)
        scale = blocks.abs().amax(1)
        codes = torch.tensor(NF4, device=weight.device)
        nearest = torch.bucketize(blocks / scale.clamp(min=1e-30)[:, None],
                                  (codes[1:] + codes[:-1]) / 2, out_int32=True).to(torch.uint8)
        self.register_buffer("codes", nearest.view(-1, 2)[:, 0] << 4 | nearest.view(-1, 2)[:, 1])
        mean = scale.mean()
        scale = padded(scale - mean, SUPERBLOCK)
        step = scale.abs().amax(1) / 127
        scale = (scale / step.clamp(min=1e-30)[:, None]).round().to(torch.int8)
        self.register_buffer("scales", scale.flatten()[:len(blocks)].clone())
        self.register_buffer("steps", torch.cat([step, mean[None]]).view(torch.int32))

    @property
    def weight(self) -> torch.Tensor:
        if self.held is not None:
            return self.held
        steps = self.steps.view(torch.float32)  # and the mean
        scale = padded(self.scales.float(), SUPERBLOCK) * steps[:-1, None] + steps[-1]
        table = torch.tensor(NF4, device=self.codes.device)
        table = torch.stack([table.repeat_interleave(16), table.repeat(16)], dim=1)  # of a byte
        W = F.embedding(self.codes.int(), table).view(-1, BLOCK)
        W = W.mul_(scale.flatten()[:len(W), None]).flatten()[:self.out_features * self.in_features]
        return W.to(self.dtype).view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return NF4Product.apply(x, self)


class NF4Product(torch.autograd.Function):
    """x W^T that keeps nothing: autograd would keep W, and 4 bits would have saved no memory."""

    @staticmethod
    def forward(ctx, x, linear):
        ctx.linear = linear
        return F.linear(x, linear.weight)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.weight, None


def padded(x: torch.Tensor, size: int) -> torch.Tensor:
    """x (N,) as rows of `size`, the last one filled up with zeros."""
    return F.pad(x, (0, -len(x) % size)).view(-1, size)
