"""Checkpoints that a kill, a crash or a full disk cannot take away."""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import all_gather_object, is_main_process, master_only
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner

from mmcls_involution import compat
from mmcls_involution.engine.config import is_called
from mmcls_involution.engine.errors import UserError, did_you_mean
from mmcls_involution.engine.loops import ExactEpochLoop, ExactIterLoop
from mmcls_involution.weights.files import (
    bring_back,
    put_in_place,
    save,
    sha256,
    write_text,
)

LEAST = 2  # checkpoints that are always kept


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's ``CheckpointHook``, with files that are there whole or not at all.

    MMEngine deletes the oldest checkpoint, then writes the new one over its target.
    Here a checkpoint is written beside its target, flushed to the disk and renamed;
    ``last_checkpoint`` is replaced in the same way, and then old ones are deleted.
    A disk that is full or away costs this checkpoint alone: it is reported, and
    training goes on to the next one. What it writes can be loaded weights-only.

    In any config, installed beside this package::

        default_hooks = dict(
            checkpoint=dict(
                type='mmcls_involution.engine.saving.SafeCheckpointHook', interval=1
            )
        )

    Args:
        max_keep_ckpts (int): As MMEngine's, at least 2: a file that another program
            damages must not be the only one. Defaults to -1, all.
        **kwargs: All the others of ``CheckpointHook``. An ``out_dir`` with ``://`` is
            written to as MMEngine does, for such stores take objects whole; the order
            is the same as here.

    Raises:
        TypeError: If ``interval`` is no int.
    """

    def __init__(self, *args: Any, max_keep_ckpts: int = -1, **kwargs: Any) -> None:
        compat.apply()
        if max_keep_ckpts > 0:
            max_keep_ckpts = max(max_keep_ckpts, LEAST)
        super().__init__(*args, max_keep_ckpts=max_keep_ckpts, **kwargs)
        if not isinstance(self.interval, int):  # else the first save finds out
            raise TypeError(f'interval should be an int, got {self.interval!r}')
        self._meta: dict = {}
        self._process = 0
        self._outlived: list[str] = []  # best ones that the last checkpoint may name

    @property
    def _local(self) -> bool:
        return isinstance(self.file_backend, LocalBackend)

    def before_train(self, runner: Runner) -> None:
        super().before_train(runner)
        # Two trainings in one folder do not write to one file; all processes of one do.
        self._process = all_gather_object(os.getpid())[0]
        if self._local:
            named = Path(self.out_dir, self.filename_tmpl).parent
            folders = {named, Path(self.out_dir), Path(runner.work_dir)}
            for folder in folders:
                bring_back(folder)
            rests = [f for folder in folders for f in folder.glob('.*.partial*')]
            for rest in rests:  # of a kill
                self._delete(runner, str(rest))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        # FlexibleRunner counts one epoch too many for those saved after a validation.
        checkpoint['meta'].update(self._meta)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        before = self._state(runner)
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        old = []
        if self.max_keep_ckpts > 0:
            kept = [kept for kept in self.keep_ckpt_ids if kept != step] + [step]
            old, kept = kept[: -self.max_keep_ckpts], kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        saved = self._save(
            runner,
            name,
            meta,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            by_epoch=self.by_epoch,
            **self.args,
        )
        if not saved:
            self._set_back(runner, before)
            return
        pointer = Path(runner.work_dir, 'last_checkpoint')
        error = _first_error(
            lambda: is_main_process() and write_text(pointer, self.last_ckpt)
        )
        if error is not None:
            runner.logger.error(
                f'{name} is saved, but {pointer} cannot be written: {error}. What it '
                'names is kept'
            )
            if self.max_keep_ckpts > 0:  # for the next time
                self.keep_ckpt_ids = deque([*old, *kept])
            return
        for step in old:
            path = self.file_backend.join_path(
                self.out_dir, self.filename_tmpl.format(step)
            )
            if path != self.last_ckpt:  # a template may have no number
                self._delete(runner, path)
        self._delete_outlived(runner)

    def _delete_outlived(self, runner: Runner) -> None:
        while self._outlived:
            self._delete(runner, self._outlived.pop())

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if not self.save_best:
            return
        try:
            if 'auto' in self.key_indicators:
                self._init_rule(self.rules, [list(metrics)[0]])
            absent = [key for key in self.key_indicators if key not in metrics]
        except ValueError as error:
            raise UserError(
                f'save_best: {error} Set rule to greater or less.'
            ) from error
        if absent:
            raise UserError(
                f'save_best of the checkpoint hook names {absent[0]!r}, and the '
                f'evaluators give {", ".join(metrics)}.'
                f'{did_you_mean(absent[0], metrics)} Name one of these; a training '
                'goes on from its last checkpoint with --resume.'
            )
        step = runner.epoch if self.by_epoch else runner.iter
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        single = len(self.key_indicators) == 1
        replaced = False
        for key in self.key_indicators:
            suffix = '' if single else f'_{key}'
            known = runner.message_hub.runtime_info
            # As upstream finds them; `rules` has a None where it guessed the rule.
            better = self.is_better_than[key]
            worst = -float('inf') if better(1, 0) else float('inf')
            score = metrics[key]
            if score is None or not better(
                score, known.get(f'best_score{suffix}', worst)
            ):
                continue
            before = self._state(runner)
            old = self.best_ckpt_path if single else self.best_ckpt_path_dict[key]
            name = f'best_{key}_{self.filename_tmpl.format(step)}'.replace('/', '_')
            path = self.file_backend.join_path(self.out_dir, name)
            if single:
                self.best_ckpt_path = path
            else:
                self.best_ckpt_path_dict[key] = path
            runner.message_hub.update_info(f'best_score{suffix}', score)
            runner.message_hub.update_info(f'best_ckpt{suffix}', path)
            if not self._save(
                runner,
                name,
                meta,
                save_optimizer=False,
                save_param_scheduler=False,
                by_epoch=False,
            ):
                self._set_back(runner, before)
                continue
            runner.logger.info(
                f'The best checkpoint with {score:0.4f} {key} at {step} '
                f'{"epoch" if self.by_epoch else "iter"} is saved to {name}.'
            )
            replaced = True
            if old and old != path:
                self._outlived.append(old)
        # Once more, for it names the best one; until then the old best one is needed.
        if replaced and self.last_ckpt is not None:
            self._save_checkpoint_with_step(runner, step, meta)
        elif replaced:
            self._delete_outlived(runner)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str | None) -> None:
        """Write a copy with ``published_keys`` alone; a failure costs the copy."""
        if ckpt_path is None:  # there was no score
            return
        if not self._local:
            super()._publish_model(runner, ckpt_path)
            return
        path = Path(ckpt_path)
        try:
            content = CheckpointLoader.load_checkpoint(ckpt_path, 'cpu', 'silent')
            content = {k: v for k, v in content.items() if k in self.published_keys}
            file = save(
                content,
                path,
                lambda partial: path.with_stem(f'{path.stem}-{sha256(partial)[:8]}'),
            )
        except (OSError, RuntimeError, UserError) as error:
            runner.logger.error(f'{path} is not published: {error}')
        else:
            runner.logger.info(f'{path} is published as {file}')

    def _save(
        self,
        runner: Runner,
        name: str,
        meta: dict,
        **options: Any,
    ) -> bool:
        """Write a checkpoint, on every process that holds a part of it.

        Args:
            runner: The runner.
            name: Of the file, or of the folder where each process writes one.
            meta: What to note of the moment.
            **options: Of ``runner.save_checkpoint``.

        Returns:
            Whether all of it is on the disk.
        """
        partial = name
        if self._local:
            file = Path(name)  # which may name a folder, too
            partial = str(file.with_name(f'.{file.name}.{self._process}.partial'))
        self._meta = dict(meta)
        if isinstance(runner.train_loop, ExactEpochLoop | ExactIterLoop):
            runner.train_loop.gather()

        def write() -> None:
            runner.save_checkpoint(
                self.out_dir,
                partial,
                self.file_client_args,
                meta=meta,
                backend_args=self.backend_args,
                **options,
            )

        def finish() -> None:
            if self._local and is_main_process():
                put_in_place(Path(self.out_dir, partial), Path(self.out_dir, name))

        # Others may have parts to write: nobody renames before all have written.
        error = _first_error(write) or _first_error(finish)
        self._meta = {}
        if error is None:
            return True
        if self._local:
            self._delete(runner, str(Path(self.out_dir, partial)))
        runner.logger.error(
            f'{name} was NOT saved in {self.out_dir}: {error}. Training goes on, and '
            'tries again when the next checkpoint is due; the earlier ones are kept. '
            'Make room, or make the folder writable again.'
        )
        return False

    def _state(self, runner: Runner) -> tuple[dict, dict]:
        """What the hook and the message hub know of the files there are."""
        names = 'last_ckpt', 'keep_ckpt_ids', 'best_ckpt_path', 'best_ckpt_path_dict'
        own = {name: copy(value) for name, value in vars(self).items() if name in names}
        return own, dict(runner.message_hub.runtime_info)

    def _set_back(self, runner: Runner, state: tuple[dict, dict]) -> None:
        own, known = state
        vars(self).update(own)
        runner.message_hub.runtime_info.clear()
        runner.message_hub.runtime_info.update(known)

    def _delete(self, runner: Runner, path: str) -> None:
        if not is_main_process():
            return
        try:
            if self._local:
                _remove(Path(path))
            elif self.file_backend.isfile(path):
                self.file_backend.remove(path)
        except OSError as error:
            runner.logger.warning(f'{path} cannot be deleted: {error}')


def _first_error(step: Callable[[], None]) -> str | None:
    """Take a step on every process; what went wrong on the first that failed."""
    error = None
    try:
        step()
    except OSError as found:
        error = f'{type(found).__name__}: {found}'
    return next(filter(None, all_gather_object(error)), None)


def _remove(path: Path) -> None:
    """Delete a file, or the folder in which each process has one, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:  # its folder has gone
            return


def save_safely(cfg: Config) -> None:
    """Put :class:`SafeCheckpointHook` in the place of MMEngine's in a config.

    A ``CheckpointHook`` of somebody else's stays.

    Args:
        cfg (Config): The config; changed in place.
    """
    hooks = dict(cfg.get('default_hooks') or {})
    hooks.setdefault('checkpoint', dict(interval=1))  # that of MMEngine
    if hooks['checkpoint'] is not None:
        hooks['checkpoint'].setdefault('type', 'CheckpointHook')
    cfg.default_hooks = hooks
    for hook in [cfg.default_hooks['checkpoint'], *(cfg.get('custom_hooks') or [])]:
        if isinstance(hook, dict) and is_called(
            hook.get('type'), 'CheckpointHook', HOOKS
        ):
            hook['type'] = f'{__name__}.SafeCheckpointHook'
