"""Involution and RedNet for OpenMMLab 2.x.

This import is light: ``mmcls_involution.ops`` needs torch alone, and
``mmcls_involution.models`` (which registers everything) needs MMEngine and
MMCV.
"""

from mmcls_involution.version import __version__

__all__ = ['__version__']
