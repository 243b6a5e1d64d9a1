"""Our classifiers by name, in MMPretrain's model hub."""

from __future__ import annotations

import functools

from mmcls_involution.paths import ROOT

# Of classifiers alone: MMPretrain builds whatever it finds in its hub with its own
# registries, and those know neither detectors nor segmenters.
FOLDERS = ('imagenet', 'ablations', 'bccd_cells')


@functools.cache  # the hub refuses a name that it already has
def register_classifiers() -> None:
    """Let ``mmpretrain.get_model`` and ``list_models`` find our classifiers by name.

    Does nothing where their metafiles are not there, or where MMPretrain, or something
    that it needs, is missing.

    Example:
        >>> import mmcls_involution.models  # calls this function
        >>> from mmpretrain import get_model
        >>> model = get_model('rednet50_64xb32-warmup-coslr_in1k')
    """
    try:
        from mmpretrain.apis.model import ModelHub
    except ImportError:
        return
    metafiles = [ROOT / 'configs' / name / 'metafile.yml' for name in FOLDERS]
    if all(file.is_file() for file in metafiles):
        for file in metafiles:
            ModelHub.register_model_index(file, config_prefix=ROOT)
