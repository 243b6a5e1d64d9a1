"""A loss or gradient that is not finite never reaches the weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip('torch')
pytest.importorskip('mmengine')

import toy  # noqa: E402
from mmengine.optim import OptimWrapper, OptimWrapperDict  # noqa: E402
from mmengine.registry import MODELS  # noqa: E402

from mmcls_involution.engine.errors import UserError  # noqa: E402
from mmcls_involution.engine.hooks import LossCheck, image_names  # noqa: E402


class Root(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float('inf')


@MODELS.register_module(force=True)
class FragileModel(toy.ToyModel):
    """Its loss, or the gradient of it, is not finite where sample 4 is in the batch."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x, y, mode, **others):
        bad = '4.png' in others['img_path']
        if bad and self.where == 'loss':
            x = x * float('nan')  # batch norm takes it in as well
        result = super().forward(x, y, mode)
        if bad and self.where == 'gradient':
            result['loss'] = Root.apply(result['loss'])
        return result


def runner_of(build, folder, where, skip):
    cfg = toy.config(folder)
    cfg.model = dict(type='FragileModel', where=where)
    cfg.custom_hooks = []
    runner = build(cfg)
    runner.register_hook(LossCheck(skip))
    return runner


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_stops(where, build, tmp_path):
    runner = runner_of(build, tmp_path, where, skip=False)
    what = 'loss' if where == 'loss' else 'norm of the gradient'
    expected = (
        rf'The {what} is not finite at iteration \d+: loss .*lr .*images: .*4.png'
    )
    with pytest.raises(UserError, match=expected):
        runner.train()
    assert all(p.isfinite().all() for p in runner.model.parameters())
    (file,) = (tmp_path / 'not_finite').glob('iter_*.pth')
    kept = torch.load(file, weights_only=True)
    assert '4.png' in kept['images'] and kept['batch']['x'].shape == (2, 8)


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_skips(where, build, tmp_path):
    runner = runner_of(build, tmp_path, where, skip=True)
    runner.train()
    assert runner.iter == 20
    assert len(list((tmp_path / 'not_finite').glob('*.pth'))) == 4  # one in an epoch
    values = runner.model.state_dict().values()
    assert all(value.isfinite().all() for value in values)


def test_several_optimizers(tmp_path):
    parts = {
        name: OptimWrapper(torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr))
        for name, lr in (('a', 0.1), ('b', 0.02))
    }
    wrapper = OptimWrapperDict(**parts)
    runner = SimpleNamespace(optim_wrapper=wrapper, iter=6, work_dir=tmp_path)
    hook = LossCheck()
    hook.before_train(runner)
    iteration = 0, dict(img_path=['4.png']), dict(loss=torch.tensor(float('nan')))
    expected = r'iteration 7: loss nan; a\.lr 0\.1, b\.lr 0\.02; images: 4\.png\.'
    with pytest.raises(UserError, match=expected):
        hook.after_train_iter(runner, *iteration)
    assert (tmp_path / 'not_finite' / 'iter_7.pth').is_file()
    parts['b'].loss_scaler = object()  # which skips the step, and is given time
    hook.after_train_iter(runner, *iteration)


def test_names_in_samples():
    from mmengine.structures import BaseDataElement

    sample = BaseDataElement(metainfo=dict(img_path='a.png'))
    assert image_names(dict(inputs=[torch.ones(1)], data_samples=[sample])) == ['a.png']
    assert image_names(None) == []
