"""Reproducing: what is repeated, what is refused, and the page that is written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import cv2
import pytest

from mmcls_involution import __main__ as commands
from mmcls_involution.runs import reproduce as tool
from mmcls_involution.runs.logs import read_log

ROOT = Path(__file__).parents[2]
TINY = ROOT / 'tests' / 'tiny'
STEPS = ('train', 'test', 'examples')
NAME = 'mmcls_involution'


@pytest.fixture
def ran() -> list[list[str]]:
    """The commands that a call has run."""
    return []


@pytest.fixture
def reproduce(ran, command) -> Callable[..., str]:
    """Run the command ``reproduce``; see ``command``."""

    def run(*arguments: object) -> str:
        ran.clear()
        return command('reproduce', *arguments)

    return run


@pytest.fixture
def real_tools(ran, command, monkeypatch) -> None:
    """Let the tools run in this process, which saves their imports."""

    def call(name: str, words: list[str], *_: object, **__: object) -> None:
        ran.append(words)
        assert words[:4] == ['python', '-m', 'mmcls_involution', name]
        if message := command(*words[3:]):
            raise tool.StepError(message)

    monkeypatch.setattr(tool, 'call', call)
    # The layout of the configs that MMEngine writes: a third of the time of a tiny run.
    monkeypatch.setattr(
        import_module('mmengine.config.config'),
        'FormatCode',
        lambda text, **_: (text, 1),
    )


@pytest.fixture
def quick_tools(ran, monkeypatch) -> None:
    """In place of the tools, leave the files that they leave for the segmenter."""
    torch = pytest.importorskip('torch')

    def call(name: str, command: list[str], *_: object, **__: object) -> None:
        ran.append(command)
        options = dict(part.split('=', 1) for part in command if '=' in part)
        if name == 'train':
            last = int(options.get('train_cfg.max_iters', 2))
            for i in range(1, last + 1):
                file = Path(command[command.index('--work-dir') + 1], f'iter_{i}.pth')
                torch.save(dict(meta=dict(iter=i, seed=0), state_dict={}), file)
                os.utime(file, (i, i))  # lest two be of the same moment
        elif '--out' in command:
            scores = {'mIoU': 50.0, 'aAcc': 60.0}
            if 'mDice' in options.get('test_evaluator.iou_metrics', ''):
                scores['mDice'] = 70.0
            out = Path(command[command.index('--out') + 1])
            out.write_text(json.dumps(scores))

    monkeypatch.setattr(tool, 'call', call)


@pytest.fixture(scope='module')
def flat(seg_root) -> str:
    """tests/tiny/segmenter.py without its bases, which are slow to find."""
    pytest.importorskip('mmseg')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('TINY_DATA', str(seg_root))
        cfg = import_module('mmengine').Config.fromfile(TINY / 'segmenter.py')
    return '\n'.join(f'{key} = {value!r}' for key, value in cfg.items())


@pytest.fixture
def segmenter(flat, tmp_path) -> Path:
    file = tmp_path / 'segmenter.py'
    file.write_text(flat)
    return file


def steps(ran: list[list[str]]) -> list[str]:
    """Which steps a call has done anew."""
    return [
        'examples' if '--show-dir' in command else command[command.index(NAME) + 1]
        for command in ran
    ]


class Structure(HTMLParser):
    """Checks that tags close in order, and collects what a page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value for key, value in attrs if key in ('src', 'href')]
        if tag not in ('meta', 'img'):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ------------------------------------------------------------------------- whole calls


