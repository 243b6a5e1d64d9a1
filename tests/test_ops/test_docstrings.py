"""The examples in the docstrings of the public functions run."""

import doctest

import pytest

from mmcls_involution.ops import functional, fused, kernels, modules, swap


@pytest.mark.parametrize(
    'module',
    [functional, fused, kernels, modules, swap],
    ids=lambda module: module.__name__,
)
def test_examples(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
