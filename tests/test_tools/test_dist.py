"""Several processes: the launchers, two gloo processes on the CPU beside one, and what
Slurm would be asked.

Two processes and one add the same float32 numbers in another order. Here their losses
and weights differ by less than 1e-6; the tests allow RTOL.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / 'tools'
TINY = ROOT / 'tests' / 'tiny'
RTOL = 1e-5

on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason='about machines without a GPU'
)


def execute(*command: str | Path, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*map(str, command)],
        env={
            **os.environ,
            'PYTHONPATH': os.pathsep.join(map(str, (ROOT, TINY))),
            **env,
        },
        capture_output=True,
        text=True,
    )


def run(script: str, *arguments: str | Path, **env: str) -> subprocess.CompletedProcess:
    # As in an activated environment; `bin` comes before it.
    folders = (env.pop('bin', ''), str(Path(sys.executable).parent), os.environ['PATH'])
    return execute(
        'bash', TOOLS / script, *arguments, PATH=os.pathsep.join(folders), **env
    )


def free_port() -> str:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return str(s.getsockname()[1])


def logged(work_dir: Path, key: str) -> list[float]:
    """What the runs in a work dir logged, one after the other."""
    files = sorted(work_dir.glob('*/vis_data/scalars.json'))
    lines = [json.loads(line) for f in files for line in f.read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=False)['state_dict']


def assert_same_training(one: Path, two: Path, last: str) -> None:
    """Equal loss curves, and equal weights in the last checkpoint."""
    curve = logged(one, 'loss')
    assert curve[-1] < curve[0]  # it learns, so the weights matter
    assert logged(two, 'loss') == pytest.approx(curve, rel=RTOL)
    torch.testing.assert_close(
        weights(two / last), weights(one / last), rtol=RTOL, atol=1e-6
    )


@on_cpu
@pytest.mark.parametrize(
    'interrupted', [False, pytest.param(True, marks=pytest.mark.long)]
)
def test_two_processes_train_as_one(interrupted, seg_root, tmp_path):
    """On one machine; or there, and resumed on two "machines" of one process each."""
    pytest.importorskip('mmseg')
    config = TINY / 'segmenter_parity.py'
    one, two, data = tmp_path / 'one', tmp_path / 'two', dict(TINY_DATA=str(seg_root))
    result = execute(
        sys.executable, TOOLS / 'train.py', config, '--work-dir', one, **data
    )
    assert result.returncode == 0, result.stderr[-3000:]

    flags = [
        *('--work-dir', two, '--cfg-options', 'train_dataloader.batch_size=1'),
        'sync_bn=torch',  # there is none on the CPU
    ]
    length = 'train_cfg.max_iters=3' if interrupted else 'train_cfg.max_iters=6'
    result = run(
        'dist.sh', 'train', config, '2', *flags, length, PORT=free_port(), **data
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count('No GPU: the processes communicate by gloo') == 1
    assert 'Iter(val) [2/2]' in result.stdout  # four pictures over two processes

    if interrupted:
        port = free_port()

        def machine(rank: str) -> subprocess.CompletedProcess:
            env = dict(NNODES='2', NODE_RANK=rank, PORT=port, **data)
            return run('dist.sh', 'train', config, '1', '--resume', *flags, **env)

        with ThreadPoolExecutor() as pool:
            for result in pool.map(machine, '01'):
                assert result.returncode == 0, result.stderr[-3000:]

    assert 'sync_bn' not in (two / config.name).read_text()
    assert len(logged(two, 'loss')) == 6
    assert_same_training(one, two, 'iter_6.pth')
    for key in ('mIoU', 'lr'):
        assert logged(two, key) == pytest.approx(logged(one, key), rel=RTOL)
    state = torch.load(two / 'iter_6.pth', weights_only=False)
    assert state['meta']['iter'] == 6
    assert not any(key.startswith('module.') for key in state['state_dict'])


@pytest.fixture(scope='module')
def two_processes(cls_root, tmp_path_factory) -> Path:
    """The folder that tests/tiny/two_processes.py has filled."""
    pytest.importorskip('mmpretrain')
    folder = tmp_path_factory.mktemp('two_processes')
    result = execute(
        sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2',
        f'--master_port={free_port()}', TINY / 'two_processes.py', folder,
        TINY_DATA=str(cls_root), MMCLS_INVOLUTION_FUSED='1',
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


STAGES = ['stem', 'layer1', 'layer2', 'layer3', 'layer4']


@on_cpu
@pytest.mark.parametrize(
    ('case', 'frozen'),
    [
        *((f'frozen_stages={n}', STAGES[: n + 1]) for n in range(-1, 5)),
        ('with_cp', []),
        ('unused stage', ['layer4']),
        ('fully_shard', STAGES[:2]),
    ],
)
def test_wrapped_rednet(case, frozen, two_processes):
    result = json.loads((two_processes / 'results.json').read_text())[case]
    assert result['two'] == pytest.approx(result['one'], rel=RTOL)
    assert result['difference'] < RTOL
    assert result['changed'] == sorted({*STAGES, 'head'} - {*frozen})


@on_cpu
def test_fsdp_strategy_trains_and_resumes_as_one_process(two_processes):
    one, two = two_processes / 'one', two_processes / 'fsdp'
    assert len(logged(two, 'loss')) == 4
    assert_same_training(one, two, 'epoch_2.pth')


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
        ('dist.sh train', ['c.py', '8'], [TOOLS / 'train.py', 'c.py']),
        ('dist_train.sh', ['c.py', '8'], [TOOLS / 'train.py', 'c.py']),
        ('dist_test.sh', ['c.py', 'a.pth', '8'], [TOOLS / 'test.py', 'c.py', 'a.pth']),
    ],
)
def test_several_machines(script, arguments, tool, fake_bin):
    flags = ['--cfg-options', 'a=b c']
    env = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.1', PORT='1234')
    result = run(*script.split(), *arguments, *flags, bin=fake_bin, **env)
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