@pytest.mark.parametrize(
    ('task', 'library', 'data', 'score'),
    [
        ('detector', 'mmdet', 'coco_root', 'box AP'),
        ('segmenter', 'mmseg', 'seg_root', 'mIoU'),
        ('classifier', 'mmpretrain', 'cls_root', 'top-1'),
    ],
)
def test_report_of_a_training(
    task,
    library,
    data,
    score,
    reproduce,
    real_tools,
    ran,
    monkeypatch,
    request,
    tmp_path,
):
    pytest.importorskip(library)
    monkeypatch.setenv('TINY_DATA', str(request.getfixturevalue(data)))
    arguments = (TINY / f'{task}.py', '--work-dir', tmp_path, '--seed', 5)
    assert reproduce(*arguments) == ''
    assert tuple(steps(ran)) == STEPS
    assert 'randomness.seed=5' in ran[0]

    record = json.loads((tmp_path / 'report' / 'record.json').read_text())
    markdown = (tmp_path / 'report.md').read_text()
    html = (tmp_path / 'report.html').read_text()
    page = Structure(html)
    for text in (markdown, html):
        assert 'none: not in the paper' in text
        assert 'nothing to compare with' in text
        assert record['train']['revision'] in text
        assert record['test']['environment']['PyTorch'] in text
        assert record['test']['key']['checkpoint'] in text
    for step in STEPS:
        assert record[step]['command'] in markdown
    assert '- Seed: `5`' in markdown
    pictures = re.findall(r'!\[.*\]\((.*)\)', markdown)
    assert len(pictures) == 1 + 4, 'the curves, and each of the four test images'
    for picture in pictures:
        assert cv2.imread(str(tmp_path / picture)) is not None
    assert len(page.sources) == len(pictures)
    assert all(source.startswith('data:image/') for source in page.sources)

    # What the page says is what MMEngine's own log of the test says.
    (first, *_) = sorted((tmp_path / 'report' / 'test').glob('*/*.json'))
    logged = json.loads(first.read_text())
    assert record['test']['scores'].items() <= logged.items()
    key = {'box AP': 'coco/bbox_mAP', 'mIoU': 'mIoU', 'top-1': 'accuracy/top1'}[score]
    ours = re.search(rf'\| {score} \|.*?\|.*?\| ([\d.]+) \|', markdown)[1]
    scale = 100 if score == 'box AP' else 1
    assert float(ours) == pytest.approx(scale * logged[key], abs=0.05)
    log = read_log(tmp_path, by_epoch=task != 'segmenter')
    assert [line['step'] for line in log.train] == [1, 2]
    (line,) = log.val
    assert line['x'] == (2 if task == 'segmenter' else 1) and key in line


def test_resumed_training_has_one_log(
    segmenter, reproduce, real_tools, ran, monkeypatch, tmp_path
):
    work = tmp_path / 'work'
    options = ['--cfg-options', 'train_cfg.max_iters=4']
    arguments = [str(segmenter), '--work-dir', str(work), *options]
    monkeypatch.setattr(sys, 'argv', ['reproduce', *arguments])
    (job,) = tool.prepare(commands.parse(tool))
    with tool.lock(job) as descriptor:
        tool.train(job, None, descriptor)
    # As if it had been killed in the fourth iteration, its last checkpoint at 2.
    for name in ('iter_3.pth', 'iter_4.pth', 'last_checkpoint'):
        (work / name).unlink()
    (file,) = work.glob('*/vis_data/scalars.json')
    lines = file.read_text().splitlines()
    file.write_text('\n'.join(lines[:4]) + lines[4][:9])
    time.sleep(1)  # MMEngine names the logs' folder by the second
    assert reproduce(*arguments) == ''
    assert tuple(steps(ran)) == STEPS
    log = read_log(work, by_epoch=False)
    assert len(log.runs) == 2
    assert [line['step'] for line in log.train] == [1, 2, 3, 4]
    assert [line['x'] for line in log.val] == [2, 4]
    again = json.loads(
        sorted(work.glob('*/vis_data/scalars.json'))[1].read_text().splitlines()[0]
    )
    assert log.train[2] == again


# -------------------------------------------------------------------- what is repeated


