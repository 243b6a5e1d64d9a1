"""Import a torchvision that was built for another torch."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

_torchvision_schemas: Any = None  # the registration ends when this object dies


def declare_torchvision_ops() -> None:
    """Let a torchvision that was built for another torch be imported.

    Its C++ extension does not load, so its Python side fails with ``operator
    torchvision::nms does not exist``; MMEngine's environment report and MMPretrain's
    transforms import it. With the schemas declared the import succeeds. The compiled
    operators still do not exist, and torchvision says so when one is called.

    Answers https://github.com/pytorch/vision/issues/8985. Does nothing if torchvision
    is absent, already imported, or its extension loads; nor on Windows, where only
    torchvision itself knows the DLL folders to try that with.
    """
    global _torchvision_schemas
    if (
        _torchvision_schemas is not None
        or 'torchvision' in sys.modules
        or os.name == 'nt'
    ):
        return
    spec = importlib.util.find_spec('torchvision')
    if spec is None or spec.origin is None:
        return
    import torch

    try:
        for extension in Path(spec.origin).parent.glob('_C*.so'):
            torch.ops.load_library(extension)
            return
    except OSError:
        pass
    schemas = torch.library.Library('torchvision', 'FRAGMENT')
    schemas.define('nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    schemas.define('qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor')
    _torchvision_schemas = schemas
