"""Whether weights fit a model, and how they can be made to: by torch alone.

RedNet, the hook of training and testing, and the converters ask it here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F


class Misfit(ValueError):
    """The weights are of another model; the message says what differs."""


class Fit:
    """What weights fill of a model's tensors: made before they are loaded.

    A tensor is filled if torch's version counter of it has moved since. So whatever
    modules do as they load counts: upstream's renaming of old names, a position
    embedding that is resized. What a loader skips and logs does not.

    Args:
        tensors (Mapping[str, Tensor]): The model's own, by name, no copies:
            ``dict(model.named_parameters())`` or ``model.state_dict(keep_vars=True)``.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        # Tensors that were made in torch's inference mode have no counter.
        self._versions = {
            name: value._version
            for name, value in tensors.items()
            if not value.is_inference()
        }

    @property
    def empty(self) -> list[str]:
        """Names of the tensors that have not been filled, as far as can be known."""
        return [n for n, v in self._versions.items() if self.tensors[n]._version == v]

    def differences(
        self, weights: Mapping[str, Tensor]
    ) -> tuple[list[str], list[str], list[str]]:
        """What keeps weights from being the model's, all of them and no others.

        Args:
            weights (Mapping[str, Tensor]): By the names of ``tensors``. Before they
                are loaded every tensor counts as empty.

        Returns:
            tuple: Names that are missing, those that the model does not have, and
            those of another shape.
        """
        filled = self._versions.keys() - self.empty
        empty = [name for name in self.tensors if name not in filled]
        return (
            [name for name in empty if name not in weights],
            [name for name in weights if name not in self.tensors],
            [
                name
                for name in empty
                if name in weights and weights[name].shape != self.tensors[name].shape
            ],
        )


def grow_kernels(taps: Tensor, groups: int, kernel_size: int) -> Tensor:
    """Lay smaller kernels into the middle of larger ones, whose outer taps are zero.

    What an involution computes stays the same, bit by bit.

    Args:
        taps (Tensor): What generates the kernels, ``[groups * k * k, ...]``: weight or
            bias of the last convolution of an involution's generator.
        groups (int): Number of kernels per pixel.
        kernel_size (int): Side K of the larger kernels in pixels, odd.

    Returns:
        Tensor: ``[groups * K * K, ...]``. ``taps`` itself if it has no smaller kernels.
    """
    size = round((len(taps) / groups) ** 0.5)
    if size >= kernel_size or size % 2 == 0 or len(taps) != groups * size**2:
        return taps
    border = 2 * [(kernel_size - size) // 2]
    grown = F.pad(taps.reshape(groups, size, size, -1), [0, 0, *border, *border])
    return grown.reshape(-1, *taps.shape[1:])
