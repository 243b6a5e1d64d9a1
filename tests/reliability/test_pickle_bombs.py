"""A file that would run code when it is unpickled is refused, wherever it gets in."""

from __future__ import annotations

import ast
import functools
import os
import pickle
import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip('torch')
pytest.importorskip('mmpretrain')

from mmcls_involution.apis import web  # noqa: E402
from mmcls_involution.weights.paddleclas import FILES, PLACE  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / 'tests' / 'tiny' / 'classifier.py'


class Bomb:
    """Harmless: it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f'touch {self.trace}',)


class Place:
    """A folder with bombs of all kinds, and the commands that may be led to them."""

    def __init__(self, folder: Path, command: Callable[..., str]) -> None:
        self.folder, self.command = folder, command
        self.file = folder / 'epoch_1.pth'
        self.trace = folder / 'ran'
        bomb = Bomb(self.trace)
        state = dict(meta=dict(epoch=1, iter=1, bomb=bomb), message_hub={})
        torch.save(dict(state, state_dict=dict(a=torch.zeros(1))), self.file)
        self.paddle = folder / FILES['RedNet26']
        self.paddle.write_bytes(pickle.dumps({'fc.bias': bomb}))
        self.image = folder / 'photo.png'
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(self.image)

    def url(self) -> str:
        """Of the file, from a server of this process."""
        handler = functools.partial(SimpleHTTPRequestHandler, directory=self.folder)
        server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f'http://127.0.0.1:{server.server_port}/{self.file.name}'

    def train(self, *flags: object) -> str:
        return self.command('train', CONFIG, '--work-dir', self.folder / 'run', *flags)

    def option(self, setting: str) -> str:
        return self.train('--cfg-options', setting)

    def resume_the_newest(self) -> str:
        (self.folder / 'run').mkdir()
        self.file.rename(self.folder / 'run' / self.file.name)
        return self.train('--resume')

    def pretrained(self, address: object) -> str:
        key = 'model.backbone.init_cfg'
        return self.train(
            *('--cfg-options', f'{key}.type=Pretrained', f'{key}.checkpoint={address}')
        )

    def converted(self) -> str:
        """In the place of what a download has been converted to."""
        cache = self.folder / 'torch' / 'hub' / 'checkpoints'
        cache.mkdir(parents=True)
        self.file.rename(cache / self.paddle.with_suffix('.pth').name)
        return self.pretrained('paddleclas://RedNet26')


# What a user calls -> how
DOORS: dict[str, Callable[[Place], str]] = {
    'load_from': lambda p: p.option(f'load_from={p.file}'),
    'load_from, a URL': lambda p: p.option(f'load_from={p.url()}'),
    'Pretrained': lambda p: p.pretrained(p.file),
    'Pretrained, a URL': lambda p: p.pretrained(p.url()),
    'Pretrained, paddleclas://': lambda p: p.pretrained('paddleclas://RedNet26'),
    'Pretrained, converted before': Place.converted,
    'resume': lambda p: p.train('--resume', p.file),
    'resume, the newest': Place.resume_the_newest,
    'resume in the config': lambda p: p.train(
        '--cfg-options', 'resume=True', f'load_from={p.file}'
    ),
    'test': lambda p: p.command('test', CONFIG, p.file),
    'infer': lambda p: p.command(
        'infer', p.image, '--config', CONFIG, '--weights', p.file
    ),
    'kernels': lambda p: p.command(
        'kernels', p.image, '--config', CONFIG, '--weights', p.file, '--out', 'a.png'
    ),
    'export': lambda p: p.command(
        'export', CONFIG, p.file, '--out', p.folder / 'a.pt2', '--format', 'pt2'
    ),
    'publish': lambda p: p.command('publish', p.file, p.folder / 'published'),
    'convert': lambda p: p.command(
        'convert', p.file, p.folder / 'b.pth', '--config', CONFIG
    ),
    'convert, Paddle': lambda p: p.command(
        'convert', p.paddle, p.folder / 'b.pth', '--config', CONFIG
    ),
    'convert, paddleclas://': lambda p: p.command(
        'convert', 'paddleclas://RedNet26', p.folder / 'b.pth', '--config', CONFIG
    ),
    'reproduce': lambda p: p.command(
        *('reproduce', CONFIG, '--work-dir', p.folder / 'run'),
        *('--cfg-options', f'load_from={p.file}'),
    ),
    'the web page': lambda p: (
        web.answer(str(CONFIG), str(p.file), str(p.image)).message
    ),
}


@pytest.mark.parametrize('door', DOORS)
def test_refused(door, command, cls_root, tmp_path, monkeypatch):
    monkeypatch.setenv('TINY_DATA', str(cls_root))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    monkeypatch.setenv(PLACE, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    place = Place(tmp_path, command)
    message = DOORS[door](place)
    assert 'posix.system' in message, message
    assert not place.trace.exists()


def test_the_bomb_is_one(tmp_path):
    """What ``torch.load`` does with it by itself."""
    place = Place(tmp_path, command=str)
    torch.load(place.file, weights_only=False)
    assert place.trace.exists()


def test_no_other_door():
    """Whatever reads a file of torch does so weights-only, and nothing unpickles."""
    found = []
    for folder in ('mmcls_involution', 'tools'):
        for file in (ROOT / folder).rglob('*.py'):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name = ast.unparse(node.func)
                only = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if name == 'torch.load' and only.get('weights_only') != 'True':
                    found.append(f'{file}:{node.lineno}')
                if name in ('pickle.load', 'pickle.loads', 'pickle.Unpickler'):
                    found.append(f'{file}:{node.lineno}')
    assert not found
