"""Models for other runtimes: the command ``export``, and what reads its files."""

from .runtime import detections, register_custom_operators

__all__ = ['detections', 'register_custom_operators']
