"""Training and testing on tiny real data, and what they refuse."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmcls_involution import __main__ as commands
from mmcls_involution.data import segmentation

torch = pytest.importorskip('torch')
Runner = pytest.importorskip('mmengine.runner').Runner

ROOT = Path(__file__).parents[2]
LIBRARIES = dict(detector='mmdet', segmenter='mmseg', classifier='mmpretrain')
DATA = dict(detector='coco_root', segmenter='seg_root', classifier='cls_root')
TASKS = tuple(LIBRARIES)
# What one run trains, and the checkpoint it leaves.
LAST = dict(detector='epoch_1', segmenter='iter_2', classifier='epoch_1')

Tool = Callable[..., str]


def forget_runs() -> None:
    """Drop the loggers and visualizers that MMEngine keeps for the whole process."""
    from mmengine.utils import ManagerMixin

    classes = [ManagerMixin]
    while classes:
        cls = classes.pop()
        cls._instance_dict.clear()
        classes += cls.__subclasses__()


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Tool:
    """Run a command in this process, on tests/tiny or the config given first.

    Returns the message it ended with, '' for success.
    """

    def run(name: str, task: str, *arguments: str | Path) -> str:
        pytest.importorskip(LIBRARIES[task])
        monkeypatch.setenv('TINY_DATA', str(request.getfixturevalue(DATA[task])))
        if Path(*arguments[:1]).suffix != '.py':
            arguments = (ROOT / 'tests' / 'tiny' / f'{task}.py', *arguments)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        forget_runs()
        try:
            commands.run(name)
        except SystemExit as end:
            return str(end.code or '')
        return ''

    return run


@pytest.fixture(scope='module')
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Work dirs of finished runs, by task; filled by :func:`checkpoint`."""
    return {}


@pytest.fixture
def checkpoint(trained, tool, tmp_path_factory) -> Callable[[str], Path]:
    """Train a task for two iterations, once, and give its checkpoint."""

    def get(task: str) -> Path:
        if task not in trained:
            folder = tmp_path_factory.mktemp(task)
            assert tool('train', task, '--work-dir', folder) == ''
            trained[task] = folder
        return trained[task] / f'{LAST[task]}.pth'

    return get


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def metrics(folder: Path) -> dict:
    """Metrics that a test run wrote into its work dir."""
    (file,) = folder.glob('*/*.json')
    return json.loads(file.read_text())


# ------------------------------------------------------------------ train, test, resume


@pytest.mark.parametrize('task', TASKS)
def test_train_and_test(task, checkpoint, tool, tmp_path):
    file = checkpoint(task)
    state = load(file)
    assert state['meta']['iter'] == 2
    assert all(v.isfinite().all() for v in state['state_dict'].values())
    logs = next(file.parent.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in logs if '"loss"' in line]
    assert len(losses) == 2 and np.isfinite(losses).all()

    out = tmp_path / 'metrics.json'
    assert (
        tool(
            'test', task, file, '--work-dir', tmp_path / 'work',
            '--out', out, '--out-item', 'metrics',
        )
        == ''
    )  # fmt: skip
    saved = json.loads(out.read_text())
    assert saved and metrics(tmp_path / 'work').items() >= saved.items()


@pytest.mark.parametrize('task', TASKS)
def test_pictures_and_predictions(task, checkpoint, tool, tmp_path):
    file, pictures = checkpoint(task), tmp_path / 'pictures'
    out = tmp_path / ('maps' if task == 'segmenter' else 'predictions.pkl')
    assert (
        tool(
            'test', task, file, '--work-dir', tmp_path / 'work',
            '--show-dir', pictures, '--out', out,
        )
        == ''
    )  # fmt: skip
    assert len([*pictures.glob('**/*.png'), *pictures.glob('**/*.jpg')]) == 4
    if task == 'segmenter':
        assert len(list(out.glob('*.png'))) == 4
    else:
        assert len(pickle.loads(out.read_bytes())) == 4


def test_predictions_outlive_a_metric_that_fails(
    checkpoint, tool, tmp_path, monkeypatch
):
    file, out = checkpoint('detector'), tmp_path / 'predictions.pkl'
    from mmdet.evaluation import CocoMetric

    def fail(self, results):
        raise RuntimeError('of the metric')

    monkeypatch.setattr(CocoMetric, 'compute_metrics', fail)
    with pytest.raises(RuntimeError, match='of the metric'):
        tool('test', 'detector', file, '--work-dir', tmp_path, '--out', out)
    assert len(pickle.loads(out.read_bytes())) == 4


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_default_augmentation_of_tests(task, checkpoint, tool, tmp_path):
    assert tool('test', task, checkpoint(task), '--work-dir', tmp_path, '--tta') == ''
    assert len(list(tmp_path.glob('*/*.log'))) == 1


TWICE = dict(
    detector=('train_cfg.max_epochs=2', 'epoch_1.pth', 'epoch_2.pth'),
    segmenter=('train_cfg.max_iters=4', 'iter_2.pth', 'iter_4.pth'),
)


@pytest.mark.parametrize('task', TWICE)
def test_resumed_run_equals_uninterrupted_run(task, tool, tmp_path):
    option, half, last = TWICE[task]
    whole, auto, named = (tmp_path / name for name in ('whole', 'auto', 'named'))
    arguments = ['--no-validate', '--cfg-options', option]
    assert tool('train', task, '--work-dir', whole, *arguments) == ''
    # A run that was killed there, in a work dir that was moved: last_checkpoint names
    # a file that is gone.
    auto.mkdir()
    shutil.copy(whole / half, auto)
    (auto / 'last_checkpoint').write_text(str(tmp_path / 'gone' / half))
    for folder, resume in ((auto, []), (named, [whole / half])):
        arguments[:1] = ['--no-validate', '--resume', *resume]
        assert tool('train', task, '--work-dir', folder, *arguments) == ''
        del arguments[1 : 2 + len(resume)]
        assert_same_training_state(load(whole / last), load(folder / last))


