"""Checkpoints: whether they fit, reading and writing them, converting, publishing.

``fit`` knows torch alone, so that models may ask it. Places to load weights from, a
scheme for MMEngine's loader say, get a module of their own here.
"""
