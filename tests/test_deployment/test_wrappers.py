"""Which models are exported, and what is said of the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmcls_involution.deployment import export
from mmcls_involution.deployment.wrappers import Exported
from mmcls_involution.engine.errors import UserError


def test_other_heads_are_refused():
    class Head(nn.Module):
        def forward(self, features):
            return features, features, features  # the third may be how central it is

    model = nn.ModuleDict({'bbox_head': Head()})
    model.extract_feat = lambda image: (image,)
    with pytest.raises(UserError, match='Head gives 3 kinds of maps'):
        Exported(model)(torch.randn(1, 3, 4, 4))
    cascade = nn.ModuleDict({'decode_head': nn.ModuleList()})
    with pytest.raises(UserError, match='is no classifier, encoder-decoder segmenter'):
        Exported(cascade)
    masks_alone = nn.ModuleDict({'mask_head': Head()})  # as SOLO is
    masks_alone.bbox_head = None
    with pytest.raises(UserError, match='is no classifier, encoder-decoder segmenter'):
        Exported(masks_alone)


class _Needs(nn.Module):
    """A head of a transformer, which takes queries too."""

    def forward(self, features, queries):
        return features, features


class _Two(nn.Module):
    """A head with an output for training, as EncHead has one."""

    def forward(self, features):
        return features[0], features[0]


class _Pairs(nn.Module):
    """A head whose boxes are two maps of each level, as SABLRetinaHead's are."""

    def forward(self, features):
        return [features[0]], [(features[0], features[0])]


@pytest.mark.parametrize(
    'parts, message',
    [
        (dict(bbox_head=_Pairs()), '_Pairs gives a tuple for each level'),
        (dict(bbox_head=_Needs()), '_Needs does not take feature maps alone: '),
        (dict(decode_head=_Needs()), '_Needs does not take feature maps alone: '),
        # CascadeRPNHead has no forward: it predicts in stages
        (dict(rpn_head=nn.Module()), 'Module does not take feature maps alone: '),
        (dict(decode_head=_Two()), '_Two gives tuple, not one tensor of logits'),
        (dict(head=_Two()), '_Two gives tuple, not one tensor of logits'),
    ],
)
def test_heads_that_need_or_give_more_are_refused(parts, message, tmp_path):
    model = nn.ModuleDict(parts)
    model.extract_feat = lambda image: (image,)
    with pytest.raises(UserError, match=f'{message}.*--backbone exports'):
        Exported(model)(torch.randn(1, 3, 4, 4))
    image, file = torch.randn(1, 3, 4, 4), tmp_path / 'model.pt2'
    with pytest.raises(UserError, match=message):
        export.export_pt2(Exported(model), image, file, dynamic=False, decompose=False)


def test_models_without_head_or_backbone_are_refused():
    model = nn.ModuleDict({'backbone': nn.Identity()})
    model.head = None
    with pytest.raises(UserError, match='is no classifier.*--backbone exports'):
        Exported(model)
    tracker = nn.ModuleDict({'detector': nn.Identity()})
    with pytest.raises(UserError, match='two-stage detector[.]$'):
        Exported(tracker)
    with pytest.raises(UserError, match='--backbone: ModuleDict has no backbone'):
        Exported(tracker, backbone=True)


def test_a_backbone_may_give_one_tensor():
    """As DDRNet and PIDNet do when they do not train."""
    model = nn.ModuleDict({'backbone': nn.Conv2d(3, 4, 1)})
    image = torch.randn(2, 3, 5, 7)
    (feature,) = Exported(model, backbone=True)(image)
    torch.testing.assert_close(feature, model.backbone(image))


def test_stages_that_are_no_tensors_are_refused():
    class Branches(nn.Module):  # as Conformer's
        def forward(self, image):
            return (image, [image, image])

    model = nn.ModuleDict({'backbone': Branches()})
    with pytest.raises(UserError, match='Branches gives a list for a stage'):
        Exported(model, backbone=True)(torch.randn(1, 3, 4, 4))


@pytest.mark.parametrize('size', [3, (2, 5), (None, 1), (4, None)])
def test_pools_to_any_size(size):
    model = nn.ModuleDict({'backbone': nn.Sequential(nn.AdaptiveAvgPool2d(size))})
    image = torch.randn(2, 3, 7, 9)
    (feature,) = Exported(model, backbone=True)(image)
    torch.testing.assert_close(feature, model.backbone(image))


class _Apart(nn.Module):
    """A norm that follows a convolution by name alone, as in NAS-FCOS."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.last = nn.Conv2d(3, 4, 1)
        self.first = norm

    def forward(self, x):
        return (self.last(self.first(x)),)


def test_norms_of_another_order_stay():
    class First(nn.Module):  # as a ConvModule of the order norm, act, conv
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return (self.conv(self.norm(x)),)

    model = nn.ModuleDict({'backbone': First()}).eval()
    model.backbone.norm.running_var.fill_(4)
    image = torch.randn(2, 3, 4, 5)
    exported = Exported(model, backbone=True, image=image)
    torch.testing.assert_close(exported(image), model.backbone(image))


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False),
    ],
    ids=['channels', 'no statistics', 'no weights'],
)
def test_norms_that_cannot_be_folded_stay(norm):
    model = nn.ModuleDict({'backbone': _Apart(norm)}).eval()
    image = torch.randn(2, 3, 4, 5)
    exported = Exported(model, backbone=True)
    torch.testing.assert_close(exported(image), model.backbone(image))
    exported = Exported(nn.ModuleDict({'backbone': nn.Identity(), 'head': model}))
    assert isinstance(exported.model.head.backbone.first, nn.BatchNorm2d)