def assert_same_training_state(a: dict, b: dict) -> None:
    """Compare counters, weights, optimizer and schedules bit for bit."""
    for key in ('epoch', 'iter', 'seed'):
        assert a['meta'][key] == b['meta'][key]
    assert a['state_dict'].keys() == b['state_dict'].keys()
    for key, value in a['state_dict'].items():
        assert torch.equal(value, b['state_dict'][key]), key
    assert a['param_schedulers'] == b['param_schedulers']
    assert a['optimizer']['param_groups'] == b['optimizer']['param_groups']
    assert a['optimizer']['state'].keys() == b['optimizer']['state'].keys() != set()
    for i, state in a['optimizer']['state'].items():
        for key, value in state.items():
            assert torch.equal(value, b['optimizer']['state'][i][key]), (i, key)
    losses = [c['message_hub']['log_scalars']['train/loss'].data[0] for c in (a, b)]
    assert np.array_equal(*losses)


def test_resume_takes_the_files_of_its_own_folder_alone(checkpoint, tool, tmp_path):
    """A copied work dir, and another run under the name that the first one had."""
    work, copy = tmp_path / 'work', tmp_path / 'copy'
    for folder in (work, copy):
        shutil.copytree(checkpoint('segmenter').parent, folder)
        (folder / 'last_checkpoint').write_text(str(work / 'iter_2.pth'))
    shutil.copy(work / 'iter_1.pth', work / 'iter_2.pth')
    options = ['--no-validate', '--cfg-options', 'train_cfg.max_iters=3']
    assert tool('train', 'segmenter', '--work-dir', copy, '--resume', *options) == ''
    assert not list(copy.glob('earlier_*'))
    assert {f'iter_{i}.pth' for i in (1, 2, 3)} == {f.name for f in copy.glob('*.pth')}
    log = max(copy.glob('*/vis_data/scalars.json')).read_text().splitlines()
    assert [json.loads(line)['step'] for line in log] == [3]


def test_resume_keeps_the_best_checkpoint_of_the_other_run(tool, tmp_path):
    work, copy = tmp_path / 'work', tmp_path / 'copy'
    options = ['--cfg-options', 'default_hooks.checkpoint.save_best=mIoU']
    assert tool('train', 'segmenter', '--work-dir', work, *options) == ''
    (best,) = work.glob('best_*.pth')
    shutil.copytree(work, copy)
    state = load(copy / 'iter_2.pth')
    assert state['message_hub']['runtime_info']['best_ckpt'] == str(best)
    state['message_hub']['runtime_info']['best_score'] = -1.0
    torch.save(state, copy / 'iter_2.pth')
    options += ['train_cfg.max_iters=4']
    assert tool('train', 'segmenter', '--work-dir', copy, '--resume', *options) == ''
    assert best.exists()
    assert [file.name for file in copy.glob('best_*')] == ['best_mIoU_iter_4.pth']


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (
            ['model.decode_head.channels=8'],
            r'The config says model.decode_head.channels=8 \(before: 16\). 22 '
            r'parameters do not fit: .*conv_seg.weight is \[2, 16, 1, 1\], in the '
            r'model \[2, 8, ',
        ),
        (
            ['model.backbone.depth=38'],
            r'depth=38 \(before: 26\). \d+ parameters do not fit: .* is missing',
        ),
        (
            ['model.decode_head.in_channels=[16,16]',
             'model.decode_head.feature_strides=[4,8]',
             'model.decode_head.in_index=[0,1]'],
            r'parameters of it are not in the model: decode_head.scale_heads.2',
        ),
        (
            ['optim_wrapper.optimizer._delete_=True',
             'optim_wrapper.optimizer.type=AdamW'],
            r'optimizer SGD has .*momentum.* that of the config, AdamW, .*betas',
        ),
        (
            ['optim_wrapper.paramwise_cfg.bias_lr_mult=2'],
            r'optimizer has (\d+) parameters in 1 group\(s\), that of the config \1 '
            r'parameters in \1 group',
        ),
    ],
)  # fmt: skip
def test_resume_of_another_training(options, expected, checkpoint, tool, tmp_path):
    work = tmp_path / 'work'
    shutil.copytree(checkpoint('segmenter').parent, work)
    before = sorted(work.rglob('*'))
    options = ['--cfg-options', *options, 'train_cfg.max_iters=3']
    message = tool('train', 'segmenter', '--work-dir', work, '--resume', *options)
    assert re.search(expected, message), message
    assert f'load_from={work / "iter_2.pth"}' in message
    assert sorted(work.rglob('*')) == before


def test_resume_of_bare_weights(checkpoint, tool, tmp_path):
    weights, work = tmp_path / 'weights.pth', tmp_path / 'work'
    torch.save(dict(state_dict=load(checkpoint('segmenter'))['state_dict']), weights)
    message = tool('train', 'segmenter', '--work-dir', work, '--resume', weights)
    assert 'holds weights, and no state of a training' in message
    assert not work.exists()


def test_settings_that_a_resumed_run_passes_over(checkpoint, tool, tmp_path, capfd):
    start = checkpoint('segmenter')
    arguments = ['--work-dir', tmp_path, '--resume', start, '--no-validate']
    options = ['train_cfg.max_iters=3']
    assert tool('train', 'segmenter', *arguments, '--cfg-options', *options) == ''
    assert 'is resumed with its own' not in ''.join(capfd.readouterr())
    options += ['optim_wrapper.optimizer.lr=0.5', 'param_scheduler.0.power=2']
    assert tool('train', 'segmenter', *arguments, '--cfg-options', *options) == ''
    assert (
        f'{start} is resumed with its own lr 0.01 (the config has 0.5), its '
        'param_scheduler (the config has another one). To use'
    ) in ''.join(capfd.readouterr())


