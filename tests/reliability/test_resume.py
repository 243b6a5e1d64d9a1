"""2N iterations are N, a kill, and N more, bit for bit on the CPU."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

import toy  # noqa: E402
from torch.utils.data import DataLoader, RandomSampler  # noqa: E402

from mmcls_involution.engine.loops import (  # noqa: E402
    DATA,
    SeededBatch,
    SeekableLoader,
    SeekableSampler,
    own_random_numbers,
)


def state(file: Path) -> dict:
    """What must be equal, by names."""
    content = torch.load(file, weights_only=True)
    found = {}

    def add(path: str, value: object) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                add(f'{path}.{key}', item)
        elif isinstance(value, list):
            for key, item in enumerate(value):
                add(f'{path}.{key}', item)
        else:
            found[path] = value

    for key in (
        'state_dict',
        'ema_state_dict',
        'optimizer',
        'param_schedulers',
        'place',
    ):
        add(key, content.get(key))
    for key in ('epoch', 'iter', 'seed'):
        add(key, content['meta'][key])
    losses = content['message_hub']['log_scalars']['train/loss']
    add('losses', [float(loss) for loss in losses.data[0]])
    return found


def assert_same(a: Path, b: Path) -> None:
    first, second = state(a), state(b)
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = (
            torch.equal(value, second[key])
            if torch.is_tensor(value)
            else value == second[key]
        )
        assert same, key


CASES = {
    'epochs': dict(),
    'validated': dict(**toy.VALIDATION),
    'no seed given': dict(randomness__seed=None),
    'another seed per process': dict(randomness__diff_rank_seed=True),
    'gradients accumulated': dict(optim_wrapper__accumulative_counts=3),
    'iterations': dict(by_epoch=False),
    'iterations, validated': dict(by_epoch=False, **toy.VALIDATION),
    'iterations, a sampler with an end': dict(
        by_epoch=False, train_dataloader__sampler__type='DefaultSampler'
    ),
    'Adam': dict(optim_wrapper__optimizer=dict(type='AdamW', lr=0.01, _delete_=True)),
}
WORKERS = {
    'epochs': (1, 4),
    'iterations': (1, 4),
    'iterations, a sampler with an end': (4,),
}


@pytest.mark.parametrize(
    ('name', 'workers'),
    [(name, 0) for name in CASES]
    + [(name, count) for name, counts in WORKERS.items() for count in counts],
)
def test_whole_and_resumed(name, workers, train, tmp_path):
    """Resumed within an epoch, after its last iteration, and between two."""
    whole = tmp_path / 'whole'
    changes = dict(CASES[name], train_dataloader__num_workers=workers)
    if name != 'no seed given' and workers:
        changes['train_dataloader__persistent_workers'] = True

    def config(folder):
        cfg = toy.config(folder, **changes)
        # After each iteration, of which an epoch has five.
        cfg.default_hooks.checkpoint.update(by_epoch=False, interval=1)
        cfg.custom_hooks.append(dict(type='CheckpointHook', interval=1, by_epoch=True))
        if 'iterations' in name:
            cfg.custom_hooks.pop()
        return cfg

    train(config(whole))
    places = ['iter_7', 'iter_10'] + ['epoch_2'] * ('iterations' not in name)
    for place in places if not workers else places[:1]:
        part = tmp_path / place
        part.mkdir()
        record = part / 'read'
        cfg = config(part)
        cfg.resume, cfg.load_from = True, str(whole / f'{place}.pth')
        cfg.train_dataloader.dataset.record = str(record)
        random.seed(), np.random.seed(), torch.seed()
        train(cfg)
        assert_same(whole / 'iter_20.pth', part / 'iter_20.pth')
        read = len(record.read_text().split())
        left = 2 * (13 if place == 'iter_7' else 10)
        ahead = 2 * 2 * workers if 'iterations' in name else 0
        assert left <= read <= left + ahead
        shutil.rmtree(part)


def test_number_of_workers_does_not_matter(train, tmp_path):
    for workers in (0, 3):
        folder = tmp_path / str(workers)
        train(toy.config(folder, train_dataloader__num_workers=workers))
    assert_same(*(tmp_path / name / 'epoch_4.pth' for name in '03'))


def test_checkpoint_of_the_stock_loops(train, tmp_path):
    """It resumes, in the place of the data where it was."""
    whole = toy.config(tmp_path / 'whole')
    whole.default_hooks.checkpoint.update(by_epoch=False, interval=1)
    train(whole)
    file = tmp_path / 'old.pth'
    content = torch.load(tmp_path / 'whole' / 'iter_7.pth', weights_only=True)
    del content['place']
    torch.save(content, file)
    cfg = toy.config(tmp_path / 'part')
    cfg.default_hooks.checkpoint.update(by_epoch=False, interval=1)
    cfg.resume, cfg.load_from = True, str(file)
    train(cfg)
    assert_same(tmp_path / 'whole' / 'iter_20.pth', tmp_path / 'part' / 'iter_20.pth')


def test_other_batches_are_said(train, tmp_path, capfd):
    train(toy.config(tmp_path / 'whole', train_cfg__max_epochs=1))
    cfg = toy.config(tmp_path / 'part', train_dataloader__batch_size=5)
    cfg.resume, cfg.load_from = True, str(tmp_path / 'whole' / 'epoch_1.pth')
    cfg.train_cfg.max_epochs = 2
    runner = train(cfg)
    assert runner.iter == 7
    assert 'with 5 batches in an epoch' in ''.join(capfd.readouterr())


def test_starting_weights_do_not_move_the_data(train, tmp_path):
    train(toy.config(tmp_path / 'a', train_cfg__max_epochs=1))
    cfg = toy.config(tmp_path / 'b', train_cfg__max_epochs=1)
    cfg.load_from = str(tmp_path / 'a' / 'epoch_1.pth')
    assert train(cfg).iter == 5


def test_data_without_indices(train, tmp_path):
    from mmengine.registry import DATASETS

    @DATASETS.register_module(force=True)
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield dict()

    cfg = toy.config(tmp_path)
    cfg.train_dataloader = dict(
        batch_size=1, num_workers=0, sampler=None, dataset=dict(type='Stream')
    )
    with pytest.raises(TypeError, match='EpochBasedTrainLoop, which cannot resume'):
        train(cfg)


@pytest.mark.parametrize('by_epoch', [False, True])
def test_data_of_less_than_a_batch(by_epoch, build, tmp_path):
    """Nothing would be learnt, and nothing said."""
    cfg = toy.config(tmp_path, by_epoch)
    cfg.train_dataloader.update(batch_size=11, drop_last=True)
    cfg.train_dataloader.sampler.type = 'DefaultSampler'
    with pytest.raises(ValueError, match='10 samples and gives no batch: make batch_'):
        build(cfg).train()


@pytest.mark.parametrize(
    'by_epoch, name, number',
    [(True, 'max_epochs', 0), (False, 'max_iters', -1)]
    + [(by_epoch, 'val_interval', 0) for by_epoch in (True, False)],
)
def test_numbers_that_would_train_nothing_or_end_it(
    by_epoch, name, number, build, tmp_path
):
    cfg = toy.config(tmp_path, by_epoch)
    cfg.train_cfg[name] = number
    with pytest.raises(ValueError, match=f'{name} must be at least 1, got {number}'):
        build(cfg).train()


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_own_random_numbers():
    before = random.getstate()
    with own_random_numbers((DATA, 1, 0, 5)):
        first = draws()
    assert random.getstate() == before
    outside = draws()
    with own_random_numbers((DATA, 1, 0, 5)):
        assert draws() == first
    others = set()
    for key in [(DATA, 1, 0, 6), (DATA, 1, 1, 5), (DATA, 2, 0, 5), (1, 1, 0, 5)]:
        with own_random_numbers(key):
            others.add(draws())
    assert len(others | {first, outside}) == 6
    batch = SeededBatch([3, 4], (DATA, 1, 0, 5))
    for index in batch:
        assert (draws() == first) == (index == 3)


@pytest.mark.parametrize('endless', [False, True])
def test_any_order_from_the_middle(endless):
    """Torch's own sampler, which draws its seed from the global numbers."""
    data = list(range(10))
    loader = SeekableLoader(
        DataLoader(data, 2, sampler=RandomSampler(data)), endless=endless
    )
    loader.seek(7, 20, 0)
    whole = [batch.tolist() for batch, _ in zip(loader, range(12), strict=False)]
    assert len(whole) == (12 if endless else 5)
    assert sorted(sum(whole[:5], [])) == data
    loader.seek(7, 23, 3)
    part = [batch.tolist() for batch, _ in zip(loader, range(9), strict=False)]
    assert part == whole[3:]


