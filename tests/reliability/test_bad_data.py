"""Bad data: what the check says of it, what training does, what is passed over."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

import bad_data  # noqa: E402
from check_cases import edit  # noqa: E402

from mmcls_involution.data import images, segmentation  # noqa: E402
from mmcls_involution.engine import samples  # noqa: E402
from mmcls_involution.engine.errors import UserError  # noqa: E402

LIBRARIES = dict(detector='mmdet', segmenter='mmseg')
Run = Callable[..., str]


@pytest.fixture
def run(command, tmp_path) -> Run:
    """Run a command on ``tmp_path / 'data'``; give its message, '' for success."""

    def call(name: str, config: str, *flags: object) -> str:
        pytest.importorskip(LIBRARIES[config])
        file = tmp_path / f'{config}.py'
        text = bad_data.CONFIGS[config].replace('{root}', str(tmp_path / 'data'))
        file.write_text(text)
        return command(name, file, *flags)

    return call


@pytest.fixture
def checked(run, tmp_path) -> Callable[[str], set[str]]:
    """The rules that the full check finds broken."""

    def call(config: str) -> set[str]:
        out = tmp_path / 'findings.txt'
        run('check', config, '--workers', 1, '--out', out)
        return {line.split('\t')[1] for line in out.read_text().splitlines()}

    return call


@pytest.fixture
def coco(coco_root, tmp_path) -> Path:
    return shutil.copytree(coco_root, tmp_path / 'data')


def turned(file: Path) -> None:
    """A photo of 64x64 that was 64x32, upright by its EXIF orientation alone."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(file).crop((0, 0, 64, 32)).save(file, exif=exif)


IMAGES = {
    'torn': (lambda file: file.write_bytes(file.read_bytes()[:3000]), 'undecodable'),
    'missing': (Path.unlink, 'missing'),
    'empty': (lambda file: file.write_bytes(b''), 'undecodable'),
    'no image': (lambda file: file.write_text('<html>404</html>'), 'undecodable'),
    'of no size': (lambda file: bad_data.png_that_says(0, 0, file), 'undecodable'),
    'huge': (lambda file: bad_data.png_that_says(10**5, 10**5, file), 'undecodable'),
    'turned': (turned, 'size'),
    'a folder': (lambda file: (file.unlink(), file.mkdir()), 'missing'),
    'a link to nothing': (
        lambda file: (file.unlink(), file.symlink_to('nothing')),
        'missing',
    ),
}


@pytest.mark.parametrize('name', IMAGES)
def test_image(name, coco, run, checked, tmp_path):
    """The check names it, training stops at it, or passes over it as often as asked."""
    damage, kind = IMAGES[name]
    damage(coco / '1.png')
    (rule,) = checked('detector')
    assert kind in rule
    message = run('train', 'detector', '--work-dir', tmp_path / 'a')
    assert message.startswith(f'Error: {coco / "1.png"}: '), message
    assert '--max-bad-samples N' in message and len(message.splitlines()) == 1
    flags = ['--work-dir', tmp_path / 'b', '--max-bad-samples', 1]
    assert run('train', 'detector', *flags) == ''
    (line,) = (tmp_path / 'b' / 'bad_samples.txt').read_text().splitlines()
    assert line.startswith(f'{coco / "1.png"}: ')


def test_names_that_no_file_of_text_takes(coco, run, tmp_path, capfd):
    """One with a line end, one with a byte that is no letter: each is one line."""
    names = ['0\n1.png', '1\udcff\u2028.png']
    content = json.loads((coco / 'ann.json').read_text())
    for i, name in enumerate(names):
        (coco / f'{i}.png').unlink()
        (coco / name).write_text('no image')
        content['images'][i]['file_name'] = name
    (coco / 'ann.json').write_text(json.dumps(content))
    shown = [f'{coco}/0\\n1.png', f'{coco}/1\\udcff\\u2028.png']
    out = tmp_path / 'findings.txt'
    run('check', 'detector', '--workers', 1, '--out', out)
    assert [line.split('\t')[2] for line in out.read_text().splitlines()] == shown
    flags = ['--work-dir', tmp_path / 'w', '--max-bad-samples', 2]
    assert run('train', 'detector', *flags) == ''
    lines = (tmp_path / 'w' / 'bad_samples.txt').read_text().splitlines()
    assert sorted(line.split(': ')[0] for line in lines) == shown
    assert 'Logging error' not in ''.join(capfd.readouterr())


def test_what_the_system_keeps_from_being_read(tmp_path, monkeypatch):
    """It is not said to be damaged."""
    file = tmp_path / 'a.png'
    Image.new('RGB', (4, 4)).save(file)

    def denied(*_, **__):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr(np, 'fromfile', denied)
    ((finding,), _) = images.check_image(str(file), None)
    assert finding.message == f'{file}: cannot be read: Permission denied.'
    monkeypatch.setattr(Image, 'open', denied)
    ((finding,), _) = segmentation.check_label(str(file), None, None)
    assert finding.message == f'{file}: cannot be read: Permission denied.'


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_size_of_turned_photos(suffix, orientation, tmp_path):
    """The header says what the image that is read has."""
    file, exif = tmp_path / f'a.{suffix}', Image.Exif()
    exif[0x0112] = orientation
    Image.new('RGB', (24, 16)).save(file, exif=exif)
    expected = images.read_image(file).shape[1::-1]
    assert images.image_size(str(file)) == expected
    assert expected == ((24, 16) if orientation < 5 else (16, 24))


