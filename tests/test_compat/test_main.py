"""``python -m mmcls_involution.compat SCRIPT``."""

from __future__ import annotations

import sys

import pytest

from mmcls_involution import compat
from mmcls_involution.compat.__main__ import main


@pytest.fixture
def run(monkeypatch):
    """Calls the command with arguments."""

    def call(*arguments: object) -> None:
        monkeypatch.setattr(sys, 'argv', ['compat', *map(str, arguments)])
        monkeypatch.setattr(sys, 'path', [*sys.path])
        main()

    return call


def test_script_runs_as_python_would_run_it(run, tmp_path, capsys):
    (tmp_path / 'beside.py').write_text('value = 5\n')
    script = tmp_path / 'script.py'
    script.write_text(
        'import sys\n'
        'from beside import value\n'
        'from mmcv.ops import nms\n'
        "print(__name__, value, sys.argv[1:], sys.argv[0].endswith('script.py'))\n"
    )
    run(script, '--flag', 'x y')
    assert capsys.readouterr().out == "__main__ 5 ['--flag', 'x y'] True\n"


def test_script_of_a_toolbox(run, tmp_path, capsys, monkeypatch):
    """Named as configs are in ``_base_``, by distribution or module."""
    folder = tmp_path / 'toolbox' / '.mim' / 'tools' / 'misc'
    folder.mkdir(parents=True)
    (tmp_path / 'toolbox' / '__init__.py').touch()
    (folder / 'hello.py').write_text("print('hello')\n")
    monkeypatch.syspath_prepend(tmp_path)
    run('toolbox::misc/hello.py')
    assert capsys.readouterr().out == 'hello\n'


def test_what_is_not_there_is_named(run, tmp_path):
    with pytest.raises(SystemExit, match='There is no script .*nothing.py'):
        run(tmp_path / 'nothing.py')
    with pytest.raises(SystemExit, match='no_such_package is not installed'):
        run('no_such_package::nothing.py')
    with pytest.raises(SystemExit, match='-m mmcls_involution.compat SCRIPT'):
        run()
    script = tmp_path / 'script.py'
    script.write_text('import no_such_module\n')
    with pytest.raises(SystemExit, match='pip install no_such_module'):
        run(script)


@pytest.mark.parametrize('flag', ['-h', '--help'])
def test_help_is_no_error(flag, run, capsys):
    run(flag)
    assert '-m mmcls_involution.compat SCRIPT' in capsys.readouterr().out


def test_versions_are_checked_first(run, tmp_path, monkeypatch):
    monkeypatch.setitem(compat.SUPPORTED, 'torch', ('0.1', '0.2'))
    with pytest.raises(ImportError, match='torch'):
        run(tmp_path / 'nothing.py')