def test_resume_passes_over_a_file_cut_short(checkpoint, tool, tmp_path):
    first = checkpoint('segmenter')
    shutil.copytree(first.parent, tmp_path / 'work')
    torn = tmp_path / 'work' / 'iter_3.pth'
    torn.write_bytes(first.read_bytes()[:5000])
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(torn))
    assert (
        tool(
            'train', 'segmenter', '--work-dir', tmp_path / 'work', '--resume',
            '--no-validate', '--cfg-options', 'train_cfg.max_iters=3',
        )
        == ''
    )  # fmt: skip
    assert load(torn)['meta']['iter'] == 3


def test_resume_with_nothing_to_resume_keeps_load_from(checkpoint, tool, tmp_path):
    start = checkpoint('segmenter')
    assert (
        tool(
            'train', 'segmenter', '--work-dir', tmp_path, '--resume', '--no-validate',
            '--cfg-options', f'load_from={start}', 'optim_wrapper.optimizer.lr=0',
            'train_cfg.max_iters=1',
        )
        == ''
    )  # fmt: skip
    ours, theirs = load(tmp_path / 'iter_1.pth'), load(start)
    assert ours['meta']['iter'] == 1
    key = 'decode_head.conv_seg.weight'
    assert torch.equal(ours['state_dict'][key], theirs['state_dict'][key])


def test_a_new_run_keeps_the_checkpoints_of_the_earlier_one(checkpoint, tool, tmp_path):
    work = tmp_path / 'work'
    shutil.copytree(checkpoint('segmenter').parent, work)
    earlier = {file.name: file.read_bytes() for file in work.glob('*.pth')}
    options = ['--no-validate', '--cfg-options', 'train_cfg.max_iters=1']
    assert tool('train', 'segmenter', '--work-dir', work, *options) == ''
    (aside,) = work.glob('earlier_*')
    assert {file.name: file.read_bytes() for file in aside.glob('*.pth')} == earlier
    assert [file.name for file in work.glob('*.pth')] == ['iter_1.pth']

    options += [f'load_from={work / "iter_1.pth"}']
    message = tool('train', 'segmenter', '--work-dir', work, *options)
    assert 'own work dir' in message and '--resume' in message
    assert (work / 'iter_1.pth').exists()
    key = 'model.backbone.init_cfg'
    options[-1:] = [f'{key}.type=Pretrained', f'{key}.checkpoint={work / "iter_1.pth"}']
    message = tool('train', 'segmenter', '--work-dir', work, *options)
    assert f'{key}.checkpoint is a checkpoint in this run' in message
    assert (work / 'iter_1.pth').exists()


# ----------------------------------------------------------------- every config of ours


