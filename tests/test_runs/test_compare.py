"""Comparison of seeds: table, picture, refusals; compare_backbones.sh, its user."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from mmcls_involution import __main__ as commands
from mmcls_involution.engine.config import add_cfg_options, read_config
from mmcls_involution.engine.errors import UserError
from mmcls_involution.runs import compare as tool
from mmcls_involution.weights.files import identity

ROOT = Path(__file__).parents[2]
SCORES = dict(slow=[30.0, 31.0, 35.0], quick=[40.0, 44.0])


def write_run(
    folder: Path, config: str, seed: int, score: float, **recipe: str | int
) -> Path:
    """What tools/reproduce.py leaves, as far as it is read."""
    processes = recipe.pop('processes', 2)
    train = dict(config=recipe, processes=processes, changed=[], finished='a.pth')
    command = "DATA='a b' python -m torch.distributed.run -m mmcls_involution test"
    if processes == 1:
        command = 'python tools/test.py'
    test = dict(
        command=f'{command} configs/{config}.py a.pth --cfg-options model.x=1',
        checkpoint=str(folder / 'a.pth'),
        meta=dict(seed=seed),
        scores={'mIoU': score, 'aAcc': 90.0},
    )
    (folder / 'report').mkdir(parents=True)
    record = dict(train=train, test=test)
    (folder / 'report' / 'record.json').write_text(json.dumps(record))
    data = folder / '20260101_000000' / 'vis_data'
    data.mkdir(parents=True)
    lines = [dict(lr=0.1, loss=score / step, step=step) for step in (10, 20, 30)]
    lines.insert(2, dict(mIoU=score - 5, step=20))
    (data / 'scalars.json').write_text('\n'.join(map(json.dumps, lines)))
    return folder


@pytest.fixture
def runs(tmp_path) -> list[Path]:
    return [
        write_run(tmp_path / f'{name}{seed}', name, seed, score)
        for name, scores in SCORES.items()
        for seed, score in enumerate(scores)
    ]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, 'argv', ['compare', *map(str, arguments)])
    commands.run('compare')


def test_table_and_picture(runs, monkeypatch, tmp_path, capsys):
    out = tmp_path / 'new' / 'picture.png'
    call(monkeypatch, *runs, '--out', out)
    header, _, slow, quick, *_ = capsys.readouterr().out.splitlines()
    assert header == '| Config | Seeds | mIoU | Difference |'
    assert slow == f'| slow | 3 | 32.00 ± {statistics.stdev(SCORES["slow"]):.2f} |  |'
    assert quick == '| quick | 2 | 42.00 ± 2.83 | +10.00 |'
    picture = cv2.imread(str(out))[..., ::-1] / 255
    for color in ('C0', 'C1'):  # the curves of both, in all three panels
        distance = np.abs(picture - to_rgb(color)).max(axis=2)
        panels = np.array_split(distance, 3, axis=1)
        assert [bool((panel < 0.02).sum() > 20) for panel in panels] == [True] * 3


@pytest.mark.parametrize('name', ['table.md', 'picture'])
def test_picture_of_no_kind(name, runs, monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f'--out must be a file of .*.png.*{name}'):
        call(monkeypatch, *runs, '--out', tmp_path / name)
    assert not list(tmp_path.glob(f'{name}*'))


def test_settings_of_one_config_by_name(monkeypatch, tmp_path, capsys):
    a, b = (write_run(tmp_path / f'x={lr}', 'c', 0, 30 + lr, lr=lr) for lr in (1, 2))
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, a, b)
    assert 'NAME=WORK_DIR' in str(stopped.value)
    call(monkeypatch, f'slow={a}', f'lr 2={b}', '--out', tmp_path / 'p.png')
    _, _, first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == '| slow | 1 | 31.00 |  |'
    assert second == '| lr 2 | 1 | 32.00 | +1.00 |'


def remember(folder: Path, **facts: object) -> None:
    """Change what is on record of a training."""
    file = folder / 'report' / 'record.json'
    record = json.loads(file.read_text())
    record['train'].update(facts)
    file.write_text(json.dumps(record))


def test_data_in_another_folder(monkeypatch, tmp_path, capsys):
    """The same recipe on two machines; an earlier record has no word of it."""
    runs = [write_run(tmp_path / str(s), 'c', s, 30 + s, data=s) for s in (0, 1)]
    for folder, place in zip(runs, ('/a/coco', '/b/coco'), strict=True):
        with pytest.raises(SystemExit, match='with different settings'):
            call(monkeypatch, *runs)
        remember(folder, recipe=dict(model='x'), data=[place])
    call(monkeypatch, *runs, '--out', tmp_path / 'p.png')
    output = capsys.readouterr().out
    assert '| c | 2 | 30.50 ±' in output
    assert 'Note: c was trained on the data in /a/coco and /b/coco' in output
    remember(runs[1], recipe=dict(model='y'))
    with pytest.raises(SystemExit, match='with different settings'):
        call(monkeypatch, *runs)


def test_other_weights_to_start_from(monkeypatch, tmp_path):
    """The config may name them by one path, or by an environment variable."""
    runs = [write_run(tmp_path / str(s), 'c', s, 30 + s) for s in (0, 1)]
    starts = 'sha256 1', 'https://host/a.pth', 'sha256 1', 'sha256 2'
    for folder, start in zip(2 * runs, starts, strict=True):
        remember(folder, weights={'model.backbone.init_cfg.checkpoint': start})
        if start != 'sha256 2':
            call(monkeypatch, *runs, '--out', tmp_path / 'p.png')
    with pytest.raises(SystemExit, match='with different settings'):
        call(monkeypatch, *runs)


def test_called_from_another_folder_than_reproduce(tmp_path, monkeypatch):
    folder = write_run(tmp_path / 'runs' / '0', 'c', 0, 30)
    record = folder / 'report' / 'record.json'
    changed = json.loads(record.read_text())
    for path, fits in (('runs/0/a.pth', True), ('runs/1/a.pth', False)):
        changed['test']['checkpoint'] = path
        record.write_text(json.dumps(changed))
        monkeypatch.chdir(folder)
        if fits:
            assert tool.read_run(Path('.')).scores['mIoU'] == 30
        else:
            with pytest.raises(UserError, match='the scores are of runs/1/a.pth'):
                tool.read_run(Path('.'))


@pytest.mark.parametrize('renamed', [False, True])
def test_work_dir_that_is_a_link_or_renamed(renamed, tmp_path):
    folder = write_run(tmp_path / 'here', 'c', 0, 30)
    (folder / 'a.pth').write_text('weights')
    file = folder / 'report' / 'record.json'
    record = json.loads(file.read_text())
    record['test']['key'] = dict(checkpoint=identity(str(folder / 'a.pth')))
    if not renamed:
        record['test']['checkpoint'] = str(tmp_path / 'there' / 'a.pth')
    file.write_text(json.dumps(record))
    there = tmp_path / 'there'
    folder.rename(there) if renamed else there.symlink_to(folder)
    assert tool.read_run(there).scores['mIoU'] == 30
    (there / 'a.pth').write_text('others')
    with pytest.raises(UserError, match='the scores are of '):
        tool.read_run(there)


@pytest.mark.parametrize(
    'command',
    [
        'python -m mmcls_involution test {}',
        "D='a b/test' python -m torch.distributed.run -m mmcls_involution test {}",
        'python tools/test.py {}',
        'PORT=1 tools/dist_test.sh {}',
    ],
)
@pytest.mark.parametrize('config', ['a-r50_v1.5', 'a-r50_v1.5.py', 'b/a-r50_v1.5.py'])
def test_the_config_of_a_command(command, config, tmp_path):
    """Of this package's configs a name will do."""
    folder = write_run(tmp_path, 'c', 0, 30)
    record = folder / 'report' / 'record.json'
    changed = json.loads(record.read_text())
    changed['test']['command'] = command.format(config) + ' test.py --work-dir test'
    record.write_text(json.dumps(changed))
    assert tool.read_run(folder).name == 'a-r50_v1.5'
    changed['test']['command'] = 'python'
    record.write_text(json.dumps(changed))
    with pytest.raises(UserError, match='has no training that is finished'):
        tool.read_run(folder)


