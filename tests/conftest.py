"""Random numbers, and tiny data for the tools; tests/tiny has configs for it."""

from __future__ import annotations

import functools
import importlib
import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

# One thread each: pytest-xdist has a worker per core already, and threads that wait for
# one another burn processor time. Libraries read it when they are imported, the
# processes that tests start inherit it.
os.environ['OMP_NUM_THREADS'] = '1'

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    # Triton reads it when it is imported; without a GPU its interpreter runs kernels.
    os.environ['TRITON_INTERPRET'] = '1'

from mmcls_involution import __main__ as commands
from mmcls_involution import compat

compat.apply()  # toolboxes can be imported, whichever test runs first

ROOT = Path(__file__).parents[1]
COCO_CLASSES = ('square', 'bar')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--seed', type=int, help='of the random numbers in tests (default: a fresh one)'
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:  # the workers of pytest-xdist get that of the run
        config.option.seed = random.randrange(2**32)


@pytest.fixture(autouse=True)
def random_numbers(request: pytest.FixtureRequest) -> None:
    """The same in every test of a run; pytest shows what is printed if a test fails."""
    seed = request.config.option.seed
    print(f'--seed {seed} repeats the random numbers')
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True, scope='session')
def upstream_metafiles_are_parsed_once():
    """MMEngine parses all of a toolbox's for each base that a config inherits."""
    config_utils = importlib.import_module('mmengine.config.utils')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config_utils, 'load', functools.cache(config_utils.load))
        yield


@pytest.fixture
def forget_runs() -> Callable[[], None]:
    """Drop the loggers and visualizers that MMEngine keeps for the whole process."""

    def forget() -> None:
        from mmengine.utils import ManagerMixin

        classes = [ManagerMixin]
        while classes:
            cls = classes.pop()
            cls._instance_dict.clear()
            classes += cls.__subclasses__()

    return forget


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, forget_runs: Callable[[], None]
) -> Callable[..., str]:
    """Run a command in this process; the message it ended with, '' for success."""

    def run(name: str, *arguments: object) -> str:
        forget_runs()
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        try:
            commands.run(name)
        except SystemExit as end:
            return str(end.code or '')
        return ''

    return run


@pytest.fixture
def tool(
    command: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Callable[..., str]:
    """Run a command on a config of tests/tiny, or on the config given first."""
    tasks = dict(
        detector=('mmdet', 'coco_root'),
        segmenter=('mmseg', 'seg_root'),
        classifier=('mmpretrain', 'cls_root'),
    )

    def run(name: str, task: str, *arguments: object) -> str:
        library, data = tasks[task]
        pytest.importorskip(library)
        monkeypatch.setenv('TINY_DATA', str(request.getfixturevalue(data)))
        if Path(*arguments[:1]).suffix != '.py':
            arguments = (ROOT / 'tests' / 'tiny' / f'{task}.py', *arguments)
        return command(name, *arguments)

    return run


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope='session')
def coco_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four noisy 64x64 pictures with a bright square and a dark bar, COCO format."""
    root, rng = tmp_path_factory.mktemp('coco'), _rng()
    images, annotations = [], []
    for i in range(4):
        picture = rng.integers(90, 160, (64, 64, 3), dtype=np.uint8)
        boxes = [(8 + 4 * i, 8, 24, 24), (4, 44, 48, 10)]
        for label, (x, y, w, h) in enumerate(boxes):
            picture[y : y + h, x : x + w] = 250 if label == 0 else 5
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=i + 1,
                    category_id=label + 1,
                    bbox=[x, y, w, h],
                    area=w * h,
                    segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
                    iscrowd=0,
                )
            )
        Image.fromarray(picture).save(root / f'{i}.png')
        images.append(dict(id=i + 1, file_name=f'{i}.png', width=64, height=64))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(COCO_CLASSES)]
    (root / 'ann.json').write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return root


@pytest.fixture(scope='session')
def seg_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four 64x64 pictures with label maps of two classes, halves of the picture."""
    root, rng = tmp_path_factory.mktemp('seg'), _rng()
    for folder in ('images', 'labels'):
        (root / folder).mkdir()
    for i in range(4):
        labels = np.zeros((64, 64), dtype=np.uint8)
        labels[16 + 8 * i :] = 1
        picture = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        picture += labels[..., None] * np.uint8(150)
        Image.fromarray(picture).save(root / 'images' / f'{i}.png')
        Image.fromarray(labels).save(root / 'labels' / f'{i}.png')
    return root


@pytest.fixture(scope='session')
def cls_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders, one per class, of two 64x64 pictures each."""
    root, rng = tmp_path_factory.mktemp('cls'), _rng()
    for label, name in enumerate(('dark', 'light')):
        (root / name).mkdir()
        for i in range(2):
            picture = rng.integers(0, 99, (64, 64, 3), dtype=np.uint8)
            picture += np.uint8(150 * label)
            Image.fromarray(picture).save(root / name / f'{name}_{i}.png')
    return root