def test_only_what_is_out_of_date_is_repeated(
    segmenter, reproduce, quick_tools, ran, tmp_path
):
    work = tmp_path / 'work'
    arguments = [segmenter, '--work-dir', work]
    assert reproduce(*arguments) == ''
    assert tuple(steps(ran)) == STEPS
    before = (work / 'report.md').read_text()
    (work / 'report.md').unlink()
    assert reproduce(*arguments) == ''
    assert ran == []
    after = (work / 'report.md').read_text()
    assert [line for line in before.splitlines() if not line.startswith('Written')] == [
        line for line in after.splitlines() if not line.startswith('Written')
    ]

    # Loading with more workers is the same test; another evaluator is not.
    options = ['--cfg-options', 'test_dataloader.num_workers=1']
    assert reproduce(*arguments, *options) == ''
    assert ran == []
    options = ['--cfg-options', 'test_evaluator.iou_metrics=mIoU,mDice']
    assert reproduce(*arguments, *options) == ''
    assert steps(ran) == ['test', 'examples']
    assert '- mDice: 70.0' in (work / 'report.md').read_text()

    # The earlier of the two checkpoints, then the training as it was.
    given = ['--checkpoint', work / 'iter_1.pth']
    assert reproduce(*arguments, *given) == ''
    assert steps(ran) == ['test', 'examples']
    assert 'iteration 1`' in (work / 'report.md').read_text()
    assert reproduce(*arguments) == ''
    assert steps(ran) == ['test', 'examples']

    # A longer training goes on from where the finished one ended.
    options = ['--cfg-options', 'train_cfg.max_iters=4']
    assert reproduce(*arguments, *options) == ''
    assert tuple(steps(ran)) == STEPS and '--resume' in ran[0]
    page = (work / 'report.md').read_text()
    assert 'iteration 4`' in page
    assert 'changed after the training had started: train_cfg' in page

    message = reproduce(*arguments, '--seed', 7)
    assert 'was trained with seed 0. Give another --work-dir' in message
    assert ran == []


def test_a_training_that_ends_early_is_finished(
    segmenter, reproduce, quick_tools, ran, tmp_path
):
    arguments = [segmenter, '--work-dir', tmp_path / 'work']
    options = ['--cfg-options', 'train_cfg.max_iters=3']
    assert reproduce(*arguments, *options) == ''
    for name in ('iter_3.pth', 'iter_2.pth'):  # as if it had stopped at 1 by itself
        (tmp_path / 'work' / name).unlink()
    record = tmp_path / 'work' / 'report' / 'record.json'
    text = record.read_text()
    record.write_text(text.replace('"iter_3.pth"', '"iter_1.pth"'))
    assert reproduce(*arguments, *options) == ''
    assert steps(ran) == ['test', 'examples']
    record.write_text(text)  # no word of that: it was cut short
    assert reproduce(*arguments, *options) == ''
    assert steps(ran)[0] == 'train'


def test_several_processes(segmenter, reproduce, quick_tools, ran, tmp_path):
    assert reproduce(segmenter, '--work-dir', tmp_path / 'work', '--gpus', 2) == ''
    two = ['-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port=29500']
    assert [command[1 : command.index(NAME)] for command in ran] == [
        *([*two, '-m'], [*two, '-m'], ['-m'])
    ]
    launched = [command[-2:] == ['--launcher', 'pytorch'] for command in ran]
    assert steps(ran) == list(STEPS) and launched == [True, True, False]


# ----------------------------------------------------------------------------- failures


