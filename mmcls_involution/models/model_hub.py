"""Our classifiers by name, in MMPretrain's model hub."""

from __future__ import annotations

import functools
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
# Of classifiers alone: MMPretrain builds whatever it finds in its hub with its own
# registries, and those know neither detectors nor segmenters.
FOLDERS = ('imagenet', 'ablations', 'bccd_cells')


@functools.cache  # the hub refuses a name that it already has
def register_classifiers() -> None:
    """Let ``mmpretrain.get_model`` and ``list_models`` find our classifiers by name.

    Reads the metafiles of the installation (``mmcls_involution/.mim``), else those of
    the checkout that the package is imported from. Does nothing where there are none,
    or where MMPretrain, or something that it needs, is missing.

    Example:
        >>> import mmcls_involution.models  # calls this function
        >>> from mmpretrain import get_model
        >>> model = get_model('rednet50_64xb32-warmup-coslr_in1k')
    """
    try:
        from mmpretrain.apis.model import ModelHub
    except ImportError:
        return
    for root in (PACKAGE / '.mim', PACKAGE.parent):
        metafiles = [root / 'configs' / name / 'metafile.yml' for name in FOLDERS]
        if all(file.is_file() for file in metafiles):
            for file in metafiles:
                ModelHub.register_model_index(file, config_prefix=root)
            return
