"""Whether a run can go on from a checkpoint: the same model, the same optimizer."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from mmcls_involution.engine.errors import UserError
from mmcls_involution.weights.files import meta_of
from mmcls_involution.weights.fit import Fit

SHOWN = 5  # differences in a message
# Of an optimizer's options those that only say how a step is computed.
HOW = {'params', 'foreach', 'fused', 'capturable', 'differentiable', 'maximize'}


def check_resume(cfg: Config) -> None:
    """Refuse to resume the checkpoint of another training; name what is kept of it.

    MMEngine loads the weights that fit, and the optimizer's state whatever it belongs
    to. Nothing has been written or moved yet when this is called.

    Args:
        cfg (Config): The complete config, with the checkpoint as ``load_from``.

    Raises:
        UserError: If the file is no checkpoint of a training, or of one with another
            model or optimizer.
        pickle.UnpicklingError: If reading it could run code.
    """
    path = cfg.load_from
    if '://' in path or cfg.get('runner_type'):
        return  # not here yet; FlexibleRunner keeps its state in another form
    if Path(path).is_dir():
        raise UserError(
            f'Cannot resume {path}: it is a folder, as FSDP writes with '
            "state_dict_cfg='local', and only the FlexibleRunner of such a config "
            'reads it. Resume with that config, or name a file.'
        )
    try:
        checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu', logger='silent')
    except RuntimeError as error:
        raise UserError(f'Cannot resume: {error}') from error
    meta = meta_of(checkpoint)
    if not {'epoch', 'iter'} <= set(meta) or 'message_hub' not in checkpoint:
        raise UserError(
            f'Cannot resume {path}: it holds weights, and no state of a training. To '
            f'start from them: no --resume, and --cfg-options load_from={path}'
        )
    # MMEngine would begin the optimizer and its schedules anew, in the middle.
    parts = dict(optimizer='optim_wrapper', param_schedulers='param_scheduler')
    if lacking := [
        part for part, key in parts.items() if cfg.get(key) and part not in checkpoint
    ]:
        raise UserError(
            f'Cannot resume {path}: it has no {" and no ".join(lacking)}. The best '
            'checkpoints have none, nor those of a hook with save_optimizer=False or '
            'save_param_scheduler=False. Name another one, such as epoch_N.pth; or '
            'start a new training from its weights: another --work-dir, no --resume, '
            f'and --cfg-options load_from={path}'
        )
    model_cfg = deepcopy(cfg.model)
    if cfg.get('data_preprocessor'):  # as the Runner does
        model_cfg.setdefault('data_preprocessor', cfg.data_preprocessor)
    model = MODELS.build(model_cfg)
    wrapper = build_optim_wrapper(model, deepcopy(cfg.optim_wrapper))
    earlier = _assignments(meta.get('cfg') or '')
    problems = [*_weights(model, checkpoint['state_dict'])]
    if isinstance(wrapper, OptimWrapper) and 'optimizer' in checkpoint:
        problems += _optimizer(wrapper, checkpoint['optimizer'], earlier, cfg)
    problems += _schedules(checkpoint.get('param_schedulers'), earlier, cfg)
    if problems:
        changed = list(_changed(earlier, cfg, ('model', 'optim_wrapper')))
        if changed:
            problems.insert(0, f'The config says {_some(changed)}')
        raise UserError(
            f'Cannot resume {path}, which is of a training with another model, '
            f'optimizer or schedule than the config. {". ".join(problems)}. Nothing '
            'has been changed. Resume with the config of that training; or start a new '
            'one from its weights: another --work-dir, no --resume, and --cfg-options '
            f'load_from={path}'
        )
    if isinstance(wrapper, OptimWrapper):
        _name_what_is_kept(wrapper, checkpoint, earlier, cfg)


def _weights(model: nn.Module, weights: dict) -> Iterator[str]:
    """What keeps weights from being those of the model."""
    fit = Fit(dict(model.named_parameters()))
    own = set(model.state_dict())
    load_state_dict(model, weights, logger='silent')
    if fit.empty:
        shapes = [
            f'{name} is {list(weights[name].shape)}, in the model '
            f'{list(fit.tensors[name].shape)}'
            if name in weights
            else f'{name} is missing'
            for name in fit.empty
        ]
        yield f'{len(shapes)} parameters do not fit: {_some(shapes)}'
    # Names that the model renames as it loads fill a parameter.
    elif more := [name for name in weights if name not in own]:
        yield f'{len(more)} parameters of it are not in the model: {_some(more)}'


def _optimizer(
    wrapper: OptimWrapper, state: dict, earlier: dict, cfg: Config
) -> Iterator[str]:
    """What keeps the state of an optimizer from being that of another one."""
    groups, saved = wrapper.optimizer.param_groups, state['param_groups']
    kinds = [_kind(c) for c in (earlier, cfg)]
    ours, theirs = (
        {key for key in group if not key.startswith('initial_')} - HOW
        for group in (groups[0], saved[0])
    )
    # A newer torch may have options that an older one lacked.
    if (earlier and kinds[0] != kinds[1]) or (ours - theirs and theirs - ours):
        yield (
            f'Its optimizer{f" {kinds[0]}" if earlier else ""} has '
            f'{", ".join(sorted(theirs - ours)) or "the same options"}, that of the '
            f'config, {kinds[1]}, {", ".join(sorted(ours - theirs)) or "too"}'
        )
    sizes = [[len(group['params']) for group in which] for which in (saved, groups)]
    if sizes[0] != sizes[1]:
        counts = [f'{sum(s)} parameters in {len(s)} group(s)' for s in sizes]
        yield f'Its optimizer has {counts[0]}, that of the config {counts[1]}'


def _kind(cfg: dict) -> str:
    """The class of a config's optimizer."""
    return _class_name((cfg.get('optim_wrapper') or {}).get('optimizer', {}))


