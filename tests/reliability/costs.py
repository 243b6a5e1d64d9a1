"""Time what safe saves and exact resuming cost, beside MMEngine's.

    python tests/reliability/costs.py [--saves 20] [--resumes 7]

A save: of the toy model, and of Faster R-CNN with RedNet-50 with its optimizer's state;
MMEngine as it is, MMEngine with the one repair that lays out a config's text once, and
the safe hook, in turn. Resuming: from ``Runner.train`` to the end of the first new
iteration, anew, at iteration 1 and at 10,000 of a set of 10 samples, each in a process
of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ['OMP_NUM_THREADS'] = '1'
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

import soak  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from mmengine.config import config as mmengine_config  # noqa: E402
from mmengine.hooks import CheckpointHook, Hook  # noqa: E402

from mmcls_involution import compat  # noqa: E402
from mmcls_involution.engine.config import build_runner, read_config  # noqa: E402
from mmcls_involution.engine.saving import SafeCheckpointHook  # noqa: E402

LATE = 10_000  # iteration
DETECTOR = ROOT / 'configs' / 'bccd' / 'faster-rcnn_rednet50_fpn_bccd.py'


class Stop(Exception):
    """The training has done what it was for."""


class TimeSaves(Hook):
    """Save again and again before the training begins."""

    priority = 'LOWEST'

    def __init__(self, times: int) -> None:
        self.times = times

    def before_train(self, runner) -> None:
        for group in runner.optim_wrapper.optimizer.param_groups:
            for weight in group['params']:
                state = runner.optim_wrapper.optimizer.state[weight]
                state['momentum_buffer'] = torch.zeros_like(weight)
        repaired = mmengine_config.FormatCode
        ways = {
            'MMEngine': (CheckpointHook, repaired.__wrapped__),
            'MMEngine, its text laid out once': (CheckpointHook, repaired),
            'the safe hook': (SafeCheckpointHook, repaired),
        }
        hooks, seconds = {}, {way: [] for way in ways}
        for number, (way, (hook, _)) in enumerate(ways.items()):
            folder = Path(runner.work_dir, str(number))
            folder.mkdir()
            hooks[way] = hook(interval=1, max_keep_ckpts=2, out_dir=str(folder))
            hooks[way].before_train(runner)
        for number in range(self.times + 1):
            runner.train_loop._epoch = number
            for way, (_, lay_out) in ways.items():
                mmengine_config.FormatCode = lay_out
                before = time.perf_counter()
                hooks[way]._save_checkpoint(runner)
                if number:  # the first one finds nothing laid out
                    seconds[way].append(time.perf_counter() - before)
        file = next(Path(hooks[way].out_dir).glob('*.pth'))
        size = file.stat().st_size
        medians = {way: statistics.median(taken) for way, taken in seconds.items()}
        print(f'a save of {size / 1e6:.2f} MB, medians of {self.times}:')
        for way, median in medians.items():
            print(
                f'  {way}: {1e3 * median:.1f} ms, {median / medians["MMEngine"]:.2f} '
                'of MMEngine as it is'
            )
        raise Stop


class EndAt(Hook):
    """Stop after an iteration, and after its checkpoint."""

    priority = 'LOWEST'

    def __init__(self, last: int) -> None:
        self.last = last

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.last:
            raise Stop


def train(runner, hook: Hook) -> float:
    """Seconds of the processor until the hook stops a training."""
    runner.register_hook(hook)
    before = time.process_time()
    try:
        runner.train()
    except Stop:
        return time.process_time() - before
    raise RuntimeError('nothing stopped the training')


def time_saves(folder: Path, real: bool, times: int) -> None:
    cfg = toy.config(folder)
    if real:
        detector = read_config(str(DETECTOR))
        cfg.model, cfg.default_scope = detector.model, 'mmdet'
        cfg.model.backbone.init_cfg = None
        cfg.rest = detector._cfg_dict  # its text is part of a checkpoint
    train(build_runner(cfg), TimeSaves(times))


def long_training(folder: Path, by_epoch: bool):
    """A training of more than LATE iterations, from what is in its folder."""
    length = dict(max_epochs=LATE) if by_epoch else dict(max_iters=2 * LATE)
    changes = {f'train_cfg__{key}': value for key, value in length.items()}
    changes['default_hooks__checkpoint__interval'] = LATE
    return soak.runner_of(folder, by_epoch=by_epoch, **changes)


def to_checkpoint(folder: Path, by_epoch: bool, last: int) -> None:
    runner = long_training(folder, by_epoch)
    hook = next(h for h in runner.hooks if isinstance(h, SafeCheckpointHook))
    hook.interval = last
    train(runner, EndAt(last))


def first_iteration(folder: Path, by_epoch: bool, at: int, queue) -> None:
    with open(os.devnull, 'w') as null, contextlib.redirect_stdout(null):
        queue.put(train(long_training(folder, by_epoch), EndAt(at + 1)))


def time_resumes(folder: Path, by_epoch: bool, times: int) -> None:
    fork = multiprocessing.get_context('fork')

    def apart(task, *arguments) -> None:
        process = fork.Process(target=task, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise SystemExit(f'{task.__name__} failed')

    places = (0, 1, LATE)
    for place in places[1:]:
        apart(to_checkpoint, folder / str(place), by_epoch, place)
    seconds = {place: [] for place in places}
    for _ in range(times):
        for place in places:
            run, queue = folder / 'run', fork.SimpleQueue()
            run.mkdir()
            if place:
                shutil.copy(folder / str(place) / f'iter_{place}.pth', run)
            apart(first_iteration, run, by_epoch, place, queue)
            seconds[place].append(queue.get())
            shutil.rmtree(run)
    anew, first, late = (statistics.median(seconds[place]) for place in places)
    print(
        f'first iteration, by {"epochs" if by_epoch else "iterations"}, medians of '
        f'{times}: anew {1e3 * anew:.0f} ms, resumed at 1 {1e3 * first:.0f} ms, at '
        f'{LATE} {1e3 * late:.0f} ms: {late / anew:.2f} of anew, {late / first:.2f} '
        'of at 1',
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--saves', type=int, default=20)
    parser.add_argument('--resumes', type=int, default=7)
    arguments = parser.parse_args()
    compat.apply()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for by_epoch in (True, False) if arguments.resumes else ():
            time_resumes(folder / str(by_epoch), by_epoch, arguments.resumes)
        for real in (False, True) if arguments.saves else ():
            time_saves(folder / f'save {real}', real, arguments.saves)


if __name__ == '__main__':
    main()
