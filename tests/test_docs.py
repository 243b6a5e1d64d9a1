"""README and docs: links lead somewhere, examples run, commands take what they show.

What cannot run here, or would take minutes, stands in NOT_RUN and NOT_EXECUTED with the
reason; of those commands the files, targets and arguments are checked all the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mmcls_involution.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', ROOT / 'CHANGELOG.md']
PAGES += sorted(ROOT.glob('docs/*.md')) + sorted(ROOT.glob('configs/*/README.md'))
every_page = pytest.mark.parametrize(
    'page', PAGES, ids=lambda page: str(page.relative_to(ROOT))
)

# Beginnings of commands (regular expressions) -> why they are not run.
TRAINS = 'trains or tests a full model: test_engine and test_tools run small ones'
LONG = 'takes minutes: test_tools runs it small'
DATA = 'needs a data set that is downloaded: test_dataset_converters.py draws one'
PIP = 'installs: test_packaging.py and test_setup.py do'
NOT_RUN = {
    r'python (tools/(train|test)\.py|-m mmcls_involution (train|test))': TRAINS,
    r'(\w+=\S+ )*bash tools/(dist|slurm)\.sh': 'test_tools/test_dist.py',
    r'python tools/reproduce\.py': 'test_runs/test_reproduce.py',
    r'python tools/analysis_tools/make_start\.py': 'test_tools/test_make_start.py',
    r'python -m mmcls_involution compare': 'test_runs/test_compare.py',
    r'python tools/(infer|visualizations/vis_kernels)\.py': 'test_apis',
    r'python -m mmcls_involution (infer|kernels|web)': 'test_apis',
    r'python -m mmcls_involution export': 'test_deployment',
    r'python -m mmcls_involution publish': 'test_weights/test_publish.py',
    r'tensorboard --logdir': 'serves until it is stopped',
    r'python tools/model_converters/': 'test_weights/test_convert.py',
    r'python (tools/check_dataset\.py|-m mmcls_involution check)': 'test_data',
    r'python tools/(analysis_tools/benchmark_|analysis_tools/compile_kernels)': LONG,
    r"SEEDS='[\d ]+' bash tools/analysis_tools/compare_backbones\.sh": TRAINS,
    r'make (demo|test|setup|lint|bench-gpu)': LONG,
    r'python tools/dataset_converters/': DATA,
    r'python \$MMSEG/|MMSEG=|python -c "$': DATA,
    r'(cd|mkdir|git clone|unzip|for|curl|done) ?': DATA,
    r'python -m mmcls_involution\.compat': 'test_compat/test_main.py',
    r'pip (un)?install': PIP,
    r'(SHORT|LONG|SMALL|START|CONFIG)=|export (OMP|MALLOC)_': 'sets variables',
}
# Pages -> why their Python is compiled and not executed.
NOT_EXECUTED = {
    'docs/deployment.md': 'reads an exported file: test_deployment makes one',
    'configs/imagenet/README.md': 'test_configs/test_metafiles.py runs it',
    **{
        f'configs/{name}/README.md': 'reads the checkpoint of a full training'
        for name in 'ablations bccd bccd_cells camvid cityscapes coco'.split()
    },
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf'```{language}\n(.*?)```', page.read_text(), re.DOTALL)


def commands(page: Path) -> list[str]:
    """The commands in the shell blocks of a page, without comments."""
    lines = '\n'.join(blocks(page, 'sh')).replace('\\\n', ' ').splitlines()
    if 'python -c "' in lines:  # its program is no command
        begin = lines.index('python -c "')
        del lines[begin + 1 : lines.index('"') + 1]
    return [' '.join(re.sub(r'(^|\s)#.*', '', line).split()) for line in lines if line]


def slug(title: str) -> str:
    """What GitHub and MyST make of a heading."""
    return re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-')


@every_page
def test_links_lead_somewhere(page):
    for link in re.findall(r'(?:\]\(|<img src=")([^)"]+)[)"]', page.read_text()):
        if re.match('https?://', link):
            continue
        name, _, anchor = link.partition('#')
        target = page.parent / name if name else page
        assert target.exists(), f'{link}: no such file'
        # of a folder there is no page in the site
        assert target.is_file(), f'{link}: name the README.md in it'
        if anchor:
            titles = re.findall(r'^#+ (.*)$', target.read_text(), re.MULTILINE)
            assert anchor in map(slug, titles), f'{link}: no such heading'


def test_every_page_stands_in_the_table_of_contents():
    index = (ROOT / 'docs' / 'index.md').read_text()
    entries = re.findall(r'^[\w./\[\]*-]+$', index, re.MULTILINE)
    found = {file for entry in entries for file in (ROOT / 'docs').glob(f'{entry}.md')}
    left = {page.resolve() for page in PAGES} - {file.resolve() for file in found}
    assert left == {ROOT / 'README.md', ROOT / 'docs' / 'index.md'}


def test_readme_is_one_screen():
    assert len((ROOT / 'README.md').read_text().splitlines()) < 100


@every_page
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('your_config.py').write_text("default_scope = 'mmdet'\n")
    for block in blocks(page, 'python'):
        program = compile(block, str(page), 'exec')
        if str(page.relative_to(ROOT)) in NOT_EXECUTED:
            continue
        if '_base_ = ' in block:
            build(block)
            continue
        printed: list[str] = []
        exec(
            program, {'print': lambda *values, out=printed: out.append(f'{values[0]}')}
        )
        assert re.findall(r'\)  # (torch\.Size.*)', block) == [
            line
            for line, call in zip(printed, re.findall(r'print.*', block), strict=True)
            if '  # torch.Size' in call
        ]


def build(config: str) -> None:
    """Read a config, and build the model that it has."""
    pytest.importorskip('mmdet')
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    Path('config.py').write_text(config)
    cfg = Config.fromfile('config.py')
    init_default_scope(cfg.default_scope)
    if 'model' in cfg:
        assert type(MODELS.build(cfg.model).backbone).__name__ == 'RedNet'


def fronts() -> dict[str, str]:
    """Scripts in tools/ that stand for a command -> its name."""
    found = {}
    for file in (ROOT / 'tools').rglob('*.py'):
        if match := re.search(r"^    run\('(\w+)'\)$", file.read_text(), re.MULTILINE):
            found[str(file.relative_to(ROOT))] = match[1]
    return found


def check_command(command: str) -> None:
    """What a command names is there, and its parser takes the arguments."""
    for path in re.findall(r'\b(?:configs|tools|docs)/[\w./-]+\.\w+', command):
        assert (ROOT / path).is_file(), path
    if target := re.match(r'make ([a-z-]+)', command):
        makefile = (ROOT / 'Makefile').read_text()
        assert re.search(rf'^{target[1]}:', makefile, re.MULTILINE), command
    if command == 'python -c "':
        return
    # [--flag VALUE ...] of a synopsis is there; N is a number
    text = re.sub(r'\[flags of [^]]*\]|\.\.\.|[][]', ' ', command)
    text = re.sub(r'\$\w+', 'KEY=VALUE', text)
    words = ['2' if word == 'N' else word for word in shlex.split(text)]
    while words and re.match('[A-Z_]+=', words[0]):
        del words[0]
    if words[:2] == ['bash', 'tools/dist.sh'] and words[2:]:
        name, *arguments = words[2:]
        assert arguments.pop({'train': 1, 'test': 2}[name]).isdigit(), command
    elif words[:3] == ['python', '-m', 'mmcls_involution'] and words[3:]:
        name, *arguments = words[3:]
    elif words[:1] == ['python'] and words[1:2] and words[1] in (known := fronts()):
        name, arguments = known[words[1]], words[2:]
    else:
        return
    if not arguments or name == 'NAME':
        return  # named, not called
    assert name in COMMANDS, command
    parser = argparse.ArgumentParser(exit_on_error=False)
    import_module(f'mmcls_involution.{COMMANDS[name][0]}').add_arguments(parser)
    try:
        parser.parse_args(arguments)
    except (argparse.ArgumentError, SystemExit) as error:
        pytest.fail(f'{command}: {error}')


@every_page
def test_commands_name_what_exists_and_take_their_arguments(page):
    pytest.importorskip('mmengine')
    inline = re.findall(r'`((?:python|bash|make) [^`\n]+)`', page.read_text())
    for command in {*commands(page), *inline}:
        check_command(command)


def test_commands_run(monkeypatch):
    pytest.importorskip('mmpretrain')
    found = {command for page in PAGES for command in commands(page)}
    run = [c for c in found if not any(re.match(why, c) for why in NOT_RUN)]
    assert run, 'nothing is left that is run'
    for why in NOT_RUN:
        assert any(re.match(why, c) for c in found), f'{why}: no page has it any more'
    for command in run:
        python, option, module, *arguments = shlex.split(command)
        assert (python, option) == ('python', '-m'), command
        monkeypatch.setattr(sys, 'argv', [module, *arguments])
        try:
            runpy.run_module(module, run_name='__main__')
        except SystemExit as end:
            assert not end.code, command


@pytest.mark.long
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ('sphinx', 'myst_parser', 'furo'))),
    reason='the extra `docs` is not installed; `make docs` installs it',
)
def test_site_is_built_without_a_warning(tmp_path):
    options = ['-q', '-W', '-b', 'html', '-c', 'docs', '.']
    result = subprocess.run(
        [sys.executable, '-m', 'sphinx', *options, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert 'url=docs/index.html' in (tmp_path / 'index.html').read_text()
    operator = (tmp_path / 'docs' / 'operator.html').read_text()
    assert 'mmcls_involution.ops.involution2d' in operator and '<math' in operator
    for file in tmp_path.rglob('*.html'):  # nothing is loaded from the network
        loads = re.findall(
            r'<(?:script|link|img)[^>]+(?:src|href)="http', file.read_text()
        )
        assert not loads, file
        for picture in re.findall(r'<img[^>]+src="([^":]+)"', file.read_text()):
            assert (file.parent / picture).is_file(), f'{file}: {picture}'