def test_curves_are_those_of_the_logs(runs):
    configs = tool.group([tool.read_run(folder) for folder in runs])
    assert [[run.seed for run in group] for group in configs.values()] == [
        [0, 1, 2],
        [0, 1],
    ]
    log = configs['quick'][1].log
    assert [(line['step'], line['loss']) for line in log.train][:2] == [
        (10, 4.4),
        (20, 2.2),
    ]
    assert [(line['x'], line['mIoU']) for line in log.val] == [(20, 39.0)]


def test_band_spans_the_points_that_all_have():
    axis = tool.plt.figure().subplots()
    curves = [[(1, 2.0), (2, 4.0), (3, 1.0)], [(1, 4.0), (2, 8.0)]]
    tool.draw_band(axis, curves, 'C0', 'a')
    assert axis.lines[0].get_xydata().tolist() == [[1, 3], [2, 6]]
    corners = axis.collections[0].get_paths()[0].vertices.tolist()
    assert {(1, 2), (1, 4), (2, 4), (2, 8)} == {tuple(corner) for corner in corners}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(seed=0), 'have the same seed, 0'),
        (dict(model='other'), 'with different settings'),
        (dict(processes=1), 'with different settings'),
    ],
)
def test_what_are_no_repetitions_is_refused(
    runs, change, message, monkeypatch, tmp_path
):
    arguments = dict(config='slow', seed=3, score=30.0) | change
    runs.append(write_run(tmp_path / 'one more', **arguments))
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, *runs, '--out', tmp_path / 'a.png')
    assert not (tmp_path / 'a.png').exists()


