"""make_start.py gives the involutions that are named the start that is named."""

import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmcls_involution.ops import Involution2d

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'make_start.py'
CONFIG = ROOT / 'configs' / 'bccd_cells' / 'rednet26_1xb32_bccd-cells.py'


@pytest.fixture(scope='module')
def restart():
    spec = importlib.util.spec_from_file_location('make_start', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.restart


@pytest.mark.parametrize('bias', ['identity', 'random', 'random3', 'zero'])
@pytest.mark.parametrize('scale', [0, 0.3])
def test_weights_and_bias(restart, scale, bias):
    layer = Involution2d(512, kernel_size=5)
    assert restart(nn.Sequential(layer), scale, bias) == ['0']
    span = layer.conv2.conv
    he = scale * math.sqrt(2 / span.out_channels)
    assert span.weight.std().item() == pytest.approx(he, rel=0.05)
    taps = span.bias.detach().unflatten(0, (-1, 5, 5))
    if bias == 'identity':
        middle = nn.functional.one_hot(torch.tensor(12), 25).unflatten(0, (5, 5))
        assert torch.equal(taps, middle + 0 * taps)
    elif bias == 'random':
        assert taps.std().item() == pytest.approx(1 / 5, rel=0.2)
    elif bias == 'random3':
        assert taps[:, 1:4, 1:4].std().item() == pytest.approx(1 / 3, rel=0.2)
        assert torch.equal(nn.functional.pad(taps[:, 1:4, 1:4], (1, 1, 1, 1)), taps)
    else:
        assert not taps.any()


def test_only_the_parts_that_are_named(restart):
    model = nn.ModuleDict({'stem': Involution2d(16), 'neck': Involution2d(16)})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert restart(model, 0.5, 'identity', ['ne']) == ['neck']
    changed = {
        name
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {'neck.conv2.conv.weight', 'neck.conv2.conv.bias'}


def test_command(tmp_path):
    out = tmp_path / 'start.pth'
    options = ('--scale', '0', '--bias', 'identity', '--parts')
    command = [sys.executable, TOOL, CONFIG, out, *options]
    refused = subprocess.run([*command, 'neck'], capture_output=True, text=True)
    assert refused.returncode == 1
    assert refused.stderr.startswith('Error: No involution of')
    assert not out.exists()
    made = subprocess.run([*command, 'backbone.stem'], check=True, capture_output=True)
    assert b'backbone.stem.0' not in made.stdout  # a line for each parameter
    weights = torch.load(out)['state_dict']
    spans = [name for name in weights if name.endswith('conv2.conv.weight')]
    assert {name for name in spans if not weights[name].any()} == {
        'backbone.stem.1.conv2.conv.weight'
    }
