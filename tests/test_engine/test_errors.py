"""How an exception becomes one message."""

from __future__ import annotations

import errno
import re

import pytest
from mmengine.config import Config
from mmengine.registry import Registry

from mmcls_involution.compat.checkpoints import NoCheckpoint
from mmcls_involution.engine.errors import UserError, one_message_per_error
from mmcls_involution.weights.fit import Misfit

PARTS = Registry('part', scope='mmengine')


@PARTS.register_module()
class Leaf:
    def __init__(self, size: int = 1) -> None:
        if size < 0:
            raise ValueError('size must not be negative')


@PARTS.register_module()
class Branch:
    def __init__(self, leaf: dict, careful: bool = False) -> None:
        try:
            self.leaf = PARTS.build(leaf)
        except ValueError:
            if not careful:
                raise
            self.leaf = None


def message_of(error: Exception | dict | Config) -> str:
    """The message that an error, or what building a config raises, ends with."""
    with pytest.raises(SystemExit) as end, one_message_per_error():
        if isinstance(error, Exception):
            raise error
        PARTS.build(error)
    return str(end.value)


def test_the_innermost_part_is_named():
    wrong = dict(type='Branch', leaf=dict(type='Leaf', size=-1))
    assert re.fullmatch(
        r'Error: Cannot build Leaf from the config: ValueError: size must not be '
        r'negative \(.*test_errors.py:\d+\)',
        message_of(wrong),
    )
    wrong = dict(type='Branch', leaf=dict(type='Leave'))
    assert "No part is called 'Leave' in mmengine. Did you mean Leaf?" in message_of(
        wrong
    )
    wrong = dict(type='Branch', leaf=dict(type='Leaf', siz=1))
    assert message_of(wrong) == (
        "Error: Leaf has no argument 'siz'. Did you mean size? It takes size."
    )


def test_a_whole_config_is_explained_too():
    cfg = Config(dict(type='Leaf', size=-1))
    assert 'Cannot build Leaf from the config: ValueError' in message_of(cfg)


def test_a_config_that_is_passed_by_name_is_explained_too():
    with pytest.raises(SystemExit, match='Leaf.*ValueError: size must not be negat'):
        with one_message_per_error():
            PARTS.build(cfg=dict(type='Leaf', size=-1))


def test_those_who_catch_an_error_still_do():
    with one_message_per_error():
        branch = PARTS.build(
            dict(type='Branch', leaf=dict(type='Leaf', size=-1), careful=True)
        )
    assert branch.leaf is None


def test_upstream_is_as_before_afterwards():
    before = Registry.build
    with one_message_per_error():
        assert Registry.build is not before
    assert Registry.build is before


@pytest.mark.parametrize('kind', [UserError, Misfit, NoCheckpoint])
def test_what_the_user_can_put_right(kind):
    assert message_of(kind('the reason')) == 'Error: the reason'


def test_what_is_left_of_several_processes():
    error = '[/pytorch/third_party/gloo/x.cc:5] Connection closed. This is typically ..'
    message = message_of(RuntimeError(error))
    assert 'Another process of this run has ended' in message
    assert 'x.cc:5] Connection closed).' in message and '--resume' in message


@pytest.mark.parametrize('name', 'EROFS EDQUOT EISDIR ENOTDIR EEXIST'.split())
def test_a_place_that_cannot_be_written_to(name):
    error = OSError(getattr(errno, name), 'the reason', 'preds.pkl')
    assert message_of(error).endswith("] the reason: 'preds.pkl'")
    error.explanation = 'Cannot build A'  # what was being built says more
    assert message_of(error) == 'Error: Cannot build A'


def test_bugs_keep_their_traceback():
    with pytest.raises(ValueError, match='of ours'), one_message_per_error():
        raise ValueError('of ours')
