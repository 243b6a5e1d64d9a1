"""The full check on class folders and lists of labels."""

from __future__ import annotations

import shutil

from check_cases import tear
from PIL import Image


def test_sound_classification(cls, run):
    assert run('classifier', cls) == []


def test_class_folders_that_are_links(cls, run, tmp_path, capsys):
    """As those of a part of ImageNet are; MMPretrain follows them."""
    (tmp_path / 'part').mkdir()
    for folder in cls.iterdir():
        (tmp_path / 'part' / folder.name).symlink_to(folder)
    assert run('classifier', tmp_path / 'part') == []
    assert 'train_dataloader.dataset: 4 images' in capsys.readouterr().out


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
