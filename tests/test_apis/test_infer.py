"""`build_inferencer` and the command `infer`, on photos of every kind."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import BaseDataElement, PixelData
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pycocotools.coco import COCO
from torch import nn

from mmcls_involution.apis import build_inferencer, infer, inferencer, web
from mmcls_involution.apis.inferencer import find_config
from mmcls_involution.engine.errors import UserError

TINY = Path(__file__).parents[1] / 'tiny'
# name -> height and width as it is meant to be seen
PHOTOS = {
    'odd.jpg': (37, 51),
    'gray.png': (48, 64),
    'cmyk.jpg': (48, 64),
    'deep.png': (48, 64),
    'alpha.png': (48, 64),
    'turned.jpg': (64, 48),
    'sub/odd.png': (41, 33),
}


@pytest.fixture(scope='module')
def photos(tmp_path_factory) -> Path:
    """One photo of each kind, in a folder with what is none."""
    root = tmp_path_factory.mktemp('photos')
    (root / 'sub').mkdir()
    (root / 'empty').mkdir()
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8))
    image.resize((51, 37)).save(root / 'odd.jpg')
    image.resize((33, 41)).save(root / 'sub' / 'odd.png')
    image.convert('L').save(root / 'gray.png')
    image.convert('CMYK').save(root / 'cmyk.jpg')
    image.convert('RGBA').save(root / 'alpha.png')
    cv2.imwrite(str(root / 'deep.png'), np.asarray(image).astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x112] = 6  # turn by 90 degrees
    image.save(root / 'turned.jpg', exif=exif)
    (root / 'notes.txt').write_text('no image')
    return root


@pytest.fixture
def run(weights, tmp_path, monkeypatch, coco_root):
    """Run the command; give its output folder, images and results."""
    monkeypatch.setenv('TINY_DATA', str(coco_root))

    def run(kind: str, *inputs: object, **options):
        parser = argparse.ArgumentParser()
        infer.add_arguments(parser)
        flags = [f'--{key.replace("_", "-")}={value}' for key, value in options.items()]
        config = str(TINY / f'{kind}.py')
        args = [*map(str, inputs), '--config', config, '--weights', weights[kind]]
        infer.main(parser.parse_args([*args, '--out-dir', str(tmp_path), *flags]))
        return read(tmp_path)

    return run


def read(folder: Path):
    return [
        json.loads((folder / name).read_text())
        for name in ('images.json', 'results.json')
    ]


def check_images(listed: dict, root: Path) -> None:
    """Every photo was seen, in the size and the way that a person sees it."""
    found = {
        str(Path(image['file_name']).relative_to(root)): (
            image['height'],
            image['width'],
        )
        for image in listed['images']
    }
    assert found == PHOTOS


def test_detector(run, photos, tmp_path):
    listed, results = run('detector', photos, batch_size=3)
    check_images(listed, photos)
    assert [c['name'] for c in listed['categories']] == ['square', 'bar']
    coco = COCO(tmp_path / 'images.json').loadRes(str(tmp_path / 'results.json'))
    assert len(coco.anns) == len(results) > 0
    assert {r['image_id'] for r in results} == {i['id'] for i in listed['images']}
    for result in results:
        image = listed['images'][result['image_id'] - 1]
        x, y, width, height = result['bbox']
        assert x >= -1e-3 and x + width <= image['width'] + 1e-3
        assert y >= -1e-3 and y + height <= image['height'] + 1e-3
    # two photos are called odd
    pictures = {file.name for file in tmp_path.glob('*.jpg')}
    assert pictures == {f'{Path(p).stem}.jpg' for p in PHOTOS} | {'odd_2.jpg'}
    assert cv2.imread(str(tmp_path / 'turned.jpg')).shape == (64, 48, 3)


def test_masks_are_run_lengths():
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData
    from pycocotools.mask import decode

    mask = torch.zeros(1, 6, 8, dtype=torch.bool)
    mask[0, 1:3, 2:5] = True
    sample = DetDataSample(
        pred_instances=InstanceData(
            bboxes=torch.tensor([[2.0, 1.0, 5.0, 3.0]]),
            scores=torch.tensor([0.5]),
            labels=torch.tensor([1]),
            masks=mask,
        )
    )
    (result,) = json.loads(json.dumps(infer.as_results(sample, 7, '', None)))
    assert result.pop('segmentation')['size'] == [6, 8]
    expected = dict(image_id=7, category_id=2, bbox=[2, 1, 3, 2], score=0.5)
    assert result == expected
    again = infer.as_results(sample, 7, '', None)[0]['segmentation']
    assert np.array_equal(decode(again), mask[0].numpy())


def test_segmenter(run, photos, tmp_path):
    listed, results = run('segmenter', photos, batch_size=2)
    check_images(listed, photos)
    for image, result in zip(listed['images'], results, strict=True):
        labels = cv2.imread(str(tmp_path / result['label_map']), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (image['height'], image['width'])
        assert set(np.unique(labels)) <= {0, 1}
        picture = tmp_path / result['label_map'].replace('_labels.png', '.jpg')
        assert cv2.imread(str(picture)).shape[:2] == labels.shape


def test_labels_of_one_logit_are_integers():
    """With out_channels=1 MMSegmentation compares with a threshold, in float32."""
    sample = BaseDataElement(pred_sem_seg=PixelData(data=torch.tensor([[[0.0, 1]]])))
    labels = infer.label_map(sample)
    assert labels.dtype == np.uint8 and labels.tolist() == [[0, 1]]
    rows = web._rows(sample, ('sky', 'road'))
    assert {row[0] for row in rows} == {'sky', 'road'}


def test_other_predictions_are_refused():
    sample = BaseDataElement(pred_panoptic_seg=PixelData(sem_seg=torch.zeros(1, 2, 2)))
    with pytest.raises(UserError, match='predicts pred_panoptic_seg'):
        infer.as_results(sample, 1, 'photo', None)


def test_what_cannot_be_drawn_is_predicted(run, photos, tmp_path, capsys):
    """MMSegmentation's visualizer stops at an image of one pixel."""
    dot = tmp_path / 'in' / 'dot.png'
    dot.parent.mkdir()
    Image.new('RGB', (1, 1), (9, 9, 9)).save(dot)
    listed, results = run('segmenter', dot, photos / 'odd.jpg')
    assert [result['label_map'] for result in results] == [
        'dot_labels.png',
        'odd_labels.png',
    ]
    printed = ' '.join(capsys.readouterr().out.split())
    assert f'prediction of {dot} cannot be drawn: ' in printed
    assert cv2.imread(str(tmp_path / 'dot.jpg')).tolist() == [[[9, 9, 9]]]
    assert cv2.imread(str(tmp_path / 'dot_labels.png')).shape == (1, 1, 3)


