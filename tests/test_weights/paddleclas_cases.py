"""RedNets with weights by formula, and what PaddleClas makes of them.

    python tests/test_weights/paddleclas_cases.py

writes tests/golden/paddleclas.npz anew, with PaddleClas 2.6.0 and Paddle 3.3.1, both in
an environment of their own: they are not needed to run the tests.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / 'golden' / 'paddleclas.npz'
DEPTHS = (26, 50)


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor by its name in Paddle: waves, of the size that a trained one has."""
    waves = np.sin(sum(map(ord, name)) + 0.37 * np.arange(np.prod(shape)) ** 1.1)
    if name.endswith('_variance'):
        waves = 1 + 0.5 * waves**2
    elif name.endswith('_mean') or name.endswith('bias'):
        waves = 0.1 * waves
    elif len(shape) == 1:
        waves = 1 + 0.2 * waves
    else:  # Paddle's linear layer has its inputs first
        inputs = shape[0] if len(shape) == 2 else np.prod(shape[1:])
        waves = 1.5 * waves / inputs**0.5
    return waves.reshape(shape).astype(np.float32)


def image() -> np.ndarray:
    """[1, 3, 64, 96]."""
    return np.sin(0.01 * np.arange(3 * 64 * 96) ** 1.3).reshape(1, 3, 64, 96)


def paddle_weights(depth: int) -> dict[str, np.ndarray]:
    """What PaddleClas would save. Our names and shapes are held to the official."""
    import torch

    from mmcls_involution.models import RedNet

    with torch.device('meta'):
        state = RedNet(depth).state_dict()
    shapes = {
        name.replace('running_mean', '_mean').replace(
            'running_var', '_variance'
        ): tuple(value.shape)
        for name, value in state.items()
        if not name.endswith('num_batches_tracked')
    }
    shapes.update({'fc.weight': (2048, 1000), 'fc.bias': (1000,)})
    weights = {name: formula(name, shape) for name, shape in shapes.items()}
    names = {name: f'param_{i}' for i, name in enumerate(weights)}
    return {**weights, 'StructuredToParameterName@@': names}


def main() -> None:
    """Write what PaddleClas computes."""
    import paddle
    from paddleclas.ppcls.arch.backbone.model_zoo import rednet

    logits = {}
    for depth in DEPTHS:
        model = getattr(rednet, f'RedNet{depth}')()
        names = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        model.set_state_dict({name: formula(name, s) for name, s in names.items()})
        model.eval()
        with paddle.no_grad():
            x = paddle.to_tensor(image().astype(np.float32))
            logits[f'RedNet{depth}'] = model(x).numpy()[0]
    np.savez_compressed(GOLDEN, **logits)


if __name__ == '__main__':
    main()
