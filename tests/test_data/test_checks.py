"""The command ``check`` as a whole."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from check_cases import CONFIGS, edit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize('task', ['detector', 'segmenter', 'classifier'])
def test_sound_data_of_a_whole_config(task, command, monkeypatch, request, capsys):
    root = dict(detector='coco_root', segmenter='seg_root', classifier='cls_root')
    monkeypatch.setenv('TINY_DATA', str(request.getfixturevalue(root[task])))
    assert command('check', ROOT / 'tests' / 'tiny' / f'{task}.py') == ''
    output = capsys.readouterr().out
    assert 'train_dataloader.dataset: 4 images' in output
    assert 'test_dataloader.dataset: the same as ' in output
    assert 'Findings: none' in output


def test_many_findings_in_processes(coco, tmp_path):
    """As the user runs it: the report is cut short, the file is complete."""

    def many(content):
        picture = (coco / '0.png').read_bytes()
        for i in range(40):
            if i >= 12:
                (coco / f'many_{i}.png').write_bytes(picture)
            entry = dict(content['images'][0], id=100 + i, file_name=f'many_{i}.png')
            content['images'].append(entry)

    edit(coco, many)
    out = tmp_path / 'all.txt'
    config = tmp_path / 'config.py'
    config.write_text(CONFIGS['detector'].replace('{root}', str(coco)))
    command = [
        sys.executable, ROOT / 'tools' / 'check_dataset.py', config,
        '--workers', '2', '--out', out,
    ]  # fmt: skip
    environment = dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    assert done.returncode == 1, done.stderr
    assert 'missing image: 12 (get it again' in done.stdout
    assert (
        len(re.findall(r'^    \S+many_\d+\.png: does not exist$', done.stdout, re.M))
        == 10
    )
    assert '    ... and 2 more' in done.stdout
    assert f'Findings: 12, listed in {out}' in done.stdout
    rows = [line.split('\t') for line in out.read_text().splitlines()]
    assert [Path(row[2]).name for row in rows] == [f'many_{i}.png' for i in range(12)]


@pytest.mark.parametrize(
    'flags, message',
    [
        (['--split', 'val'], 'has no data set in val_dataloader'),
        (['--out', 'no/such/file'], 'no/such does not exist: make it'),
        (
            ['--cfg-options', 'train_dataloader.dataset.type=CIFAR10'],
            'CIFAR10 reads its data in a way that the check does not know',
        ),
        (
            ['--cfg-options', 'train_dataloader.dataset.backend_args.backend=petrel'],
            'the check reads local files',
        ),
        (
            ['--cfg-options', 'train_dataloader.dataset.type=CustomDatset'],
            'Did you mean CustomDataset',
        ),
        (['--cfg-options', 'model=None'], "has no 'model'"),
    ],
)
def test_what_cannot_be_checked(command, tmp_path, cls, flags, message):
    config = tmp_path / 'config.py'
    config.write_text(CONFIGS['classifier'].replace('{root}', str(cls)))
    answer = command('check', config, *flags)
    assert answer.startswith('Error: ') and message in answer
