"""Images and labels that stop a run in the middle."""

from __future__ import annotations

import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from mmcls_involution.data import segmentation


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_image_that_is_cut_short(split, workers, coco_root, tool, tmp_path):
    """OpenCV's imread reads such a JPEG and warns, its imdecode gives nothing."""
    root = shutil.copytree(coco_root, tmp_path / 'data')
    torn = cv2.imencode('.jpg', cv2.imread(str(root / '2.png')))[1].tobytes()[:-20]
    (root / '2.png').write_bytes(torn)
    options = [f'{split}_dataloader.dataset.data_root={root}']
    options += [f'{split}_dataloader.num_workers={workers}']
    options += ['val_evaluator.ann_file=' + str(root / 'ann.json')] * (split == 'val')
    message = tool(
        'train', 'detector', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith(f'Error: {root / "2.png"}: cannot be decoded. Damaged'), (
        message
    )
    assert 'mmcls_involution check' in message and len(message.splitlines()) == 1
    command = re.search('python -c "(.*?)"', message)[1]
    os_names = (('NEW.png', tmp_path / 'new.png'), ('IMAGE', root / '2.png'))
    for name, file in os_names:
        command = command.replace(name, str(file))
    exec(command)
    assert np.array(Image.open(tmp_path / 'new.png')).shape == (64, 64, 3)


@pytest.mark.parametrize(
    ('damage', 'expected'),
    [
        (lambda a: a * 3, '.png: has 3 ('),
        (lambda a: np.dstack([a] * 3), 'shape (64, 64, 3)'),
        (lambda a: a[:32], 'is 64x32, its image 64x64'),
    ],
)
def test_damage_that_is_met_in_training(
    damage, expected, seg_copy, tool, tmp_path, monkeypatch
):
    """Label maps that the sample read before a run passes over."""
    monkeypatch.setattr(segmentation, 'SAMPLE', 2)
    for i in (1, 2, 3):  # of four, the first and the third are read
        shutil.copy(seg_copy / 'images' / '0.png', seg_copy / 'images' / f'{i}.png')
    for i in (1, 3):
        file = seg_copy / 'labels' / f'{i}.png'
        Image.fromarray(damage(np.array(Image.open(file)))).save(file)
    options = [f'train_dataloader.dataset.data_root={seg_copy}']
    message = tool(
        'train', 'segmenter', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith('Error: ') and expected in message, message
    assert 'mmcls_involution check' in message


def test_damage_that_is_met_in_an_augmented_test(
    seg_copy, edited, checkpoint, tool, tmp_path
):
    torn = seg_copy / 'images' / '0.png'
    torn.write_bytes(torn.read_bytes()[:-50])
    config = edited(
        'segmenter',
        "tta_model = dict(type='SegTTAModel')\n"
        'tta_pipeline = [\n'
        "    dict(type='LoadImageFromFile'),\n"
        "    dict(type='TestTimeAug', transforms=[[dict(type='PackSegInputs')]]),\n"
        ']\n',
    )
    options = [f'test_dataloader.dataset.data_root={seg_copy}']
    message = tool(
        *('test', 'segmenter', config, checkpoint('segmenter'), '--tta'),
        *('--work-dir', tmp_path / 'w', '--cfg-options', *options),
    )
    assert message.startswith(f'Error: {torn}: '), message


def test_image_too_narrow_to_be_resized(coco_root, tool, tmp_path):
    root = shutil.copytree(coco_root, tmp_path / 'data')
    Image.new('RGB', (2000, 3)).save(root / '2.png')
    options = [f'train_dataloader.dataset.data_root={root}']
    options += ['train_dataloader.dataset.pipeline.2.keep_ratio=True']
    message = tool(
        'train', 'detector', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith(f'Error: {root / "2.png"} ') and 'resize' in message


def test_error_of_ones_own_transform_keeps_its_traceback(tool, tmp_path, monkeypatch):
    from mmcv.transforms import LoadImageFromFile

    def transform(self, results):
        raise ValueError('of ones own')

    monkeypatch.setattr(LoadImageFromFile, 'transform', transform)
    with pytest.raises(ValueError, match='of ones own'):
        tool('train', 'detector', '--work-dir', tmp_path / 'w')
