"""Configs that have mistakes, and those that only look as if they had."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from mmcls_involution.engine.config import check_output
from mmcls_involution.engine.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ('task', 'option', 'expected'),
    [
        ('detector', 'train_dataloder.batch_size=4', 'no .train_dataloder.*train_data'),
        ('detector', 'param_scheduler.9.end=3', 'param_scheduler.9.end does not fit'),
        ('detector', 'train_cfg.max_epochs.x=3', 'x does not fit.*config of your own'),
        ('detector', 'model.backbone.type=RedNett', 'RedNett.*Did you mean RedNet'),
        (
            'detector',
            'model.backbone.dept=26',
            "RedNet has no argument 'dept'. Did you mean depth.* It takes .*strides",
        ),
        ('detector', 'model.backbone.depth=27', 'Cannot build RedNet.*27'),
        ('detector', 'optim_wrapper.optimizer.type=SDG', 'optimizer.*SDG.*mean.*SGD'),
        ('detector', 'param_scheduler.0.type=LinearRL', 'LinearRL.*LinearLR'),
        ('detector', 'train_dataloader.dataset.pipeline.0.type=LoadImage', 'LoadImage'),
        ('detector', 'train_dataloader.dataset.type=CocoDataSet', 'CocoDataset'),
        ('detector', 'train_dataloader.bach_size=4', "unexpected.*'bach_size'"),
        ('detector', 'train_cfg.max_epoch=4', "no argument 'max_epoch'.*max_epochs"),
        ('detector', 'model.bbox_head.num_classes=80', 'num_classes is 80.*2 classes'),
        ('segmenter', 'model.decode_head.num_classes=19', 'num_classes is 19.*2 clas'),
        ('detector', 'load_from=/path/to/rednet50.pth', 'load_from is a placeholder'),
        ('detector', 'load_from=nowhere.pth', 'load_from: nowhere.pth does not exist'),
        (
            'detector',
            'model.backbone.init_cfg.type=Pretrained '
            'model.backbone.init_cfg.checkpoint=no.pth',
            'backbone.init_cfg.checkpoint: no.pth does not exist',
        ),
        (
            'detector',
            'train_dataloader.dataset.data_root=nowhere',
            'train_dataloader.dataset.data_root: nowhere does not exist.*nearest',
        ),
        (
            'detector',
            'train_dataloader.dataset.ann_file=none.json',
            'train_dataloader.dataset.ann_file: .*none.json does not exist',
        ),
        (
            'detector',
            'train_dataloader.dataset.data_prefix.img=none',
            'train_dataloader.dataset.data_prefix.img: .*none does not exist',
        ),
        (
            'detector',
            'train_dataloader.dataset.data_prefix.img=..',
            'names the photo 0.png, which is not in the folder',
        ),
        (
            'segmenter',
            'val_dataloader.dataset.data_prefix.seg_map_path=none',
            'val_dataloader.dataset.data_prefix.seg_map_path: .*none does not exist',
        ),
        (
            'detector',
            'val_evaluator.ann_file=none.json',
            'val_evaluator.ann_file: none.json does not exist',
        ),
        (
            'detector',
            'train_dataloader.dataset.metainfo.classes=square,car',
            "'car' not among its categories.*'square', 'bar'",
        ),
        (
            'detector',
            'train_dataloader.dataset.metainfo.classes=bar,square',
            'the order differs',
        ),
        (
            'detector',
            'train_dataloader.dataset.metainfo.classes=square',
            r"the text 'square'.*classes=\('square',\)",
        ),
        ('segmenter', 'default_scope=mmsegg', 'no library.*mean mmseg'),
        # values of another kind
        ('classifier', 'model=5', 'classifier.py: model is 5, and should be a dict'),
        ('classifier', 'model.backbone=5', 'backbone is 5, and should be a dict'),
        ('classifier', 'model.neck=5', 'build a model from 5: it should be a dict'),
        ('classifier', 'model.neck.type=5', 'Cannot build 5.*type must be a str'),
        (
            'classifier',
            'optim_wrapper=[5]',
            r'optim_wrapper is \[5\], and should be a di',
        ),
        ('classifier', 'optim_wrapper.optimizer=SGD', "optimizer is 'SGD'.* be a dict"),
        ('classifier', 'optim_wrapper.optimizer.type=5', '5 is no type'),
        ('classifier', 'optim_wrapper.optimizer.lr=high', 'Cannot build SGD.*'),
        ('classifier', 'param_scheduler=5', 'is 5, and should be a dict or a list'),
        ('classifier', 'custom_hooks=[5]', 'custom_hooks.0 is 5, and should be a dict'),
        ('classifier', 'default_hooks.timer=5', 'default_hooks.timer is 5, and should'),
        ('classifier', 'default_hooks.checkpoint.interval=x', 'interval should be an'),
        ('classifier', 'val_evaluator.topk=1,5', 'topk asks for the best 5 of 2 clas'),
        ('classifier', 'train_dataloader.dataset=5', 'dataset is 5, and should be a'),
        ('classifier', 'train_dataloader.dataset.type=5', '5 is no type'),
        ('classifier', 'train_dataloader.dataset.data_prefix=5', 'dict or a text'),
        ('classifier', 'train_dataloader.dataset.metainfo=a,b', 'should be a dict, su'),
        ('classifier', 'train_dataloader.dataset.classes=2', 'classes is 2, and sho'),
        ('classifier', 'val_dataloader.dataset.metainfo.classes=2', 'fo.classes is 2'),
        ('classifier', 'train_dataloader.batch_size=x', 'batch_size should be a posit'),
        ('classifier', 'val_dataloader.batch_size=x', 'batch_size should be a positi'),
        ('classifier', 'train_cfg.max_epochs=x', "Cannot build ExactEpochLoop.*'x'"),
        ('classifier', 'randomness.seed=x', 'Cannot set up the randomness of the conf'),
        ('classifier', 'env_cfg.mp_cfg=5', 'Cannot set up the env of the config.*not'),
        ('classifier', 'resume=maybe', "resume is 'maybe', and should be True or Fal"),
    ],
)
def test_config_error_is_one_message(task, option, expected, tool, tmp_path):
    options = ['--cfg-options', *option.split()]
    message = tool('train', task, '--work-dir', tmp_path, *options)
    assert message.startswith('Error: ')
    assert re.search(expected, message, re.DOTALL), message
    assert not list(tmp_path.glob('*.pth'))


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('optim_wraper = dict()', "'optim_wraper' would be ignored.*'optim_wrapper'"),
        ('model = dict(', 'Cannot read the config .*edited.py: SyntaxError'),
        ("model = dict(backbone=dict(depth='50'))", "depth must be one of.*got '50'"),
        ('x = y', "Cannot read the config .*NameError: name 'y' is not defined"),
        ("_base_ = './none.py'  #", 'Cannot read the config .*none.py'),
        ('train_dataloader = None', "no 'train_dataloader'"),
        ('model = None', "no 'model'"),
        ('val_evaluator = None', "no 'val_evaluator'"),
        (
            "custom_imports = dict(imports=['no_such_module'])",
            'no_such_module.*mmcls_involution.doctor',
        ),
    ],
)
def test_config_file_error_is_one_message(text, expected, tool, edited, tmp_path):
    file = edited('detector', text)
    message = tool('train', 'detector', file, '--work-dir', tmp_path)
    assert message.startswith('Error: ')
    assert re.search(expected, message, re.DOTALL), message


@pytest.mark.parametrize(
    ('text', 'warns'),
    [
        ("work_dirs = 'runs'", True),
        ('train_cfgs = dict()', True),
        ('optim_wraper = dict(lr=1)\nrate = optim_wraper["lr"]', False),
    ],
)
def test_variables_of_the_user_pass(text, warns, tool, edited, tmp_path, capfd):
    """What is refused comes after: the config has been read."""
    file = edited('detector', text)
    options = ['--cfg-options', 'load_from=nowhere.pth']
    message = tool('train', 'detector', file, '--work-dir', tmp_path, *options)
    assert message.startswith('Error: load_from: nowhere.pth does not exist')
    said = 'is taken for a variable of yours' in ''.join(capfd.readouterr())
    assert said == warns


@pytest.mark.parametrize(
    ('option', 'warns'),
    [('dataset.ann_file=none.json', True), ('optim_wrapper.optimizer.lr=1', False)],
)
def test_option_that_sets_a_variable_is_named(option, warns, tool, tmp_path, capfd):
    """What the config has made of the variable stays as it is."""
    options = ['--cfg-options', option, 'load_from=nowhere.pth']
    message = tool('train', 'detector', '--work-dir', tmp_path, *options)
    assert message.startswith('Error: load_from: nowhere.pth does not exist')
    said = f'{option.split("=")[0]}: ' in ''.join(capfd.readouterr())
    assert said == warns


def test_stock_config_without_this_package(tool, tmp_path):
    """A config that only inherits upstream, and data that are not there."""
    pytest.importorskip('mmseg')
    file = tmp_path / 'stock.py'
    file.write_text(
        "_base_ = 'mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py'\n"
    )
    options = ['--cfg-options', 'model.pretrained=None']
    message = tool('train', 'segmenter', file, '--work-dir', tmp_path, *options)
    assert re.search('data_root: data/cityscapes.* does not exist', message)


def test_missing_config_names_similar_ones(tool):
    message = tool('train', 'detector', ROOT / 'tests' / 'tiny' / 'detectr.py')
    assert re.search(
        r'Config not found: .*detectr.py. Did you mean .*detector.py', message
    )


def test_quote_in_a_path(coco_root, tool, command, edited, tmp_path, monkeypatch):
    """A work dir may have one; a place that is written into a config may not."""
    file = edited('detector', '')
    root = shutil.copytree(coco_root, tmp_path / "it's")
    monkeypatch.setenv('TINY_DATA', str(root))
    message = command('train', file)
    assert f'The environment variable TINY_DATA is {root}: a' in message
    options = ['--cfg-options', f'train_dataloader.dataset.data_root={root}']
    arguments = ['--work-dir', tmp_path / "its' work", '--no-validate', *options]
    assert tool('train', 'detector', *arguments) == ''


def test_missing_data_names_the_variable_for_its_place(command, tmp_path, monkeypatch):
    monkeypatch.setenv('TINY_DATA', 'no-such-folder')
    file = ROOT / 'tests' / 'tiny' / 'detector.py'
    message = command('train', file, '--work-dir', tmp_path)
    assert re.search('no-such-folder does not exist.*variable TINY_DATA or', message)


@pytest.mark.parametrize('in_place', [False, True])
def test_where_an_output_needs_leave_to_write(in_place, tmp_path, monkeypatch):
    """In the folder, unless it is written over an earlier one (such as /dev/null)."""
    (tmp_path / 'old').touch()
    monkeypatch.setattr('os.access', lambda path, mode: path != tmp_path)
    for name in ('new', 'old'):
        if name == 'old' and in_place:
            check_output(tmp_path / name, '--out', in_place)
            continue
        with pytest.raises(UserError, match=f'^--out: {tmp_path} is read-only'):
            check_output(tmp_path / name, '--out', in_place)