FORMS = {
    'CMYK': lambda image, file: image.convert('CMYK').save(file, 'JPEG', quality=99),
    'gray': lambda image, file: image.convert('L').save(file),
    'gray with alpha': lambda image, file: image.convert('LA').save(file),
    'palette': lambda image, file: image.quantize(256).save(file),
    'alpha': lambda image, file: image.convert('RGBA').save(file),
    '16 bit': lambda image, file: Image.fromarray(
        np.array(image.convert('L')).astype(np.uint16) * 257
    ).save(file),
    'upright by EXIF': lambda image, file: image.rotate(90).save(
        file, exif=b'Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\x06\0\0\0\0\0\0'
    ),
}


@pytest.mark.parametrize('name', FORMS)
def test_other_forms_of_images(name, coco, run, checked, tmp_path, monkeypatch):
    """They are trained on as what they show."""
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.integers(50, 200, (4, 4, 3)), np.ones((16, 16, 1)))
    image = Image.fromarray(smooth.astype(np.uint8))
    for i in range(4):
        FORMS[name](image, coco / f'{i}.png')
    expected = image.convert('L').convert('RGB') if '16' in name else image
    expected = image.convert('L').convert('RGB') if 'gray' in name else expected
    seen = []
    forward = bad_data.OneLayer.forward

    def look(self, inputs, data_samples, mode):
        seen.extend(
            picture.flip(-1) if sample.flip else picture
            for picture, sample in zip(inputs, data_samples, strict=True)
        )
        return forward(self, inputs, data_samples, mode)

    monkeypatch.setattr(bad_data.OneLayer, 'forward', look)
    assert checked('detector') == set()
    assert run('train', 'detector', '--work-dir', tmp_path / 'w') == ''
    wanted = np.array(expected).transpose(2, 0, 1).astype(float)
    for picture in seen:
        assert np.abs(picture.numpy() - wanted).mean() < 5


def annotation(**changes) -> Callable[[dict], None]:
    return lambda content: content['annotations'][2].update(changes)


# What is wrong, its rule, and whether training stops before it begins or warns.
ANNOTATIONS = {
    'no box': (annotation(bbox=[]), 'malformed entry', True),
    'box of NaN': (annotation(bbox=[4, 4, float('nan'), 9]), 'malformed entry', True),
    'box of text': (annotation(bbox=['4', '4', '9', '9']), 'malformed entry', True),
    'box without area': (annotation(bbox=[4, 4, 0, 9]), 'box without area', False),
    'negative box': (annotation(bbox=[9, 9, -5, -5]), 'box without area', False),
    'box outside': (annotation(bbox=[99, 9, 5, 5]), 'box outside the image', False),
    'box half outside': (annotation(bbox=[9, 9, 99, 9]), 'box outside the im', False),
    'category': (annotation(category_id=77), 'no such category', False),
    'image': (annotation(image_id=77), 'unknown image', False),
    'image twice': (lambda c: c['images'][2].update(id=2), 'duplicate id', True),
    'annotation twice': (annotation(id=1), 'duplicate id', True),
    'category twice': (lambda c: c['categories'][1].update(id=1), 'duplicate', True),
    'file twice': (lambda c: c['images'][2].update(file_name='1.png'), 'dupl', False),
    'only crowd': (
        lambda c: [a.update(iscrowd=1) for a in c['annotations']],
        'nothing to train on',
        True,
    ),
}


@pytest.mark.parametrize('name', ANNOTATIONS)
def test_annotations(name, coco, run, checked, tmp_path, capfd):
    change, rule, stops = ANNOTATIONS[name]
    edit(coco, change)
    assert any(rule in found for found in checked('detector'))
    capfd.readouterr()
    message = run('train', 'detector', '--work-dir', tmp_path / 'w')
    if stops:
        assert message.startswith(f'Error: {coco / "ann.json"}: '), message
        assert not (tmp_path / 'w').exists()
    else:
        assert message == ''
        assert f'{coco / "ann.json"}: ' in ''.join(capfd.readouterr())


def test_image_of_crowds_alone(coco, run, checked, tmp_path):
    """One of several is sound: nothing need be found in it."""
    edit(coco, lambda c: [a.update(iscrowd=1) for a in c['annotations'][:2]])
    assert checked('detector') == set()
    assert run('train', 'detector', '--work-dir', tmp_path / 'w') == ''


LABELS = {
    'out of range': (lambda label: label * 3, 'label value'),
    'of three channels': (lambda label: np.dstack([label] * 3), 'undecodable label'),
    'of another size': (lambda label: label[:32], 'label size'),
    'missing': (None, 'missing label'),
}


