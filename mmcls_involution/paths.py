"""Where the configs lie."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# What an installation has of the checkout: setup.py puts it there, MIM reads it.
MIM = PACKAGE / '.mim'
# The folder that holds configs: the checkout, or what an installation has of it.
ROOT = PACKAGE.parent if (PACKAGE.parent / 'configs' / 'paper.yml').is_file() else MIM
