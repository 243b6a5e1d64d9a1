"""The involution operator: torch is all it needs."""

from .functional import BACKENDS, involution2d
from .geometry import output_size
from .modules import Involution2d

__all__ = ['BACKENDS', 'Involution2d', 'involution2d', 'output_size']
