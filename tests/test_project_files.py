"""CI, pre-commit, issue templates and CITATION.cff agree with the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mmcls_involution import __version__, compat

yaml = pytest.importorskip('yaml')
ROOT = Path(__file__).parents[1]
GITHUB = ROOT / '.github'
TORCH = re.search(r'TORCH \?= torch==(.*)', (ROOT / 'Makefile').read_text())[1]


def read(file: Path) -> dict:
    return yaml.safe_load(file.read_text())


def test_workflow_tests_the_oldest_and_the_newest_versions():
    jobs = read(GITHUB / 'workflows' / 'ci.yml')['jobs']
    assert {'lint', 'test', 'docs', 'wheels'} <= set(jobs)
    matrix = jobs['test']['strategy']['matrix']['include']
    assert {entry['torch'] for entry in matrix} == {compat.SUPPORTED['torch'][0], TORCH}
    assert jobs['docs']['env']['TORCH'].startswith(f'torch=={TORCH} ')
    setup = (ROOT / 'setup.py').read_text()
    pythons = re.findall(r'Python :: (3\.\d+)', setup)
    assert [entry['python'] for entry in matrix] == [pythons[0], pythons[-1]]
    oldest = pythons[0].replace('.', '')
    assert f"'py_limited_api': 'cp{oldest}'" in setup
    assert f"build = 'cp{oldest}-manylinux" in (ROOT / 'pyproject.toml').read_text()


def test_workflow_calls_targets_that_exist():
    text = (GITHUB / 'workflows' / 'ci.yml').read_text()
    targets = set(re.findall(r'run: make (\S+)', text))
    assert targets == {'setup', 'test', 'docs'}
    makefile = (ROOT / 'Makefile').read_text()
    assert targets <= set(re.findall(r'^([a-z-]+):', makefile, re.MULTILINE))


def test_pre_commit_has_the_tested_ruff():
    (repo,) = read(ROOT / '.pre-commit-config.yaml')['repos']
    assert [hook['id'] for hook in repo['hooks']] == ['ruff-check', 'ruff-format']
    tested = (ROOT / 'requirements' / 'tested.txt').read_text()
    assert f'\nruff=={repo["rev"].removeprefix("v")}\n' in tested


def test_issue_templates_ask_for_the_doctor():
    templates = sorted(GITHUB.glob('ISSUE_TEMPLATE/*.yml'))
    assert [file.stem for file in templates] == ['bug', 'installation', 'question']
    for file in templates:
        fields = {field['id']: field for field in read(file)['body']}
        asked = fields['doctor']['attributes']['description']
        assert 'python -m mmcls_involution.doctor' in asked
        assert (file.stem == 'question') != ('validations' in fields['doctor'])


def test_citation_names_this_version_and_the_authors_of_the_paper():
    citation = read(ROOT / 'CITATION.cff')
    assert citation['version'] == __version__
    assert citation['license'] == 'Apache-2.0'
    paper = citation['preferred-citation']
    names = [f'{a["family-names"]}, {a["given-names"]}' for a in paper['authors']]
    bibtex = (ROOT / 'README.md').read_text()
    assert f'author    = {{{" and ".join(names)}}}' in bibtex
    assert f'title     = {{{paper["title"]}}}' in bibtex