@pytest.mark.parametrize(
    ('part', 'key', 'value', 'message'),
    [
        ('train', 'changed', ['model'], 'model of the config was changed'),
        ('train', 'finished', None, 'no training that is finished'),
        ('test', 'checkpoint', '/else/a.pth', 'the scores are of /else/a.pth, not of'),
    ],
)
def test_what_is_not_the_result_of_its_config_is_refused(
    runs, part, key, value, message, monkeypatch, tmp_path
):
    file = runs[0] / 'report' / 'record.json'
    record = json.loads(file.read_text())
    record[part][key] = value
    if value is None:
        del record[part][key]
    file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, *runs, '--out', tmp_path / 'a.png')


@pytest.mark.parametrize('missing', ['record', 'test', 'known scores'])
def test_what_is_missing_is_named(runs, missing, monkeypatch, tmp_path):
    file = runs[1] / 'report' / 'record.json'
    record = json.loads(file.read_text())
    if missing == 'test':
        del record['test']
    elif missing == 'record':
        file.unlink()
    if missing == 'known scores':
        record['test']['scores'] = dict(aAcc=1.0)
        message, arguments = 'None of the scores is known: aAcc', [runs[1]]
    else:
        message, arguments = f'{runs[1]} has no training that is finished', runs
    if file.exists():
        file.write_text(json.dumps(record))
    with pytest.raises(SystemExit, match=message):
        call(monkeypatch, *arguments, '--out', tmp_path / 'a.png')


# ----------------------------------------------------------------- compare_backbones.sh

SCRIPT = ROOT / 'tools' / 'analysis_tools' / 'compare_backbones.sh'


