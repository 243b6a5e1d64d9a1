"""Kill a small training at random moments, resume it, and count what is lost.

    python tests/reliability/soak.py [--kills 200] [--full 20] [--ranks 20] [--seed S]

Each training saves after every iteration, so that many kills are inside of a save. It
is killed by SIGKILL and resumed until it has ended, and then another one begins; its
end must be that of a training that nobody killed.

A second part has the disk full for three saves. Where this program may mount one, that
is a file system in memory, with a file that leaves no or little room; elsewhere writing
past a limit of size fails as on a full disk.

In a third part the command ``train`` runs in two processes, as torchrun starts them,
and one of them is killed, every other time while a checkpoint is written.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import toy  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.runner import Runner  # noqa: E402

from mmcls_involution import compat  # noqa: E402
from mmcls_involution.engine.config import build_runner  # noqa: E402
from mmcls_involution.engine.loops import resume_exactly  # noqa: E402
from mmcls_involution.engine.saving import save_safely  # noqa: E402
from mmcls_involution.weights.files import latest_checkpoint  # noqa: E402

LENGTH = 100  # iterations of a training in two processes
PATIENCE = 300  # seconds for it to end


def runner_of(folder: Path, **changes) -> Runner:
    """A training that goes on from the newest checkpoint, if there is one."""
    cfg = toy.config(folder, **changes)
    cfg.default_hooks.checkpoint.update(by_epoch=False, max_keep_ckpts=2)
    if (latest := latest_checkpoint(folder)) is not None:
        cfg.resume, cfg.load_from = True, str(latest)
    save_safely(cfg)
    resume_exactly(cfg)
    return build_runner(cfg)


class FullDisk(Hook):
    """The disk is full from the seventh iteration to the ninth.

    Args:
        room: Bytes that a file may have, or on a file system of its own, that are left.
        own: Whether the work dir is on a file system that is its own.
    """

    def __init__(self, room: int, own: bool) -> None:
        self.room, self.own = room, own

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        if not self.own:
            most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            limit = self.room if 6 <= runner.iter < 9 else most
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
            return
        ballast = Path(runner.work_dir, 'ballast')
        if runner.iter == 6:
            free = shutil.disk_usage(runner.work_dir).free
            ballast.write_bytes(bytes(max(0, free - self.room)))
        elif runner.iter == 9:
            ballast.unlink()


def start(folder: Path, full: FullDisk | None = None) -> int:
    """Train in a process of its own."""
    if process := os.fork():
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        logging.disable(logging.CRITICAL)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        runner = runner_of(folder, default_hooks__checkpoint__interval=1)
        if full:
            runner.register_hook(full)
        runner.train()
        status = 0
    finally:
        os._exit(status)


def warm_up(folder: Path) -> None:
    """Train once here, so that no process that is forked spends its time on imports."""
    # Under a name of its own, by which MMEngine keeps loggers for the whole process.
    changes = dict(default_hooks__checkpoint__interval=1, experiment_name='warm up')
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        runner_of(folder, **changes).train()


def iteration(folder: Path) -> int:
    """Of the newest checkpoint; every one that has its name must load in full."""
    newest = 0
    for file in folder.glob('*.pth'):
        newest = max(newest, torch.load(file, weights_only=True)['meta']['iter'])
    return newest


def same(a: Path, b: Path, last: int = 20) -> bool:
    """Whether two trainings ended with the same weights."""
    first, second = (
        torch.load(folder / f'iter_{last}.pth', weights_only=True)['state_dict']
        for folder in (a, b)
    )
    return all(torch.equal(first[name], second[name]) for name in first)


def kill_often(folder: Path, whole: Path, kills: int) -> str:
    """Returns what was counted."""
    started = time.time()
    os.waitpid(start(folder / 'timed'), 0)
    length = time.time() - started
    killed = ended = equal = lost = 0
    run = folder / 'run'

    def counted() -> str:
        return (
            f'{killed} kills: {lost} times a checkpoint was lost, every file loaded; '
            f'{ended} trainings ended, {equal} of them bit-equal to one without a kill'
        )

    while killed < kills:
        run.mkdir(exist_ok=True)
        process = start(run)
        time.sleep(random.uniform(0.1, 1.0) * length)
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if os.WIFSIGNALED(status):
            killed += 1
            # A checkpoint that was seen once is never lost again.
            now = iteration(run)
            lost += now < lost_before(run)
            (run / 'seen').write_text(str(now))
            if killed % 10 == 0:
                print(counted(), flush=True)
            continue
        if os.WEXITSTATUS(status):
            raise SystemExit(f'A resumed training failed; its folder: {run}')
        ended += 1
        equal += same(run, whole)
        shutil.rmtree(run)
    return counted()


def lost_before(run: Path) -> int:
    """The iteration seen at the last kill."""
    seen = run / 'seen'
    return int(seen.read_text()) if seen.exists() else 0


def fill_often(folder: Path, whole: Path, times: int) -> str:
    """Returns what was counted."""
    good = 0
    run = folder / 'full'
    run.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', run]
    own = subprocess.run(mount, capture_output=True).returncode == 0
    try:
        for _ in range(times):
            full = FullDisk(random.randrange(1, 12_000), own)
            _, status = os.waitpid(start(run, full), 0)
            good += status == 0 and iteration(run) == 20 and same(run, whole)
            for entry in run.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    finally:
        if own:
            subprocess.run(['umount', run], check=True)
    what = 'disk' if own else 'disk, by a limit on the size of files'
    return f'{times} trainings with a full {what}: {good} ended as without'


def start_two(folder: Path) -> subprocess.Popen:
    """Train in two processes, or go on; the process is torchrun."""
    return subprocess.Popen(
        **toy.for_two(folder, train_cfg__max_iters=LENGTH),
        stdout=(folder / 'log').open('w'),
        stderr=subprocess.STDOUT,
    )


def ranks(job: subprocess.Popen) -> list[int]:
    """The two processes of a training, while there are both."""
    if job.poll() is not None:
        return []
    children = Path(f'/proc/{job.pid}/task/{job.pid}/children').read_text().split()
    return [int(process) for process in children] if len(children) == 2 else []


def kill_one_of_two(folder: Path, times: int) -> str:
    """Returns what was counted."""
    whole, run = folder / 'whole of two', folder / 'two'
    started = time.time()
    if start_two(whole).wait(PATIENCE):
        raise SystemExit((whole / 'log').read_text())
    length = time.time() - started
    killed = in_save = ended = equal = lost = 0
    longest = 0.0

    def counted() -> str:
        return (
            f'{killed} kills of one of two processes, {in_save} in a save: the other '
            f'ended within {longest:.1f} s; {lost} times a checkpoint was lost, every '
            f'file loaded; {ended} trainings ended, {equal} of them bit-equal to one '
            'without a kill'
        )

    while killed < times:
        job = start_two(run)
        time.sleep(random.uniform(0.3, 1.0) * length)
        both, wait = ranks(job), killed % 2
        while both and wait and job.poll() is None and not any(run.glob('.iter_*')):
            time.sleep(0.0002)
        if both and job.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(random.choice(both), signal.SIGKILL)
        before = max((int(file.stem[5:]) for file in run.glob('iter_*.pth')), default=0)
        moment = time.time()
        if job.wait(PATIENCE) == 0:
            ended += 1
            equal += same(run, whole, LENGTH)
            shutil.rmtree(run)
            continue
        longest = max(longest, time.time() - moment)
        # torchrun says so, or the one that was left; whichever notices first.
        log = (run / 'log').read_text()
        if 'SIGKILL' not in log and 'Another process of this run' not in log:
            raise SystemExit(log)
        killed += 1
        in_save += any(run.glob('.iter_*'))
        lost += iteration(run) < before
        if killed % 5 == 0:
            print(counted(), flush=True)
    return counted()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--full', type=int, default=20)
    parser.add_argument('--ranks', type=int, default=20)
    parser.add_argument('--seed', type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    compat.apply()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        logging.disable(logging.CRITICAL)
        warm_up(folder / 'whole')
        print(f'--seed {arguments.seed}', flush=True)
        print(fill_often(folder, folder / 'whole', arguments.full), flush=True)
        print(kill_often(folder, folder / 'whole', arguments.kills), flush=True)
        if arguments.ranks:
            print(kill_one_of_two(folder, arguments.ranks), flush=True)


if __name__ == '__main__':
    main()
