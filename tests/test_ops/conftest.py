"""The fixture behind the backends of op_cases.py; kernels compiled once for tests."""

import pytest
import torch
from op_cases import TRITON_KERNELS

from mmcls_involution.ops import BACKENDS
from mmcls_involution.ops.backends.contract import Problem


@pytest.fixture
def backend(request):
    """Name of a backend; tensors are made on its device unless told otherwise."""
    name, device = request.param
    dtype = request.node.callspec.params.get('dtype', torch.float32)
    if reason := BACKENDS[name].supports(Problem.typical(device, dtype)):
        pytest.skip(reason)
    with torch.device(device), torch.backends.cudnn.flags(deterministic=True):
        yield name


@pytest.fixture(autouse=True)
def one_candidate(monkeypatch):
    """The tuner gets one, on a GPU: each would be compiled for every test's sizes."""
    if not torch.cuda.is_available():
        return
    from mmcls_involution.ops.backends.triton_kernels import kernels
    from mmcls_involution.ops.backends.triton_kernels.tuner import candidates

    def first(*arguments, **constants):
        return candidates(*arguments, **constants)[:1]

    for name in TRITON_KERNELS:
        tuner = getattr(kernels, name)
        monkeypatch.setattr(tuner, 'early_config_prune', first)
        monkeypatch.setattr(tuner, 'cache_results', False)
