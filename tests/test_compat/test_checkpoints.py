from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmcls_involution import compat
from mmcls_involution.compat.checkpoints import NoCheckpoint

torch = pytest.importorskip('torch')
np = pytest.importorskip('numpy')
mmengine = pytest.importorskip('mmengine')


@pytest.fixture(autouse=True)
def repaired():
    compat.apply()


def history(n: int = 5):
    from mmengine.logging import HistoryBuffer

    buffer = HistoryBuffer(max_length=4)
    for i in range(n):
        buffer.update(0.1 * i, count=i + 1)
    return buffer


def same(a, b) -> bool:
    return a.max_length == b.max_length and all(
        x.dtype == y.dtype and (x == y).all() and len(x) == len(y)
        for x, y in zip(a.data, b.data, strict=True)
    )


@pytest.fixture
def training_state() -> dict:
    return dict(
        state_dict=dict(weight=torch.arange(3.0)),
        message_hub=dict(
            log_scalars=dict(loss=history()),
            runtime_info=dict(
                best=np.float64(0.5), epoch=np.int64(2), done=np.bool_(True)
            ),
        ),
    )


def test_our_checkpoint_loads_weights_only(training_state, tmp_path):
    file = tmp_path / 'epoch_1.pth'
    torch.save(training_state, file)
    loaded = torch.load(file, weights_only=True)  # neither our loader nor a hook
    hub = loaded['message_hub']
    assert same(hub['log_scalars']['loss'], history())
    assert hub['runtime_info'] == training_state['message_hub']['runtime_info']
    with zipfile.ZipFile(file) as archive:
        data = archive.read(next(n for n in archive.namelist() if 'data.pkl' in n))
    assert b'getattr' not in data


@pytest.mark.parametrize('n', [0, 1, 9])
def test_history_survives_copies(n):
    import copy

    buffer = history(n)
    for other in (copy.deepcopy(buffer), pickle.loads(pickle.dumps(buffer))):
        assert same(buffer, other)
        other.update(1.0)
        assert other.statistics('current') == 1.0


def test_our_checkpoint_loads_in_unrepaired_mmengine(
    training_state, tmp_path, run_python
):
    torch.save(training_state, tmp_path / 'ours.pth')
    run_python(
        'import torch\n'
        f'state = torch.load({str(tmp_path / "ours.pth")!r}, weights_only=False)\n'
        'buffer = state["message_hub"]["log_scalars"]["loss"]\n'
        'assert buffer.statistics("max", 4) == 0.4, buffer.data\n'
    )


@pytest.fixture
def stock_checkpoint(training_state, tmp_path, monkeypatch) -> Path:
    """A checkpoint as an unrepaired MMEngine writes it."""
    from mmengine.logging import HistoryBuffer

    file = tmp_path / 'stock.pth'
    with monkeypatch.context() as context:
        context.delattr(HistoryBuffer, '__reduce__')
        training_state['message_hub']['log_scalars']['loss'] = history()
        torch.save(training_state, file)
    return file


def load(path: Path | str):
    from mmengine.runner import CheckpointLoader

    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu')


def test_stock_checkpoint_loads(stock_checkpoint):
    with pytest.raises(pickle.UnpicklingError, match='getattr'):
        torch.load(stock_checkpoint, weights_only=True)
    loaded = load(stock_checkpoint)
    assert same(loaded['message_hub']['log_scalars']['loss'], history())
    with pytest.raises(pickle.UnpicklingError, match='getattr'):
        torch.load(stock_checkpoint, weights_only=True)  # allowed in our loader alone


@pytest.mark.parametrize('name', ['test', 'publish', 'convert'])
def test_folder_in_place_of_a_checkpoint(
    name, command, cls_root, monkeypatch, tmp_path
):
    """The work dir, say; or what a variable that is not set makes of the name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TINY_DATA', str(cls_root))
    config = Path(__file__).parents[1] / 'tiny' / 'classifier.py'
    rest = dict(test=[], publish=['a'], convert=['a.pth', '--config', config])[name]
    for folder in (tmp_path, ''):
        files = [config, folder] if name == 'test' else [folder]
        message = command(name, *files, *rest)
        place = folder or '.'
        assert message == f'Error: {place} is a folder: name a checkpoint in it'


class Call:
    """Pickles to a call of any function: what a malicious file holds."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.fixture
