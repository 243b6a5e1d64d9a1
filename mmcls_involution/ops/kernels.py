"""The kernels that the involutions of a model generate, as tensors."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .modules import Involution2d


@contextmanager
def record_kernels(
    model: nn.Module, layers: Collection[str] | str | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """Record the kernels of every involution that runs while this is open.

    What the model computes, and how, stays as it is: the kernels are generated once
    more beside it, without gradients, and running statistics are updated once. They
    take memory, which ``layers`` saves: 49 values for each pixel and group of a 7x7
    involution. For one layer and one input there is :meth:`Involution2d.kernels`.

    Args:
        model (nn.Module): Any model with involutions, or one itself.
        layers (Collection[str] | str, optional): Dotted names of the involutions to
            record, or one name, as in ``model.named_modules()``. Defaults to None: all
            of them.

    Yields:
        dict[str, list[Tensor]]: By the names of layers, in the model's order: the
        kernels ``[N, G, K, K, H, W]`` of each of their calls, as
        :meth:`Involution2d.kernels` gives them. A head that all levels of a neck share
        is called once for each, a layer that did not run has an empty list.

    Raises:
        ValueError: If the model has no involution, or none of a name in ``layers``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mmcls_involution.ops import Involution2d, record_kernels
        >>> model = nn.Sequential(Involution2d(32, stride=2), nn.ReLU())
        >>> with record_kernels(model) as kernels:
        ...     _ = model(torch.rand(1, 32, 9, 7))
        >>> kernels['0'][0].shape
        torch.Size([1, 2, 7, 7, 5, 4])
    """
    involutions = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, Involution2d)
    }
    if not involutions:
        raise ValueError(f'{type(model).__name__} has no Involution2d')
    if isinstance(layers, str):  # else a collection of letters
        layers = (layers,)
    unknown = set(layers or ()) - set(involutions)
    if unknown:
        raise ValueError(
            f'no involution is called {" or ".join(sorted(unknown))}; there are '
            + ', '.join(involutions)
        )
    kernels: dict[str, list[Tensor]] = {
        name: [] for name in involutions if layers is None or name in layers
    }

    def record(layer: Involution2d, args: tuple, kwargs: dict) -> None:
        # A backward pass runs a checkpointed layer again, which is no call of its own.
        # Compilers cannot trace the question, and run no module again.
        compiling = torch.compiler.is_compiling()
        if not compiling and torch._C._current_graph_task_id() != -1:
            return
        with torch.no_grad(), CopiesOfBuffers(layer):
            kernels[names[layer]].append(layer.kernels(*args, **kwargs))

    names = {involutions[name]: name for name in kernels}
    with ExitStack() as hooks:
        for layer in names:
            hook = layer.register_forward_pre_hook(record, with_kwargs=True)
            hooks.callback(hook.remove)
        yield kernels


class CopiesOfBuffers:
    """While it is entered, a module's buffers are copies: what is written is lost.

    Autograd may have saved the buffers themselves. torch enters the same one again for
    each backward pass through a checkpoint, which a generator's context does not
    survive.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __enter__(self) -> None:
        self.own = [(m, m._buffers) for m in self.module.modules() if m._buffers]
        for m, buffers in self.own:
            m._buffers = {k: b if b is None else b.clone() for k, b in buffers.items()}

    def __exit__(self, *error: object) -> None:
        for m, buffers in self.own:
            m._buffers = buffers
