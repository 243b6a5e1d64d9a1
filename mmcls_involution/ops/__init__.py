"""The involution operator: torch is all it needs."""

from .backends import BACKENDS
from .functional import involution2d
from .fused import fused_involution2d
from .geometry import output_size
from .kernels import record_kernels
from .modules import Involution2d
from .swap import InvolutionConv, swap_convolutions

__all__ = [
    'BACKENDS',
    'Involution2d',
    'InvolutionConv',
    'fused_involution2d',
    'involution2d',
    'output_size',
    'record_kernels',
    'swap_convolutions',
]
