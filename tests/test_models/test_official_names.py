"""Official checkpoints load as they are: the same names and shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmcls_involution import ops
from mmcls_involution.models import InvolutionFPN, RedNet

FILE = Path(__file__).parents[1] / 'golden' / 'official_state_dicts.json'
OFFICIAL = json.loads(FILE.read_text())
CHANNELS = (256, 512, 1024, 2048)
OURS = {
    **{
        f'cls_rednet{depth}': lambda depth=depth: RedNet(depth)
        for depth in RedNet.arch_settings
    },
    'det_rednet50': lambda: RedNet(50, stem_kernel_size=7),
    'seg_rednet50': lambda: RedNet(50, stem_kernel_size=7),
    'det_fpn_involution': lambda: InvolutionFPN([*CHANNELS], 256, num_outs=5),
    'det_fpn_involution_retina': lambda: InvolutionFPN(
        [*CHANNELS], 256, num_outs=5, start_level=1, add_extra_convs='on_input'
    ),
    'seg_fpn_involution': lambda: InvolutionFPN([*CHANNELS], 256, num_outs=4),
    'involution_c32_k7_s1': lambda: ops.Involution2d(32),
    'involution_c32_k7_s2': lambda: ops.Involution2d(32, stride=2),
}


@pytest.mark.parametrize('name', OFFICIAL)
def test_state_dict_has_the_official_names_and_shapes(name):
    with torch.device('meta'):
        model = OURS[name]()
    ours = {key: list(value.shape) for key, value in model.state_dict().items()}
    assert ours == OFFICIAL[name]
