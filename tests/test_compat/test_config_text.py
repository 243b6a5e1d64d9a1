"""The text of a config is laid out once, and anew when the config has changed."""

from __future__ import annotations

import pytest

pytest.importorskip('mmengine')

from mmengine.config import Config
from mmengine.config import config as module

from mmcls_involution.compat.config_text import _remembering


def test_text_is_that_of_mmengine(monkeypatch):
    cfg, calls = Config(dict(a=1, b=dict(type='C', size=(2, 3)))), []
    stock = module.FormatCode.__wrapped__  # compat.apply() has run
    monkeypatch.setattr(module, 'FormatCode', stock)
    first = cfg.pretty_text
    cfg.b.size = (4, 5)
    second = cfg.pretty_text
    assert first != second

    def counting(*args, **kwargs):
        calls.append(args)
        return stock(*args, **kwargs)

    monkeypatch.setattr(module, 'FormatCode', _remembering(counting))
    assert cfg.pretty_text == cfg.pretty_text == second and len(calls) == 1
    cfg.b.size = (2, 3)
    assert cfg.pretty_text == first and len(calls) == 2
