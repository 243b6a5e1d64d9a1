"""The scope ``mmcls_involution`` for MMEngine.

MMEngine imports ``<scope>.registry`` when a config spells a type with its scope,
as in ``mmcls_involution.RedNet``. The classes themselves are registered in
MMEngine's root, so this child holds nothing and falls back to its parent.
"""

from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import Registry

MODELS = Registry(
    'model',
    parent=ROOT_MODELS,
    scope='mmcls_involution',
    locations=['mmcls_involution.models'],
)