def write_images(folder: Path, names: Iterable[str], size: tuple[int, int]) -> None:
    """Noise with a dark left and a light right half, of ``size`` (width, height)."""
    folder.mkdir(parents=True)
    rng, (width, height) = np.random.default_rng(0), size
    for name in names:
        picture = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
        picture[:, width // 2 :] += 150
        Image.fromarray(picture).save(folder / name)


def write_coco(root: Path, ann_file: str, images: str, classes: Iterable[str]) -> None:
    write_images(root / images, [f'{i}.jpg' for i in range(4)], (96, 64))
    annotations = [
        dict(
            id=i + 1,
            image_id=i // 2,
            category_id=1 + i % 3,
            bbox=[48 * (i % 2), 8, 40, 48],
            area=40 * 48,
            segmentation=[[x, 8, x + 40, 8, x + 40, 56, x, 56]],
            iscrowd=0,
        )
        for i in range(8)
        for x in [48 * (i % 2)]
    ]
    (root / ann_file).parent.mkdir()
    (root / ann_file).write_text(
        json.dumps(
            dict(
                images=[
                    dict(id=i, file_name=f'{i}.jpg', width=96, height=64)
                    for i in range(4)
                ],
                annotations=annotations,
                categories=[dict(id=i, name=n) for i, n in enumerate(classes, 1)],
            )
        )
    )


def write_segmentation(
    root: Path, images: str, labels: str, suffixes: tuple[str, str]
) -> None:
    write_images(root / images, [f'{i}{suffixes[0]}' for i in range(4)], (128, 96))
    (root / labels).mkdir(parents=True)
    halves = np.zeros((96, 128), dtype=np.uint8)
    halves[:, 64:], halves[:8] = 1, 255
    for i in range(4):
        Image.fromarray(halves).save(root / labels / f'{i}{suffixes[1]}')


def write_data(name: str, root: Path) -> None:
    """Four training images (cells: one per class) in the format of ``configs/name``."""
    if name == 'coco':
        from mmdet.datasets import CocoDataset

        classes = CocoDataset.METAINFO['classes']
        write_coco(root, 'annotations/instances_train2017.json', 'train2017', classes)
    elif name == 'bccd':
        write_coco(
            root, 'annotations/train.json', 'images', ('RBC', 'WBC', 'Platelets')
        )
    elif name == 'demo':
        shapes = ('circle', 'square', 'triangle', 'star')
        write_coco(root, 'annotations/train.json', 'images', shapes)
    elif name == 'cityscapes':
        folders = ('leftImg8bit/train/aachen', 'gtFine/train/aachen')
        suffixes = ('_leftImg8bit.png', '_gtFine_labelTrainIds.png')
        write_segmentation(root, *folders, suffixes)
    elif name == 'camvid':
        write_segmentation(root, 'images/train', 'labels/train', ('.jpg', '.png'))
    elif name == 'imagenet':
        files = [f'n0{i}_{i}.JPEG' for i in range(4)]
        write_images(root / 'train', files, (64, 64))
        (root / 'meta').mkdir()
        lines = (f'{file} {249 * i}\n' for i, file in enumerate(files))
        (root / 'meta' / 'train.txt').write_text(''.join(lines))
    else:
        for cell in ('Platelets', 'RBC', 'WBC'):
            write_images(root / 'train' / cell, [f'{cell}.png'], (64, 64))


# folder of configs -> kind, and what names its data
FOLDERS = dict(
    ablations=('classifier', None),
    bccd=('detector', 'BCCD_ROOT'),
    bccd_cells=('classifier', 'BCCD_CELLS_ROOT'),
    camvid=('segmenter', 'CAMVID_ROOT'),
    cityscapes=('segmenter', None),
    coco=('detector', None),
    demo=('detector', 'SHAPES_ROOT'),
    imagenet=('classifier', None),
)
# A quarter of the channels, on small pictures; all else is as shipped.
SLIM = dict(
    detector=[
        'model.neck.in_channels=[64,128,256,512]',
        'train_dataloader.dataset.pipeline.2.scale=(96,64)',
    ],
    segmenter=[
        'train_dataloader.dataset.pipeline.2.scale=(128,96)',
        'train_dataloader.dataset.pipeline.3.crop_size=(64,96)',
        'model.data_preprocessor.size=(64,96)',
    ],
    classifier=['model.head.in_channels=512'],
)
SHIPPED = sorted(
    file for file in (ROOT / 'configs').glob('*/*.py') if file.parent.name != '_base_'
)
PRETRAINED = [
    file
    for file in SHIPPED
    if file.parent.name in ('coco', 'cityscapes') or 'rednet50-in1k-pre' in file.stem
]
CLASSIFIER = ROOT / 'configs/imagenet/rednet50_64xb32-warmup-coslr_in1k.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Data for a folder of configs, made once."""
    roots: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in roots:
            roots[name] = tmp_path_factory.mktemp(name)
            write_data(name, roots[name])
        return roots[name]

    return get


@pytest.fixture
def train_shipped(
    tool: Tool, data: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Runner]:
    """Train a config of ours for two iterations, a quarter or half as wide."""
    runners: list[Runner] = []
    train_runner = Runner.train

    def record(runner: Runner) -> torch.nn.Module:
        runners.append(runner)
        return train_runner(runner)

    monkeypatch.setattr(Runner, 'train', record)

    def train(file: Path, work_dir: Path, *options: str) -> Runner:
        task, variable = FOLDERS[file.parent.name]
        name = 'imagenet' if file.parent.name == 'ablations' else file.parent.name
        options = [
            'model.backbone.base_channels=16', 'model.backbone.stem_channels=32',
            'train_dataloader.batch_size=2', 'train_dataloader.num_workers=0',
            'default_hooks.logger.interval=1', *SLIM[task], *options,
        ]  # fmt: skip
        if variable:
            monkeypatch.setenv(variable, str(data(name)))
        else:
            options.append(f'train_dataloader.dataset.data_root={data(name)}')
        if name == 'imagenet':
            options.append('train_dataloader.dataset.pipeline.1.scale=64')
        loop = 'max_iters=2' if task == 'segmenter' else 'max_epochs=1'
        options.append(f'train_cfg.{loop}')
        if 'upernet' in file.stem:
            options += [
                'model.decode_head.in_channels=[64,128,256,512]',
                'model.auxiliary_head.in_channels=256',
            ]
        elif task == 'segmenter':
            options.append('model.neck.in_channels=[64,128,256,512]')
        if '-g32_' in file.stem:  # 32 channels are the least that share a kernel
            options += [
                'model.backbone.base_channels=32', 'model.backbone.stem_channels=64',
                'model.head.in_channels=1024',
            ]  # fmt: skip
        if 'rcnn' in file.stem:
            options.append('model.train_cfg.rcnn.sampler.num=16')
        if '_r50-in1k-pre' in file.stem:  # torchvision's weights, which are not here
            options.append('model.backbone.init_cfg=None')
        arguments = ['--work-dir', work_dir, '--no-validate', '--cfg-options', *options]
        assert tool('train', task, file, *arguments) == ''
        return runners.pop()

    return train


@pytest.fixture(scope='module')
def pretrained_once() -> list[Path]:
    return []


@pytest.fixture
def pretrained(pretrained_once, train_shipped, tmp_path_factory) -> Path:
    """What our ImageNet config leaves for detectors and segmenters to start from."""
    if not pretrained_once:
        folder = tmp_path_factory.mktemp('pretrained')
        # Two steps at the full rate leave weights that frozen batch norms overflow on.
        train_shipped(CLASSIFIER, folder, 'optim_wrapper.optimizer.lr=1e-3')
        pretrained_once.append(folder / 'epoch_1.pth')
    return pretrained_once[0]


@pytest.mark.parametrize(
    'file', SHIPPED, ids=lambda file: str(file.relative_to(ROOT / 'configs'))
)
def test_every_config_trains_on_data_of_its_format(
    file, train_shipped, request, tmp_path, monkeypatch
):
    if file in PRETRAINED:
        monkeypatch.setenv('REDNET50', str(request.getfixturevalue('pretrained')))
    keep_none = ['checkpoint.interval=-1', 'checkpoint.save_last=False']
    runner = train_shipped(file, tmp_path, *(f'default_hooks.{o}' for o in keep_none))
    logs = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    losses = [json.loads(line)['loss'] for line in logs if '"loss"' in line]
    assert len(losses) == 2 and np.isfinite(losses).all()
    text = next(tmp_path.glob('*/*.log')).read_text()
    assert ('load backbone. in model from' in text) is (file in PRETRAINED)
    assert ('(3 into 7), zeros around them, in stem.1.' in text) is (file in PRETRAINED)
    assert 'in source state_dict' not in text  # keys missing or unexpected
    parameters = dict(runner.model.named_parameters())
    trained = {name for name, p in parameters.items() if p.requires_grad}
    assert len(trained) > 50
    reached = runner.optim_wrapper.optimizer.state  # has what a gradient came to
    assert {name for name, p in parameters.items() if p in reached} == trained


@pytest.mark.parametrize(
    ('options', 'found'),
    [
        (['model.backbone.frozen_stages=1'], 'frozen_stages=1 would keep random ones'),
        (
            ['model.backbone.frozen_stages=0', 'model.backbone.norm_eval=True'],
            'frozen_stages=0 and norm_eval=True would keep random ones. To train it '
            'from scratch: model.backbone.frozen_stages=-1 '
            'model.backbone.norm_eval=False',
        ),
        (['model.backbone.frozen_stages=-1'], None),
        (['model.backbone.norm_eval=True', 'load_from=weights.pth'], None),
        (
            ['model.backbone.frozen_stages=1']
            + ['model.backbone.init_cfg.type=Pretrained']
            + ['model.backbone.init_cfg.checkpoint=weights.pth'],
            None,
        ),
    ],
)
def test_frozen_noise_is_named(options, found, tool, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('weights.pth').touch()
    # The missing data stops it before it trains.
    options = [*options, f'train_dataloader.dataset.data_root={tmp_path / "none"}']
    message = tool(
        'train', 'detector', '--work-dir', tmp_path, '--cfg-options', *options
    )
    assert 'none' in message
    text = ''.join(capfd.readouterr())
    assert ('has no pre-trained weights' in text) is (found is not None)
    assert (found or '') in text


# ----------------------------------------------------------------------------- settings


def dumped(folder: Path, task: str):
    from mmengine.config import Config

    return Config.fromfile(folder / f'{task}.py')


def test_flags_come_before_options_before_config(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ['--no-validate', '--cfg-options', 'train_cfg.max_iters=1']
    assert tool('train', 'segmenter', *short) == ''
    assert Path('work_dirs/segmenter/iter_1.pth').exists()
    assert tool('train', 'segmenter', *short, 'work_dir=option') == ''
    assert Path('option/iter_1.pth').exists()
    assert tool('train', 'segmenter', *short, 'work_dir=x', '--work-dir', 'flag') == ''
    assert Path('flag/iter_1.pth').exists() and not Path('x').exists()


@pytest.mark.parametrize('task', ['detector', 'classifier'])
def test_both_forms_of_auto_scale_lr(task, tool, tmp_path):
    arguments = ['--work-dir', tmp_path, '--no-validate', '--auto-scale-lr']
    assert tool('train', task, *arguments) == ''
    assert dumped(tmp_path, task).auto_scale_lr.enable
    (log,) = tmp_path.glob('*/vis_data/scalars.json')
    last = json.loads(log.read_text().splitlines()[-1])
    # two pictures per batch, and the detector's warm-up
    full = 0.01 * 2 / (16 if task == 'detector' else 256)
    assert last['lr'] == pytest.approx(full * (0.55 if task == 'detector' else 1))


def test_config_with_amp_trains_in_float32_on_cpu(tool, tmp_path, monkeypatch):
    monkeypatch.setattr('mmengine.device.get_device', lambda: 'cpu')
    if torch.cuda.is_available():
        pytest.skip('this is about machines without a GPU')
    options = [
        'optim_wrapper.type=AmpOptimWrapper', 'optim_wrapper.loss_scale=dynamic',
        'train_cfg.max_iters=1',
    ]  # fmt: skip
    arguments = ['--work-dir', tmp_path, '--no-validate', '--cfg-options', *options]
    assert tool('train', 'segmenter', *arguments) == ''
    assert dumped(tmp_path, 'segmenter').optim_wrapper.type == 'OptimWrapper'


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


# ------------------------------------------------------------------------------- errors


def edited(tmp_path: Path, task: str, text: str) -> Path:
    """A config over a tiny one."""
    file = tmp_path / 'edited.py'
    base = f'_base_ = {str(ROOT / "tests" / "tiny" / f"{task}.py")!r}\n'
    file.write_text(text if text.startswith('_base_') else base + text)
    return file


@pytest.mark.parametrize(
    ('task', 'option', 'expected'),
    [
        ('detector', 'train_dataloder.batch_size=4', 'no .train_dataloder.*train_data'),
        ('detector', 'model.backbone.type=RedNett', 'RedNett.*Did you mean RedNet'),
        ('detector', 'model.backbone.dept=26', "RedNet has no argument 'dept'.*depth"),
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
def test_config_file_error_is_one_message(text, expected, tool, tmp_path):
    file = edited(tmp_path, 'detector', text)
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
def test_variables_of_the_user_pass(text, warns, tool, tmp_path, capfd):
    """What is refused comes after: the config has been read."""
    file = edited(tmp_path, 'detector', text)
    options = ['--cfg-options', 'load_from=nowhere.pth']
    message = tool('train', 'detector', file, '--work-dir', tmp_path, *options)
    assert message.startswith('Error: load_from: nowhere.pth does not exist')
    said = 'is taken for a variable of yours' in ''.join(capfd.readouterr())
    assert said == warns


@pytest.mark.parametrize('folder', ['histopath/tower', 'path/to', '<mine>'])
def test_a_checkpoint_that_is_there_is_no_placeholder(
    folder, checkpoint, tool, tmp_path
):
    file = tmp_path / folder / 'last.pth'
    file.parent.mkdir(parents=True)
    shutil.copy(checkpoint('segmenter'), file)
    assert tool('test', 'segmenter', file, '--work-dir', tmp_path / 'work') == ''
    message = tool('test', 'segmenter', file.parent / 'no.pth')
    assert ('is a placeholder' in message) == (folder != 'histopath/tower')


def test_info_of_a_coco_file_may_have_categories(coco_root, tmp_path, tool):
    def change(content: dict) -> None:
        content['info'] = dict(categories=['blood'], images=[], annotations=7)
        for key in [*content][:-1]:  # info comes first
            content[key] = content.pop(key)

    options = odd_annotations(coco_root, tmp_path / 'ann.json', change)
    options += ['train_cfg.max_epochs=1']
    arguments = ['--work-dir', tmp_path / 'work', '--no-validate', *options]
    assert tool('train', 'detector', *arguments) == ''


def test_quote_in_a_path(coco_root, tool, tmp_path, monkeypatch):
    """A work dir may have one; a place that is written into a config may not."""
    file = edited(tmp_path, 'detector', '')
    root = shutil.copytree(coco_root, tmp_path / "it's")
    monkeypatch.setenv('TINY_DATA', str(root))
    monkeypatch.setattr(sys, 'argv', ['train', str(file)])
    with pytest.raises(SystemExit) as end:
        commands.run('train')
    assert f'The environment variable TINY_DATA is {root}: a' in str(end.value)
    options = ['--cfg-options', f'train_dataloader.dataset.data_root={root}']
    arguments = ['--work-dir', tmp_path / "its' work", '--no-validate', *options]
    assert tool('train', 'detector', *arguments) == ''


def test_missing_data_names_the_variable_for_its_place(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(DATA, 'detector', 'nowhere')
    message = tool('train', 'detector', '--work-dir', tmp_path)
    assert re.search('no-such-folder does not exist.*variable TINY_DATA or', message)


@pytest.mark.parametrize(
    'file', PRETRAINED, ids=lambda file: str(file.relative_to(ROOT / 'configs'))
)
def test_weights_that_are_not_there_say_how_to_get_them(
    file, tool, tmp_path, monkeypatch
):
    monkeypatch.delenv('REDNET50', raising=False)
    monkeypatch.setenv('MMCLS_INVOLUTION_WEIGHTS', str(tmp_path))
    message = tool('train', FOLDERS[file.parent.name][0], file, '--work-dir', tmp_path)
    assert message.startswith(
        'Error: model.backbone.init_cfg.checkpoint: cannot load paddleclas://RedNet50: '
        f'{tmp_path}/RedNet50_pretrained.pdparams does not exist (there: no '
        '.pdparams). What to do: fetch https://'
    )
    assert message.endswith('model.backbone.init_cfg=None: from random weights.')


@pytest.mark.parametrize(
    ('place', 'expected'),
    [
        ('nowhere.pth', r'nowhere.pth does not exist.*environment variable REDNET50'),
        ('torchvision://resnet51', r"cannot load torchvision://resnet51: 'resnet51'\."),
        (
            'http://127.0.0.1:9/a.pth',
            r'cannot load http://127.0.0.1:9/a.pth: .*refused',
        ),
        ('RedNet50_pretrained.pdparams', r'a file of Paddle\. tools/model_converters/'),
    ],
)
def test_weights_that_cannot_be_had(place, expected, tool, tmp_path, monkeypatch):
    monkeypatch.setenv('REDNET50', place)
    file = PRETRAINED[0]
    message = tool('train', FOLDERS[file.parent.name][0], file, '--work-dir', tmp_path)
    assert message.startswith('Error: model.backbone.init_cfg.checkpoint: ')
    assert re.search(expected, message), message


def test_weights_are_looked_for_by_any_spelling(tool, tmp_path):
    start = dict(type='mmengine.Pretrained', checkpoint='nowhere.pth')
    options = [f'model.backbone.init_cfg.{key}={value}' for key, value in start.items()]
    message = tool(
        'train', 'detector', '--work-dir', tmp_path, '--cfg-options', *options
    )
    assert 'model.backbone.init_cfg.checkpoint: nowhere.pth does not exist' in message


@pytest.fixture
def nowhere() -> str:
    return 'no-such-folder'


def test_prefix_that_does_not_fit_is_explained(tool, tmp_path):
    bare, work_dir = tmp_path / 'bare.pth', tmp_path / 'work'
    torch.save(dict(state_dict={'stem.0.conv.weight': torch.zeros(16, 3, 3, 3)}), bare)
    start = dict(type='Pretrained', checkpoint=bare, prefix='backbone.')
    options = [f'model.backbone.init_cfg.{key}={value}' for key, value in start.items()]
    message = tool(
        'train', 'detector', '--work-dir', work_dir, '--cfg-options', *options
    )
    assert message.startswith(
        'Error: backbone. is not in the pretrained model: no name'
    )
    assert 'set model.backbone.init_cfg.prefix=None' in message


def test_missing_config_names_similar_ones(tool):
    message = tool('train', 'detector', ROOT / 'tests' / 'tiny' / 'detectr.py')
    assert re.search(
        r'Config not found: .*detectr.py. Did you mean .*detector.py', message
    )


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        (['--resume', 'none.pth'], '--resume: none.pth does not exist'),
        (['--auto-scale-lr'], 'auto_scale_lr=dict'),
        (['--launcher', 'slurm'], 'tools/dist.sh'),
        (['--amp'], '--amp needs a GPU'),
    ],
)
def test_flag_error_is_one_message(flags, expected, tool, tmp_path):
    if torch.cuda.is_available() and flags[0] in ('--launcher', '--amp'):
        pytest.skip('this is about machines without a GPU')
    message = tool('train', 'segmenter', '--work-dir', tmp_path, *flags)
    assert message.startswith('Error: ') and expected in message


def test_loss_that_is_not_finite_stops_the_run(tool, tmp_path):
    options = ['optim_wrapper.optimizer.lr=1e30', 'train_cfg.max_iters=4']
    arguments = ['--work-dir', tmp_path, '--no-validate', '--cfg-options', *options]
    message = tool('train', 'segmenter', *arguments)
    found = re.search(r'not finite at iteration (\d): loss nan', message)
    assert found and 'clip_grad' in message
    saved = {file.name for file in tmp_path.glob('*.pth')}
    assert saved == {f'iter_{i}.pth' for i in range(1, int(found[1]))}


def test_category_twice_in_the_file(coco_root, tmp_path, tool):
    content = json.loads((coco_root / 'ann.json').read_text())
    content['categories'].append(dict(id=3, name='bar'))
    file = tmp_path / 'ann.json'
    file.write_text(json.dumps(content))
    option = f'train_dataloader.dataset.ann_file={file}'
    message = tool('train', 'detector', '--work-dir', tmp_path, '--cfg-options', option)
    assert 'twice' in message


@pytest.mark.parametrize('text', ['', '{}', '[1]', '{"categories": [1]}'])
def test_annotation_file_that_is_not_coco(text, tmp_path, tool):
    (tmp_path / 'ann.json').write_text(text)
    option = f'train_dataloader.dataset.ann_file={tmp_path / "ann.json"}'
    message = tool('train', 'detector', '--work-dir', tmp_path, '--cfg-options', option)
    assert 'is not a COCO annotation file' in message


@pytest.mark.parametrize('metric', ['CocoMetric', 'mmdet.CocoMetric', 'subclass'])
@pytest.mark.parametrize('wrapped', [False, True])
def test_metrics_of_other_annotations(metric, wrapped, coco_root, tmp_path, tool):
    if metric == 'subclass':
        from mmdet.evaluation import CocoMetric
        from mmdet.registry import METRICS

        metric = 'MetricOfMyOwn'
        METRICS.register_module(
            name=metric, module=type(metric, (CocoMetric,), {}), force=True
        )
    other = tmp_path / 'ann.json'
    shutil.copy(coco_root / 'ann.json', other)
    text = f'val_evaluator = dict(type={metric!r})\n'
    place = 'val_dataloader.dataset'
    if wrapped:
        text += """
_inner = dict(type='CocoDataset', data_root='{{$TINY_DATA:x}}',
    data_prefix=dict(img=''), ann_file='ann.json', test_mode=True,
    metainfo=dict(classes=('square', 'bar')))
val_dataloader = dict(dataset=dict(
    _delete_=True, type='mmdet.ConcatDataset', datasets=[_inner]))
"""
        place += '.datasets.0'
    file = edited(tmp_path, 'detector', text)
    message = tool(
        'train', 'detector', file, '--work-dir', tmp_path / 'work',
        '--cfg-options', f'{place}.ann_file={other}',
    )  # fmt: skip
    assert f'but the data set reads {other}' in message
    assert f'--cfg-options val_evaluator.ann_file={other}' in message


@pytest.fixture
def seg_copy(seg_root, tmp_path) -> Path:
    return shutil.copytree(seg_root, tmp_path / 'seg')


def rewrite(file: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    Image.fromarray(change(np.array(Image.open(file)))).save(file)


@pytest.mark.parametrize(
    ('damage', 'expected'),
    [
        (
            lambda file: file.unlink(),
            'labels/2.png: does not exist. Training stops here',
        ),
        (lambda file: rewrite(file, lambda a: a * 3), 'labels/2.png: has 3 ('),
        (lambda file: rewrite(file, lambda a: np.dstack([a] * 3)), 'shape (64, 64, 3)'),
        (lambda file: rewrite(file, lambda a: a[:32]), 'is 64x32, its image 64x64'),
        (lambda file: file.write_bytes(file.read_bytes()[:-40]), 'labels/2.png: '),
        (
            lambda file: [rewrite(f, lambda a: a * 255) for f in file.parent.iterdir()],
            'bottom (1 of 2 classes) in 4 label maps; ignored is 255, 56.2% of all',
        ),
    ],
)
def test_damaged_label_maps(damage, expected, seg_copy, tool, tmp_path):
    damage(seg_copy / 'labels' / '2.png')
    options = [f'train_dataloader.dataset.data_root={seg_copy}']
    message = tool(
        'train', 'segmenter', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith('Error: ') and expected in message, message
    assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_image_that_is_cut_short(split, workers, coco_root, tool, tmp_path):
    """OpenCV's imread reads such a JPEG and warns, its imdecode gives nothing."""
    root = shutil.copytree(coco_root, tmp_path / 'data')
    cv2 = pytest.importorskip('cv2')
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
    assert 'check_dataset.py' in message and len(message.splitlines()) == 1
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
    rewrite(seg_copy / 'labels' / '3.png', damage)
    rewrite(seg_copy / 'labels' / '1.png', damage)
    options = [f'train_dataloader.dataset.data_root={seg_copy}']
    message = tool(
        'train', 'segmenter', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith('Error: ') and expected in message, message
    assert 'check_dataset.py' in message


def test_image_too_narrow_to_be_resized(coco_root, tool, tmp_path):
    root = shutil.copytree(coco_root, tmp_path / 'data')
    Image.new('RGB', (2000, 3)).save(root / '2.png')
    options = [f'train_dataloader.dataset.data_root={root}']
    options += ['train_dataloader.dataset.pipeline.2.keep_ratio=True']
    message = tool(
        'train', 'detector', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith(f'Error: {root / "2.png"} ') and 'resize' in message


@pytest.mark.parametrize(
    ('damage', 'expected'),
    [
        (lambda root: (root / '.hidden').mkdir(), 'cls/.hidden. Take it away: it'),
        (lambda root: (root / 'third').mkdir(), 'holds 3 folders: expected one per'),
        (
            lambda root: [f.rename(f.with_suffix('.heic')) for f in root.glob('*/*')],
            'cls: no file name ends in one of .bmp, .jpeg',
        ),
    ],
)
def test_class_folders(damage, expected, cls_root, tool, tmp_path):
    root = shutil.copytree(cls_root, tmp_path / 'cls')
    damage(root)
    options = [f'train_dataloader.dataset.data_prefix={root}']
    message = tool(
        'train', 'classifier', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert message.startswith('Error: ') and expected in message, message


def test_filter_that_leaves_nothing(tool, tmp_path):
    options = ['train_dataloader.dataset.filter_cfg.min_size=99']
    message = tool(
        'train', 'detector', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert 'CocoDataset holds no sample' in message and "'min_size': 99" in message


def test_error_of_ones_own_transform_keeps_its_traceback(tool, tmp_path, monkeypatch):
    from mmcv.transforms import LoadImageFromFile

    def transform(self, results):
        raise ValueError('of ones own')

    monkeypatch.setattr(LoadImageFromFile, 'transform', transform)
    with pytest.raises(ValueError, match='of ones own'):
        tool('train', 'detector', '--work-dir', tmp_path / 'w')


def test_wrong_suffix(tool, tmp_path):
    options = ['train_dataloader.dataset.img_suffix=.jpg']
    message = tool(
        'train', 'segmenter', '--work-dir', tmp_path / 'w', '--cfg-options', *options
    )
    assert 'images: no file name ends in .jpg; there are 0.png, 1.png' in message


def odd_annotations(coco_root: Path, file: Path, change: Callable[[dict], None]) -> str:
    """Write changed annotations; give the options that train and evaluate with them."""
    content = json.loads((coco_root / 'ann.json').read_text())
    change(content)
    file.write_text(json.dumps(content), encoding='utf-8-sig')
    keys = ('train_dataloader.dataset', 'val_dataloader.dataset', 'val_evaluator')
    return ['--cfg-options', *(f'{key}.ann_file={file}' for key in keys)]


def test_annotations_that_say_what_everybody_means(coco_root, tmp_path, tool):
    """A byte order mark, no iscrowd, ids from 0: trained and evaluated."""

    def change(content: dict) -> None:
        for i, annotation in enumerate(content['annotations']):
            annotation['id'] = i
            del annotation['iscrowd']

    options = odd_annotations(coco_root, tmp_path / 'ann.json', change)
    assert tool('train', 'detector', '--work-dir', tmp_path / 'work', *options) == ''
    log = next((tmp_path / 'work').glob('*/vis_data/scalars.json')).read_text()
    assert 'coco/bbox_mAP' in log


def test_nothing_to_train_on(coco_root, tmp_path, tool, capfd):
    def crowds(labels: tuple[int, ...]) -> Callable[[dict], None]:
        def change(content: dict) -> None:
            for annotation in content['annotations']:
                annotation['iscrowd'] = int(annotation['category_id'] in labels)

        return change

    arguments = ['train', 'detector', '--work-dir', tmp_path / 'work']
    options = odd_annotations(coco_root, tmp_path / 'ann.json', crowds((1, 2)))
    message = tool(*arguments, *options)
    assert message.startswith('Error: ') and str(tmp_path / 'ann.json') in message
    assert 'none of its annotations can be trained on: 8 with iscrowd=1.' in message
    assert not (tmp_path / 'work').exists()
    capfd.readouterr()
    options = odd_annotations(coco_root, tmp_path / 'ann.json', crowds((2,)))
    assert tool(*arguments, *options) == ''
    assert 'ann.json: bar (1 of 2 classes); ' in ''.join(capfd.readouterr())


def test_more_findings_than_one_are_counted(coco_root, tmp_path, tool):
    def change(content: dict) -> None:
        for annotation in content['annotations'][2:5]:
            annotation['bbox'] = [str(number) for number in annotation['bbox']]

    options = odd_annotations(coco_root, tmp_path / 'ann.json', change)
    message = tool('train', 'detector', '--work-dir', tmp_path / 'work', *options)
    assert 'annotation 3' in message and 'expected 4 numbers' in message
    assert message.endswith(' 2 more like this: tools/check_dataset.py lists them.')


# ---------------------------------------------------------------------- errors of tests


def test_missing_checkpoint(tool, tmp_path):
    message = tool('test', 'segmenter', 'none.pth', '--work-dir', tmp_path)
    assert message.startswith('Error: checkpoint: none.pth does not exist')


@pytest.mark.parametrize('name', ['train', 'test'])
def test_malicious_checkpoint_is_refused(name, tool, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f'touch {tmp_path / "owned"}',)

    file = tmp_path / 'evil.pth'
    torch.save(dict(state_dict=Evil()), file)
    arguments = [file] if name == 'test' else ['--cfg-options', f'load_from={file}']
    message = tool(name, 'segmenter', *arguments, '--work-dir', tmp_path / 'work')
    assert message.startswith('Error: Refused to load') and 'system' in message
    assert not (tmp_path / 'owned').exists()


def test_checkpoint_of_another_model(checkpoint, tool, tmp_path):
    other = checkpoint('segmenter')
    message = tool('test', 'classifier', other, '--work-dir', tmp_path)
    assert re.search(r'does not fit the model: \d+ of \d+ parameters', message)
    state = load(other)['state_dict']
    weights = {'other.' + key: value for key, value in state.items()}
    torch.save(dict(state_dict=weights), tmp_path / 'other.pth')
    options = ['--cfg-options', f'load_from={tmp_path / "other.pth"}']
    message = tool('train', 'segmenter', '--work-dir', tmp_path / 'work', *options)
    found = re.search(r'does not fit the model: (\d+) of (\d+) parameters', message)
    assert found and found[1] == found[2], message


@pytest.mark.parametrize(
    ('task', 'flags', 'expected'),
    [
        ('detector', ['--out', 'folder'], 'predictions go to a .pkl file'),
        ('detector', ['--out-item', 'metrics'], 'needs --out'),
        ('detector', ['--out', 'a.txt', '--out-item', 'metrics'], 'metrics go to'),
        ('segmenter', ['--tta'], '--tta needs'),
        ('segmenter', ['--amp'], '--amp needs a GPU'),
        ('classifier', ['--tta', '--show-dir', 'x'], 'cannot draw'),
    ],
)
def test_flag_error_of_tests(task, flags, expected, checkpoint, tool, tmp_path):
    if torch.cuda.is_available() and flags == ['--amp']:
        pytest.skip('this is about machines without a GPU')
    message = tool('test', task, checkpoint(task), '--work-dir', tmp_path, *flags)
    assert message.startswith('Error: ') and expected in message