def victim(tmp_path) -> Path:
    return tmp_path / 'owned'


@pytest.fixture
def malicious(tmp_path, victim) -> Path:
    file = tmp_path / 'malicious.pth'
    torch.save(dict(state_dict=Call(os.system, f'touch {victim}')), file)
    return file


@pytest.mark.parametrize('forced', [False, True])
def test_code_in_weights_is_refused(forced, malicious, victim, monkeypatch):
    if forced:  # the well-known workaround must not open the door
        monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.raises(pickle.UnpicklingError, match='Refused to load .*system'):
        load(malicious)
    assert not victim.exists()


def test_code_in_old_file_format_is_refused(tmp_path, victim):
    file = tmp_path / 'old.pth'
    torch.save(
        dict(state_dict=Call(os.system, f'touch {victim}')),
        file,
        _use_new_zipfile_serialization=False,
    )
    with pytest.raises(pickle.UnpicklingError, match='Refused to load .*system'):
        load(file)
    assert not victim.exists()


def test_code_in_downloaded_weights_is_refused(malicious, victim, tmp_path):
    from mmengine.runner import checkpoint

    with pytest.raises(pickle.UnpicklingError, match='Refused to load'):
        checkpoint.load_url(malicious.as_uri(), model_dir=str(tmp_path / 'cache'))
    assert not victim.exists()


def test_getattr_reaches_nothing_but_the_history_statistics(tmp_path):
    from mmengine.logging import HistoryBuffer

    for owner, name in ((HistoryBuffer, '__init__'), (torch.Tensor, 'max')):
        torch.save(Call(getattr, owner, name), tmp_path / 'file.pth')
        with pytest.raises(pickle.UnpicklingError, match='Refused'):
            load(tmp_path / 'file.pth')


def test_what_the_user_allows_is_loaded(tmp_path):
    """The state of some user's hook."""
    file = tmp_path / 'file.pth'
    torch.save(dict(hook=SimpleNamespace(count=3)), file)
    with pytest.raises(pickle.UnpicklingError, match='asks for types.SimpleNamespace'):
        load(file)
    with torch.serialization.safe_globals([SimpleNamespace]):
        assert load(file)['hook'].count == 3


def test_missing_and_torn_files(tmp_path):
    with pytest.raises(FileNotFoundError, match='Checkpoint not found'):
        load(tmp_path / 'none.pth')
    buffer = io.BytesIO()
    torch.save(dict(weight=torch.zeros(1000)), buffer)
    torn = [buffer.getvalue()[:size] for size in (0, 100, 2000)]
    for content in (*torn, b'hello'):
        (tmp_path / 'torn.pth').write_bytes(content)
        with pytest.raises(RuntimeError, match='torn.pth is not a complete checkpoint'):
            load(tmp_path / 'torn.pth')


@pytest.mark.parametrize(
    ('content', 'found'),
    [
        (3, "<class 'int'>"),
        ([1, 2], "<class 'list'>"),
        (dict(state_dict='weights'), "<class 'str'>"),
        (dict(state_dict={1: 2}), r'\[1\]'),
        ({1: 2}, r'\[1\]'),
    ],
)
def test_what_holds_no_weights(content, found, tmp_path):
    torch.save(content, tmp_path / 'odd.pth')
    with pytest.raises(NoCheckpoint, match=f'odd.pth holds no weights: .* {found}$'):
        load(tmp_path / 'odd.pth')


def test_apply_twice_changes_nothing():
    from mmengine._strategy.fsdp import FSDPStrategy
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import Runner, checkpoint

    def state():
        return (
            HistoryBuffer.__reduce__,
            Runner.resume,
            FSDPStrategy.load_optim_state_dict,
            checkpoint.load_url,
            checkpoint.load_from_local,
        )

    before = state()
    compat.apply()
    assert state() == before
