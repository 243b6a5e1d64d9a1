"""Arguments and annotation files of any kind: a right result, or an error that says it.

`make test-long` tries a thousand of each.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

hypothesis = pytest.importorskip('hypothesis')
torch = pytest.importorskip('torch')

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from mmcls_involution.ops import (  # noqa: E402
    Involution2d,
    fused_involution2d,
    involution2d,
)

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
SAID = (ValueError, TypeError)


@pytest.fixture(params=[25, pytest.param(1000, marks=pytest.mark.long)])
def fuzz(request) -> Callable[[st.SearchStrategy, Callable[[Any], None]], None]:
    """Try examples; which ones follows from --seed."""

    def run(strategy: st.SearchStrategy, check: Callable[[Any], None]) -> None:
        @hypothesis.seed(request.config.option.seed)
        @settings(
            max_examples=request.param,
            deadline=None,
            database=None,
            suppress_health_check=[*HealthCheck],
        )
        @given(strategy)
        def each(example: Any) -> None:
            check(example)

        each()

    return run


# No lengths in the thousands: they would be right, and fill the memory.
WILD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 4), max_size=3),
    st.tuples(st.integers(-2, 4), st.integers(-2, 4)),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=1),
)
STEP = st.one_of(WILD, st.sampled_from([2**31, 2**40, 2**63, -(2**63)]))


def definition(x: Tensor, kernels: Tensor, stride, padding, dilation) -> Tensor:
    """The sum over taps, with Python's integers."""
    stride, padding, dilation = (
        value if isinstance(value, list | tuple) else (value, value)
        for value in (stride, padding, dilation)
    )
    groups, *taps, ho, wo = kernels.shape[1:]
    x, kernels = x.double(), kernels.double()
    kernels = kernels.repeat_interleave(x.shape[1] // groups, 1)
    out = x.new_zeros(*x.shape[:2], ho, wo)
    for u in range(taps[0]):
        for v in range(taps[1]):
            pairs = []
            for axis, (tap, length) in enumerate(((u, ho), (v, wo))):
                places = [
                    (i, place)
                    for i in range(length)
                    for place in [
                        i * stride[axis] + tap * dilation[axis] - padding[axis]
                    ]
                    if 0 <= place < x.shape[2 + axis]
                ]
                pairs.append(torch.tensor(places, dtype=torch.long).reshape(-1, 2).T)
            (i, y), (j, column) = pairs
            i, y = i[:, None], y[:, None]
            out[:, :, i, j] += kernels[:, :, u, v][:, :, i, j] * x[:, :, y, column]
    return out


def assert_right(out: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype]
    )


