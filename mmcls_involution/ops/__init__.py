"""The involution operator: torch is all it needs."""

from .backends import BACKENDS
from .functional import involution2d
from .fused import fused_involution2d
from .geometry import output_size
from .modules import Involution2d

__all__ = [
    'BACKENDS',
    'Involution2d',
    'fused_involution2d',
    'involution2d',
    'output_size',
]