def test_classifier(run, photos):
    listed, results = run('classifier', photos, batch_size=4)
    check_images(listed, photos)
    for result in results:
        assert sum(result['scores']) == pytest.approx(1, abs=1e-5)
        assert result['score'] == max(result['scores'])
        assert result['category_id'] == np.argmax(result['scores']) + 1


def test_same_results_in_batches_and_alone(run, photos):
    _, alone = run('classifier', photos)
    _, batches = run('classifier', photos, batch_size=7)
    for a, b in zip(alone, batches, strict=True):
        assert a['scores'] == pytest.approx(b['scores'], abs=1e-5)


def test_what_is_broken_is_named_and_the_rest_goes_on(run, photos, tmp_path, capsys):
    folder = tmp_path / 'in'
    folder.mkdir()
    whole = (photos / 'gray.png').read_bytes()
    for name, content in (('torn.png', whole[:200]), ('none.jpg', b'')):
        (folder / name).write_bytes(content)
    (folder / 'clip.mp4').write_bytes(b'no video')
    good = photos / 'odd.jpg'
    inputs = [folder / 'torn.png', good, folder / 'none.jpg', folder / 'clip.mp4']
    with pytest.raises(SystemExit) as exit:
        run('classifier', *inputs, batch_size=2)
    assert exit.value.code == 1
    listed, results = read(tmp_path)
    assert [image['file_name'] for image in listed['images']] == [str(good)]
    assert len(results) == 1
    printed = capsys.readouterr().out.replace('\n', '')
    for name in ('torn.png', 'none.jpg', 'clip.mp4'):
        assert f'Passed over: {folder / name}' in printed
    assert '1 images, 3 passed over' in printed


