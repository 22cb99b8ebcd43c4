"""What the fused losses share: an autograd function over a custom op that fills the loss and its gradient.

On a GPU the forward launch also writes the student's gradient, for an upstream gradient of 1, which `loss.backward()`
sends. Backward looks at the upstream gradient on the device, without a sync. Where it is not 1 the kernel runs again
with it, so that the gradient is rounded once and a loss scale saves what float16 would flush to zero.

The mean or the sum over the samples, of loss and KL together, is a second, small launch. Within one launch the last
program would have to know from a counter that it is the last: one that lives on between calls adds up wrong, silently,
when two streams use it or a kernel is aborted. Float atomics give other bits each time.

Shape legend: B batch, C classes.
"""

from __future__ import annotations

from typing import Any

import torch

from .reference import reduced


class FusedLoss(torch.autograd.Function):
    """apply(op, options, with_kl, with_gradient, student, *target) -> (loss, kl or None); options end with reduction.

    op(student, target, *options, samples, gradient, upstream) fills what is given of samples, float32 [1, B] for the
    loss or [2, B] with KL, and gradient [B, C], for an upstream gradient of 1. With `upstream`, a scalar or [B], it
    rewrites the rows of the gradient where that is not 1.
    """

    @staticmethod
    def forward(ctx: Any, op: Any, options: Any, with_kl: bool, with_gradient: bool, student: Any, *target: Any) -> Any:
        samples = student.new_empty((1 + with_kl, student.shape[0]), dtype=torch.float32)
        gradient = student.new_empty(student.shape) if with_gradient else None
        op(student, target, *options, samples, gradient, None)
        values = reduced(samples, options[-1])
        loss, kl = values[0], values[1] if with_kl else None
        ctx.save_for_backward(student, *target)
        ctx.call = op, options
        ctx.gradient = gradient
        if with_kl:
            ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    def backward(ctx: Any, upstream: Any, _kl: Any) -> Any:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # else a gradient penalty would be ignored
            raise RuntimeError("a fused loss has no second derivative: create_graph=True cannot work")
        student, *target = ctx.saved_tensors
        op, options = ctx.call
        # The caller gets the buffer itself. A second backward, through a retained graph, therefore needs a new one.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            gradient = student.new_empty(student.shape)
            op(student, target, *options, None, gradient, None)
        op(student, target, *options, None, gradient, upstream)
        return None, None, None, None, gradient, *[None] * len(target)