def _class_name(part: dict) -> str:
    """The class of a part of a config, which may be named with its module."""
    kind = part.get('type')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _schedules(states: Any, earlier: dict, cfg: Config) -> Iterator[str]:
    """What keeps states of schedules from being those of the config's.

    MMEngine gives them out in turn, whatever they are of: the rate would follow neither
    the earlier schedule nor the new one.
    """
    if not isinstance(states, list):  # none, or those of several optimizers
        return
    found = []
    for which in (earlier, cfg):
        parts = which.get('param_scheduler') or []
        parts = [parts] if isinstance(parts, dict) else parts
        found.append([_class_name(part) for part in parts])
    # The text of a config may not tell them.
    known = 'param_scheduler' in earlier
    if len(states) != len(found[1]) or (known and found[0] != found[1]):
        names = [', '.join(kinds) or 'none' for kinds in found]
        before = names[0] if known else f'{len(states)} of them'
        yield f'Its param_scheduler is {before}, that of the config {names[1]}'


def _name_what_is_kept(
    wrapper: OptimWrapper, checkpoint: dict, earlier: dict, cfg: Config
) -> None:
    """Say which settings of the config a resumed optimizer and schedule pass over."""
    kept = []
    if 'optimizer' in checkpoint:
        ours = wrapper.optimizer.param_groups[0]
        theirs = checkpoint['optimizer']['param_groups'][0]
        scaled = (cfg.get('auto_scale_lr') or {}).get('enable')
        for key in sorted(ours.keys() & theirs.keys() - HOW):
            before = theirs.get(f'initial_{key}', theirs[key])
            if before != ours[key] and not (key == 'lr' and scaled):
                kept.append(f'{key} {before} (the config has {ours[key]})')
    if 'param_schedulers' in checkpoint and [
        *_changed(earlier, cfg, ('param_scheduler',))
    ]:
        kept.append('its param_scheduler (the config has another one)')
    if kept:
        print_log(
            f'{cfg.load_from} is resumed with its own {", ".join(kept)}. To use the '
            'settings of the config, start anew from its weights, with load_from',
            level=logging.WARNING,
        )


def _some(items: list[str]) -> str:
    return '; '.join(items[:SHOWN]) + ('; ...' if len(items) > SHOWN else '')


def _changed(earlier: dict, cfg: Config, parts: tuple[str, ...]) -> Iterator[str]:
    """Settings that differ between the config in a checkpoint and this one."""

    def compare(path: str, old: Any, new: Any) -> Iterator[str]:
        if isinstance(old, dict) and isinstance(new, dict):
            for key in dict.fromkeys([*old, *new]):
                yield from compare(f'{path}.{key}', old.get(key), new.get(key))
        elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
            if len(old) != len(new):
                yield f'{path} has {len(new)} entries (before: {len(old)})'
            else:
                for i, (a, b) in enumerate(zip(old, new, strict=True)):
                    yield from compare(f'{path}.{i}', a, b)
        elif old != new:
            yield f'{path}={new!r} (before: {old!r})'

    if earlier:
        now = _assignments(cfg.pretty_text)
        for part in parts:
            yield from compare(part, earlier.get(part), now.get(part))


def _assignments(text: str) -> dict[str, Any]:
    """The settings of a config as MMEngine writes it, read without running it.

    What is not a plain value, the work of a config in Python, is left out.
    """

    def value(node: ast.expr) -> Any:
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'dict':
            named = {item.arg: value(item.value) for item in node.keywords}
            rest = named.pop(None, {})  # keys that are no identifiers: **{...}
            return rest | named
        if isinstance(node, ast.List | ast.Tuple):
            return [value(item) for item in node.elts]
        if isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            return {value(k): value(v) for k, v in pairs if k is not None}
        return ast.literal_eval(node)

    found = {}
    try:
        lines = ast.parse(text).body
    except SyntaxError:
        return {}
    for line in lines:
        if isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
            try:
                found[line.targets[0].id] = value(line.value)
            except ValueError:
                continue
    return found
