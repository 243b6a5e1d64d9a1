"""The arrow of imports, the table of commands, and the fronts in tools/."""

from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from mmcls_involution.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmcls_involution'
MODULES = [file for file in PACKAGE.rglob('*.py') if '.mim' not in file.parts]
LIBRARIES = {'mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'}
# What a part of the package must not import: names of libraries, or of other parts.
FORBIDDEN = {
    'ops': {
        *LIBRARIES,
        'deployment',
        'models',
        'weights',
        'data',
        'engine',
        'runs',
        'apis',
    },
    'models': {'data', 'engine', 'runs', 'weights', 'apis'},
    'weights': {'data', 'runs', 'apis'},
    'data': {'weights', 'runs', 'apis'},
    'engine': {'runs', 'apis'},
    'runs': {'data', 'apis'},
    'apis': {'runs', 'deployment'},
    'deployment': {'runs', 'data'},
}


def imported(file: Path) -> set[str]:
    """Absolute names of modules that a file imports, anywhere in it."""
    names = set()
    package = ['mmcls_involution', *file.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = '.'.join([*above, *filter(None, [node.module])])
            names |= {module, *(f'{module}.{alias.name}' for alias in node.names)}
    return names


@pytest.mark.parametrize('part', FORBIDDEN)
def test_arrow_of_imports(part):
    found = set()
    for file in MODULES:
        if file.relative_to(PACKAGE).parts[0] != part:
            continue
        for name in imported(file):
            first, *rest = name.split('.')
            other = rest[0] if first == 'mmcls_involution' and rest else first
            # torch alone: models may ask it
            allowed = name.startswith('mmcls_involution.weights.fit') or (
                # a scheme is registered when the models are
                (file.parent.name, file.name) == ('models', '__init__.py')
                and name.startswith('mmcls_involution.weights')
            )
            if other in FORBIDDEN[part] and not allowed:
                found.add((str(file.relative_to(PACKAGE)), name))
    assert found == set()


def test_fit_knows_torch_alone():
    names = {name.split('.')[0] for name in imported(PACKAGE / 'weights' / 'fit.py')}
    assert names <= {'__future__', 'collections', 'torch'}


def test_package_does_not_import_tools():
    tools = {file.stem for file in (ROOT / 'tools').rglob('*.py')}
    for file in MODULES:
        assert not {name.split('.')[0] for name in imported(file)} & tools, file
        # but for the command that runs other people's scripts, as Python would
        if file != PACKAGE / 'compat' / '__main__.py':
            assert 'sys.path' not in file.read_text(), file


def test_messages_name_no_script_of_the_checkout():
    found = set()
    for file in MODULES:
        tree = ast.parse(file.read_text())
        docstrings = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(getattr(node, 'body', None), list)
            and isinstance(node.body[0], ast.Expr)
        }
        found |= {
            (str(file.relative_to(PACKAGE)), node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
            # but for those that an installation of a toolbox has
            and re.search(r'(?<!\.mim/)\btools/\w|check_dataset', node.value)
        }
    assert found == set()


@pytest.mark.parametrize('name', sorted(set(COMMANDS) - {'doctor'}))
def test_every_command_keeps_the_contract(name):
    command = import_module(f'mmcls_involution.{COMMANDS[name][0]}')
    assert f'python -m mmcls_involution {name} ' in command.__doc__
    assert [*inspect.signature(command.add_arguments).parameters] == ['parser']
    assert [*inspect.signature(command.main).parameters] == ['args']


def test_fronts_name_commands():
    fronts = {}
    for file in (ROOT / 'tools').rglob('*.py'):
        if found := re.search(r"^    run\('(\w+)'\)$", file.read_text(), re.MULTILINE):
            fronts[str(file.relative_to(ROOT / 'tools'))] = found[1]
    assert fronts == {
        'train.py': 'train',
        'test.py': 'test',
        'reproduce.py': 'reproduce',
        'infer.py': 'infer',
        'deployment/export.py': 'export',
        'visualizations/vis_kernels.py': 'kernels',
        'check_dataset.py': 'check',
        'dataset_converters/check_dataset.py': 'check',  # its old place
        'analysis_tools/compare_seeds.py': 'compare',
        'analysis_tools/get_flops.py': 'flops',
        'model_converters/publish_model.py': 'publish',
        'model_converters/rednet_to_mmcls_involution.py': 'convert',
    }
    assert set(fronts.values()) <= set(COMMANDS)