def test_a_failing_config_does_not_stop_the_others(
    segmenter, reproduce, quick_tools, ran, monkeypatch, tmp_path
):
    text = segmenter.read_text()
    configs = {name: tmp_path / f'{name}.py' for name in ('no_data', 'crash')}
    configs['no_data'].write_text(
        text + "\ntrain_dataloader['dataset']['data_root'] = 'x/'"
    )
    configs['crash'].write_text(text)
    succeed = tool.call

    def call(name: str, command: list[str], *arguments: object, **kw: object) -> None:
        succeed(name, command, *arguments, **kw)
        if 'crash.py' in command[4] and name == 'test':
            raise tool.StepError('test: does not fit the model')

    monkeypatch.setattr(tool, 'call', call)
    work = tmp_path / 'work'
    message = reproduce(*configs.values(), segmenter, '--work-dir', work)
    assert re.fullmatch(
        'Error: no_data: .*data_root: x does not exist .*\n'
        'Error: crash: test: does not fit the model',
        message,
    )
    assert steps(ran) == ['train', 'test', *STEPS]
    for suffix in ('md', 'html'):
        table = (work / f'report.{suffix}').read_text()
        for name in (*configs, 'segmenter'):
            assert f'{name}/report.{suffix}' in table
        assert 'does not exist' in table and 'does not fit the model' in table
    rows = (work / 'report.md').read_text().splitlines()
    verdicts = [row.split('|')[-2].strip() for row in rows if row.startswith('| [')]
    assert verdicts == ['failed', 'failed', 'nothing to compare with']
    for name in configs:
        assert '**Failed' in (work / name / 'report.md').read_text()
        Structure((work / name / 'report.html').read_text())
    assert '**Failed' not in (work / 'segmenter' / 'report.md').read_text()
    Structure((work / 'report.html').read_text())


