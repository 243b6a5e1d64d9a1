"""The launchers: two gloo processes on the CPU, and what Slurm would be asked."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'


def run(script: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
    # As in an activated environment; `bin` comes before it.
    folders = (env.pop('bin', ''), str(Path(sys.executable).parent), os.environ['PATH'])
    path = os.pathsep.join(folders)
    return subprocess.run(
        ['bash', TOOLS / script, *map(str, arguments)],
        env={**os.environ, 'PYTHONPATH': str(ROOT), 'PATH': path, **env},
        capture_output=True,
        text=True,
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason='about machines without a GPU')
def test_two_processes_train_on_cpu(seg_root, tmp_path):
    pytest.importorskip('mmseg')
    result = run(
        'dist_train.sh', ROOT / 'tests' / 'tiny' / 'segmenter.py', '2',
        '--work-dir', tmp_path,
        PORT=free_port(), TINY_DATA=str(seg_root), OMP_NUM_THREADS='1',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('No GPU: the processes communicate by gloo') == 1
    assert 'Iter(val) [2/2]' in result.stdout  # four pictures over two processes
    state = torch.load(tmp_path / 'iter_2.pth', weights_only=False)
    assert state['meta']['iter'] == 2
    assert not any(key.startswith('module.') for key in state['state_dict'])


@pytest.fixture
def fake_bin(tmp_path) -> str:
    """Stand-ins for python and srun that print what they are asked."""
    for name in ('python', 'srun'):
        file = tmp_path / name
        file.write_text('#!/bin/sh\nfor word; do echo "$word"; done\n')
        file.chmod(0o755)
    return str(tmp_path)


@pytest.mark.parametrize(
    ('script', 'arguments', 'tool'),
    [
        ('dist_train.sh', ['c.py', '8'], [TOOLS / 'train.py', 'c.py']),
        ('dist_test.sh', ['c.py', 'a.pth', '8'], [TOOLS / 'test.py', 'c.py', 'a.pth']),
    ],
)
def test_several_machines(script, arguments, tool, fake_bin):
    flags = ['--cfg-options', 'a=b c']
    env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='1234')
    result = run(script, *arguments, *flags, bin=fake_bin, **env)
    assert result.stdout.splitlines() == [
        '-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1',
        '--master_addr=10.0.0.1', '--master_port=1234', '--nproc_per_node=8',
        *map(str, tool), '--launcher', 'pytorch', *flags,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ('script', 'arguments', 'tool'),
    [
        (
            'slurm_train.sh',
            ['c.py', 'w'],
            [TOOLS / 'train.py', 'c.py', '--work-dir', 'w'],
        ),
        ('slurm_test.sh', ['c.py', 'a.pth'], [TOOLS / 'test.py', 'c.py', 'a.pth']),
    ],
)
def test_slurm(script, arguments, tool, fake_bin):
    env = dict(GPUS='4', SRUN_ARGS='--qos=high --exclusive')
    result = run(script, 'part', 'job', *arguments, '--amp', bin=fake_bin, **env)
    assert result.stdout.splitlines() == [
        '-p', 'part', '--job-name=job', '--gres=gpu:4', '--ntasks=4',
        '--ntasks-per-node=4', '--cpus-per-task=5', '--kill-on-bad-exit=1',
        '--qos=high', '--exclusive', 'python', '-u',
        *map(str, tool), '--launcher', 'slurm', '--amp',
    ]  # fmt: skip


@pytest.mark.parametrize('script', sorted(p.name for p in TOOLS.glob('*.sh')))
def test_too_few_arguments_print_the_usage(script):
    result = run(script, 'config.py')
    assert result.returncode == 2
    assert result.stderr.startswith('usage: ')
