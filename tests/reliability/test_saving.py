"""Checkpoints are there whole, or the earlier ones are."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

import toy  # noqa: E402
from mmengine.fileio import LocalBackend  # noqa: E402
from mmengine.logging import MMLogger  # noqa: E402

from mmcls_involution.engine import saving  # noqa: E402
from mmcls_involution.engine.errors import UserError  # noqa: E402
from mmcls_involution.engine.hooks import OwnBest  # noqa: E402
from mmcls_involution.engine.resume import check_resume  # noqa: E402
from mmcls_involution.engine.saving import SafeCheckpointHook, save_safely  # noqa: E402
from mmcls_involution.weights import files  # noqa: E402


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir() if file.is_file()} - {'20.py'}


def test_train_puts_it_in_the_place_of_the_stock_hook(tmp_path):
    from mmengine.config import Config

    for default_hooks in (
        None, {}, dict(checkpoint=dict(interval=2)),
        dict(checkpoint=dict(type='CheckpointHook', interval=2)),
        dict(checkpoint=dict(type='mmengine.CheckpointHook', interval=2)),
    ):  # fmt: skip
        cfg = Config(dict(default_hooks=default_hooks))
        save_safely(cfg)
        hook = cfg.default_hooks.checkpoint
        assert hook.type == 'mmcls_involution.engine.saving.SafeCheckpointHook'
        assert hook.interval == (2 if default_hooks else 1)
    cfg = Config(dict(default_hooks=dict(checkpoint=None)))
    save_safely(cfg)
    assert cfg.default_hooks.checkpoint is None


def test_files_of_a_training(train, tmp_path):
    cfg = toy.config(tmp_path, **toy.VALIDATION)
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, save_best='accuracy')
    (tmp_path / '.epoch_9.pth.partial').write_text('of a kill')
    runner = train(cfg)
    assert any(isinstance(hook, SafeCheckpointHook) for hook in runner.hooks)
    best = {file for file in names(tmp_path) if file.startswith('best_')}
    assert len(best) == 1
    left = {file for file in names(tmp_path) if not file.endswith('.py')}
    assert left == {'epoch_3.pth', 'epoch_4.pth', 'last_checkpoint', *best}
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_4.pth')
    for file in tmp_path.glob('*.pth'):
        state = torch.load(file, weights_only=True)
    info = torch.load(tmp_path / 'epoch_4.pth', weights_only=True)['message_hub']
    assert info['runtime_info']['keep_ckpt_ids'] == [3, 4]
    assert {Path(info['runtime_info']['best_ckpt']).name} == best
    assert state['meta']['epoch'] <= 4


def test_a_folder_left_aside_is_not_deleted(train, tmp_path):
    """By a kill while it was replaced; FSDP writes such folders."""
    for name in ('.epoch_9.pth.7.partial.old', '.epoch_9.pth.7.partial'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'rank0.pth').write_text(name)
    train(toy.config(tmp_path))
    assert not [*tmp_path.glob('.*.partial*')]
    text = (tmp_path / 'epoch_9.pth' / 'rank0.pth').read_text()
    assert text == '.epoch_9.pth.7.partial.old'


def test_several_best_ones(train, tmp_path):
    cfg = toy.config(tmp_path, **toy.VALIDATION)
    cfg.val_evaluator = [dict(type='ToyMetric'), dict(type='ToyMetric', prefix='b')]
    cfg.default_hooks.checkpoint.update(
        save_best=['accuracy', 'b/accuracy'], rule='greater'
    )
    train(cfg)
    assert len(list(tmp_path.glob('best_accuracy_*.pth'))) == 1
    assert len(list(tmp_path.glob('best_b_accuracy_*.pth'))) == 1


@pytest.mark.parametrize('where', ['while it is written', 'in its fsync', 'its name'])
def test_a_full_disk_costs_one_checkpoint(where, train, tmp_path, monkeypatch, caplog):
    """At any of the steps of the third checkpoint."""
    full = OSError(errno.ENOSPC, 'No space left on device')
    put, fsync, replace = LocalBackend.put, os.fsync, os.replace

    def is_third(path):
        return 'epoch_3' in str(path)

    def failing_put(self, content, path):
        if is_third(path):
            put(self, content[:1000], path)
            raise full
        put(self, content, path)

    def failing_fsync(descriptor):
        if is_third(os.readlink(f'/proc/self/fd/{descriptor}')):
            raise full
        fsync(descriptor)

    def failing_replace(source, target):
        if is_third(source):
            raise full
        replace(source, target)

    if where == 'while it is written':
        monkeypatch.setattr(LocalBackend, 'put', failing_put)
    elif where == 'in its fsync':
        monkeypatch.setattr(os, 'fsync', failing_fsync)
    else:
        monkeypatch.setattr(os, 'replace', failing_replace)
    cfg = toy.config(tmp_path)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 2
    errors = []
    monkeypatch.setattr(MMLogger, 'error', lambda self, text, *a: errors.append(text))
    runner = train(cfg)
    assert runner.iter == 20
    assert len(errors) == 1
    assert 'epoch_3.pth was NOT saved' in errors[0] and 'No space left' in errors[0]
    assert {f.name for f in tmp_path.glob('*.pth')} == {'epoch_2.pth', 'epoch_4.pth'}
    assert not list(tmp_path.glob('.*'))
    state = torch.load(tmp_path / 'epoch_4.pth', weights_only=True)
    assert state['message_hub']['runtime_info']['keep_ckpt_ids'] == [2, 4]


def test_old_ones_go_when_the_new_one_is_durable(train, tmp_path, monkeypatch):
    """Whatever moment the machine stops at, two whole checkpoints are there."""
    seen = []
    unlink, replace = Path.unlink, os.replace

    def look(*args, **kwargs):
        whole = 0
        for file in tmp_path.glob('epoch_*.pth'):
            torch.load(file, weights_only=True)
            whole += 1
        seen.append(whole)

    def watched_unlink(self, *args, **kwargs):
        unlink(self, *args, **kwargs)
        look()

    def watched_replace(source, target):
        look()
        replace(source, target)

    monkeypatch.setattr(Path, 'unlink', watched_unlink)
    monkeypatch.setattr(os, 'replace', watched_replace)
    cfg = toy.config(tmp_path)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 2
    train(cfg)
    # Four of each, a checkpoint and a pointer, and two deletions.
    assert seen == [0, 1, 1, 2, 2, 3, 2, 2, 3, 2]


def test_a_folder_that_vanishes_comes_back(train, tmp_path):
    import shutil

    from mmengine.hooks import Hook
    from mmengine.registry import HOOKS

    @HOOKS.register_module(force=True)
    class Vandal(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == 2:
                shutil.rmtree(runner.work_dir)

    cfg = toy.config(tmp_path / 'work')
    cfg.custom_hooks.append(dict(type='Vandal'))
    train(cfg)
    assert {f.name for f in (tmp_path / 'work').glob('*.pth')} == {
        'epoch_3.pth', 'epoch_4.pth'
    }  # fmt: skip


def test_the_newest_that_loads_in_full(train, tmp_path, monkeypatch):
    train(toy.config(tmp_path))
    warnings = []
    monkeypatch.setattr(files, 'print_log', lambda text, **_: warnings.append(text))
    latest = files.latest_checkpoint(tmp_path)
    assert latest.name == 'epoch_4.pth' and not warnings
    # The pointer is older than the file: killed between the two.
    (tmp_path / 'last_checkpoint').write_text('/gone/epoch_3.pth')
    assert files.latest_checkpoint(tmp_path).name == 'epoch_4.pth'
    # In the middle, where a look at the end of the file would miss it.
    content = bytearray(latest.read_bytes())
    place = content.index(b'data/0') + 200
    content[place : place + 300] = bytes(300)
    latest.write_bytes(content)
    third = tmp_path / 'epoch_3.pth'
    third.write_bytes(third.read_bytes()[:-400])
    assert files.latest_checkpoint(tmp_path).name == 'epoch_2.pth'
    for damage in ('epoch_3.pth: cut short', 'epoch_4.pth: damaged at'):
        assert any(damage in warning for warning in warnings)
    for number in (1, 2):
        (tmp_path / f'epoch_{number}.pth').write_bytes(b'')
    assert files.latest_checkpoint(tmp_path) is None


def test_a_folder_is_not_resumed_by_itself(tmp_path, monkeypatch):
    """FSDP writes one, a part of the weights for each process."""
    torch.save(dict(state_dict={}), tmp_path / 'epoch_1.pth')
    os.utime(tmp_path / 'epoch_1.pth', (1, 1))
    folder = tmp_path / 'epoch_2.pth'
    folder.mkdir()
    warnings = []
    monkeypatch.setattr(files, 'print_log', lambda text, **_: warnings.append(text))
    assert files.latest_checkpoint(tmp_path).name == 'epoch_1.pth'
    assert 'epoch_2.pth: a folder' in warnings[0]
    cfg = toy.config(tmp_path, load_from=str(folder))
    with pytest.raises(UserError, match='epoch_2.pth: it is a folder, as FSDP'):
        check_resume(cfg)


def failing(monkeypatch, name: str, error: OSError) -> None:
    """A file that is written under this name cannot be given it, nor be deleted."""
    replace, unlink = os.replace, Path.unlink

    def failing_replace(source, target):
        if Path(target).name == name:
            raise error
        replace(source, target)

    def failing_unlink(self, *args, **kwargs):
        if name in self.name and self.exists():
            raise error
        unlink(self, *args, **kwargs)

    monkeypatch.setattr(os, 'replace', failing_replace)
    monkeypatch.setattr(Path, 'unlink', failing_unlink)


def test_a_disk_that_becomes_read_only(train, tmp_path, monkeypatch):
    """What has been written cannot be removed either."""
    failing(monkeypatch, 'epoch_3.pth', OSError(errno.EROFS, 'Read-only file system'))
    assert train(toy.config(tmp_path)).iter == 20
    assert (tmp_path / 'epoch_4.pth').is_file()


def test_no_room_for_the_pointer(train, tmp_path, monkeypatch):
    """The checkpoint counts; what the pointer names stays until it names another."""
    write = files.write_text
    errors, left = [], []

    def failing_write(path, text):
        left.append({f.name for f in tmp_path.glob('*.pth')})
        if 'epoch_3' in text:
            raise OSError(errno.ENOSPC, 'No space left on device')
        write(path, text)

    monkeypatch.setattr(saving, 'write_text', failing_write)
    monkeypatch.setattr(MMLogger, 'error', lambda self, text, *a: errors.append(text))
    cfg = toy.config(tmp_path, train_cfg__max_epochs=5)
    cfg.default_hooks.checkpoint.max_keep_ckpts = 2
    train(cfg)
    assert len(errors) == 1 and 'epoch_3.pth is saved, but' in errors[0]
    assert left[3] == {f'epoch_{i}.pth' for i in (1, 2, 3, 4)}
    assert {f.name for f in tmp_path.glob('*.pth')} == {'epoch_4.pth', 'epoch_5.pth'}


@pytest.mark.parametrize('template', ['deep/er_{}.pth', 'newest.pth'])
def test_any_name(template, train, tmp_path):
    """With a folder in it, and without a number: the same file each time."""
    cfg = toy.config(tmp_path)
    cfg.default_hooks.checkpoint.update(filename_tmpl=template, max_keep_ckpts=2)
    train(cfg)
    found = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob('*.pth')}
    expected = {template.format(number) for number in (3, 4)}
    assert found == expected
    last = tmp_path / template.format(4)
    assert torch.load(last, weights_only=True)['meta']['epoch'] == 4
    assert files.latest_checkpoint(tmp_path, cfg) == last
    last.write_bytes(last.read_bytes()[:-1])
    earlier = tmp_path / template.format(3)
    expected = earlier if earlier != last else None
    assert files.latest_checkpoint(tmp_path, cfg) == expected


def test_best_one_is_kept_until_a_checkpoint_names_another(
    train, tmp_path, monkeypatch
):
    scores = iter([0.1, 0.2, 0.3, 0.1])
    monkeypatch.setattr(
        toy.ToyMetric, 'compute_metrics', lambda *_: dict(accuracy=next(scores))
    )
    save = SafeCheckpointHook._save
    calls = []

    def second_fails(self, runner, name, meta, **options):
        calls.append(name)
        if calls.count('epoch_2.pth') == 2 and name == 'epoch_2.pth':
            assert (tmp_path / 'best_accuracy_epoch_2.pth').is_file()
            return False
        if name == 'epoch_3.pth' and name not in calls[:-1]:
            assert (tmp_path / 'best_accuracy_epoch_1.pth').is_file()
        return save(self, runner, name, meta, **options)

    monkeypatch.setattr(SafeCheckpointHook, '_save', second_fails)
    cfg = toy.config(tmp_path, **toy.VALIDATION)
    cfg.default_hooks.checkpoint.save_best = 'accuracy'
    train(cfg)
    assert calls.count('epoch_2.pth') == 2
    (best,) = tmp_path.glob('best_*')
    assert best.name == 'best_accuracy_epoch_3.pth'


@pytest.mark.parametrize('metrics', [1, 2])
def test_score_of_a_best_one_that_is_gone(metrics, build, tmp_path, monkeypatch):
    """A training that goes back to before another one took its place."""
    keys = ['accuracy', 'b/accuracy'][:metrics]
    scores = iter([s for s in (0.5, 0.2, 0.9, 0.1, 0.3, 0.4) for _ in keys])
    monkeypatch.setattr(
        toy.ToyMetric, 'compute_metrics', lambda *_: dict(accuracy=next(scores))
    )
    cfg = toy.config(tmp_path, **toy.VALIDATION)
    cfg.val_evaluator = [
        dict(type='ToyMetric', prefix=p) for p in (None, 'b')[:metrics]
    ]
    cfg.default_hooks.checkpoint.update(save_best=keys, rule='greater')
    build(cfg).train()
    bests = {f'best_{key.replace("/", "_")}_epoch' for key in keys}
    assert {f.stem for f in tmp_path.glob('best_*')} == {f'{b}_3' for b in bests}
    for file in tmp_path.glob('best_*'):
        file.unlink()
    cfg.resume, cfg.load_from = True, str(tmp_path / 'epoch_2.pth')
    runner = build(cfg)
    runner.register_hook(OwnBest())
    runner.train()
    assert {f.stem for f in tmp_path.glob('best_*')} == {f'{b}_4' for b in bests}


def test_a_score_that_there_is_not(train, tmp_path):
    cases = dict(
        accuracy="names 'accuracy', .* Did you mean toy/acc",
        auto='a specific rule must',
    )
    for wrong, text in cases.items():
        cfg = toy.config(tmp_path / wrong, **toy.VALIDATION)
        cfg.val_evaluator = dict(type='ToyMetric', prefix='toy')
        cfg.default_hooks.checkpoint.save_best = wrong
        if wrong == 'auto':
            cfg.default_hooks.checkpoint.greater_keys = ['none']
        with pytest.raises(UserError, match=text):
            train(cfg)
        assert (tmp_path / wrong / 'epoch_1.pth').is_file()


def test_published_copies(train, tmp_path, monkeypatch):
    """Whole or not there, and without the best one of a folder that is elsewhere."""
    cfg = toy.config(tmp_path / 'a', **toy.VALIDATION)
    cfg.default_hooks.checkpoint.update(
        save_best='accuracy', published_keys=['meta', 'state_dict']
    )
    train(cfg)
    copies = [*(tmp_path / 'a').glob('*-????????.pth')]
    assert len(copies) == 2
    for copy in copies:
        assert {*torch.load(copy, weights_only=True)} == {'meta', 'state_dict'}
    # It is no checkpoint to go on from.
    (tmp_path / 'a' / 'last_checkpoint').unlink()
    assert files.latest_checkpoint(tmp_path / 'a').name == 'epoch_4.pth'
    errors = []
    monkeypatch.setattr(MMLogger, 'error', lambda self, text, *a: errors.append(text))
    for best in (tmp_path / 'a').glob('best_*'):
        best.unlink()
    cfg.resume, cfg.load_from = True, str(tmp_path / 'a' / 'epoch_4.pth')
    train(cfg)
    assert len(errors) == 1 and 'is not published: Checkpoint not found' in errors[0]


@pytest.fixture
def run(command, tmp_path):
    """Train by the command, with these settings of the hook."""

    def call(work: Path, *flags: object, **hook: object) -> str:
        cfg = toy.config(tmp_path / 'unused')
        cfg.custom_imports = dict(imports=['toy'], allow_failed_imports=False)
        cfg.default_hooks.checkpoint.update(hook)
        cfg.dump(tmp_path / 'toy_config.py')
        config = tmp_path / 'toy_config.py'
        return command('train', config, '--work-dir', work, *flags)

    return call


def test_best_ones_are_not_resumed(train, tmp_path):
    """Without an optimizer, its schedule would begin anew in the middle."""
    cfg = toy.config(tmp_path, **toy.VALIDATION)
    cfg.default_hooks.checkpoint.save_best = 'accuracy'
    train(cfg)
    (best,) = tmp_path.glob('best_*')
    expected = 'it has no optimizer and no param_schedulers. The best'
    with pytest.raises(UserError, match=expected):
        check_resume(toy.config(tmp_path, load_from=str(best)))
    check_resume(toy.config(tmp_path, load_from=str(tmp_path / 'epoch_4.pth')))


MORE = ('--resume', '--cfg-options', 'train_cfg.max_epochs=5')


def test_checkpoints_in_another_folder(run, tmp_path):
    """Resumed from there; set aside there by a training that starts anew."""
    hook = dict(out_dir=str(tmp_path / 'out'), filename_tmpl='e_{:03d}.pth')
    folder = tmp_path / 'out' / 'work'
    assert run(tmp_path / 'work', **hook) == ''
    first = (folder / 'e_001.pth').stat().st_mtime
    assert run(tmp_path / 'work', *MORE, **hook) == ''
    assert (folder / 'e_005.pth').is_file()
    assert (folder / 'e_001.pth').stat().st_mtime == first
    assert run(tmp_path / 'work', **hook) == ''
    (aside,) = folder.glob('earlier_*')
    assert len([*aside.glob('*.pth')]) == 5 and len([*folder.glob('*.pth')]) == 4


def test_a_work_dir_by_another_name(run, tmp_path, monkeypatch):
    """The checkpoint that a training goes on from is not set aside."""
    assert run(tmp_path / 'work') == ''
    (tmp_path / 'link').symlink_to('work')
    (tmp_path / 'b').mkdir()
    monkeypatch.chdir(tmp_path / 'b')
    assert run('../work', *MORE) == ''
    file = tmp_path / 'work' / 'epoch_4.pth'
    assert run(tmp_path / 'link', '--resume', file, *MORE[1:]) == ''
    aside = [file.name for file in (tmp_path / 'work').glob('earlier_*/*')]
    assert aside == ['epoch_5.pth']  # which came after it
    message = run('../link', '--cfg-options', f'load_from={file}')
    assert 'own work dir' in message


def test_damaged_pointers(train, tmp_path):
    train(toy.config(tmp_path))
    for text in ('', '\0\0', 'x' * 300):
        (tmp_path / 'last_checkpoint').write_text(text)
        assert files.latest_checkpoint(tmp_path).name == 'epoch_4.pth'
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/epoch_9.pth')
    assert files.latest_checkpoint(tmp_path) == 's3://bucket/epoch_9.pth'


def test_out_dir_that_is_the_work_dir(tmp_path):
    """MMEngine puts no folder of its name into it then."""
    cfg = toy.config(tmp_path)
    hook = dict(out_dir=str(tmp_path), filename_tmpl='a_{}.pth')
    cfg.default_hooks.checkpoint.update(hook)
    for number in (9, 10):
        torch.save({}, tmp_path / f'a_{number}.pth')
        os.utime(tmp_path / f'a_{number}.pth', (1, 1))  # within a step of the clock
    assert files.latest_checkpoint(tmp_path, cfg).name == 'a_10.pth'
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'a_9.pth'))
    assert files.latest_checkpoint(tmp_path, cfg).name == 'a_10.pth'
