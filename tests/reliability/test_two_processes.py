"""One of two processes is killed: the other one ends, and both go on after that.

``make soak`` does this at random moments.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

import toy  # noqa: E402

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason='gloo, on machines without a GPU'
)


def train(work_dir: Path, **changes) -> subprocess.CompletedProcess:
    """As a user starts it; it resumes what there is.

    Gradients are accumulated over three iterations, which each process does for itself.
    """
    arguments = toy.for_two(work_dir, optim_wrapper__accumulative_counts=3, **changes)
    return subprocess.run(**arguments, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> Path:
    """The work dir of a training that nobody killed."""
    folder = tmp_path_factory.mktemp('whole')
    result = train(folder)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize(
    ('rank', 'in_save'), [(0, True), pytest.param(1, False, marks=pytest.mark.long)]
)
def test_one_is_killed(rank, in_save, whole, tmp_path):
    result = train(
        tmp_path,
        custom_hooks=[
            dict(type='EMAHook'), dict(type='Killed', rank=rank, in_save=in_save)
        ],
    )  # fmt: skip
    assert result.returncode == 1
    # torchrun says so, or the process that was left; whichever notices first.
    message = f'[rank {1 - rank}] Another process of this run has ended'
    assert message in result.stderr or 'Signal 9 (SIGKILL)' in result.stderr
    left = [*tmp_path.glob('*.pth')]
    assert {file.name for file in left} == {'iter_6.pth', 'iter_7.pth'}
    for file in left:
        torch.load(file, weights_only=True)

    result = train(tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    ended, other = (
        torch.load(folder / 'iter_20.pth', weights_only=True)
        for folder in (tmp_path, whole)
    )
    assert ended['meta']['iter'] == 20
    for part in ('state_dict', 'ema_state_dict'):
        for name, value in other[part].items():
            assert torch.equal(ended[part][name], value), name
