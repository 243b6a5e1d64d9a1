"""Small models, and the command ``export`` on a model."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmcls_involution.deployment import export
from mmcls_involution.ops import Involution2d
from mmcls_involution.ops.backends import BACKENDS
from mmcls_involution.paths import ROOT


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    reason = f'not installed: {", ".join(missing)}'
    return pytest.mark.skipif(bool(missing), reason=reason)


needs_onnx = needs('onnx', 'onnxruntime')
needs_onnxscript = needs('onnxscript')
SLIM = dict(depth=26, stem_channels=32, base_channels=16)


def needs_library(operator: str = 'custom') -> None:
    """Skip a test of custom operators where there are none."""
    if operator == 'custom' and BACKENDS['native'].kernels._library() is None:
        pytest.skip('the C++ kernels were not built')


def slim(config: str, **changes) -> nn.Module:
    cfg = Config.fromfile(ROOT / 'configs' / config)
    # Random kernels multiply what they are made of: values of a network without
    # training would differ by powers of ten, and so would errors of rounding.
    involutions = {'model.backbone.involution_cfg': dict(init='identity')}
    cfg.merge_from_dict({'model.backbone.init_cfg': None} | involutions | changes)
    cfg.model.backbone.update(SLIM, norm_cfg=dict(type='BN'))
    with MODELS.switch_scope_and_registry(cfg.default_scope) as registry:
        model = registry.build(cfg.model)
    for module in model.modules():  # as training leaves them: of its own
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
        elif isinstance(module, Involution2d):
            nn.init.normal_(module.conv2.conv.weight, std=0.05)
    return model


def command(
    monkeypatch, model: nn.Module, *arguments: str | Path, backbone: bool = True
) -> None:
    """Run the command on a model, in place of that of a config."""
    model.data_preprocessor = nn.Module()
    cfg = Config(dict(default_scope='mmpretrain'))
    inferencer = SimpleNamespace(model=model, cfg=cfg, classes=['a', 'b'])
    monkeypatch.setattr(export, 'build_inferencer', lambda *_, **__: inferencer)
    parser = argparse.ArgumentParser()
    export.add_arguments(parser)
    options = ['--backbone', '--shape', '5', '7'] if backbone else []
    export.main(parser.parse_args(['CONFIG', *options, *map(str, arguments)]))


class _Tuple(nn.Module):
    """Outputs of a backbone are several."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return (self.layer(x),)


def around(layer: nn.Module) -> nn.Module:
    """A model whose backbone is a layer."""
    return nn.ModuleDict({'backbone': _Tuple(layer)})
