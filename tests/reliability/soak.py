"""Kill a small training at random moments, resume it, and count what is lost.

    python tests/reliability/soak.py [--kills 200] [--seed SEED]

Each training saves after every iteration, so that many kills are inside of a save. It
is killed by SIGKILL and resumed until it has ended, and then another one begins; its
end must be that of a training that nobody killed. A second part has the disk full in a
save: writing a file past a limit of size fails as on a full disk.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import torch  # noqa: E402
import toy  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402

from mmcls_involution import compat  # noqa: E402
from mmcls_involution.engine.config import build_runner  # noqa: E402
from mmcls_involution.engine.loops import resume_exactly  # noqa: E402
from mmcls_involution.engine.saving import save_safely  # noqa: E402
from mmcls_involution.weights.files import latest_checkpoint  # noqa: E402


def train(folder: Path, limit: int | None = None) -> None:
    """Train, from the newest checkpoint if there is one."""
    cfg = toy.config(folder)
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=1, max_keep_ckpts=2)
    if (latest := latest_checkpoint(folder)) is not None:
        cfg.resume, cfg.load_from = True, str(latest)
    save_safely(cfg)
    resume_exactly(cfg)
    runner = build_runner(cfg)
    if limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        third = FullDisk(limit)
        runner.register_hook(third)
    runner.train()


class FullDisk(Hook):
    """No file grows past a limit from the seventh iteration to the ninth."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        full = 6 <= runner.iter < 9
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit if full else most, most))


def start(folder: Path, limit: int | None = None) -> int:
    """Train in a process of its own."""
    if process := os.fork():
        return process
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        logging.disable(logging.CRITICAL)
        train(folder, limit)
        status = 0
    finally:
        os._exit(status)


def iteration(folder: Path) -> int:
    """Of the newest checkpoint; every one that has its name must load in full."""
    newest = 0
    for file in folder.glob('*.pth'):
        newest = max(newest, torch.load(file, weights_only=True)['meta']['iter'])
    return newest


def same(a: Path, b: Path) -> bool:
    """Whether two trainings ended with the same weights."""
    first, second = (
        torch.load(folder / 'iter_20.pth', weights_only=True)['state_dict']
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
            continue
        if os.WEXITSTATUS(status):
            raise SystemExit(f'A resumed training failed; its folder: {run}')
        ended += 1
        equal += same(run, whole)
        shutil.rmtree(run)
    return (
        f'{killed} kills: {lost} times a checkpoint was lost, every file loaded; '
        f'{ended} trainings ended, {equal} of them bit-equal to one without a kill'
    )


def lost_before(run: Path) -> int:
    """The iteration seen at the last kill."""
    seen = run / 'seen'
    return int(seen.read_text()) if seen.exists() else 0


def fill_often(folder: Path, whole: Path, times: int) -> str:
    """Returns what was counted."""
    good = 0
    for number in range(times):
        run = folder / f'full_{number}'
        _, status = os.waitpid(start(run, random.randrange(1, 12_000)), 0)
        good += status == 0 and iteration(run) == 20 and same(run, whole)
        shutil.rmtree(run)
    return f'{times} trainings with a full disk: {good} ended as without'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=200)
    parser.add_argument('--full', type=int, default=20)
    parser.add_argument('--seed', type=int, default=random.randrange(2**32))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    compat.apply()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        os.waitpid(start(folder / 'whole'), 0)
        print(f'--seed {arguments.seed}', flush=True)
        print(fill_often(folder, folder / 'whole', arguments.full), flush=True)
        print(kill_often(folder, folder / 'whole', arguments.kills), flush=True)


if __name__ == '__main__':
    main()