@pytest.mark.parametrize(
    ('arguments', 'expected'),
    [
        (['segmentr.py'], 'Config not found: .*segmentr.py. Did you mean .*segmenter'),
        (['segmenter.py', 'segmenter.py'], 'would both work in'),
        (['segmenter.py', '--checkpoint', 'a.pth', 'b.pth'], '2 files for 1 config'),
        (['segmenter.py', '--checkpoint', 'a.pth'], '--checkpoint: a.pth does not exi'),
        (['segmenter.py', '--cfg-options', 'max_iters'], 'expected KEY=VALUE'),
        (['segmenter.py', '--cfg-options', 'optim_wraper.a=1'], "no 'optim_wraper'"),
        (['segmenter.py', '--gpus', '0'], '--gpus 0'),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    arguments, expected, segmenter, reproduce, quick_tools, ran, tmp_path
):
    arguments = [
        segmenter.with_name(part) if part.endswith('.py') else part
        for part in arguments
    ]
    message = reproduce('--work-dir', tmp_path / 'work', *arguments)
    assert message.startswith('Error: ') and re.search(expected, message)
    assert ran == [] and not (tmp_path / 'work').exists()


def test_two_calls_do_not_share_a_work_dir(
    segmenter, reproduce, quick_tools, ran, monkeypatch, tmp_path
):
    arguments = [str(segmenter), '--work-dir', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', ['reproduce', *arguments])
    (job,) = tool.prepare(commands.parse(tool))
    # A training whose parent was killed keeps the lock that it inherited.
    with tool.lock(job) as descriptor:
        child = subprocess.Popen(
            [sys.executable, '-c', 'input()'],
            stdin=subprocess.PIPE,
            pass_fds=[descriptor],
        )
    try:
        message = reproduce(*arguments)
        assert f'{tmp_path} is in use' in message
        assert ran == [] and not (tmp_path / 'report.md').exists()
    finally:
        child.communicate(b'\n')
    assert reproduce(*arguments) == ''


# -------------------------------------------------------------------------------- parts


def test_tools_run_as_processes_of_this_python(tmp_path, capfd):
    script = tmp_path / 'script.py'
    script.write_text(
        'import os, sys\n'
        "print('one'); os.fstat(int(sys.argv[1])); print(sys.executable)\n"
        "print('Error: no space left,\\nthat is all'); sys.exit(len(sys.argv) > 2)\n"
    )
    with (tmp_path / 'lock').open('w') as lock:
        descriptor = lock.fileno()
        command = ['python', str(script), str(descriptor)]
        lines = []
        tool.call('train', command, descriptor, lines.append)
        assert lines[:2] == ['one\n', f'{sys.executable}\n']
        with pytest.raises(tool.StepError) as failure:
            tool.call('train', [*command, 'fail'], descriptor, lines.append)
    assert str(failure.value) == 'train: no space left,\nthat is all'
    assert capfd.readouterr().out == ''


def test_weights_to_start_from_are_on_record(tmp_path, monkeypatch):
    """By content: their place may change between two calls."""
    pytest.importorskip('mmdet')
    config = ROOT / 'configs' / 'coco' / 'faster-rcnn_rednet50_fpn_1x_coco.py'
    files = [tmp_path / 'a b.pth', tmp_path / 'c.pth']
    jobs = []
    for file in files:
        file.write_bytes(b'weights')
        monkeypatch.setenv('REDNET50', str(file))
        cfg = import_module('mmengine').Config.fromfile(config)
        jobs.append(tool.Job(config, [], tmp_path, cfg))
        command = tool.provenance(jobs[-1], ['python', 'x'])['command']
        assert f'REDNET50={"" if file is files[1] else chr(39)}{file}' in command
        assert command.endswith(' python x')
    digest = hashlib.sha256(b'weights').hexdigest()
    assert [tool.pretrained(job.cfg) for job in jobs] == 2 * [
        {'model.backbone.init_cfg.checkpoint': f'sha256 {digest}'}
    ]
    for keys in (tool.TRAINING, tool.TESTING):
        assert tool.digests(jobs[0].cfg, keys) == tool.digests(jobs[1].cfg, keys)
    # A resumed training has started from what the first call has found.
    monkeypatch.setattr(tool, 'call', lambda *_: (tmp_path / 'epoch_1.pth').touch())
    monkeypatch.setattr(
        tool, 'latest_checkpoint', lambda folder, cfg: folder / 'epoch_1.pth'
    )
    job = jobs[0]
    tool.train(job, None, 0)
    assert job.record['train']['weights'] == tool.pretrained(job.cfg)
    files[0].write_bytes(b'others')
    tool.train(job, str(tmp_path / 'epoch_1.pth'), 0)
    assert list(job.record['train']['weights'].values()) == [f'sha256 {digest}']
    jobs[1].cfg.model.backbone.init_cfg = None
    assert tool.pretrained(jobs[1].cfg) == {}
    assert tool.digests(jobs[0].cfg, keys) != tool.digests(jobs[1].cfg, keys)


def test_recipe_wherever_data_and_weights_lie():
    from mmengine.config import Config

    def cfg(root: str = '/a', file: str = 'ann.json', start: str = 'a.pth') -> Config:
        data = dict(type='CocoDataset', data_root=root, ann_file=file)
        data = dict(dataset=dict(type='RepeatDataset', dataset=data), num_workers=2)
        return Config(dict(model={}, train_dataloader=data, load_from=start))

    def recipe(sha: str = '1', **options: str) -> dict[str, str]:
        return tool.digests(cfg(**options), tool.TRAINING, dict(load_from=sha))

    assert recipe() == recipe(root='/b', start='b.pth')
    assert recipe() != recipe(file='other.json') and recipe() != recipe('2')
    # not identified: the path must do
    a, b = (tool.digests(cfg(start=s), tool.TRAINING, {}) for s in ('a', 'b'))
    assert a != b
    plain = [tool.digests(cfg(root=root), tool.TRAINING) for root in ('/a', '/b')]
    assert plain[0] != plain[1]
    assert tool.data_roots(cfg()) == ['/a']


def test_batch_of_another_recipe_is_named_before_training(tmp_path, monkeypatch):
    pytest.importorskip('mmdet')
    config = ROOT / 'configs' / 'coco' / 'faster-rcnn_rednet50_fpn_1x_coco.py'
    cfg = import_module('mmengine').Config.fromfile(config)
    cfg.model.backbone.init_cfg = None

    class Started(Exception):
        pass

    def call(*_: object) -> None:
        raise Started

    monkeypatch.setattr(tool, 'call', call)
    printed: list[str] = []
    monkeypatch.setattr('builtins.print', lambda *texts, **_: printed.extend(texts))
    for gpus, notes in ((8, 0), (4, 1)):
        printed.clear()
        with pytest.raises(Started):
            tool.train(tool.Job(config, [], tmp_path, cfg, gpus=gpus), None, 0)
        assert (
            len([text for text in printed if 'the recipe is for 16' in text]) == notes
        )