@pytest.mark.parametrize('shuffle', [False, True])
def test_endless_sampler(shuffle, monkeypatch):
    """Two processes have all samples in each pass, and begin anywhere alike."""
    from mmengine.dataset import InfiniteSampler

    def indices(rank, start, count):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda: (rank, 2))
        sampler = SeekableSampler(InfiniteSampler(range(7), shuffle, seed=4))
        sampler.start = start
        return list(itertools.islice(sampler, count))

    whole = [indices(rank, 0, 21) for rank in range(2)]
    together = [index for pair in zip(*whole, strict=True) for index in pair]
    passes = [together[7 * i : 7 * i + 7] for i in range(6)]
    assert all(sorted(order) == list(range(7)) for order in passes)
    assert len({*map(tuple, passes)}) == (6 if shuffle else 1)
    for start in (1, 4, 10):
        assert [indices(rank, start, 9) for rank in range(2)] == [
            order[start : start + 9] for order in whole
        ]


def test_endless_order_is_not_drawn_again(train, tmp_path, monkeypatch):
    """Resumed late, the sampler draws the order that it is in, and no other."""
    cfg = toy.config(tmp_path / 'a', by_epoch=False, train_cfg__max_iters=5)
    train(cfg)
    file = tmp_path / 'late.pth'
    content = torch.load(tmp_path / 'a' / 'iter_5.pth', weights_only=True)
    content['meta']['iter'] = content['place']['skip'] = 10_003
    torch.save(content, file)
    drawn = []
    permute = torch.randperm
    monkeypatch.setattr(
        torch, 'randperm', lambda *a, **k: drawn.append(a) or permute(*a, **k)
    )
    cfg = toy.config(tmp_path / 'b', by_epoch=False, train_cfg__max_iters=10_004)
    cfg.resume, cfg.load_from = True, str(file)
    assert train(cfg).iter == 10_004
    assert len(drawn) == 1
