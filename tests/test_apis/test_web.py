"""The web page: what is behind it, without gradio; and itself, in a browser."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import struct
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmcls_involution.apis import web
from mmcls_involution.engine.errors import UserError

TINY = Path(__file__).parents[1] / 'tiny'
KINDS = ('detector', 'segmenter', 'classifier')


class Evil:
    def __reduce__(self):
        return open, (str(Evil.trace), 'w')


@pytest.fixture
def folder(weights, tmp_path, monkeypatch, coco_root) -> Path:
    """Work dirs of the tiny models, a checkpoint that would run code, and files."""
    monkeypatch.setenv('TINY_DATA', str(coco_root))
    root = tmp_path / 'runs'
    for kind, file in weights.items():
        (root / kind).mkdir(parents=True)
        shutil.copy(file, root / kind / 'epoch_1.pth')
        shutil.copy(TINY / f'{kind}.py', root / kind)
    shutil.copytree(root / 'detector', root / 'evil')
    Evil.trace = tmp_path / 'ran'
    torch.save(dict(state_dict={}, meta=Evil()), root / 'evil' / 'epoch_1.pth')
    (root / 'stray').mkdir()
    shutil.copy(weights['detector'], root / 'stray' / 'lost.pth')
    image = np.random.randint(0, 255, (60, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / 'photo.png'), image)
    (tmp_path / 'notes.jpg').write_text('no image')
    return root


def test_models_of_a_folder_and_of_the_hub(folder, capsys):
    models = web.find_models(folder)
    local = {name for name in models if not name.startswith('hub: ')}
    assert local == {f'{kind}/epoch_1.pth' for kind in (*KINDS, 'evil')}
    assert 'lost.pth is left out' in capsys.readouterr().out.replace('\n', ' ')
    assert models['hub: rednet50_3rdparty_in1k'][1] == 'paddleclas://RedNet50'
    models = web.find_models(folder, str(TINY / 'detector.py'))
    assert models['stray/lost.pth'][0] == str(TINY / 'detector.py')
    assert all(name.startswith('hub: ') for name in web.find_models(None))
    with pytest.raises(UserError, match='No folder of checkpoints'):
        web.find_models(folder / 'gone')


@pytest.mark.parametrize('kind', KINDS)
def test_answers(kind, folder):
    model = web.find_models(folder)[f'{kind}/epoch_1.pth']
    found = web.answer(*model, str(folder.parent / 'photo.png'))
    assert 'Click on a pixel' in found.message
    assert found.picture.shape[2] == 3 and found.heat.std() > 10
    if kind == 'segmenter':
        assert sum(float(row[2].rstrip('%')) for row in found.rows) > 99
    elif kind == 'classifier':
        assert sum(float(row[1]) for row in found.rows) == pytest.approx(1, abs=0.01)
    # a corner of the picture is that of the image
    height, width = found.picture.shape[:2]
    message, kernels = web.kernels_at(found, width - 1, height - 1)
    assert 'x=79, y=59' in message
    assert kernels.std() > 10 and kernels.shape[0] < found.heat.shape[0] * 2


def test_what_cannot_be_drawn_is_answered_all_the_same(folder):
    """MMSegmentation's visualizer stops at an image of one pixel."""
    model = web.find_models(folder)['segmenter/epoch_1.pth']
    file = folder.parent / 'dot.png'
    cv2.imwrite(str(file), np.full((1, 1, 3), 9, dtype=np.uint8))
    found = web.answer(*model, str(file))
    assert 'of dot.png cannot be drawn: ' in found.message and len(found.rows) == 1
    assert found.picture.tolist() == [[[9, 9, 9]]]


def test_what_is_refused_in_one_message(folder):
    models = web.find_models(folder)
    photo = folder.parent / 'photo.png'
    given = web.answer(
        *models['detector/epoch_1.pth'], str(folder.parent / 'notes.jpg')
    )
    assert given.message.startswith('notes.jpg cannot be decoded')
    assert given.picture is None and given.view is None
    given = web.answer(*models['evil/epoch_1.pth'], str(photo))
    assert 'epoch_1.pth cannot be used: Refused to load' in given.message
    assert not Evil.trace.exists()
    config = models['detector/epoch_1.pth'][0]
    given = web.answer(config, models['classifier/epoch_1.pth'][1], str(photo))
    assert 'does not fit' in given.message
    smaller = folder / 'smaller.py'
    smaller.write_text(
        f'_base_ = {config!r}\nmodel = dict(backbone=dict(stem_kernel_size=1))\n'
    )
    given = web.answer(str(smaller), models['detector/epoch_1.pth'][1], str(photo))
    assert given.message.startswith('epoch_1.pth cannot be used: '), given.message
    assert 'stem involutions differ' in given.message
    assert 'drop an image' in web.kernels_at(None, 1, 1)[0]