def test_video(run, tmp_path):
    path = tmp_path / 'in' / 'clip.avi'
    path.parent.mkdir()
    video = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*'MJPG'), 5, (64, 48))
    for value in (0, 90, 180):
        video.write(np.full((48, 64, 3), value, dtype=np.uint8))
    video.release()
    listed, results = run('segmenter', path, batch_size=2)
    files = [f'{path}#{i}' for i in range(3)]
    assert [image['file_name'] for image in listed['images']] == files
    assert len({result['label_map'] for result in results}) == 3
    drawn = cv2.VideoCapture(str(tmp_path / 'clip.mp4'))
    assert drawn.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert drawn.get(cv2.CAP_PROP_FPS) == 5
    assert drawn.get(cv2.CAP_PROP_FRAME_WIDTH) == 64


@pytest.mark.parametrize(
    ('rate', 'written'),
    [(23.976, 23.976), (65.5361, 65.54), (240.123, 240.12), (90000, 65535)],
)
def test_rates_that_mpeg4_cannot_hold(rate, written, tmp_path):
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    with ExitStack() as stack:
        frame = infer.Frame('a#0', 'a_0', image, video='a', rate=rate)
        infer.write_picture(tmp_path, frame, image, {}, stack)
    video = cv2.VideoCapture(str(tmp_path / 'a.mp4'))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 1
    assert video.get(cv2.CAP_PROP_FPS) == written


def test_a_video_that_cannot_be_written_is_an_error(tmp_path):
    image = np.zeros((48, 64, 3), dtype=np.uint8)
    for video in ('', 'a'):
        frame = infer.Frame('a', 'a', image, video=video, rate=25)
        with pytest.raises(UserError, match=f'Cannot write {tmp_path}/none/a'):
            infer.write_picture(tmp_path / 'none', frame, image, {}, ExitStack())


def test_files(photos, tmp_path, monkeypatch):
    found = infer.find_files([str(photos)])
    assert {str(f.relative_to(photos)) for f in found} == {*PHOTOS}
    pattern = str(photos / '**' / 'odd.*')
    assert len(infer.find_files([pattern])) == 2
    lines = f'{photos / "gray.png"}\n\n{photos / "odd.jpg"}\n'
    monkeypatch.setattr('sys.stdin', io.StringIO(lines))
    assert [f.name for f in infer.find_files(['-'])] == ['gray.png', 'odd.jpg']
    monkeypatch.setattr('sys.stdin', io.StringIO(''))
    for text, message in (
        (photos / 'empty', 'No image or video in .*; the folder is empty'),
        (photos / 'gone.jpg', 'No such file, folder or pattern'),
        ('-', 'standard input is empty'),
    ):
        with pytest.raises(UserError, match=message):
            infer.find_files([str(text)])


def test_names_are_never_taken_twice(tmp_path):
    names = ['a_2.png', 'a.png', 'a.jpg', 'a.bmp']
    found = [frame.name for frame in infer.frames(map(Path, names))]
    assert found == ['a_2', 'a', 'a_3', 'a_4']


def test_frames_and_images_have_names_of_their_own(tmp_path):
    clip, image = tmp_path / 'clip.avi', tmp_path / 'clip_000000.png'
    video = cv2.VideoWriter(str(clip), cv2.VideoWriter.fourcc(*'MJPG'), 5, (64, 48))
    for _ in range(2):
        video.write(np.zeros((48, 64, 3), dtype=np.uint8))
    video.release()
    found = [frame.name for frame in infer.frames([clip, image])]
    assert found == ['clip_000000', 'clip_000001', 'clip_000000_2']
    found = [frame.name for frame in infer.frames([image, clip])]
    assert found == ['clip_000000', 'clip_000000_2', 'clip_000001']


