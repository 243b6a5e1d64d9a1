"""Bilinear operators under torch.func and forward-mode differentiation.

torch.library registers neither for a custom operator: forward mode would take its
output for a constant, and torch.func ends in an error. There, and only there, an
autograd.Function runs the operator. torch.compile and torch.export see operators alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether torch.func transforms what is called now, or a forward mode is on."""
    # The question that autograd.Function asks, and the level that dual_level enters;
    # torch has no public name for either.
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


_here = threading.local()


def refuse_forward_mode(name: str) -> None:
    """To be called where an operator computes: its result would have no tangent.

    Raises:
        NotImplementedError: If forward mode is on and the operator was not called by a
            function of this module, but by an exported program, for one.
    """
    if forward_ad._current_level >= 0 and not getattr(_here, 'called', False):
        raise NotImplementedError(
            f'torch.ops.mmcls_involution.{name} has no forward-mode derivative where '
            'it is called as an operator, as exported and compiled programs do; call '
            'the functions of mmcls_involution.ops, or the module that was exported'
        )


def transformable(operator: Callable, setup: Callable, backward: Callable) -> Callable:
    """`operator`, linear in each of its first two arguments, under any transform.

    ``setup(ctx, inputs, output)`` and ``backward(ctx, grad)`` are what its autograd is
    registered with; the first one sets ``ctx.arguments`` to the other arguments. All
    tensors have the batch as their first dimension.
    """

    def call(*arguments) -> Tensor:
        if not active():
            return operator(*arguments)
        apply = _Function.apply
        # torch.compile fails on such a Function. Where nothing can have been compiled,
        # disabling it would import all of torch._dynamo, which takes a second.
        if 'torch._dynamo' in sys.modules:
            apply = torch.compiler.disable(apply)
        return apply(*arguments)

    class _Function(torch.autograd.Function):
        @staticmethod
        def forward(*arguments) -> Tensor:
            _here.called = True
            try:
                return operator(*arguments)
            finally:
                _here.called = False

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            setup(ctx, inputs, output)
            ctx.save_for_forward(*inputs[:2])
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx, grad):
            if grad is None:
                return (None,) * (2 + len(ctx.arguments))
            return backward(ctx, grad)

        @staticmethod
        def jvp(ctx, first_tangent, second_tangent, *_) -> Tensor:
            first, second = ctx.saved_tensors
            parts = []
            if first_tangent is not None:
                # Batch norm's tangent of half precision is float32.
                tangent = first_tangent.to(first.dtype)
                parts.append(call(tangent, second, *ctx.arguments))
            if second_tangent is not None:
                tangent = second_tangent.to(second.dtype)
                parts.append(call(first, tangent, *ctx.arguments))
            return sum(parts)

        @staticmethod
        def vmap(info, in_dims, first, second, *arguments) -> tuple[Tensor, int]:
            size = info.batch_size
            first, second = (
                t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
                for t, dim in zip((first, second), in_dims, strict=False)
            )
            batch = first.shape[1]
            out = call(
                first.flatten(0, 1),
                second.flatten(0, 1),
                *(_of_batch(size * batch, argument) for argument in arguments),
            )
            return out.unflatten(0, (size, batch)), 0

    return call


def _of_batch(batch: int, argument: str | Sequence[int]) -> str | Sequence[int]:
    """A shape of kernels [N, G, Kh, Kw, Ho, Wo] with that N; anything else as it is."""
    if isinstance(argument, str) or len(argument) != 6:
        return argument
    return batch, *argument[1:]
