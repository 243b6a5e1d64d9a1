"""Using trained models: inference, and what the kernels of a model look like."""

from .inferencer import build_inferencer
from .watch import WatchHook

__all__ = ['WatchHook', 'build_inferencer']
