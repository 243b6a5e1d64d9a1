"""Every rule about data, once: what is wrong, what to do, when it is looked for.

The checks give a :class:`Finding` for each place where one is broken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmcls_involution.data.segmentation import Values


@dataclass(frozen=True)
class Rule:
    """Something that data must not be.

    Args:
        name (str): What is wrong, as the report calls it.
        fix (str): What it leads to where that is not plain, and what to do about it.
        quick (bool): Whether it is looked for before each run too, and stops it.
            Defaults to False.
        warns (bool): Whether it is said before each run, which goes on. Defaults to
            False: only the full check says it.
    """

    name: str
    fix: str
    quick: bool = False
    warns: bool = False


# In the order of the report.
_RULES = (
    Rule('missing path', 'put it there, or name its place', quick=True),
    Rule('classes as text', "write a single one ('NAME',), with a comma", quick=True),
    Rule('no COCO file', 'write it anew, in its format', quick=True),
    Rule(
        'classes',
        'set metainfo.classes to these, or to some of them in the same order, and '
        'num_classes of the heads to their number; where files differ, sort the '
        'categories of one first',
        quick=True,
    ),
    Rule(
        'order of classes',
        'the scores would be of other classes; give both one order, in '
        'metainfo.classes and in the categories of the annotation file',
        quick=True,
    ),
    Rule(
        'image folder',
        'set data_prefix=dict(img=...) to the folder of the photos, relative to '
        'data_root',
        quick=True,
    ),
    Rule(
        'number of classes',
        'make them equal: set num_classes of the head, or metainfo.classes of the '
        'data set',
        quick=True,
    ),
    Rule('other annotations', 'the metrics would be wrong; set both', quick=True),
    Rule(
        'category twice',
        'both would become classes: take one out, or give its annotations the id of '
        'the other',
        quick=True,
    ),
    Rule(
        'malformed entry',
        'the annotation file must give it in its format; write it anew',
        quick=True,
    ),
    Rule(
        'nothing to train on',
        'annotate objects, or set what makes them unused right, such as iscrowd=1, '
        'which is for areas that a model need not find',
        quick=True,
    ),
    Rule(
        'nothing to score',
        'the scores will be -1; annotate objects; iscrowd=1 is for areas that a model '
        'need not find',
        warns=True,
    ),
    Rule(
        'class without objects',
        'it cannot be learnt; take it out of metainfo.classes and num_classes, or '
        'annotate some',
        warns=True,
    ),
    Rule(
        'no data',
        'name the folder and the suffix of the files, or put them there',
        quick=True,
    ),
    Rule('missing image', 'get it again, or take it out of the annotations'),
    Rule(
        'undecodable image',
        'damaged: get it again, or take it out of the annotations; where only its end '
        "is cut off: python -c \"import cv2; cv2.imwrite('NEW.png', "
        "cv2.imread('IMAGE'))\"",
    ),
    Rule(
        'image size',
        'the annotations are of another image, or it was resized or turned',
    ),
    Rule(
        'too narrow',
        'nothing of it is left when it is resized, and training stops here; cut it, '
        'or take it out',
    ),
    Rule(
        'duplicate id',
        'must be unique: the later one hides the first; number them anew',
        quick=True,
    ),
    Rule('duplicate', 'it counts as often; take the others out', warns=True),
    Rule(
        'annotation id',
        'our tools number it anew as they read the file, but pycocotools by itself '
        'takes a match with id 0 for none, and text for an error; number from 1',
    ),
    Rule(
        'unknown image',
        'the annotation belongs to no image and is not used',
        warns=True,
    ),
    Rule(
        'no such category',
        'these boxes are not used; the numbers or the categories are wrong',
        warns=True,
    ),
    Rule('unknown category', 'its boxes are not used; set metainfo.classes to name it'),
    Rule(
        'box without area',
        'or less than a pixel wide or high: not used in training; draw it again, or '
        'take it out',
        warns=True,
    ),
    Rule(
        'box outside the image',
        'cut off in training; the box or the size is wrong',
        warns=True,
    ),
    Rule(
        'no mask',
        'the config loads or evaluates masks, and stops here; draw it, take the object '
        'out, or do without masks: with_mask=False in LoadAnnotations, metric=bbox in '
        'the evaluator',
        quick=True,
    ),
    Rule(
        'broken mask',
        'it is not trained, or training or evaluation stop here; draw it again, or '
        'take the object out',
        quick=True,
    ),
    Rule(
        'mask outside the image',
        'cut off in training; the polygon or the size is wrong',
        warns=True,
    ),
    Rule(
        'short polygon',
        'left out of training, and evaluation takes it for something else: draw it '
        'again, or take it out',
        warns=True,
    ),
    Rule(
        'run-length mask',
        'not trained, as the pipeline has poly2mask=False: set poly2mask=True in its '
        'LoadAnnotations, or write polygons',
        warns=True,
    ),
    Rule(
        'missing label',
        'training stops here; get it again, or take the image away',
        quick=True,
    ),
    Rule(
        'missing labelTrainIds',
        'make them: pip install cityscapesscripts; python $(python -c "import mmseg; '
        'print(mmseg.__path__[0])")/.mim/tools/dataset_converters/cityscapes.py '
        'data/cityscapes --nproc 8',
        quick=True,
    ),
    Rule('undecodable label', 'damaged, or no label map: get it again', quick=True),
    Rule(
        'label size',
        'the label is of another image, or one of them was resized',
        quick=True,
    ),
    Rule(
        'label value',
        'number the classes from 0 to their number - 1; 255 is ignored',
        quick=True,
    ),
    Rule(
        'one class alone',
        'there is nothing to tell apart, and the scores would look perfect; write each '
        'class as its number, and ignore none that is to be learnt',
        quick=True,
    ),
    Rule(
        'class without pixels',
        'it cannot be learnt, nor scored; take it out of metainfo.classes and '
        'num_classes, or write its pixels as its number',
        warns=True,
    ),
    Rule(
        'hidden folder',
        'take it away: it counts as a class, before the others',
        quick=True,
    ),
    Rule(
        'empty class folder', 'a class without images; get them again, or merge classes'
    ),
)
RULES = {rule.name: rule for rule in _RULES}


def printable(text: str) -> str:
    """Text on one line, in letters that any file takes.

    The name of a file may hold line ends, and bytes that are no letters.
    """
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@dataclass(frozen=True)
class Finding:
    """A place where a rule is broken.

    Args:
        rule (str): Its name, of :data:`RULES`.
        place (str): Where.
        detail (str): What exactly. Defaults to ''.
        file (str): The file that the place is in, for those who see no report of it.
            Defaults to '': the place says it.
        lacks (tuple[str, ...]): The classes that a data set has nothing of, where that
            is what is wrong: another one beside it may have them. Defaults to none.
        of (int): The number of all classes, where those that lack are named before the
            detail. Defaults to 0: they are not.
    """

    rule: str
    place: str
    detail: str = ''
    file: str = ''
    lacks: tuple[str, ...] = ()
    of: int = 0

    def __post_init__(self) -> None:
        for name in ('place', 'detail', 'file'):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f'{self.place}: {self.what}' if self.what else self.place

    @property
    def what(self) -> str:
        """What exactly, with the classes that lack."""
        if not self.of:
            return self.detail
        names = printable(', '.join(self.lacks))
        return f'{names} ({len(self.lacks)} of {self.of} classes){self.detail}'

    @property
    def message(self) -> str:
        """Where, what, and what to do; one that ends in a full stop says it itself."""
        text = f'{self.file}: {self}' if self.file else str(self)
        if text.endswith('.'):
            return text
        fix = RULES[self.rule].fix
        return f'{text}. {fix[0].upper()}{fix[1:]}.'


@dataclass(frozen=True)
class Files:
    """An image, and what the annotations say about it.

    Args:
        image (str): Path.
        size (tuple[int, int], optional): Width and height in pixels.
        label (str, optional): Path of its segmentation map.
        values (Values, optional): What the values of the map mean.
        note (str): Why the image may be missing. Defaults to ''.
        scale (tuple[int, int], optional): What the pipeline resizes it to, with its
            ratio of width and height kept.
    """

    image: str
    size: tuple[int, int] | None = None
    label: str | None = None
    values: Values | None = None
    note: str = ''
    scale: tuple[int, int] | None = None


def together(found: Sequence[list[Finding]]) -> list[list[Finding]]:
    """Leave out what data sets lack, where others beside them have it.

    Args:
        found (Sequence[list[Finding]]): Of each data set of a split.
    """
    lacking = [{name for f in part for name in f.lacks} for part in found]
    by_all = set.intersection(*lacking) if lacking else set()

    def left(finding: Finding) -> Iterator[Finding]:
        lacks = tuple(name for name in finding.lacks if name in by_all)
        # What stops the run does so only if all are as poor.
        if lacks == finding.lacks or (lacks and not RULES[finding.rule].quick):
            yield replace(finding, lacks=lacks)

    return [[f for finding in part for f in left(finding)] for part in found]


def repeated(what: str, items: Iterable[Any]) -> Iterator[Finding]:
    """Findings about items that occur more than once."""
    items = list(items)
    try:
        if len(set(items)) == len(items):
            return
        # 1, 1.0 and True are one id, to pycocotools too
        counts = {repr(item): count for item, count in Counter(items).items()}
    except TypeError:  # no ids at all, but lists, say
        counts = Counter(map(repr, items))
    for item, count in counts.items():
        place, detail = f'{what} {item}', f'{count} times'
        if count > 1 and what.endswith(' id'):
            yield Finding('duplicate id', place, detail)
        elif count > 1:
            yield Finding('duplicate', place, detail)
