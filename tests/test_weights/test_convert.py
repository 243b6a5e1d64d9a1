"""Official checkpoints into ours."""

from __future__ import annotations

import os
import pickle
import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from weights_cases import SLIM, Bomb, Weights, digest, load_anywhere, renamed, same

from mmcls_involution.models import RedNet
from mmcls_involution.weights.convert import local

CONVERTER = 'convert'
SLIM_CONFIG = """
default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmcls_involution.models'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='RedNet', depth=26, base_channels=16, stem_channels=32,
        stem_kernel_size={stem},
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=2, in_channels=512),
)
"""


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / 'slim.py'
    path.write_text(SLIM_CONFIG.format(stem=3))
    return path


@pytest.fixture
def config7(tmp_path) -> Path:
    path = tmp_path / 'slim_stem7.py'
    path.write_text(SLIM_CONFIG.format(stem=7))
    return path


def backbone_of(weights: Weights) -> Weights:
    return {n: v for n, v in weights.items() if n.startswith('backbone.')}


def wrapped(weights: Weights) -> dict:
    """As mmcls 0.x saves: an OrderedDict, optimizer state, and numpy in the meta."""
    return dict(
        meta=dict(
            mmcls_version='0.10.0',
            CLASSES=('dark', 'light'),
            hook_msgs=dict(best_score=np.float64(78.3)),
        ),
        state_dict=OrderedDict(weights),
        optimizer=dict(state={0: dict(momentum_buffer=torch.rand(3))}),
    )


@pytest.mark.parametrize(
    'form',
    [
        lambda w: w,
        lambda w: wrapped(w),
        lambda w: wrapped(renamed(w, '', 'module.')),
        lambda w: backbone_of(w),
        lambda w: wrapped(renamed(backbone_of(w), 'backbone.', '')),
        lambda w: renamed(backbone_of(w), 'backbone.', 'module.'),
        lambda w: renamed(backbone_of(w), '', 'module.'),
    ],
    ids=['whole', 'wrapped', 'module', 'backbone', 'bare', 'module-bare', 'module-bb'],
)
def test_every_form_of_the_same_weights(
    form, weights, config, command, tmp_path, capsys
):
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    content = form(weights)
    torch.save(content, src)
    assert command(CONVERTER, src, dst, '--config', config) == ''

    result = load_anywhere(dst)
    alone = not any('head.' in name for name in content.get('state_dict', content))
    assert same(result['state_dict'], backbone_of(weights) if alone else weights)
    assert result.keys() == {'meta', 'state_dict'}
    assert result['meta']['converted_from'] == dict(
        name='official.pth', sha256=digest(src)
    )
    names = result['meta'].get('dataset_meta', {}).get('classes')
    assert names == (('dark', 'light') if 'meta' in content else None)
    output = capsys.readouterr().out
    assert output.count(digest(src)) == output.count(digest(dst)) == 1
    assert 'RedNet-26, stem_kernel_size 3' in output
    assert sorted(os.listdir(tmp_path)) == ['official.pth', 'ours.pth', 'slim.py']


def test_result_is_what_init_cfg_loads(weights, config, command, tmp_path):
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(renamed(backbone_of(weights), 'backbone.', ''), src)
    assert command(CONVERTER, src, dst, '--config', config) == ''
    init_cfg = dict(type='Pretrained', checkpoint=str(dst), prefix='backbone.')
    model = RedNet(**SLIM, init_cfg=init_cfg)
    model.init_weights()
    state = {f'backbone.{name}': value for name, value in model.state_dict().items()}
    assert same(state, backbone_of(weights))


def test_counters_of_batch_norm_may_be_missing(
    weights, config, command, tmp_path, capsys
):
    src, dst = tmp_path / 'old.pth', tmp_path / 'ours.pth'
    counters = {n for n in weights if n.endswith('num_batches_tracked')}
    torch.save({n: v for n, v in weights.items() if n not in counters}, src)
    assert command(CONVERTER, src, dst, '--config', config) == ''
    result = load_anywhere(dst)['state_dict']
    assert same({n: v for n, v in result.items() if n not in counters}, {
        n: v for n, v in weights.items() if n not in counters
    })  # fmt: skip
    assert {int(result[name]) for name in counters} == {0}
    assert (
        f'{len(counters)} x num_batches_tracked was missing' in capsys.readouterr().out
    )


def refused(command, tmp_path, content: object, config: Path) -> str:
    """The message of a conversion that must leave nothing behind."""
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    if not src.exists():
        torch.save(content, src)
    before = sorted(os.listdir(tmp_path))
    message = command(CONVERTER, src, dst, '--config', config)
    assert sorted(os.listdir(tmp_path)) == before
    return message