@pytest.mark.skipif(sys.platform != 'linux', reason='names are bytes on Linux alone')
def test_names_that_are_no_text(run, photos, tmp_path, capsys):
    """OpenCV crashes at them, and streams of UTF-8 do not take them."""
    folder = tmp_path / 'in'
    folder.mkdir()
    for name in (b'caf\xe9.jpg', b'clip\xe9.mp4'):
        Path(os.fsdecode(os.fsencode(folder) + b'/' + name)).write_bytes(
            (photos / 'odd.jpg').read_bytes()
        )
    files = infer.find_files([str(folder)])
    names = [(frame.name, bool(frame.fault)) for frame in infer.frames(files)]
    assert names == [('caf\\udce9', False), ('clip\\udce9', True)]
    with pytest.raises(SystemExit):
        run('classifier', folder)
    listed, _ = read(tmp_path)
    assert [image['file_name'] for image in listed['images']] == [str(files[0])]
    assert (tmp_path / 'caf\\udce9.jpg').is_file()
    printed = capsys.readouterr().out.replace('\n', '')
    assert 'clip\\udce9.mp4 has a name that is no UTF-8' in printed


def test_an_output_folder_that_is_no_text_is_refused(run, photos):
    with pytest.raises(UserError, match='--out-dir: caf.udce9 is no UTF-8'):
        run('classifier', photos / 'odd.jpg', out_dir='caf\udce9')


def test_classes_without_names_are_counted_in_cascades_too():
    shown = {}
    visualizer = SimpleNamespace(set_dataset_meta=lambda **meta: shown.update(meta))
    heads = nn.ModuleList([nn.Identity(), nn.Identity()])  # MMSegmentation's cascade
    model = SimpleNamespace(decode_head=heads, num_classes=3)
    tool = SimpleNamespace(model=model, visualizer=visualizer)
    inferencer._name_classes(tool, {}, 'mmseg')
    assert shown['classes'] == ['class 0', 'class 1', 'class 2']
    assert len(shown['palette']) == 3


def test_configs_by_name(tmp_path):
    path, weights = find_config('rednet50_3rdparty_in1k')
    assert Path(path).stem == 'rednet50_64xb32-warmup-coslr_in1k'
    assert weights == 'paddleclas://RedNet50'
    path, weights = find_config('faster-rcnn_rednet50_fpn_bccd')
    assert Path(path).is_file() and weights is None
    assert find_config('mask-rcnn_rednet26-slim_fpn_shapes.py')[0].endswith('shapes.py')
    with pytest.raises(UserError, match='mean faster-rcnn_rednet50_fpn_bccd'):
        find_config('faster-rcnn_rednet50_fpn_bcd')


@pytest.mark.parametrize(
    ('kind', 'inferencer'),
    [
        ('detector', 'DetInferencer'),
        ('segmenter', 'MMSegInferencer'),
        ('classifier', 'ImageClassificationInferencer'),
    ],
)
def test_inferencer_of_the_toolbox(kind, inferencer, weights, monkeypatch, coco_root):
    monkeypatch.setenv('TINY_DATA', str(coco_root))
    warned = []
    monkeypatch.setattr(
        'mmengine.logging.print_log', lambda line, *_, **__: warned.append(line)
    )
    built = build_inferencer(TINY / f'{kind}.py', weights[kind], 'cpu')
    assert type(built).__name__ == inferencer
    assert not [line for line in warned if 'Failed to search registry' in line]
    saved = torch.load(weights[kind], weights_only=True)['state_dict']
    for name, value in built.model.state_dict().items():
        assert torch.equal(value, saved[name]), name
    # as the toolbox's users call it
    photo = np.full((48, 64, 3), 99, dtype=np.uint8)
    assert built(photo)


