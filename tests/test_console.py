"""What is printed reaches the terminal as it is."""

from __future__ import annotations

import io

from rich.console import Console

from mmcls_involution import console as module


def test_names_that_look_like_markup(capsys, monkeypatch):
    monkeypatch.setattr(module.console, 'width', 140)  # whatever the terminal
    name = 'a[final]:dog:[/y].jpg'
    module.console.print(name)
    module.print_table(name, [{name: name}])
    assert capsys.readouterr().out.count(name) == 4


def test_name_beside_a_bar(monkeypatch):
    shown = io.StringIO()
    terminal = Console(file=shown, force_terminal=True, width=140)
    monkeypatch.setattr(module, 'console', terminal)
    assert [*module.progress([1, 2], 'a[final][/y].jpg')] == [1, 2]
    assert 'a[final][/y].jpg' in shown.getvalue()