def test_huge_images_are_refused_before_they_are_decoded(folder, tmp_path):
    """A picture of 20000x20000 pixels in some kilobytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack('>I', len(data)) + body + struct.pack('>I', zlib.crc32(body))

    header = struct.pack('>IIBBBBB', 20000, 20000, 8, 0, 0, 0, 0)
    content = zlib.compress(bytes(1000))
    huge = tmp_path / 'huge.png'
    huge.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', header)
        + chunk(b'IDAT', content)
        + chunk(b'IEND', b'')
    )
    model = web.find_models(folder)['detector/epoch_1.pth']
    message = web.answer(*model, str(huge)).message
    assert message == 'huge.png has more than 89 megapixels: make it smaller first.'


def test_without_gradio(monkeypatch):
    monkeypatch.setitem(sys.modules, 'gradio', None)
    with pytest.raises(UserError, match='pip install gradio'):
        web.build_page({})


DROP = """
const bytes = Uint8Array.from(atob(arguments[2]), c => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], arguments[1], {type: arguments[3]}));
for (const kind of ['dragenter', 'dragover', 'drop'])
  arguments[0].dispatchEvent(
    new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
"""


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium."""
    pytest.importorskip('gradio', reason='needs gradio, the extra [demo]')
    webdriver = pytest.importorskip('selenium.webdriver', reason='needs selenium')
    binary, driver = shutil.which('chromium'), shutil.which('chromedriver')
    if not binary or not driver:
        pytest.skip('needs chromium and chromedriver')
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ('headless=new', 'no-sandbox', 'window-size=1280,1600'):
        options.add_argument(f'--{flag}')
    options.add_argument(f'--user-data-dir={tmp_path / "profile"}')
    options.set_capability('goog:loggingPrefs', {'performance': 'ALL'})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options, service) as browser:
        browser.set_page_load_timeout(120)
        yield browser


class Visit:
    """The page as a person uses it."""

    def __init__(self, browser, url: str) -> None:
        self.browser = browser
        browser.get(url)
        self.wait('#message textarea')

    def wait(self, selector: str, of=lambda element: True, seconds: float = 120):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for element in self.browser.find_elements('css selector', selector):
                try:
                    if of(element):
                        return element
                except Exception as error:  # the page has replaced it meanwhile
                    assert 'stale' in str(error).lower(), error
            time.sleep(0.2)
        raise AssertionError(f'{selector}: not within {seconds} s')

    def read(self, text: str, seconds: float = 120) -> str:
        """The message, once it has this text."""
        area = self.wait(
            '#message textarea',
            lambda area: text in area.get_property('value'),
            seconds,
        )
        return area.get_property('value')

    def drop(self, file: Path, kind: str) -> None:
        for clear in self.browser.find_elements(
            'css selector', '#file button[aria-label="Clear"]'
        ):
            clear.click()
            self.read('Drop an image.')
        zone = self.wait('#file button:has(input[type=file])')
        content = base64.b64encode(file.read_bytes()).decode()
        self.browser.execute_script(DROP, zone, file.name, content, kind)

    def image(self, id: str):
        return self.wait(f'#{id} img', lambda img: img.get_property('naturalWidth') > 0)


def test_drop_click_and_read_in_a_browser(browser, folder, monkeypatch):
    connect, elsewhere = socket.socket.connect, []

    def local_only(self, address):
        if self.family != socket.AF_UNIX and address[0] not in ('127.0.0.1', '::1'):
            elsewhere.append(address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, 'connect', local_only)
    models = web.find_models(folder)
    models = {'detector/epoch_1.pth': models['detector/epoch_1.pth'], **models}
    page = web.build_page(models)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    url = web.serve(page, '127.0.0.1', port, block=False)
    try:
        visit = Visit(browser, url)
        visit.drop(folder.parent / 'notes.jpg', 'image/jpeg')
        visit.read('notes.jpg cannot be decoded')
        visit.drop(folder.parent / 'photo.png', 'image/png')
        visit.read('Click on a pixel')
        visit.image('heat')
        picture = visit.image('picture')
        assert not browser.find_elements('css selector', '#kernels img')
        picture.click()  # its middle
        answer = visit.read('Kernels of the pixel')
        assert abs(int(answer.split('x=')[1].split(',')[0]) - 40) <= 1
        assert visit.image('kernels').get_property('naturalHeight') > 500
        with pytest.raises(UserError, match=f'Cannot serve at 127.0.0.1:{port}'):
            web.serve(web.build_page(models), '127.0.0.1', port, block=False)
    finally:
        page.close()
    asked = [
        event['params']['request']['url']
        for entry in browser.get_log('performance')
        if (event := json.loads(entry['message'])['message'])['method']
        == 'Network.requestWillBeSent'
    ]
    own = (url, 'data:', 'blob:', 'chrome:')
    assert len(asked) > 10 and all(address.startswith(own) for address in asked), asked
    assert elsewhere == []
