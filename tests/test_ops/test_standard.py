"""Involution in standard operators, as exporters see it, against the reference."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

from mmcls_involution.ops import fused_involution2d, involution2d, standard
from mmcls_involution.ops.registration import grad_of_weight


@pytest.mark.parametrize('fixed', [False, True], ids=['any size', 'fixed sizes'])
@pytest.mark.parametrize('turn', range(12))
def test_standard_operators_agree_with_the_reference(turn, fixed, monkeypatch):
    """With fixed sizes in strips of some rows, down to one, of a part of the batch."""
    monkeypatch.setattr(standard, 'STRIP', 10 ** random.randint(0, 5))
    monkeypatch.setattr(standard, 'PARTS', random.randint(1, 3))
    form_of_sizes = standard.fixed_sizes if fixed else nullcontext
    kernel = random.choice([1, 3, 5, 7])
    stride, dilation = (random.choices([1, 2, 3], k=2) for _ in range(2))
    padding = [random.choice([0, kernel // 2 * d]) for d in dilation]
    size = random.randint(20, 30), random.randint(20, 45)
    batch, groups, reduced = (random.randint(1, 3) for _ in range(3))
    channels = groups * random.choice([1, 4, 16, 20])
    arguments = stride, padding, dilation
    height, width = (
        (s + 2 * p - d * (kernel - 1) - 1) // step + 1
        for s, step, p, d in zip(size, *arguments, strict=True)
    )

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    image, grad = draw(batch, channels, *size), draw(batch, channels, height, width)
    weight = draw(batch, groups, kernel, kernel, height, width)
    expected = involution2d(image, weight, *arguments, backend='reference')
    for form in (standard.involution2d, standard.involution2d_by_rows):
        with form_of_sizes():
            found = form(image, weight, *arguments)
        torch.testing.assert_close(found, expected)

    torch.testing.assert_close(
        standard.grad_of_weight(grad, image, weight.shape, *arguments),
        grad_of_weight(grad, image, weight.shape, *arguments, 'reference'),
    )

    small = draw(batch, reduced, height, width)
    span = draw(groups * kernel**2, reduced, 1, 1)
    bias = random.choice([None, draw(len(span))])
    names = ('stride', 'padding', 'dilation')
    options = dict(zip(names, arguments, strict=True))
    expected = fused_involution2d(
        image, small, span, bias, kernel_size=kernel, backend='reference', **options
    )
    for form in (standard.fused_involution2d, standard.fused_involution2d_by_rows):
        with form_of_sizes():
            found = form(image, small, span, bias, (kernel, kernel), *arguments)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('kernel, stride, width', [(3, 3, 23), (1, 8, 56), (3, 2, 15)])
def test_pixels_at_the_end_that_no_window_sees(kernel, stride, width):
    image = torch.randn(1, 4, kernel, width, dtype=torch.float64)
    outputs = (width - kernel) // stride + 1
    weight = torch.randn(1, 1, kernel, kernel, 1, outputs, dtype=torch.float64)
    arguments = (stride, stride), (0, 0), (1, 1)
    expected = involution2d(image, weight, *arguments, backend='reference')
    found = standard.involution2d(image, weight, *arguments)
    torch.testing.assert_close(found, expected)