def test_all_that_does_not_fit_is_listed(weights, config, command, tmp_path):
    del weights['backbone.layer2.1.conv2.conv1.bn.running_var']
    weights['backbone.layer2.1.conv2.conv1.weight'] = torch.rand(1)
    weights['head.fc.bias'] = torch.rand(3)
    message = refused(command, tmp_path, weights, config)
    assert message.startswith('Error: ') and 'official.pth' in message
    listed = re.findall(r'(\d+ .*:)\n  (.*)', message)
    assert listed == [
        ('1 missing:', 'backbone.layer2.1.conv2.conv1.bn.running_var'),
        ('1 of no use:', 'backbone.layer2.1.conv2.conv1.weight'),
        ('1 of another shape:', 'head.fc.bias is (3,), the model has (2,)'),
    ]
    assert '--config must be the config of the very model' in message


def test_long_lists_are_cut(config, command, tmp_path):
    state = RedNet(**{**SLIM, 'depth': 38}).state_dict()
    message = refused(command, tmp_path, state, config)
    missing = set(state) - set(RedNet(**SLIM).state_dict())
    assert f'{len(missing)} of no use:' in message
    assert f'  ... and {len(missing) - 20} more' in message


@pytest.mark.parametrize('form', [wrapped, backbone_of])
def test_a_larger_stem_takes_the_weights(
    form, weights, config7, command, tmp_path, capsys
):
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(form(weights), src)
    assert command(CONVERTER, src, dst, '--config', config7) == ''
    assert 'stem_kernel_size 3' in capsys.readouterr().out  # what the source has
    name = 'backbone.stem.1.conv2.conv.bias'
    taps = load_anywhere(dst)['state_dict'][name].view(7, 7)
    assert torch.equal(taps[2:5, 2:5].flatten(), weights[name])
    assert taps.count_nonzero() == weights[name].count_nonzero()


def test_a_smaller_stem_is_refused_with_the_reason(config, command, tmp_path):
    state = RedNet(**SLIM, stem_kernel_size=7).state_dict()
    message = refused(command, tmp_path, state, config)
    assert 'their stem involutions differ' in message
    assert 'official ImageNet models have stem_kernel_size=3' in message


@pytest.mark.parametrize('name', ['a.pdparams', 'a.pth'])
def test_sources_elsewhere(name, weights, config, command, tmp_path, monkeypatch):
    (tmp_path / 'served').mkdir()
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    if name == 'a.pth':
        torch.save(weights, tmp_path / 'served' / name)
    else:
        paddle = {
            name.removeprefix('backbone.')
            .removeprefix('head.')
            .replace('running_mean', '_mean')
            .replace('running_var', '_variance'): (
                value.T if name == 'head.fc.weight' else value
            ).numpy()
            for name, value in weights.items()
            if value.is_floating_point()
        }
        (tmp_path / 'served' / name).write_bytes(pickle.dumps(paddle))
    url = f'file://{tmp_path}/served/{name}'  # the real server is test_paddleclas.py's
    by_url, by_path = tmp_path / 'by_url.pth', tmp_path / 'by_path.pth'
    assert command(CONVERTER, url, by_url, '--config', config) == ''
    source = tmp_path / 'served' / name
    assert command(CONVERTER, source, by_path, '--config', config) == ''
    assert by_url.read_bytes() == by_path.read_bytes()
    found = load_anywhere(by_path)['state_dict']
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        if value.is_floating_point():
            assert torch.equal(found[name], value)
    gone = command(CONVERTER, f'{url}.pth', tmp_path / 'new.pth', '--config', config)
    assert 'cannot download file://' in gone


