"""Importing this package registers every model in MMEngine's root registry.

It also names the classifiers in MMPretrain's model hub, and lets MMEngine's loader know
the weights at ``paddleclas://``. The parts for a library that is not installed are left
out.
"""

from importlib.util import find_spec

from mmcls_involution import compat

compat.check_versions()
compat.apply()

from mmcls_involution.weights import paddleclas  # noqa: E402

from .backbones import RedNet  # noqa: E402
from .layers import Involution2d  # noqa: E402
from .model_hub import register_classifiers  # noqa: E402

__all__ = ['Involution2d', 'RedNet']

if find_spec('mmdet') or find_spec('mmseg'):
    from .necks import InvolutionFPN  # noqa: F401

    __all__.append('InvolutionFPN')

if find_spec('mmdet'):
    from .dense_heads import InvolutionRPNHead  # noqa: F401
    from .roi_heads import InvolutionFCNMaskHead  # noqa: F401

    __all__ += ['InvolutionFCNMaskHead', 'InvolutionRPNHead']

register_classifiers()
paddleclas.register()
