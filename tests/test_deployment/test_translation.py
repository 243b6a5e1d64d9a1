"""Involution in ONNX as the newer exporter writes it, against PyTorch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from deployment_cases import around, needs_library, needs_onnx, needs_onnxscript
from torch import nn

from mmcls_involution.deployment import export
from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.ops import Involution2d, fused_involution2d

each_operator = pytest.mark.parametrize('operator', ['standard', 'custom'])


@needs_onnx
@needs_onnxscript
@each_operator
@pytest.mark.parametrize(
    'fused, arguments',
    [
        (True, dict(kernel_size=7)),
        (False, dict(kernel_size=7, stride=2)),
        (True, dict(kernel_size=3, stride=3, dilation=3)),
        (False, dict(kernel_size=5, dilation=2)),
        (True, dict(kernel_size=3, group_channels=32)),
        (True, dict(kernel_size=1)),
        (False, dict(kernel_size=1, stride=8)),  # 7 pixels that no window sees
    ],
    ids=str,
)
def test_any_size(fused, arguments, operator, tmp_path):
    """Batches and sizes that the example is not of, down to one pixel."""
    check(Involution2d(32, fused=fused, **arguments), operator, tmp_path)


class _WithoutBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * 9, 8, 1, 1))

    def forward(self, x):
        return fused_involution2d(x, x[:, ::4], self.weight, kernel_size=3, padding=1)


@needs_onnx
@needs_onnxscript
@each_operator
def test_without_bias(operator, tmp_path):
    check(_WithoutBias(), operator, tmp_path)


def check(layer: nn.Module, operator: str, folder: Path) -> None:
    needs_library(operator)
    model = Exported(around(layer), backbone=True)
    file = folder / 'model.onnx'
    image = torch.randn(2, 32, 19, 23)
    options = dict(exporter='dynamo', operator=operator)
    export.export_onnx(model, image, file, dynamic=True, **options)
    sizes = [random.choices(range(1, 40), k=2) for _ in range(3)]
    shapes = [(random.randint(1, 3), 32, *size) for size in [(19, 23), (1, 1), *sizes]]
    export.compare(model, export.load(file, 'onnx', 1, operator), shapes)