@st.composite
def problems(draw) -> dict:
    """A sound problem, or one in which something has been changed."""
    small = st.integers(1, 3)
    pair = st.tuples(small, small)
    groups, dtype = draw(small), draw(st.sampled_from([*TOLERANCE]))
    case = dict(
        kernel=draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        stride=draw(small | pair),
        padding=draw(st.integers(0, 3) | pair),
        dilation=draw(small | pair),
    )
    shape = [
        draw(st.integers(0, 2)),
        groups * draw(small),
        *draw(st.tuples(*[small] * 2)),
    ]
    size = []
    for axis in (0, 1):
        stride, padding, dilation = (
            value[axis] if isinstance(value, tuple) else value
            for value in (case['stride'], case['padding'], case['dilation'])
        )
        length = (
            shape[2 + axis] + 2 * padding - dilation * (case['kernel'][axis] - 1) - 1
        )
        size.append(length // stride + 1)
    case['sound'] = min(size) >= 1
    size = [max(length, 1) for length in size]
    case['input'] = shape
    case['weight'] = [shape[0], groups, *case['kernel'], *size]
    case['dtypes'] = [dtype, dtype]
    change = draw(st.sampled_from(['none', 'none', 'steps', 'shape', 'dtype', 'wild']))
    if change == 'steps':
        case[draw(st.sampled_from(['stride', 'padding', 'dilation']))] = draw(STEP)
    elif change == 'shape':
        which = case[draw(st.sampled_from(['input', 'weight']))]
        place = draw(st.integers(0, len(which) - 1))
        if draw(st.booleans()):
            which[place] = draw(st.integers(0, 4))
        else:
            which.pop(place)
    elif change == 'dtype':
        kinds = [*TOLERANCE, torch.int64, torch.bool, torch.complex64]
        case['dtypes'][draw(st.integers(0, 1))] = draw(st.sampled_from(kinds))
    elif change == 'wild':
        case[draw(st.sampled_from(['backend', 'as input', 'as weight']))] = draw(WILD)
    case['sound'] &= change == 'none'
    case['layout'] = draw(st.sampled_from(['plain', 'strided', 'channels_last']))
    return case


def tensors(case: dict) -> tuple[Tensor, Tensor]:
    """Of the shapes and dtypes of a case, in the layout that it says."""
    x, weight = (
        (3 * torch.randn(shape)).to(dtype)
        for shape, dtype in zip(
            (case['input'], case['weight']), case['dtypes'], strict=True
        )
    )
    if case['layout'] == 'strided':
        x = torch.stack([x, x], -1)[..., 0]
        weight = torch.stack([weight, weight], -1)[..., 1]
    elif case['layout'] == 'channels_last' and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return case.get('as input', x), case.get('as weight', weight)


def test_involution2d(fuzz):
    def check(case: dict) -> None:
        x, weight = tensors(case)
        steps = case['stride'], case['padding'], case['dilation']
        try:
            out = involution2d(x, weight, *steps, backend=case.get('backend'))
        except SAID:
            assert not case['sound']
            return
        assert_right(out, definition(x, weight, *steps), x.dtype)

    fuzz(problems(), check)


def test_fused_involution2d(fuzz):
    def check(case: dict) -> None:
        x, kernels = tensors(case)
        if 'as weight' in case or len(case['weight']) != 6:
            reduced, weight = kernels, kernels
        else:
            n, groups, kh, kw, ho, wo = case['weight']
            dtype = case['dtypes'][1]
            reduced = torch.randn(n, 2, ho, wo).to(dtype)
            weight = torch.randn(groups * kh * kw, 2, 1, 1).to(dtype)
        steps = {key: case[key] for key in ('stride', 'padding', 'dilation')}
        kernel = case['kernel']
        try:
            out = fused_involution2d(
                x, reduced, weight, None, kernel_size=kernel, **steps,
                backend=case.get('backend'),
            )  # fmt: skip
        except SAID:
            assert not case['sound']
            return
        made = torch.einsum(
            'nrij,or->noij', reduced.double(), weight.double().flatten(1)
        )
        expected = definition(x, made.unflatten(1, (-1, *kernel)), **steps)
        # Kernels are sums of two products, rounded once more.
        tolerance = 4 * TOLERANCE[x.dtype]
        assert out.dtype == x.dtype
        torch.testing.assert_close(
            out.double(), expected, rtol=tolerance, atol=4 * tolerance
        )

    fuzz(problems(), check)


@st.composite
def mostly(draw, sound: dict[str, st.SearchStrategy]) -> dict[str, Any]:
    """Sound arguments, or some of them, in half of the cases one of them wild."""
    names = draw(st.sets(st.sampled_from([*sound])))
    arguments = {name: draw(sound[name]) for name in sorted(names)}
    if draw(st.booleans()):
        arguments[draw(st.sampled_from([*sound]))] = draw(WILD)
    return arguments


def test_module(fuzz):
    options = mostly(
        dict(
            kernel_size=st.sampled_from([1, 3, 5]),
            stride=st.integers(1, 3),
            dilation=st.integers(1, 3),
            group_channels=st.sampled_from([1, 2, 4]),
            reduction_ratio=st.sampled_from([1, 2, 4]),
            backend=st.sampled_from([None, 'reference', 'native', 'taps']),
            fused=st.none() | st.booleans(),
            generator=st.sampled_from(['bottleneck', 'linear', 'attention']),
            init=st.sampled_from(['official', 'identity']),
        )
    )
    shapes = st.lists(st.integers(1, 7), min_size=4, max_size=4) | st.lists(
        st.integers(0, 7), max_size=5
    )

    def check(case: tuple[int, dict, list[int]]) -> None:
        channels, arguments, shape = case
        arguments.setdefault('group_channels', 4)
        try:
            module = Involution2d(channels, **arguments).double().eval()
        except SAID:
            return
        if len(shape) == 4:  # else its channels are wrong
            shape[1] = module.channels
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            try:
                out = module(x)
            except SAID:
                sound = len(shape) == 4 and min(shape[2:]) > 0
                assert not sound or arguments.get('backend') is not None
                return
            padding = module.dilation * (module.kernel_size - 1) // 2
            filtered = module.value(x) if module.generator == 'attention' else x
            expected = definition(
                filtered, module.kernels(x), module.stride, padding, module.dilation
            )
        size = tuple(-(-length // module.stride) for length in shape[2:])
        assert out.shape[2:] == size
        assert_right(out, expected, torch.float64)

    fuzz(st.tuples(st.sampled_from([4, 8, 12]) | WILD, options, shapes), check)


def test_rednet(fuzz):
    pytest.importorskip('mmcv')
    from mmcls_involution.models import RedNet

    pair = st.lists(st.integers(1, 2), min_size=2, max_size=2)
    options = mostly(
        dict(
            depth=st.just(26),
            num_stages=st.just(2),
            strides=pair,
            dilations=pair,
            out_indices=st.lists(st.integers(0, 1), min_size=1, max_size=2),
            stem_channels=st.sampled_from([16, 32]),
            base_channels=st.sampled_from([16, 32]),
            in_channels=st.integers(1, 3),
            style=st.sampled_from(['pytorch', 'caffe']),
            avg_down=st.booleans(),
            frozen_stages=st.integers(-1, 2),
            stem_kernel_size=st.sampled_from([None, 3, 7]),
            involution_cfg=st.sampled_from(
                [None, dict(kernel_size=3), dict(group_channels=8), dict(kernel=3)]
            ),
            norm_eval=st.booleans(),
            with_cp=st.booleans(),
        )
    )
    shapes = st.lists(st.integers(1, 33), min_size=4, max_size=4) | st.lists(
        st.integers(1, 9), max_size=5
    )

    def check(case: tuple[dict, list[int]]) -> None:
        arguments, shape = case
        small = dict(
            depth=26,
            num_stages=2,
            strides=(1, 2),
            dilations=(1, 1),
            out_indices=(1,),
            stem_channels=16,
            base_channels=16,
        )
        arguments = small | arguments
        try:
            model = RedNet(**arguments)
        except SAID:
            return
        if len(shape) == 4:
            shape[1] = arguments.get('in_channels', 3)
        with torch.no_grad():
            model.eval()
            try:
                outs = model(torch.randn(shape))
            except SAID:
                assert len(shape) != 4
                return
        assert len(shape) == 4
        indices = sorted(set(arguments['out_indices']))
        assert len(outs) == len(indices)
        for out, index in zip(outs, indices, strict=True):
            step = 4 * math.prod(arguments['strides'][: index + 1])
            assert out.shape[1] == 4 * arguments['base_channels'] * 2**index
            assert out.shape[2:] == tuple(-(-length // step) for length in shape[2:])
            assert out.isfinite().all()

    fuzz(st.tuples(options, shapes), check)


# ------------------------------------------------------------------ the data checker

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 70)
    | st.sampled_from([0.5, 1e30, 10**400, 'x', '', '1', float('nan'), float('inf')]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(['id', 'counts', 'size']), inner, max_size=2)
    ),
    max_leaves=6,
)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Of all that is in a value of JSON, innermost and outermost."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        inner = (*path, key)
        found += places(item, inner) if isinstance(item, dict | list) else [inner]
    return found


@pytest.mark.parametrize('masks', [False, True])
def test_coco_file(masks, fuzz, coco_root, tmp_path):
    """Anything in the place of anything: findings, or a data set that can be built."""
    datasets = pytest.importorskip('mmdet.datasets')
    from mmcls_involution.data import coco
    from mmcls_involution.data.rules import RULES

    sound = json.loads((coco_root / 'ann.json').read_text())
    file = tmp_path / 'ann.json'

    def check(changes: list[tuple]) -> None:
        content = copy.deepcopy(sound)
        for place, value in changes:
            *path, last = place or (None,)
            try:
                inner = content
                for key in path:
                    inner = inner[key]
                if last is None:
                    content = value
                elif value == 'taken out':
                    del inner[last]
                else:
                    inner[last] = value
            except (KeyError, IndexError, TypeError):
                continue  # what another change has taken away
        file.write_text(json.dumps(content))
        found = [
            *coco.check_quickly(
                'train_dataloader.dataset',
                file,
                coco_root,
                ['square', 'bar'],
                True,
                masks,
            )
        ]
        if content == sound:
            assert found == []
        for finding in found:
            assert str(file) in finding.message
        if not any(RULES[finding.rule].quick for finding in found):
            dataset = datasets.CocoDataset(
                ann_file=str(file),
                data_prefix=dict(img=str(coco_root)),
                metainfo=dict(classes=('square', 'bar')),
                pipeline=[],
                serialize_data=False,  # which collects garbage each time
            )
            for index in range(len(dataset)):
                for instance in dataset.get_data_info(index)['instances']:
                    assert all(map(math.isfinite, instance['bbox']))
                    assert instance['bbox_label'] in (0, 1)

    change = st.tuples(st.sampled_from(places(sound)), JSON | st.just('taken out'))
    fuzz(st.lists(change, max_size=2), check)


@pytest.mark.parametrize('form', ['.png', '.jpg', '.bmp'])
def test_image_file(form, fuzz, coco_root, tmp_path):
    """Damaged at any place: a finding or an image, as OpenCV has it."""
    import cv2

    from mmcls_involution.data import images, segmentation

    picture = cv2.imread(str(coco_root / '0.png'))
    content = cv2.imencode(form, picture)[1].tobytes()
    file = tmp_path / f'image{form}'
    values = segmentation.Values(('a', 'b'), {0: 0, 1: 1}, False)

    def check(case: tuple[int, bytes, int]) -> None:
        place, new, end = case
        file.write_bytes((content[:place] + new + content[place + len(new) :])[:end])
        found, size = images.check_image(str(file), None)
        assert bool(found) == (size is None)
        images.image_size(str(file))
        found, _ = segmentation.check_label(str(file), size, values)
        assert found  # three channels, or noise

    length = len(content)
    fuzz(
        st.tuples(
            st.integers(0, min(length, 200)) | st.integers(0, length),
            st.binary(max_size=4),
            st.integers(0, length) | st.just(length),
        ),
        check,
    )


def test_list_of_images(fuzz, tmp_path):
    """As ImageNet's meta/val.txt."""
    pytest.importorskip('mmpretrain')
    from types import SimpleNamespace

    from mmcls_involution.data import folders

    file = Path(tmp_path, 'val.txt')

    def check(content: bytes) -> None:
        file.write_bytes(content)
        dataset = SimpleNamespace(ann_file=str(file), with_label=True)
        found, names = folders._check_list(dataset, 2)
        assert len(found) + len(names) >= len(set(names))

    lines = st.text(st.characters(), max_size=8) | st.sampled_from(
        ['a.png 0', 'a.png 1', 'a.png 2', 'a.png ²', 'a.png -1', '', ' 1', 'é.png 1']
    )
    text = st.lists(lines, max_size=3).map(
        lambda parts: '\n'.join(parts).encode('utf-8', 'surrogatepass')
    )
    fuzz(text | st.binary(max_size=12), check)
