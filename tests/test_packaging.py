"""What an installation brings, what it asks for, and what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, version
from importlib.metadata import metadata as installed
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmcls_involution import __version__, compat

ROOT = Path(__file__).resolve().parents[1]
PARTS = ['mmcls_involution', 'configs', 'tools']
FILES = ['setup.py', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md']
FILES += ['model-index.yml']


KERNELS = 'mmcls_involution/ops/backends/native/_kernels.abi3.so'
NO_COMPILER = {'CC': 'false', 'CXX': 'false'}
# Needs the metafiles, the config and what that inherits.
GET_MODEL = (
    'import mmcls_involution.models\n'
    'from mmpretrain import get_model\n'
    "model = get_model('rednet26_64xb32-warmup-coslr_in1k')\n"
    'print(model.backbone.depth, model._config.filename)'
)


def python(*arguments: str | Path, cwd: Path, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    """A copy of the sources, so that nothing is built inside the repository."""
    folder = tmp_path_factory.mktemp('clone')
    for part in PARTS:
        if (ROOT / part).exists():
            shutil.copytree(
                ROOT / part,
                folder / part,
                ignore=shutil.ignore_patterns('__pycache__', '.mim', '*.so'),
            )
    for file in FILES:
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, folder)
    return folder


@pytest.fixture(scope='module')
def wheel(clone, tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp('wheel')
    # what an old build left must not come along
    left = clone / 'build' / 'lib' / 'mmcls_involution' / '.mim' / 'configs' / 'old.py'
    left.parent.mkdir(parents=True)
    left.touch()
    options = ['--no-deps', '--no-build-isolation', '--no-index', '--quiet']
    # The kernels that all other tests run were optimized, which takes long.
    compiler = tmp_path_factory.mktemp('compiler') / 'g++'
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    env = dict(CC=str(compiler), CXX=str(compiler))
    python('-m', 'pip', 'wheel', *options, '-w', out, '.', cwd=clone, **env)
    (file,) = out.iterdir()
    # the kernels link neither torch nor one version of Python
    assert file.name.startswith(f'mmcls_involution-{__version__}-cp310-abi3-')
    return zipfile.ZipFile(file)


@pytest.fixture(scope='module')
def metadata(wheel):
    name = f'mmcls_involution-{__version__}.dist-info/METADATA'
    return Parser().parsestr(wheel.read(name).decode())


def test_wheel_holds_every_module_config_and_tool(wheel, clone):
    names = set(wheel.namelist())
    expected = {
        str(file.relative_to(clone)) for file in clone.glob('mmcls_involution/**/*.py')
    }
    expected.add('mmcls_involution/.mim/model-index.yml')
    for part in ('configs', 'tools'):
        expected |= {
            f'mmcls_involution/.mim/{file.relative_to(clone)}'
            for file in clone.glob(f'{part}/**/*')
            if file.is_file() and '__pycache__' not in file.parts
        }
    packaged = {name for name in names if '.dist-info/' not in name}
    assert packaged - {KERNELS} == expected
    assert 'mmcls_involution/.mim/tools/train.py' in packaged
    for file in ('metafile.yml', 'README.md'):
        assert f'mmcls_involution/.mim/configs/imagenet/{file}' in packaged


def test_models_and_configs_of_a_wheel_go_by_name(wheel, tmp_path):
    site, name = tmp_path / 'site', 'rednet26_1xb32_bccd-cells'
    wheel.extractall(site)
    mine = (
        "_base_ = 'mmcls_involution::bccd_cells/{}.py'\nmodel = dict(head=dict(k=7))\n"
    )
    (tmp_path / 'mine.py').write_text(mine.format(name))
    read = (
        '\nfrom mmcls_involution.engine.config import read_config\n'
        f"for name in ('{name}', 'mine.py'):\n"
        '    cfg = read_config(name)\n'
        '    print(cfg.model.head.get("k"), cfg.filename)'
    )
    out = python('-c', GET_MODEL + read, cwd=tmp_path, PYTHONPATH=str(site))
    model, shipped, inherited = (line.split() for line in out.splitlines()[-3:])
    configs = site / 'mmcls_involution' / '.mim' / 'configs'
    assert model[0] == '26' and Path(model[1]).is_relative_to(configs)
    assert shipped == ['None', str(configs / 'bccd_cells' / f'{name}.py')]
    assert inherited == ['7', 'mine.py']


@pytest.mark.skipif(
    shutil.which('g++') is None, reason='g++, which builds the kernels, is missing'
)
def test_wheel_holds_kernels_that_need_no_torch(wheel, tmp_path):
    library = wheel.extract(KERNELS, tmp_path)
    program = (
        'import ctypes, sys\n'
        f'library = ctypes.CDLL({library!r})\n'
        'name = library.involution_instruction_set\n'
        'name.restype = ctypes.c_char_p\n'
        'print(name().decode(), "torch" in sys.modules)'
    )
    name, torch = python('-c', program, cwd=tmp_path).split()
    assert name in ('avx512', 'avx2', 'baseline') and torch == 'False'


def test_source_distribution_installs_without_a_compiler(wheel, clone, tmp_path):
    program = (
        'import sys; from setuptools import build_meta; '
        'build_meta.build_sdist(sys.argv[1])'
    )
    python('-c', program, tmp_path, cwd=clone)
    (file,) = tmp_path.glob('*.tar.gz')
    shutil.unpack_archive(file, tmp_path)
    program = program.replace('sdist', 'wheel')
    folder = tmp_path / file.name.removesuffix('.tar.gz')
    names = {str(path.relative_to(folder)) for path in folder.glob('**/*')}
    sources = clone / 'mmcls_involution' / 'ops' / 'backends' / 'native'
    assert names >= {str(path.relative_to(clone)) for path in sources.iterdir()}
    python('-c', program, tmp_path, cwd=folder, **NO_COMPILER)
    (file,) = tmp_path.glob('*.whl')
    assert set(zipfile.ZipFile(file).namelist()) == set(wheel.namelist()) - {KERNELS}

    program = (
        'import torch\n'
        'from mmcls_involution.ops import Involution2d\n'
        'layer = Involution2d(16)\n'
        'for _ in range(2):\n'
        '    print(layer(torch.ones(1, 16, 5, 7)).shape)'
    )
    shutil.unpack_archive(file, tmp_path / 'site', 'zip')
    result = subprocess.run(
        [sys.executable, '-c', program],
        cwd=tmp_path,
        env={**os.environ, 'PYTHONPATH': str(tmp_path / 'site')},
        capture_output=True,
        text=True,
    )
    assert result.stdout.count('torch.Size([1, 16, 5, 7])') == 2
    assert result.stderr.count('kernels of involution are not in use') == 1


def test_license_field_classifier_and_file_agree(wheel, metadata):
    assert metadata.get('License-Expression', metadata['License']) == 'Apache-2.0'
    licenses = [c for c in metadata.get_all('Classifier') if c.startswith('License')]
    assert licenses == ['License :: OSI Approved :: Apache Software License']
    (file,) = [name for name in wheel.namelist() if name.endswith('/LICENSE')]
    assert 'Apache License' in wheel.read(file).decode()


def requirements(metadata, extra: str = '') -> dict[str, SpecifierSet]:
    """What an extra asks for on Linux; without a name, what a plain install does."""
    environment = {'extra': extra, 'sys_platform': 'linux'}
    return {
        requirement.name: requirement.specifier
        for requirement in map(Requirement, metadata.get_all('Requires-Dist'))
        if ('extra' in str(requirement.marker)) == bool(extra)
        and (requirement.marker is None or requirement.marker.evaluate(environment))
    }


def test_plain_install_requires_torch_of_any_version_only(metadata):
    assert requirements(metadata) == {'torch': SpecifierSet()}
    extras = set(metadata.get_all('Provides-Extra'))
    assert extras == {'det', 'seg', 'cls', 'all', 'demo', 'deploy', 'dev', 'docs'}


def test_extras_ask_for_the_supported_ranges(metadata):
    supported = {
        name: SpecifierSet(f'>={lowest},<{highest}')
        for name, (lowest, highest) in compat.SUPPORTED.items()
    }
    everything = requirements(metadata, 'all')
    lite = everything['mmcv-lite']
    assert '2.1.0' in lite and '2.2.0' not in lite and '2.0.0' not in lite
    for name in ('mmengine', 'mmdet', 'mmsegmentation', 'mmpretrain'):
        assert everything[name] == supported[name]


def test_extras_of_toolboxes_leave_mmcv_and_torchvision_alone(metadata):
    """Which are right depends on what is there; only `all` brings them."""
    parts = {}
    for extra in ('det', 'seg', 'cls'):
        parts |= requirements(metadata, extra)
    assert not {'mmcv', 'mmcv-lite', 'torchvision'} & set(parts)
    everything = requirements(metadata, 'all')
    assert set(everything) - set(parts) == {'mmcv-lite', 'torchvision'}
    assert {name: everything[name] for name in parts} == parts


def read_tested_txt() -> list[Requirement]:
    lines = (ROOT / 'requirements' / 'tested.txt').read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


def test_tested_versions_lie_in_the_supported_ranges():
    tested = {}
    for requirement in read_tested_txt():
        assert requirement.name not in tested, f'{requirement.name} stands twice'
        tested[requirement.name] = requirement.specifier
    makefile = (ROOT / 'Makefile').read_text()
    (torch,) = re.findall(r'^TORCH \?= (.*)$', makefile, re.MULTILINE)
    tested |= {'torch': Requirement(torch).specifier, 'mmcv': tested['mmcv-lite']}
    for name, (lowest, highest) in compat.SUPPORTED.items():
        (pin,) = tested[name]
        assert pin.operator == '=='
        assert Version(lowest) <= Version(pin.version) < Version(highest), name


def test_the_tested_versions_are_for_each_supported_python():
    """A pin that the oldest Python cannot have would end its set-up."""
    checked = []
    for requirement in read_tested_txt():
        if requirement.marker or '==' not in str(requirement.specifier):
            continue
        try:
            found = installed(requirement.name)
        except PackageNotFoundError:  # of an extra
            continue
        if requirement.specifier.contains(found['Version']):
            python = found.get('Requires-Python') or ''
            assert SpecifierSet(python).contains('3.10.0'), (
                f'{requirement} wants {python}'
            )
            checked.append(requirement.name)
    assert len(checked) > 10


def compiled_mmcv() -> bool:
    try:
        return bool(version('mmcv'))
    except PackageNotFoundError:
        return False


def test_install_leaves_this_environment_as_it_is(clone):
    """`pip install .[...]` finds all it needs at the versions that are here."""
    options = ['--dry-run', '--no-index', '--no-build-isolation', '--quiet']
    report = ['--report', clone / 'report.json']
    # `all` too, where mmcv-lite is the mmcv that is here
    extras = 'det,seg,cls' if compiled_mmcv() else 'all'
    requirement = f'.[{extras},dev]'
    python('-m', 'pip', 'install', *options, *report, requirement, cwd=clone)
    installs = json.loads((clone / 'report.json').read_text())['install']
    assert [item['metadata']['name'] for item in installs] == ['mmcls_involution']


@pytest.fixture
def editable(clone, tmp_path):
    """The folder that an editable install fills, and the links that it makes there."""
    program = (
        'import sys; from setuptools import build_meta; '
        'build_meta.build_editable(sys.argv[1])'
    )
    for _ in range(2):  # a second install replaces the links
        python('-c', program, tmp_path, cwd=clone, **NO_COMPILER)
    mim = clone / 'mmcls_involution' / '.mim'
    yield mim
    shutil.rmtree(mim)


def test_editable_install_links_what_mim_looks_for(editable, clone):
    for part in ('configs', 'tools', 'model-index.yml'):
        assert (editable / part).resolve() == clone / part


@pytest.mark.long  # as test_metafiles.py finds them in this environment
def test_models_of_an_editable_install_are_found_by_name(editable, clone, tmp_path):
    out = python('-c', GET_MODEL, cwd=tmp_path, PYTHONPATH=str(clone))
    depth, config = out.splitlines()[-1].split()
    assert depth == '26'
    assert Path(config).resolve().is_relative_to(clone / 'configs')


def test_import_is_light(tmp_path):
    program = (
        'import sys, mmcls_involution, mmcls_involution.compat\n'
        'print([m for m in ("torch", "mmengine", "mmcv", "mmdet", "mmseg", '
        '"mmpretrain") if m in sys.modules])'
    )
    assert python('-c', program, cwd=tmp_path).strip() == '[]'
