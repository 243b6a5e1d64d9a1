"""The full check on small data sets of each format, sound ones and damaged ones."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope
from PIL import Image

from mmcls_involution import __main__ as commands
from mmcls_involution.data import checks, images

ROOT = Path(__file__).parents[2]

# Just what the check reads: to inherit upstream's, as tests/tiny does, takes a second.
CONFIGS = dict(
    detector="""
default_scope = 'mmdet'
model = dict(bbox_head=dict(num_classes=2))
train_dataloader = dict(dataset=dict(type='CocoDataset',
    data_root='{root}', ann_file='ann.json', data_prefix=dict(img=''),
    metainfo=dict(classes=('square', 'bar')),
    pipeline=[dict(type='LoadAnnotations', with_mask=False)]))
""",
    segmenter="""
default_scope = 'mmseg'
model = dict(decode_head=dict(num_classes=2))
train_dataloader = dict(dataset=dict(type='BaseSegDataset',
    data_root='{root}', data_prefix=dict(img_path='images', seg_map_path='labels'),
    img_suffix='.png', metainfo=dict(classes=('top', 'bottom'))))
""",
    cityscapes="""
default_scope = 'mmseg'
model = dict(decode_head=dict(num_classes=19))
train_dataloader = dict(dataset=dict(type='CityscapesDataset', data_root='{root}',
    data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train')))
""",
    classifier="""
default_scope = 'mmpretrain'
model = dict(head=dict(num_classes=2))
train_dataloader = dict(dataset=dict(type='CustomDataset', data_prefix='{root}'))
""",
    imagenet="""
default_scope = 'mmpretrain'
model = dict(head=dict(num_classes=1000))
train_dataloader = dict(dataset=dict(
    type='ImageNet', data_root='{root}', split='train'))
val_dataloader = dict(dataset=dict(type='ImageNet', data_root='{root}', split='val'))
""",
)

Rows = list[tuple[str, str, str]]
Run = Callable[..., Rows]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[..., object]:
    """Run ``check``; give its exit code or message."""

    def call(*arguments: object) -> object:
        monkeypatch.setattr(sys, 'argv', ['check', *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            commands.run('check')
        return end.value.code

    return call


@pytest.fixture
def run(command, tmp_path) -> Run:
    """Check data with one of CONFIGS; give the rows of ``--out``: rule, place, detail.

    The exit code must agree with them.
    """

    def check(
        name: str, root: Path, *options: str, split: str = 'train', text: str = ''
    ) -> Rows:
        config, out = tmp_path / f'{name}.py', tmp_path / 'findings.txt'
        config.write_text((text or CONFIGS[name]).replace('{root}', str(root)))
        flags = ['--workers', 1, '--out', out, '--split', split]
        if options:
            flags += ['--cfg-options', *options]
        code = command(config, *flags)
        assert code in (0, 1), code
        rows = [tuple(line.split('\t')[1:]) for line in out.read_text().splitlines()]
        assert code == bool(rows)
        return rows

    return check


def tear(path: Path, form: str) -> None:
    """Replace an image by one of the same content that lacks its last tenth."""
    content = cv2.imencode(form, cv2.imread(str(path)))[1].tobytes()
    path.write_bytes(content[: len(content) * 9 // 10])


# --------------------------------------------------------------------------------- COCO


@pytest.fixture
def coco(coco_root, tmp_path) -> Path:
    return shutil.copytree(coco_root, tmp_path / 'coco')


def edit(root: Path, change: Callable[[dict], object]) -> None:
    content = json.loads((root / 'ann.json').read_text())
    change(content)
    (root / 'ann.json').write_text(json.dumps(content))


@pytest.mark.parametrize('task', ['detector', 'segmenter', 'classifier'])
def test_sound_data_of_a_whole_config(task, command, monkeypatch, request, capsys):
    root = dict(detector='coco_root', segmenter='seg_root', classifier='cls_root')
    monkeypatch.setenv('TINY_DATA', str(request.getfixturevalue(root[task])))
    assert command(ROOT / 'tests' / 'tiny' / f'{task}.py') == 0
    output = capsys.readouterr().out
    assert 'train_dataloader.dataset: 4 images' in output
    assert 'test_dataloader.dataset: the same as ' in output
    assert 'Findings: none' in output


def annotation(**changes) -> Callable[[dict], None]:
    return lambda content: content['annotations'][1].update(changes)


def image(**changes) -> Callable[[dict], None]:
    return lambda content: content['images'][1].update(changes)


@pytest.mark.parametrize(
    'change, expected',
    [
        (image(width=63), ('image size', '1.png', 'is 64x64, its annotations say 63')),
        (image(width='wide'), ('malformed entry', 'image 1.png', "'wide'")),
        (image(width='64'), ('malformed entry', 'image 1.png', "('64', 64): expected")),
        (lambda c: c['images'][1].pop('height'), ('malformed entry', '1.png', 'heigh')),
        (annotation(id=1), ('duplicate id', 'annotation id 1', '2 times')),
        (annotation(image_id=9), ('unknown image', 'annotation 2', 'image_id 9')),
        (annotation(category_id=7), ('no such category', 'category_id 7', '1 annot')),
        (annotation(bbox=[4, 4, 0, 9]), ('box without area', '2 of 0.png', '0, 9]')),
        (annotation(area=0), ('box without area', '2 of 0.png', 'area 0')),
        (annotation(bbox=[50, 4, 20, 9]), ('box outside the image', '2 of 0.', '20')),
        (annotation(bbox=[-5, 4, 20, 9]), ('box outside the image', '2 of 0.', '-5')),
        (annotation(bbox=[4, 60, 2, 9]), ('box outside the image', '2 of 0.', '60')),
        (
            annotation(bbox=[1, 2, 3]),
            ('malformed entry', 'annotation 2', 'expected 4 numb'),
        ),
        (annotation(bbox=None), ('malformed entry', 'annotation 2', 'bbox None')),
        (annotation(bbox=[1, 2, float('nan'), 3]), ('malformed entry', '2', 'nan')),
        (annotation(image_id=[1]), ('malformed entry', 'annotation 2', 'an id is a')),
        (lambda c: c['annotations'][1].pop('area'), ('malformed entry', '2', 'area')),
        (annotation(bbox=['4', '4', '9', '9']), ('malformed entry', '2', 'expected 4')),
        (annotation(iscrowd='0'), ('malformed entry', '2', "iscrowd '0': expected 0")),
        (annotation(image_id='1'), ('unknown image', '2', "'1'; the images have 1")),
        (annotation(id=0), ('annotation id', 'annotation id 0', '')),
        (annotation(id='b'), ('annotation id', '1 annotation ids that are text', '')),
        (annotation(bbox=[4, 4, 0.5, 9]), ('box without area', '2 of 0.png', '0.5')),
    ],
)
def test_damaged_annotations(coco, run, change, expected):
    edit(coco, change)
    (found,) = run('detector', coco)
    assert found[0] == expected[0]
    assert expected[1] in found[1] and expected[2] in found[2]


@pytest.mark.parametrize('value', [None, 0, 'missing', 'byte order mark'])
def test_what_everybody_means(coco, run, value):
    """An object of a file that does not speak of crowds is one to be found."""

    def change(content):
        for item in content['annotations']:
            item['iscrowd'] = value
            if value == 'missing':
                del item['iscrowd']

    if value == 'byte order mark':
        text = (coco / 'ann.json').read_text()
        (coco / 'ann.json').write_text(text, encoding='utf-8-sig')
    else:
        edit(coco, change)
    assert run('detector', coco) == []


ALL_CROWD = 'none of its annotations can be trained on: 8 with iscrowd=1'


@pytest.mark.parametrize(
    ('change', 'detail'),
    [
        (lambda content: content['annotations'].clear(), 'it has no annotations'),
        (lambda content: content.pop('annotations'), 'it has no annotations'),
        (
            lambda content: [a.update(iscrowd=1) for a in content['annotations']],
            ALL_CROWD,
        ),
        (
            lambda content: [
                a.update(image_id=str(a['image_id'])) for a in content['annotations']
            ],
            'none of its annotations can be trained on: 8 of an unknown image',
        ),
        (
            lambda content: [
                a.update(category_id=str(a['category_id']))
                for a in content['annotations']
            ],
            'none of its annotations can be trained on: 8 of an unknown category',
        ),
    ],
)
def test_nothing_to_train_on(coco, run, change, detail):
    edit(coco, change)
    found = run('detector', coco)
    (row,) = (row for row in found if row[0] == 'nothing to train on')
    assert row == ('nothing to train on', str(coco / 'ann.json'), detail)


def test_class_without_objects_and_counts(coco, run, capsys):
    def change(content):
        for item in content['annotations'][1::2]:
            item['iscrowd'] = 1

    edit(coco, change)
    ((rule, place, detail),) = run('detector', coco)
    assert (rule, place) == ('class without objects', str(coco / 'ann.json'))
    assert detail == (
        'bar (1 of 2 classes); annotations that are not used: 4 with iscrowd=1'
    )
    assert 'objects by class: square 4, bar 0' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('mask', 'rule', 'detail'),
    [
        ([8, 8, 32, 8, 32, 32], 'broken mask', 'a flat list'),
        ([[8, 8, 32, 32]], 'short polygon', 'a polygon of 4 numbers'),
        ([[8, 8, 32, 8, 32, 32, 8]], 'short polygon', 'a polygon of 7 numbers'),
        ([['8', '8', '32', '8', '32', '32']], 'broken mask', 'something else than nu'),
        ([[8, 8, 32, 8, 32, float('nan')]], 'broken mask', 'something else than nu'),
        ([[8, 8, 66, 8, 32, 32]], 'mask outside the image', '66, 32; image 64x64'),
        ([[8, 8, 32, -2, 32, 32]], 'mask outside the image', 'from 8, -2 to 32'),
        ([[8, 8, 65, 8, 32, 65]], None, ''),
        ('8,8,32,8,32,32', 'broken mask', 'expected polygons'),
        (
            dict(size=[32, 64], counts=[2048]),
            'broken mask',
            'code is of 64x32, not 64x',
        ),
        (dict(counts=[4096]), 'broken mask', 'needs "counts" and "size"'),
        ([], 'no mask', ''),
        (None, 'no mask', ''),
        (dict(size=[64, 64], counts=[0, 4096]), None, ''),
        ([[8, 8, 32, 8, 32, 32]], None, ''),
    ],
)
def test_masks(coco, run, mask, rule, detail):
    edit(coco, annotation(segmentation=mask))
    assert run('detector', coco) == []
    found = run('detector', coco, 'train_dataloader.dataset.pipeline.0.with_mask=True')
    assert [row[:2] for row in found] == (
        [(rule, 'annotation 2 of 0.png')] if rule else []
    )
    assert all(detail in row[2] for row in found)


def test_masks_that_are_evaluated(coco, run):
    """pycocotools takes four numbers for a box."""
    edit(coco, annotation(segmentation=[[8, 8, 32, 32]]))
    text = CONFIGS['detector'].replace('train_', 'val_')
    options = ['val_evaluator.type=CocoMetric', 'val_evaluator.metric=[bbox,segm]']
    assert run('validation', coco, *options[:1], split='val', text=text) == []
    ((rule, place, _),) = run('validation', coco, *options, split='val', text=text)
    assert (rule, place) == ('broken mask', 'annotation 2 of 0.png')


def test_message_before_a_run_names_the_file(coco):
    edit(coco, annotation(bbox=None))
    text = CONFIGS['detector'].replace('{root}', str(coco))
    cfg = Config.fromstring(text, '.py')
    init_default_scope('mmdet')
    (finding,) = checks.check_split_quickly(cfg, 'train')
    assert finding.message.startswith(f'{coco / "ann.json"}: annotation 2')


def test_nothing_to_score(coco, run):
    edit(coco, lambda c: [a.update(iscrowd=1) for a in c['annotations']])
    text = CONFIGS['detector'].replace('train_', 'val_')
    (found,) = run('validation', coco, split='val', text=text)
    detail = 'none of its annotations counts: 8 with iscrowd=1'
    assert found == ('nothing to score', str(coco / 'ann.json'), detail)


def test_image_too_narrow_to_be_resized(coco, run):
    Image.new('RGB', (2000, 3)).save(coco / '1.png')
    edit(coco, image(width=2000, height=3))
    step = 'train_dataloader.dataset.pipeline.0'
    options = [f'{step}.type=Resize', f'{step}.scale=(64,64)']
    options += [f'{step}.keep_ratio=True']
    (found,) = [r for r in run('detector', coco, *options) if r[0] == 'too narrow']
    assert found[1:] == (str(coco / '1.png'), 'is 2000x3, and resized to 64x0')


def test_root_category_that_roboflow_adds(coco, run):
    def add(name):
        def change(content):
            root = dict(id=0, name=name, supercategory='none')
            content['categories'].insert(0, root)
            for category in content['categories'][1:]:
                category['supercategory'] = name

        return change

    file = (coco / 'ann.json').read_text()
    edit(coco, add('shapes'))
    assert run('detector', coco) == []
    option = 'train_dataloader.dataset.metainfo.classes=[disc,bar]'
    ((rule, _, detail),) = (
        r for r in run('detector', coco, option) if r[0] == 'classes'
    )
    assert "'shapes' is the root that Roboflow adds" in detail
    assert detail.endswith("The file has, in this order: ('square', 'bar')")

    (coco / 'ann.json').write_text(file)
    edit(coco, add('bar'))
    ((rule, place, detail),) = run('detector', coco)
    assert rule == 'category twice'
    assert detail.startswith(
        "'bar' is category 0 (0 annotations) and 2 (4 annotations); 0 is the root that"
    )
    command = re.search(r'python -c (.*) takes it out', detail)[1]
    subprocess.run(f'{sys.executable} -c {command}', shell=True, check=True)
    assert run('detector', coco) == []


def test_other_annotations_than_objects_do_not_stop_a_run(coco):
    def change(content):
        for i in range(4):
            segment = dict(id=i, category_id=1, bbox=[0, 0, 9, 9], area=81, iscrowd=0)
            content['annotations'].append(
                dict(image_id=i + 1, file_name=f'{i}.png', segments_info=[segment])
            )
        del content['annotations'][:-4]

    edit(coco, change)
    text = CONFIGS['detector'].replace('CocoDataset', 'CocoPanopticDataset')
    cfg = Config.fromstring(text.replace('{root}', str(coco)), '.py')
    init_default_scope('mmdet')
    found = list(checks.check_split_quickly(cfg, 'train'))
    assert not [
        f for f in found if f.rule in ('malformed entry', 'nothing to train on')
    ]


def test_backslash_in_a_file_name(coco, run):
    edit(coco, image(file_name='photos\\1.png'))
    (found,) = run('detector', coco)
    assert found[0] == 'missing image' and 'write / in its place' in found[2]
    edit(coco, lambda content: content['images'].reverse())
    edit(coco, lambda content: content['images'].pop(0))
    edit(coco, lambda content: content['images'].pop(0))
    found = run('detector', coco)
    assert found[0][0] == 'image folder' and 'write / in its place' in found[0][2]


def test_a_box_may_exceed_its_image_by_a_pixel(coco, run):
    edit(coco, annotation(bbox=[-1, 4, 66, 9]))
    assert run('detector', coco) == []


def test_images_with_one_id_or_one_file(coco, run):
    edit(coco, image(id=1, file_name='0.png'))
    found = run('detector', coco)
    assert [row[:2] for row in found if 'duplicate' in row[0]] == [
        ('duplicate id', 'image id 1'),
        ('duplicate', "image '0.png'"),
    ]
    # what the two annotations of the lost id 2 say
    assert [row[0] for row in found[2:]] == ['unknown image'] * 2


def test_category_that_classes_do_not_name(coco, run):
    def add(content):
        content['categories'].append(dict(id=3, name='disc'))
        annotation(category_id=3)(content)

    edit(coco, add)
    (found,) = run('detector', coco)
    assert found[:2] == ('unknown category', 'disc (id 3), not among classes')


def test_classes_that_do_not_fit_the_file(coco, run):
    edit(coco, lambda content: content['categories'][0].update(name='disc'))
    rules = [row[0] for row in run('detector', coco)]
    assert rules == ['classes', 'unknown category']


def test_masks_are_needed_where_masks_are_trained(coco, run):
    edit(coco, lambda content: content['annotations'][2].pop('segmentation'))
    assert run('detector', coco) == []
    option = 'train_dataloader.dataset.pipeline.0.with_mask=True'
    assert run('detector', coco, option) == [
        ('no mask', 'annotation 3 of 1.png', 'has no segmentation')
    ]


@pytest.mark.parametrize('content', ['{"images": [', '[]', '{"images": []}', '{}'])
def test_file_that_is_no_coco(coco, run, content):
    (coco / 'ann.json').write_text(content)
    ((rule, place, _),) = run('detector', coco)
    assert rule == 'no COCO file' and 'is not a COCO annotation file' in place


@pytest.mark.parametrize('damage', ['.png', '.jpg', 'empty', 'text'])
def test_undecodable_image(coco, run, damage):
    path = coco / '2.png'
    if damage.startswith('.'):
        tear(path, damage)
    else:
        path.write_text('' if damage == 'empty' else '<html>404</html>')
    assert run('detector', coco) == [
        ('undecodable image', str(path), 'cannot be decoded')
    ]


def test_torn_jpeg_where_opencv_fills_it_up(monkeypatch, coco, run):
    """OpenCV before 5 gives a whole picture, the missing part grey."""
    tear(coco / '2.png', '.jpg')
    monkeypatch.setattr(images, 'read_image', lambda path: np.zeros((64, 64, 3)))
    monkeypatch.setattr(cv2, '__version__', '4.11.0')
    (found,) = run('detector', coco)
    assert found[:2] == ('undecodable image', str(coco / '2.png'))


def test_image_turned_by_its_orientation(coco, run):
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: a quarter turn
    Image.new('RGB', (60, 64)).save(coco / '1.jpg', exif=exif)
    edit(coco, image(file_name='1.jpg', width=60, height=64))
    (found,) = run('detector', coco)
    assert found[0] == 'image size' and 'EXIF' in found[2]


def test_missing_folder(run, tmp_path):
    (found,) = run('detector', tmp_path / 'nowhere')
    assert found[0] == 'missing path' and 'does not exist' in found[1]


def test_many_findings_in_processes(coco, tmp_path):
    """As the user runs it: the report is cut short, the file is complete."""

    def many(content):
        picture = (coco / '0.png').read_bytes()
        for i in range(40):
            if i >= 12:
                (coco / f'many_{i}.png').write_bytes(picture)
            entry = dict(content['images'][0], id=100 + i, file_name=f'many_{i}.png')
            content['images'].append(entry)

    edit(coco, many)
    out = tmp_path / 'all.txt'
    config = tmp_path / 'config.py'
    config.write_text(CONFIGS['detector'].replace('{root}', str(coco)))
    command = [
        sys.executable, ROOT / 'tools' / 'check_dataset.py', config,
        '--workers', '2', '--out', out,
    ]  # fmt: skip
    environment = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert 'missing image: 12 (get it again' in done.stdout
    assert len(re.findall(r'^    \S+many_\d+\.png$', done.stdout, re.M)) == 10
    assert '    ... and 2 more' in done.stdout
    assert f'Findings: 12, listed in {out}' in done.stdout
    rows = [line.split('\t') for line in out.read_text().splitlines()]
    assert [Path(row[2]).name for row in rows] == [f'many_{i}.png' for i in range(12)]


# ------------------------------------------------------------------------- segmentation


@pytest.fixture
def seg(seg_root, tmp_path) -> Path:
    return shutil.copytree(seg_root, tmp_path / 'seg')


def paint(path: Path, values: list[int], size: tuple[int, int] = (64, 64)) -> None:
    """Write a label map with one pixel of each value."""
    label = np.zeros(size, dtype=np.uint8)
    label.flat[: len(values)] = values
    Image.fromarray(label).save(path)


def test_sound_segmentation(seg, run):
    paint(seg / 'labels' / '1.png', [1, 255])
    assert run('segmenter', seg) == []


@pytest.mark.parametrize(
    'damage, kind, detail',
    [
        (lambda file: file.unlink(), 'missing label', 'does not'),
        (lambda file: file.write_text('?'), 'undecodable label', 'cannot identify'),
        (lambda file: paint(file, [2, 2, 254]), 'label value', 'has 2, 254 (3 pixels)'),
        (lambda file: paint(file, [], (64, 32)), 'label size', 'is 32x64, its image 6'),
        (
            lambda file: Image.new('RGB', (64, 64)).save(file),
            'undecodable label',
            'shape (64, 64, 3)',
        ),
    ],
)
def test_damaged_label(seg, run, damage, kind, detail):
    damage(seg / 'labels' / '2.png')
    (found,) = run('segmenter', seg)
    assert found[:2] == (kind, str(seg / 'labels' / '2.png'))
    assert detail in found[2]


def test_torn_label(seg, run):
    file = seg / 'labels' / '2.png'
    file.write_bytes(file.read_bytes()[:-30])
    (found,) = run('segmenter', seg)
    assert found[:2] == ('undecodable label', str(file))


def test_palette_label_counts_by_index(seg, run):
    label = Image.open(seg / 'labels' / '0.png').convert('P')
    label.putpalette([9, 9, 9, 200, 200, 200])
    label.save(seg / 'labels' / '0.png')
    assert run('segmenter', seg) == []


def test_label_without_an_image(seg, run):
    (seg / 'images' / '3.png').unlink()
    assert run('segmenter', seg) == [
        ('missing image', str(seg / 'labels' / '3.png'), 'is a label without an image')
    ]


def test_wrong_suffix(seg, run):
    found = run('segmenter', seg, 'train_dataloader.dataset.img_suffix=.jpg')
    assert found == [
        (
            'no data',
            str(seg / 'images'),
            'no file name ends in .jpg; there are 0.png, 1.png, 2.png and 1 more',
        )
    ]


@pytest.mark.parametrize(
    'option, sound, wrong',
    [
        ('train_dataloader.dataset.reduce_zero_label=True', [0, 1, 2, 255], [3, 254]),
        ('model.decode_head.ignore_index=9', [0, 1, 9], [2, 255]),
    ],
)
def test_values_that_the_config_allows(seg, run, option, sound, wrong):
    file = seg / 'labels' / '0.png'
    for name in ('1.png', '2.png', '3.png'):
        paint(seg / 'labels' / name, sound)
    paint(file, sound + wrong)
    ((kind, place, detail),) = run('segmenter', seg, option)
    assert (kind, place) == ('label value', str(file))
    assert detail == f'has {", ".join(map(str, wrong))} ({len(wrong)} pixels)'


NO_FOREGROUND = 'bottom (1 of 2 classes) in 4 label maps; ignored is '


@pytest.mark.parametrize(
    ('values', 'options', 'detail'),
    [
        # Half of one map, and a quarter more of the next ones: 44 % of all pixels.
        ([0, 255], [], f'{NO_FOREGROUND}255, 56.2% of all pixels'),
        (
            [0, 1],
            ['train_dataloader.dataset.reduce_zero_label=True'],
            f'{NO_FOREGROUND}0 (by reduce_zero_label), 43.8% of all pixels',
        ),
        ([0, 0], [], 'bottom (1 of 2 classes) in 4 label maps'),
        (
            [255, 255],
            [],
            'top, bottom (2 of 2 classes) in 4 label maps; ignored is 255',
        ),
    ],
)
def test_masks_with_one_class_alone(seg, run, values, options, detail):
    for file in (seg / 'labels').iterdir():
        label = np.array(Image.open(file))
        Image.fromarray(np.array(values, np.uint8)[label]).save(file)
    ((rule, place, text),) = run('segmenter', seg, *options)
    assert (rule, place) == ('one class alone', str(seg / 'labels'))
    assert text.startswith(detail)


def test_class_without_pixels(seg, run, tmp_path):
    options = [
        'train_dataloader.dataset.metainfo.classes=[top,middle,bottom]',
        'model.decode_head.num_classes=3',
    ]
    assert run('segmenter', seg, *options) == [
        (
            'class without pixels',
            str(seg / 'labels'),
            'bottom (1 of 3 classes) in 4 label maps',
        )
    ]


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """The folders of Cityscapes with two images and their labelTrainIds."""
    root = tmp_path / 'cityscapes'
    for kind in ('leftImg8bit', 'gtFine'):
        (root / kind / 'train' / 'ulm').mkdir(parents=True)
    for i in range(2):
        name = f'train/ulm/ulm_{i}'
        Image.new('RGB', (64, 32)).save(root / f'leftImg8bit/{name}_leftImg8bit.png')
        paint(root / f'gtFine/{name}_gtFine_labelIds.png', [7, 33], (32, 64))
        paint(
            root / f'gtFine/{name}_gtFine_labelTrainIds.png',
            [*range(19), 255],
            (32, 64),
        )
    return root


def test_sound_cityscapes(cityscapes, run):
    assert run('cityscapes', cityscapes) == []


def test_cityscapes_as_it_is_unpacked(cityscapes, run, capsys):
    for file in cityscapes.rglob('*_labelTrainIds.png'):
        file.unlink()
    (cityscapes / 'gtFine/train/ulm/ulm_0_gtFine_polygons.json').write_text('{}')
    (cityscapes / 'gtFine/train/ulm/ulm_1_gtFine_labelIds.png').unlink()
    found = run('cityscapes', cityscapes)
    assert [row[0] for row in found] == ['missing labelTrainIds'] * 2
    assert found[0][2] == 'there is _labelIds.png and _polygons.json'
    assert 'unpack gtFine_trainvaltest.zip' in found[1][2]
    assert 'tools/dataset_converters/cityscapes.py' in capsys.readouterr().out


def test_cityscapes_with_label_ids(cityscapes, run):
    suffix = 'train_dataloader.dataset.seg_map_suffix=_gtFine_labelIds.png'
    found = run('cityscapes', cityscapes, suffix)
    assert [row[0] for row in found] == ['label value'] * 2
    assert found[0][2] == 'has 33 (1 pixels); training needs its labelTrainIds'


def test_some_of_the_classes_of_cityscapes(cityscapes, run):
    """The files keep their numbers; the other classes are read as 255."""
    options = (
        'train_dataloader.dataset.metainfo.classes=[road,car]',
        'model.decode_head.num_classes=2',
    )
    assert run('cityscapes', cityscapes, *options) == []
    paint(
        cityscapes / 'gtFine/train/ulm/ulm_0_gtFine_labelTrainIds.png', [19], (32, 64)
    )
    (found,) = run('cityscapes', cityscapes, *options)
    assert found[0] == 'label value'


# ----------------------------------------------------------------------- classification


@pytest.fixture
def cls(cls_root, tmp_path) -> Path:
    return shutil.copytree(cls_root, tmp_path / 'cls')


def test_sound_classification(cls, run):
    assert run('classifier', cls) == []


def test_damaged_and_empty_folders(cls, run):
    tear(cls / 'dark' / 'dark_0.png', '.jpg')
    for file in (cls / 'light').iterdir():
        file.rename(file.with_suffix('.txt'))
    assert run('classifier', cls) == [
        ('empty class folder', str(cls / 'light'), ''),
        ('undecodable image', str(cls / 'dark' / 'dark_0.png'), 'cannot be decoded'),
    ]


def test_number_of_folders(cls, run):
    (cls / 'other').mkdir()
    shutil.copy(cls / 'dark' / 'dark_0.png', cls / 'other')
    (found,) = run('classifier', cls)
    assert found[0] == 'number of classes'
    assert 'holds 3 folders: expected one per class, 2' in found[2]


def test_classes_in_another_order_than_the_folders(cls, run):
    classes = 'train_dataloader.dataset.metainfo.classes=[light,dark]'
    (found,) = run('classifier', cls, classes)
    assert found[0] == 'classes' and "must be ('dark', 'light')" in found[2]


def test_hidden_folder_beside_class_folders(cls, run):
    shutil.copytree(cls / 'dark', cls / '.ipynb_checkpoints')
    hidden = ('hidden folder', str(cls / '.ipynb_checkpoints'), '')
    assert run('classifier', cls) == [hidden]


def test_folder_without_images(cls, run):
    for file in cls.glob('*/*.png'):
        file.rename(file.with_suffix('.heic'))
    ((rule, place, detail),) = (r for r in run('classifier', cls) if r[0] == 'no data')
    assert place == str(cls)
    assert detail.startswith('no file name ends in one of .bmp, .jpeg, ')
    assert detail.endswith('; there are dark, light')


def test_backslash_in_a_list(cls, run):
    (cls / 'list.txt').write_text('dark\\dark_0.png 0\nlight/light_0.png 1')
    option = f'train_dataloader.dataset.ann_file={cls / "list.txt"}'
    (found,) = run('classifier', cls, option)
    assert found[0] == 'missing image' and 'write / in its place' in found[2]


def test_list_of_names_and_labels(cls, run):
    lines = ['dark/dark_0.png 0', 'light/light_0.png 1', 'light/lost.png 1']
    lines += ['dark/dark_1.png 2', 'dark/dark_1.png -1', 'dark/dark_0.png 0']
    place = cls / 'list.txt'
    place.write_text('\n'.join(lines))
    found = run('classifier', cls, f'train_dataloader.dataset.ann_file={place}')
    assert [row[:2] for row in found] == [
        ('label value', f'{place}:4'),
        ('malformed entry', f'{place}:5'),
        ('duplicate', "image 'dark/dark_0.png'"),
        ('missing image', str(cls / 'light/lost.png')),
    ]


def test_imagenet_folders_and_lists(tmp_path, run):
    """Folders, or all in one and a list in meta/: MMPretrain's class reads either."""
    root = tmp_path / 'imagenet'
    for split in ('train', 'val'):
        for name in (f'n{i:08d}' for i in range(2)):
            (root / split / name).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(root / split / name / 'a.JPEG')
    (found,) = run('imagenet', root)
    assert found[0] == 'number of classes'
    assert 'holds 2 folders: expected one per class, 1000' in found[2]

    (root / 'meta').mkdir()
    (root / 'meta' / 'val.txt').write_text(
        'n00000000/a.JPEG 0\nn00000001/a.JPEG 1000\nb.JPEG 3\n'
    )
    found = run('imagenet', root, split='val')
    assert [row[0] for row in found] == ['label value', 'missing image']
    assert found[0][2] == 'label 1000: expected 0 to 999'


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--split', 'val'], 'has no data set in val_dataloader'),
        (['--out', 'no/such/file'], 'name a file in a folder that exists'),
        (
            ['--cfg-options', 'train_dataloader.dataset.type=CIFAR10'],
            'CIFAR10 reads its data in a way that check_dataset does not know',
        ),
        (
            ['--cfg-options', 'train_dataloader.dataset.backend_args.backend=petrel'],
            'check_dataset reads local files',
        ),
        (
            ['--cfg-options', 'train_dataloader.dataset.type=CustomDatset'],
            'Did you mean CustomDataset',
        ),
    ],
)
def test_what_cannot_be_checked(command, tmp_path, cls, flags, message):
    config = tmp_path / 'config.py'
    config.write_text(CONFIGS['classifier'].replace('{root}', str(cls)))
    answer = str(command(config, *flags))
    assert answer.startswith('Error: ') and message in answer
