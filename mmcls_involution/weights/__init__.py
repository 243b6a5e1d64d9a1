"""Checkpoints: whether they fit, reading and writing them, converting, publishing."""
