"""PaddleClas's weights: reading, fetching, and what may go wrong on the way."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.runner import CheckpointLoader
from paddleclas_cases import DEPTHS, GOLDEN, image, paddle_weights
from weights_cases import load_anywhere

from mmcls_involution.engine.errors import UserError
from mmcls_involution.models import RedNet
from mmcls_involution.weights import download, paddleclas
from mmcls_involution.weights.paddleclas import FILES, fetch, read_pdparams

NAME, FILE = 'RedNet26', FILES['RedNet26']


@pytest.fixture(scope='module')
def weights() -> dict[str, np.ndarray]:
    return paddle_weights(26)


@pytest.fixture(scope='module')
def good(weights) -> bytes:
    return pickle.dumps(weights, protocol=4)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """torch hub's folder of checkpoints, without a network."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.setenv(paddleclas.PLACE, 'http://127.0.0.1:9')  # nobody listens
    folder = tmp_path / 'torch' / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A folder of files by hand."""
    path = tmp_path / 'by_hand'
    path.mkdir()
    monkeypatch.setenv(paddleclas.PLACE, str(path))
    return path


def visible(folder: Path) -> list[str]:
    """All but locks."""
    return sorted(f.name for f in folder.iterdir() if f.suffix != '.lock')


# ----------------------------------------------------------------------------- reading


@pytest.mark.parametrize('depth', DEPTHS)
def test_logits_are_those_of_paddleclas(depth, folder):
    file = folder / FILES[f'RedNet{depth}']
    file.write_bytes(pickle.dumps(paddle_weights(depth), protocol=4))
    state = CheckpointLoader.load_checkpoint(f'paddleclas://RedNet{depth}')[
        'state_dict'
    ]
    model = RedNet(depth)
    prefix = 'backbone.'
    backbone = {n.removeprefix(prefix): v for n, v in state.items() if prefix in n}
    model.load_state_dict(backbone)
    with torch.no_grad():
        (features,) = model.eval()(torch.from_numpy(image()).float())
    logits = torch.nn.functional.linear(
        features.mean((2, 3)), state['head.fc.weight'], state['head.fc.bias']
    )
    expected = torch.from_numpy(np.load(GOLDEN)[f'RedNet{depth}'])
    scale = expected.abs().max().item()
    torch.testing.assert_close(logits[0], expected, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize('protocol', [2, 4, 5])
@pytest.mark.parametrize('dtype', ['<f4', '>f4', '<f8', '<f2'])
def test_reads_arrays_of_every_form(protocol, dtype, tmp_path):
    arrays = {
        'stem.0.conv.weight': np.arange(12).reshape(2, 2, 3, 1).astype(dtype),
        'stem.0.bn._mean': np.asfortranarray(np.ones((3, 2))).astype(dtype),
        'stem.0.bn._variance': np.ones(()).astype(dtype),
        'fc.weight': np.arange(6).reshape(2, 3).astype(dtype),
    }
    content = pickle.dumps(OrderedDict(arrays), protocol)
    if protocol == 2:  # as numpy 1 names it
        content = content.replace(b'cnumpy._core.', b'cnumpy.core.')
    (tmp_path / 'a.pdparams').write_bytes(content)
    found = read_pdparams(tmp_path / 'a.pdparams')
    assert list(found) == [
        'backbone.stem.0.conv.weight',
        'backbone.stem.0.bn.running_mean',
        'backbone.stem.0.bn.running_var',
        'head.fc.weight',
    ]
    *same, fc = zip(found.values(), arrays.values(), strict=True)
    for ours, theirs in [*same, (fc[0].mT, fc[1])]:
        assert ours.dtype == getattr(torch, theirs.dtype.name)
        assert ours.tolist() == theirs.tolist()


class Bomb:
    def __reduce__(self):
        return os.system, ('touch exploded',)


@pytest.mark.parametrize(
    'content, reason',
    [
        (pickle.dumps(dict(a=Bomb())), r'it asks for posix\.system'),
        (b'cbuiltins\neval\n(S"1"\ntR.', r'it asks for builtins\.eval'),
        (pickle.dumps(dict(a=np.array([Bomb()], dtype=object))), r'posix\.system'),
        (pickle.dumps(dict(a=np.array(['x'], dtype=object))), 'found object under'),
        (pickle.dumps(dict(a=np.arange(3))), 'found int64 under'),
        (pickle.dumps(dict(a=3.0)), 'found float under'),
        (pickle.dumps([np.zeros(3, 'f4')]), 'found list under'),
        (pickle.dumps(dict(a=np.zeros(99, 'f4')))[:-50], 'is cut short'),
        (b'<html>not here</html>', 'is cut short, or no .pdparams file'),
        (b'', 'is cut short, or no .pdparams file'),
    ],
)
def test_refuses_all_but_weights(content, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('a.pdparams').write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_pdparams(Path('a.pdparams'))
    assert not Path('exploded').exists()


# ---------------------------------------------------------------- from a folder


def test_result_is_whole_and_loads_anywhere(folder, cache, good, weights):
    (folder / FILE).write_bytes(good)
    result = fetch(f'paddleclas://{NAME}')
    assert result.parent == cache and visible(cache) == [result.name]
    content = load_anywhere(result)
    assert content['meta']['converted_from']['name'] == FILE
    names = {f'backbone.{name}' for name in RedNet(26).state_dict()}
    assert content['state_dict'].keys() == names | {'head.fc.weight', 'head.fc.bias'}
    assert content['state_dict']['head.fc.weight'].tolist() == (
        weights['fc.weight'].T.tolist()
    )
    # Made once, and anew when the file is another one or the result is broken.
    made = result.stat().st_mtime_ns
    assert fetch(f'paddleclas://{NAME}').stat().st_mtime_ns == made
    (folder / FILE).write_bytes(
        pickle.dumps({**weights, 'fc.bias': -weights['fc.bias']})
    )
    fetch(f'paddleclas://{NAME}')
    bias = torch.load(result)['state_dict']['head.fc.bias']
    assert bias.tolist() == (-weights['fc.bias']).tolist()
    result.write_bytes(result.read_bytes()[:-100])
    assert torch.load(fetch(f'paddleclas://{NAME}'))['state_dict'].keys() == (
        content['state_dict'].keys()
    )


def test_a_config_starts_from_it(folder, good, weights):
    (folder / FILE).write_bytes(good)
    checkpoint = f'paddleclas://{NAME}'
    start = dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone.')
    model = RedNet(26, stem_kernel_size=7, init_cfg=start)
    model.init_weights()
    model.init_weights()  # nothing happens, and nothing is said to be missing
    name = 'layer4.0.conv2.conv2.conv.weight'
    assert model.state_dict()[name].tolist() == weights[name].tolist()


@pytest.mark.parametrize(
    'change, reason',
    [
        (lambda w: w.pop('layer1.0.bn1._mean'), r'1 of \d+ tensors are missing'),
        (lambda w: w.update({'a.b': w['fc.bias']}), r'unknown, backbone\.a\.b for one'),
        (
            lambda w: w.update({'fc.weight': w['fc.weight'].T}),
            r'of another shape, head\.fc\.weight',
        ),
    ],
)
def test_file_of_another_model(change, reason, folder, cache, weights):
    content = dict(weights)
    change(content)
    (folder / FILE).write_bytes(pickle.dumps(content))
    with pytest.raises(
        UserError, match=f'does not hold the weights of {NAME}.*{reason}'
    ):
        fetch(f'paddleclas://{NAME}')
    assert visible(cache) == []


def test_file_that_is_not_in_the_folder(folder, good):
    (folder / FILE).write_bytes(good)
    with pytest.raises(UserError) as caught:
        fetch('paddleclas://RedNet50')
    assert f'{folder / FILES["RedNet50"]} does not exist (there: {FILE})' in str(
        caught.value
    )


def test_unknown_name():
    with pytest.raises(UserError, match='RedNet5 is unknown.*Did you mean RedNet50'):
        fetch('paddleclas://RedNet5')


# ------------------------------------------------------------------------ from a server


class Handler(BaseHTTPRequestHandler):
    """Gives what the server's `mode` says."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        body, mode = self.server.body, self.server.mode
        if mode == 'absent':
            return self.send_error(404)
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        half = len(body) // 2
        self.wfile.write(body[:half])
        if mode == 'slow':
            time.sleep(2)
        if mode == 'stuck':
            self.server.over.wait(20)
        if mode in ('whole', 'slow'):
            self.wfile.write(body[half:])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(good, monkeypatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    server.body, server.mode, server.asked = good, 'whole', []
    server.over = threading.Event()
    server.url = f'http://127.0.0.1:{server.server_port}/mirror'
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv(paddleclas.PLACE, server.url + '/')
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_download_shows_progress_and_happens_once(server, cache, capfd, monkeypatch):
    lines = []
    for module in (download, paddleclas):
        monkeypatch.setattr(module, 'print_log', lambda line, **_: lines.append(line))
    left = cache / f'.{FILE}.unchecked.0.partial'  # by a process that was killed
    left.write_bytes(b'half')
    result = fetch(f'paddleclas://{NAME}')
    assert visible(cache) == [FILE, result.name]
    assert (cache / FILE).read_bytes() == server.body
    assert '100%' in capfd.readouterr().err
    digest = torch.load(result)['meta']['converted_from']['sha256']
    url = f'{server.url}/{FILE}'
    assert lines == [
        f'Downloading {url}',
        f'paddleclas://{NAME} is {url}: {cache / FILE}, '
        f'{len(server.body) / 1e6:.1f} MB, sha256 {digest}',
    ]
    fetch(f'paddleclas://{NAME}')
    assert server.asked == [f'/mirror/{FILE}']


@pytest.mark.parametrize(
    'mode, body, reason',
    [
        ('absent', None, 'HTTP Error 404: Not Found'),
        ('cut', None, 'what came is cut short'),
        ('stuck', None, 'timed out'),
        ('whole', b'<html>Please log in</html>', 'no .pdparams file'),
        ('whole', pickle.dumps(dict(a=Bomb())), 'asks for posix.system'),
        ('whole', pickle.dumps({'fc.bias': np.zeros(1000, 'f4')}), 'missing'),
    ],
    ids=['404', 'cut', 'stuck', 'garbage', 'hostile', 'other'],
)
def test_what_a_server_may_do(mode, body, reason, server, good, cache, monkeypatch):
    monkeypatch.setattr(download, 'PATIENCE', 0.3)
    server.mode, server.body = mode, body or server.body
    with pytest.raises(UserError) as caught:
        fetch(f'paddleclas://{NAME}')
    message = str(caught.value)
    assert f'cannot download {server.url}/{FILE}: ' in message and reason in message
    assert f'{paddleclas.BASE_URL}/{FILE}' in message and str(cache) in message
    assert visible(cache) == []
    # As the message says: with the file put there by hand it works.
    server.mode, server.body = 'absent', b''
    (cache / FILE).write_bytes(good)
    fetch(f'paddleclas://{NAME}')


def test_nobody_answers(cache):
    with pytest.raises(UserError, match='cannot download http://127.0.0.1:9/.*refused'):
        fetch(f'paddleclas://{NAME}')
    assert visible(cache) == []


@pytest.mark.long
def test_processes_at_once_download_once(server, cache):
    server.mode = 'slow'
    code = (
        'import mmcls_involution.models; from mmengine.runner import CheckpointLoader; '
        f'print(len(CheckpointLoader.load_checkpoint("paddleclas://{NAME}")'
        '["state_dict"]))'
    )
    processes = [
        subprocess.Popen(
            [sys.executable, '-c', code],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    number = len(RedNet(26).state_dict()) + 2
    for output in outputs:
        assert output.splitlines()[-1] == str(number), output
    assert server.asked == [f'/mirror/{FILE}']
    assert sum(bool(re.search('Waiting for', output)) for output in outputs) <= 1
