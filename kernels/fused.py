"""What the fused losses share: a custom op that returns the loss with its gradient, and an autograd function over it.

On a GPU the forward launch also writes the student's gradient, for an upstream gradient of 1 (which is what
`loss.backward()` sends). Backward looks at the upstream gradient on the device, without a sync: where it is 1 there is
nothing left to do, and elsewhere the kernel runs again with it, so that the gradient is rounded once and a loss scale
saves what float16 would flush to zero.

The mean or the sum over the samples, of loss and KL together, is a second, small launch. In one launch the last program
to finish would have to do it, and know that it is the last: from a counter that is 0 at every start. A counter that
lives on between calls adds up wrong, silently, when two streams or two graphs use it at once or a kernel is aborted; a
new one takes a launch to clear. Float atomics instead would give other bits each time. And one program adding up 65,536
losses would take longer than the launch it saves.

Shape legend: B batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .reference import reduced


def row_factor(student: Tensor, reduction: str) -> float:
    """What a sample's loss is multiplied by on its way into the result."""
    return 1.0 / student.shape[0] if reduction == "mean" else 1.0


def launched(
    launch: Callable[..., None],
    student: Tensor,
    reduction: str,
    with_kl: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """An op's outputs: loss, and KL if asked for, [1 or 2] reduced or [1 or 2, B]; gradient [B, C], or empty.

    `launch(factor=..., loss=[B], kl=[B] or None, gradient=[B, C] or None)` fills them; not called for an empty batch.
    """
    samples = student.new_empty((1 + with_kl, student.shape[0]), dtype=torch.float32)
    gradient = student.new_empty(student.shape) if with_gradient else None
    if student.shape[0] > 0:
        factor = row_factor(student, reduction)
        launch(factor=factor, loss=samples[0], kl=samples[1] if with_kl else None, gradient=gradient)
    return reduced(samples, reduction), student.new_empty(0) if gradient is None else gradient


def fake(student: Tensor, reduction: str, with_kl: bool, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """The shapes and dtypes of `launched`."""
    samples = student.new_empty((1 + with_kl, student.shape[0]), dtype=torch.float32)
    return (samples if reduction == "none" else samples.new_empty(1 + with_kl)), student.new_empty(
        student.shape if with_gradient else 0
    )


class FusedLoss(torch.autograd.Function):
    """apply(op, backward_op, options, with_kl, with_gradient, student, *target) -> (loss, kl or None).

    op(student, target, *options, with_kl, with_gradient) -> (loss and KL in one tensor, gradient), and
    backward_op(gradient, upstream, student, target, *options) rewrites the gradient in place.
    """

    @staticmethod
    def forward(ctx, op, backward_op, options, with_kl, with_gradient, student, *target):
        values, gradient = op(student, target, *options, with_kl, with_gradient)
        loss, kl = values[0], values[1] if with_kl else None
        ctx.save_for_backward(student, *target)
        ctx.call = op, backward_op, options
        ctx.gradient = gradient
        if with_kl:
            ctx.mark_non_differentiable(kl)
        return loss, kl

    @staticmethod
    def backward(ctx, upstream, _kl):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # else a gradient penalty would be ignored
            raise RuntimeError("a fused loss has no second derivative: create_graph=True cannot work")
        student, *target = ctx.saved_tensors
        op, backward_op, options = ctx.call
        # The caller gets the buffer itself. A second backward, through a retained graph, therefore needs a new one.
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            *_, gradient = op(student, target, *options, False, True)
        backward_op(gradient, upstream, student, target, *options)
        return None, None, None, None, None, gradient, *[None] * len(target)
