"""Using trained models: inference, and what the kernels of a model look like."""

from .inferencer import build_inferencer

__all__ = ['build_inferencer']
