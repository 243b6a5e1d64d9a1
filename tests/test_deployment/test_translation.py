"""Involution in ONNX's operators as the newer exporter writes them, against PyTorch."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from deployment_cases import Tuple, needs_onnx, needs_onnxscript
from torch import nn

from mmcls_involution.deployment import export
from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.ops import Involution2d, fused_involution2d


@needs_onnx
@needs_onnxscript
@pytest.mark.parametrize(
    'fused, arguments',
    [
        (True, dict(kernel_size=7)),
        (False, dict(kernel_size=7, stride=2)),
        (True, dict(kernel_size=3, stride=3, dilation=3)),
        (False, dict(kernel_size=5, dilation=2)),
        (True, dict(kernel_size=1)),
    ],
    ids=str,
)
def test_any_size(fused, arguments, tmp_path):
    """Batches and sizes that the example is not of, down to one pixel."""
    check(nn.Sequential(Involution2d(32, fused=fused, **arguments)), tmp_path)


class _WithoutBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * 9, 8, 1, 1))

    def forward(self, x):
        return fused_involution2d(x, x[:, ::4], self.weight, kernel_size=3, padding=1)


@needs_onnx
@needs_onnxscript
def test_without_bias(tmp_path):
    check(_WithoutBias(), tmp_path)


def check(layer: nn.Module, folder: Path) -> None:
    model = Exported(nn.ModuleDict({'backbone': Tuple(layer)}), backbone=True)
    file = folder / 'model.onnx'
    image = torch.randn(2, 32, 19, 23)
    export.export_onnx(model, image, file, dynamic=True, exporter='dynamo')
    sizes = [random.choices(range(1, 40), k=2) for _ in range(3)]
    shapes = [(random.randint(1, 3), 32, *size) for size in [(19, 23), (1, 1), *sizes]]
    export.compare(model, export.load(file, 'onnx', threads=1), shapes)
