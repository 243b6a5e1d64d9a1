"""The table of rules, and the checks that name them."""

from __future__ import annotations

import re
from pathlib import Path

from mmcls_involution import data
from mmcls_involution.data.rules import RULES, Finding, together

SOURCES = [file.read_text() for file in Path(data.__file__).parent.glob('*.py')]


def test_every_rule_is_looked_for_and_every_finding_has_one():
    named = {
        name for text in SOURCES for name in re.findall(r"Finding\(\s*'([^']+)'", text)
    }
    assert named == set(RULES)


def test_every_rule_says_what_to_do():
    for rule in RULES.values():
        assert rule.fix and not rule.fix.endswith('.'), rule.name


def lacking(classes: str, rule: str = 'class without pixels') -> list[Finding]:
    return [Finding(rule, classes, lacks=(*classes,))] if classes else []


def places(*parts: list[Finding]) -> list[str]:
    return [finding.place for part in together(parts) for finding in part]


def test_what_data_sets_lack_together():
    def left(*sets: str) -> list[str]:
        return places(*map(lacking, sets))

    assert left() == left('') == left('ab', '') == left('a', 'b') == []
    assert left('a') == ['a'] and left('a', 'a') == ['a', 'a']
    assert left('ab', 'ac') == ['ab', 'ac']
    alone = lacking('ab', 'one class alone')
    assert places(alone, lacking('ac', 'one class alone')) == []
    assert places(alone, alone) == ['ab', 'ab']
    assert places(alone, lacking('a')) == ['a']
    other = Finding('no data', 'x')
    assert together([[other], lacking('a')]) == [[other], []]


def test_message_ends_with_what_to_do():
    finding = Finding('number of classes', 'head.num_classes is 2, but a has 3 classes')
    assert finding.message == (
        'head.num_classes is 2, but a has 3 classes. Make them equal: set num_classes '
        'of the head, or metainfo.classes of the data set.'
    )
    assert Finding('missing path', 'It is gone. Look for it.').message == (
        'It is gone. Look for it.'
    )