def test_weights_that_do_not_fit(weights, monkeypatch, coco_root, tmp_path):
    monkeypatch.setenv('TINY_DATA', str(coco_root))
    saved = torch.load(weights['detector'], weights_only=True)
    saved['state_dict'].pop('bbox_head.retina_cls.bias')
    torch.save(saved, tmp_path / 'partial.pth')
    with pytest.raises(UserError, match='1 of .* bbox_head.retina_cls.bias. Use'):
        build_inferencer(TINY / 'detector.py', str(tmp_path / 'partial.pth'))
    with pytest.raises(UserError, match='does not exist'):
        build_inferencer(TINY / 'detector.py', str(tmp_path / 'gone.pth'))


def test_weights_that_would_run_code(monkeypatch, coco_root, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / 'ran',)

    monkeypatch.setenv('TINY_DATA', str(coco_root))
    torch.save(dict(state_dict={}, meta=Evil()), tmp_path / 'evil.pth')
    with pytest.raises(pickle.UnpicklingError, match='Refused to load'):
        build_inferencer(TINY / 'detector.py', str(tmp_path / 'evil.pth'))
    assert not (tmp_path / 'ran').exists()


def test_class_names_of_a_checkpoint(weights, monkeypatch, coco_root, tmp_path):
    monkeypatch.setenv('TINY_DATA', str(coco_root))
    for kind in ('detector', 'segmenter', 'classifier'):
        saved = torch.load(weights[kind], weights_only=True)
        saved['meta'] = dict(dataset_meta=dict(classes=('cat', 'dog')))
        torch.save(saved, tmp_path / f'{kind}.pth')
        built = build_inferencer(TINY / f'{kind}.py', str(tmp_path / f'{kind}.pth'))
        if kind == 'classifier':
            assert built.classes == ('cat', 'dog')
        else:
            assert built.model.dataset_meta['classes'] == ('cat', 'dog')


@pytest.mark.parametrize(
    'meta',
    ['text', [1], dict(dataset_meta='text'), dict(dataset_meta=dict(classes=5))],
    ids=str,
)
def test_odd_meta_data_name_no_classes(meta, weights, monkeypatch, cls_root, tmp_path):
    monkeypatch.setenv('TINY_DATA', str(cls_root))
    saved = torch.load(weights['classifier'], weights_only=True)
    torch.save({**saved, 'meta': meta}, tmp_path / 'odd.pth')
    built = build_inferencer(TINY / 'classifier.py', str(tmp_path / 'odd.pth'))
    plain = build_inferencer(TINY / 'classifier.py', weights['classifier'])
    assert built.classes == plain.classes


@pytest.mark.parametrize('classes', [None, ['dark', 'light']])
def test_a_config_that_names_no_data(classes, weights, monkeypatch, cls_root):
    monkeypatch.setenv('TINY_DATA', str(cls_root))
    cfg = Config.fromfile(TINY / 'classifier.py')
    del cfg.test_dataloader.dataset.data_prefix
    if classes:
        cfg.test_dataloader.dataset.metainfo = dict(classes=classes)
    assert build_inferencer(cfg, weights['classifier']).classes == classes


def test_inputs_are_not_written_over(run, photos, tmp_path):
    photo = tmp_path / 'photo.jpg'
    content = (photos / 'odd.jpg').read_bytes()
    photo.write_bytes(content)
    for given in (photo, tmp_path):
        with pytest.raises(UserError, match='photo.jpg lies in --out-dir'):
            run('classifier', given)
    assert photo.read_bytes() == content and list(tmp_path.iterdir()) == [photo]


def test_pattern_of_folders_alone(photos):
    with pytest.raises(UserError, match='No such file, folder or pattern'):
        infer.find_files([str(photos / 's*')])


def test_image_with_much_text(photos, tmp_path):
    """Pillow refuses its text; OpenCV reads the image."""
    file, text = tmp_path / 'text.png', PngInfo()
    text.add_text('prompt', 'x' * 2_000_000, zip=True)
    Image.open(photos / 'gray.png').save(file, pnginfo=text)
    (frame,) = infer.frames([file])
    assert not frame.fault and frame.image.shape == (48, 64, 3)
