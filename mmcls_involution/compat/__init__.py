"""What today's library versions need: a range check, repairs, mmcv's operators.

Importing this package imports none of the OpenMMLab libraries. :func:`apply` makes
every repair that the environment needs and may be called any number of times; call it
before mmdet, mmseg or mmpretrain are imported. Importing ``mmcls_involution.models``
and the commands do so, and ``python -m mmcls_involution.compat SCRIPT`` does it for a
script. Each module holds the repairs of one subject; each repair says what it answers,
an issue where one is known, and when it does nothing.
"""

from __future__ import annotations

import importlib.util

from .checkpoints import load_weights_only, pickle_history_plainly
from .coco_files import read_coco_as_meant
from .config_text import remember_config_text
from .fsdp import name_fsdp_arguments
from .mmcv_ops import provide_mmcv_ops
from .package_paths import (
    find_own_configs,
    get_installed_path,
    is_installed,
    replace_pkg_resources,
)
from .scalars import outlive_lost_scalars
from .torchvision_import import declare_torchvision_ops
from .versions import SUPPORTED, check_versions

__all__ = [
    'SUPPORTED',
    'apply',
    'check_versions',
    'declare_torchvision_ops',
    'find_own_configs',
    'get_installed_path',
    'is_installed',
    'load_weights_only',
    'name_fsdp_arguments',
    'outlive_lost_scalars',
    'pickle_history_plainly',
    'provide_mmcv_ops',
    'read_coco_as_meant',
    'remember_config_text',
    'replace_pkg_resources',
]


def apply() -> None:
    """Make every repair of upstream that this environment needs.

    Safe to call more than once, and with torch alone installed.
    """
    declare_torchvision_ops()
    provide_mmcv_ops()
    read_coco_as_meant()
    if importlib.util.find_spec('mmengine') is not None:
        replace_pkg_resources()
        find_own_configs()
        pickle_history_plainly()
        load_weights_only()
        name_fsdp_arguments()
        outlive_lost_scalars()
        remember_config_text()