@pytest.mark.parametrize('name', LABELS)
def test_labels(name, seg_root, run, checked, tmp_path, monkeypatch):
    """Those that are not among the ones that are read before a run."""
    data = shutil.copytree(seg_root, tmp_path / 'data')
    change, rule = LABELS[name]
    file = data / 'labels' / '1.png'
    if change is None:
        file.unlink()
    else:
        Image.fromarray(change(np.array(Image.open(file)))).save(file)
    assert checked('segmenter') == {rule}
    monkeypatch.setattr(segmentation, 'SAMPLE', 2)
    message = run('train', 'segmenter', '--work-dir', tmp_path / 'a')
    assert message.startswith(f'Error: {file}: '), message
    flags = ['--work-dir', tmp_path / 'b', '--max-bad-samples', 1]
    assert run('train', 'segmenter', *flags) == ''
    assert str(file) in (tmp_path / 'b' / 'bad_samples.txt').read_text()


def test_validation_is_never_passed_over(seg_root, run, tmp_path, monkeypatch):
    """Though the config does not set ``test_mode``, as those of MMSegmentation."""
    data = shutil.copytree(seg_root, tmp_path / 'data')
    bad = shutil.copytree(data / 'images', data / 'val') / '1.png'
    bad.write_text('no image')
    text = bad_data.CONFIGS['segmenter'].replace('{root}', str(data))
    val = text[text.index('train_dataloader') :].replace('train_', 'val_')
    val = val.replace('shuffle=True', 'shuffle=False').replace("'images'", "'val'")
    text += f"{val}val_cfg = dict()\nval_evaluator = dict(type='IoUMetric')\n"
    monkeypatch.setitem(bad_data.CONFIGS, 'segmenter', text)
    flags = ['--work-dir', tmp_path / 'w', '--max-bad-samples', 9]
    assert run('train', 'segmenter', *flags).startswith(f'Error: {bad}: cannot be')
    assert not (tmp_path / 'w' / 'bad_samples.txt').exists()


def test_more_than_the_limit(coco, run, tmp_path):
    for i in (0, 2):
        (coco / f'{i}.png').unlink()
    work = tmp_path / 'w'
    flags = ['--work-dir', work, '--max-bad-samples', 1]
    message = run('train', 'detector', *flags)
    assert f'1 before it: {work / "bad_samples.txt"}' in message
    assert '--max-bad-samples N (now 1)' in message
    # Those of before the end count once more, and no more.
    assert run('train', 'detector', *flags[:3], 2, '--resume') == ''
    assert len((work / 'bad_samples.txt').read_text().splitlines()) == 2
    # A new training counts for itself.
    assert 'before it' not in run('train', 'detector', *flags[:2])


def test_nothing_but_bad_ones(coco, run, tmp_path):
    for i in range(1, 4):
        (coco / f'{i}.png').unlink()
    (coco / '0.png').write_text('no image')
    flags = ['--work-dir', tmp_path / 'w', '--max-bad-samples', 9]
    message = run('train', 'detector', *flags)
    assert message.startswith('Error: All 4 samples are bad. '), message


@pytest.mark.parametrize('workers', [0, 1, 4])
def test_resumed_among_bad_samples(workers, coco, run, tmp_path, capfd):
    """Bit for bit, whichever process meets them; named at the end."""
    for i in (0, 2):
        (coco / f'{i}.png').unlink()
    options = ['--max-bad-samples', 2, '--cfg-options', 'train_cfg.max_epochs=3']
    options.append(f'train_dataloader.num_workers={workers}')
    whole, part = tmp_path / 'whole', tmp_path / 'part'
    assert run('train', 'detector', '--work-dir', whole, *options) == ''
    output = ''.join(capfd.readouterr())
    assert '2 bad sample(s) were passed over' in output
    part.mkdir()
    shutil.copy(whole / 'iter_3.pth', part)
    assert run('train', 'detector', '--work-dir', part, '--resume', *options) == ''
    first, second = (
        torch.load(folder / 'iter_6.pth', weights_only=True)['state_dict']
        for folder in (whole, part)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = (whole / 'bad_samples.txt').read_text().splitlines()
    assert {line.split(':')[0] for line in lines} == {
        str(coco / '0.png'), str(coco / '2.png')
    }  # fmt: skip


def test_an_error_of_the_program_is_none_of_the_data(coco, run, tmp_path, monkeypatch):
    def broken(*_):
        raise ValueError('of the program')

    monkeypatch.setattr(samples, '_faults', broken)
    (coco / '1.png').unlink()
    flags = ['--work-dir', tmp_path / 'w', '--max-bad-samples', 9]
    with pytest.raises(ValueError, match='of the program'):
        run('train', 'detector', *flags)


def test_two_processes_meet_one_each(tmp_path, monkeypatch):
    """At the same moment: neither knows of the other's before it writes."""
    bad = samples.BadSamples(tmp_path, 1, resumed=False)
    opened = Path.open

    def after_another(self, mode='r', **kwargs):
        if mode == 'a':
            with opened(self, 'a') as file:
                file.write('of another process\n')
        return opened(self, mode, **kwargs)

    monkeypatch.setattr(Path, 'open', after_another)
    with pytest.raises(UserError, match='now 1'):
        bad.add('of this one')
