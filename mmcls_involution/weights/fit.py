"""Whether weights fit a model: the one rule, by torch alone.

RedNet, the hook of training and testing, and the converters ask it here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


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