def test_files_of_one_name_from_two_addresses(weights, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    files = [tmp_path / run / 'last-20260101.pth' for run in 'ab']  # a date, no hash
    for i, file in enumerate(files):
        file.parent.mkdir()
        torch.save(dict(weights, of=torch.tensor(i)), file)
    assert [torch.load(local(f'file://{f}'))['of'] for f in files * 2] == [0, 1, 0, 1]


def test_says_whether_a_file_is_the_published_one(
    weights, config, command, tmp_path, capsys
):
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(weights, src)
    named = tmp_path / f'rednet26-{digest(src)[:8]}.pth'
    src.rename(named)
    assert command(CONVERTER, named, dst, '--config', config) == ''
    assert 'the published file: its name has the hash' in capsys.readouterr().out
    other = named.rename(tmp_path / 'rednet26-4948f75f.pth')
    assert command(CONVERTER, other, dst, '--config', config, '--overwrite') == ''
    text = capsys.readouterr().out
    assert 'not the published file rednet26-4948f75f.pth' in text
    assert 'begins with 4948f75f' in text


def test_classifier_for_a_detector(weights, command, tmp_path):
    config = tmp_path / 'detector.py'
    text = SLIM_CONFIG[: SLIM_CONFIG.index('    neck=')].format(stem=3)
    text = text.replace('mmpretrain', 'mmdet')
    text = text.replace('ImageClassifier', 'SingleStageDetector')
    config.write_text(
        f"{text}bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=512))"
    )
    message = refused(command, tmp_path, weights, config)
    assert 'missing:\n  bbox_head.cls_convs.0.conv.weight' in message
    assert '2 of no use:\n  head.fc.weight\n  head.fc.bias' in message
    assert 'These are weights of a classifier' in message and 'REDNET50' in message


@pytest.mark.parametrize(
    'content, reason',
    [
        (dict(state_dict={}), 'holds no weights'),
        (dict(model=dict(a=torch.rand(1))), r"found \['model'\]"),
        ([torch.rand(1)], 'holds no weights: expected a dict of tensors'),
        (dict(conv1=torch.rand(1)), 'these are no weights of RedNet'),
    ],
)
def test_files_without_weights(content, reason, config, command, tmp_path):
    assert re.search(reason, refused(command, tmp_path, content, config))


@pytest.mark.parametrize(
    'meta', [None, 'text', [1], 3, torch.zeros(3), dict(CLASSES='cat')], ids=str
)
def test_odd_meta_data(meta, weights, config, command, tmp_path):
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(dict(state_dict=weights, meta=meta), src)
    assert command(CONVERTER, src, dst, '--config', config) == ''
    result = load_anywhere(dst)
    assert same(result['state_dict'], weights)
    assert 'dataset_meta' not in result['meta']


@pytest.mark.parametrize('shape', [(), (0,), (16, 0, 1, 1)])
def test_stem_of_another_shape(shape, weights, config, command, tmp_path):
    weights['backbone.stem.1.conv1.conv.weight'] = torch.zeros(shape)
    message = refused(command, tmp_path, weights, config)
    assert 'official.pth and ' in message and 'stem' in message


def test_file_that_would_run_code(weights, config, command, tmp_path):
    message = refused(command, tmp_path, dict(state_dict=weights, meta=Bomb()), config)
    assert 'Refused to load' in message and 'system' in message
    assert "['state_dict'], NEW_PATH)" in message  # the way out


def test_torn_file(weights, config, command, tmp_path):
    src = tmp_path / 'official.pth'
    torch.save(weights, src)
    src.write_bytes(src.read_bytes()[:-1000])
    assert 'is not a complete checkpoint' in refused(command, tmp_path, None, config)


def test_nothing_is_overwritten_unasked(weights, config, command, tmp_path):
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(weights, src)
    dst.write_text('precious')
    assert '--overwrite' in command(CONVERTER, src, dst, '--config', config)
    assert dst.read_text() == 'precious'
    assert command(CONVERTER, src, dst, '--config', config, '--overwrite') == ''
    assert same(load_anywhere(dst)['state_dict'], weights)


def test_full_disk_leaves_nothing(weights, config, command, tmp_path, monkeypatch):
    def fail(content, file):
        file.write(b'half')
        raise RuntimeError('unexpected pos 64 vs 0')

    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(weights, src)
    dst.write_text('precious')
    monkeypatch.setattr(torch, 'save', fail)
    message = command(CONVERTER, src, dst, '--config', config, '--overwrite')
    assert re.search('cannot write .*ours.pth: unexpected pos', message)
    assert dst.read_text() == 'precious'
    assert sorted(os.listdir(tmp_path)) == ['official.pth', 'ours.pth', 'slim.py']


@pytest.mark.parametrize(
    'arguments, reason',
    [
        (('no.pth', 'ours.pth'), 'the input: .*no.pth does not exist'),
        (('official.pth', '.'), 'is a folder: name a file'),
        (('official.pth', 'no/ours.pth'), 'does not exist: make it'),
    ],
)
def test_paths(arguments, reason, weights, config, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(weights, 'official.pth')
    assert re.search(reason, command(CONVERTER, *arguments, '--config', config))


@pytest.mark.parametrize('kind', ["'mmcls_involution.RedNet'", 'RedNet'])
def test_rednet_by_scope_or_class(kind, weights, config, command, tmp_path):
    text = config.read_text().replace("type='RedNet'", f'type={kind}')
    if kind == 'RedNet':  # MMEngine's configs of pure Python
        custom_imports = re.search('custom_imports = .*\n', text)[0]
        text = text.replace(custom_imports, '')
        text = f'from mmcls_involution.models import RedNet\n{text}'
    config.write_text(text)
    src, dst = tmp_path / 'official.pth', tmp_path / 'ours.pth'
    torch.save(weights, src)
    assert command(CONVERTER, src, dst, '--config', config) == ''
    assert dst.is_file()


def test_config_without_rednet(weights, config, command, tmp_path):
    config.write_text(config.read_text().replace("'RedNet', depth=26", "'ResNet'"))
    assert 'no model with the backbone RedNet' in refused(
        command, tmp_path, weights, config
    )