def run_script(
    tmp_path: Path, *arguments: str, **env: str
) -> subprocess.CompletedProcess:
    """Run it with a stand-in for python that prints each command on one line."""
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\nprintf "%s\\037" "$@"; echo\n')
    python.chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ['PATH']])
    command = ['bash', str(SCRIPT), *arguments]
    env = {**os.environ, 'PATH': path, **env}
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.mark.parametrize('data', ['bccd', 'camvid'])
def test_configs_are_compared_by_one_recipe(data, tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    from mmengine.registry import MODELS

    result = run_script(tmp_path, data)
    assert result.returncode == 0, result.stderr
    *calls, last = [line.split('\037')[:-1] for line in result.stdout.splitlines()]
    assert last[0].endswith('compare_seeds.py')
    compared = [Path(folder) for folder in last[1 : last.index('--out')]]
    tools, configs, flags = set(), set(), set()
    for call in calls:
        i, j = call.index('--seed'), call.index('--cfg-options')
        tools.add(call[0])
        configs.add(tuple(call[1:i]))
        flags.add(tuple(call[j:]))
    seeds = [call[call.index('--seed') + 1] for call in calls]
    assert seeds == ['0', '1', '2'] and tools == {'tools/reproduce.py'}
    (configs,) = configs
    assert compared == [  # the first config is what the others are compared with
        Path(f'work_dirs/{data}-short', seed, Path(config).stem)
        for config in configs
        for seed in seeds
    ]

    parser = argparse.ArgumentParser()
    add_cfg_options(parser)
    options = parser.parse_args([*flags.pop()]).cfg_options
    assert not flags
    recipes, swaps = [], []
    for config in configs:
        cfg = read_config(ROOT / config, options)
        MODELS.build(cfg.model)
        parts = cfg.model.pop('backbone'), cfg.model.pop('neck')
        swaps.append(tuple(part['type'] for part in parts))
        cfg.pop('custom_imports', None)  # ResNet needs none
        recipes.append(cfg.to_dict())
    assert recipes[0] == recipes[1] == recipes[2]
    assert swaps[0][0].startswith('ResNet')
    assert swaps[1:] == [('RedNet', 'FPN'), ('RedNet', 'InvolutionFPN')]


@pytest.mark.parametrize(
    ('arguments', 'env'),
    [
        ([], {}),
        (['coco'], {}),
        (['bccd'], dict(LENGTH='small')),
        (['bccd'], dict(START='imagenet')),
        (['bccd'], dict(START='in1k', LENGTH='short')),
    ],
)
def test_script_explains_itself(arguments, env, tmp_path):
    result = run_script(tmp_path, *arguments, **env)
    assert (result.returncode, result.stdout) == (2, '')
    assert result.stderr.startswith('usage: [START=scratch|in1k] [LENGTH=short|full]')


@pytest.mark.parametrize('data', ['bccd', 'camvid'])
def test_comparison_from_imagenet_weights(data, tmp_path):
    result = run_script(tmp_path, data, START='in1k', SEEDS='0 1')
    *calls, last = [line.split('\037')[:-1] for line in result.stdout.splitlines()]
    assert [call[-2:] for call in calls] == [
        ['--work-dir', f'work_dirs/{data}-in1k/{seed}'] for seed in '01'
    ]
    configs = calls[0][1 : calls[0].index('--seed')]
    assert [Path(config).is_file() for config in configs] == [True, True]
    resnet, rednet = (read_config(ROOT / config) for config in configs)
    assert resnet.model.backbone.init_cfg.checkpoint == 'torchvision://resnet50'
    assert rednet.model.backbone.init_cfg.checkpoint == 'paddleclas://RedNet50'
    assert last[0].endswith('compare_seeds.py') and len(last) == 1 + 4 + 2


def test_full_size_is_the_configs_as_they_stand(tmp_path):
    result = run_script(tmp_path, 'camvid', LENGTH='full', SEEDS='7')
    train, compare = result.stdout.splitlines()
    assert train.split('\037')[-5:-1] == [
        *('--seed', '7', '--work-dir', 'work_dirs/camvid-full/7')
    ]
    assert 'work_dirs/camvid-full/comparison.png' in compare
