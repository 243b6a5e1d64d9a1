"""Weights, and what tests of checkpoints ask of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch

SLIM = dict(depth=26, base_channels=16, stem_channels=32)
Weights = dict[str, torch.Tensor]


def renamed(weights: Weights, old: str, new: str) -> Weights:
    return {new + name.removeprefix(old): v for name, v in weights.items()}


def load_anywhere(path: Path) -> dict:
    """Load weights-only with nothing on torch's list, as a stranger's program does."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        return torch.load(path, weights_only=True)
    finally:
        torch.serialization.add_safe_globals(allowed)


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Bomb:
    def __reduce__(self):
        return os.system, ('true',)
