"""The fixture behind the backends of op_cases.py."""

import pytest
import torch


@pytest.fixture
def backend(request):
    """Name of a backend; tensors are made on its device unless told otherwise."""
    name, device = request.param
    with torch.device(device):
        yield name
