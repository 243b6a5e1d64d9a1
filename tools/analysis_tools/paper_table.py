"""Prove that the configs are the paper's models, by their parameters and FLOPs.

    python tools/analysis_tools/paper_table.py

Builds the model of every config in configs/paper.yml and prints its figures beside the
paper's, counted as its authors did (mmcls_involution/flops.py says how), and the
multiply-adds of convolutions and involutions alone, which is what most tools count
today. Ends with an error where parameters differ by more than 1 % or FLOPs by more than
3 %.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config
from mmengine.fileio import load

from mmcls_involution import compat
from mmcls_involution.console import console, print_table, progress
from mmcls_involution.flops import build_model, measure

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
TOLERANCES = {'parameters': 0.01, 'flops': 0.03}
# The paper's FLOPs of these two are without the last layers of the mask head: they lie
# 46.3 G above those of Faster R-CNN, and its four convolutions take 46.2 G for 100
# regions (100 * 14 * 14 * 4 * 9 * 256 * 256). The third Mask R-CNN's lie 13.1 G above,
# of which its four involutions take 6.2 G and these layers 6.7. MMCV 1.x looks the
# exact class of a layer up in a table; these layers have classes of MMCV's own, which
# only some versions of the table know.
LEFT_OUT = dict.fromkeys(
    ('mask-rcnn_rednet50_fpn_1x_coco', 'mask-rcnn_rednet50_fpn-inv_1x_coco'),
    ('roi_head.mask_head.upsample', 'roi_head.mask_head.conv_logits'),
)


@dataclass(frozen=True)
class Row:
    """Figures of one config.

    Attributes:
        name: Stem of the config.
        parameters: In millions: the paper's, ours.
        flops: In 1e9, counted as the authors did: the paper's, ours.
        multiply_adds: Ours in 1e9, of convolutions, involutions and linear layers.
    """

    name: str
    parameters: tuple[float, float]
    flops: tuple[float, float]
    multiply_adds: float

    def outside(self) -> list[str]:
        """Which of ``parameters`` and ``flops`` differ by more than the tolerance."""
        return [
            key
            for key, tolerance in TOLERANCES.items()
            if abs(difference(getattr(self, key))) > tolerance
        ]


def difference(figures: tuple[float, float]) -> float:
    """Of the paper's figure and ours, relative to the paper's."""
    paper, ours = figures
    return ours / paper - 1


def compare(name: str, paper: dict) -> Row:
    """Measure a config and put its figures beside the paper's.

    Args:
        name: Stem of a config in a folder of ``configs``.
        paper: ``params`` in millions, ``flops`` in 1e9 and ``input_shape`` (height,
            width), as in configs/paper.yml.

    Raises:
        FileNotFoundError: If there is no such config.
    """
    file = next(CONFIGS.glob(f'*/{name}.py'), None)
    if file is None:
        raise FileNotFoundError(
            f'configs/paper.yml has figures of {name}, but no folder of configs has '
            'a config of that name'
        )
    left_out = LEFT_OUT.get(name, ())
    model = build_model(Config.fromfile(file))
    whole, *parts = measure(model, paper['input_shape'], left_out).values()
    return Row(
        name=name,
        parameters=(paper['params'], whole.trained / 1e6),
        flops=(paper['flops'], (whole.flops - sum(p.flops for p in parts)) / 1e9),
        multiply_adds=whole.multiply_adds / 1e9,
    )


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    compat.apply()
    paper = load(CONFIGS / 'paper.yml')
    models = progress(paper.items(), 'counting', len(paper))
    rows = [compare(name, figures) for name, figures in models]
    print_table(
        'Parameters (M) and FLOPs (G) of the paper and of our configs',
        [
            {
                'config': row.name,
                'paper M': str(row.parameters[0]),
                'ours M': f'{row.parameters[1]:.2f}',
                'differ %': f'{100 * difference(row.parameters):+.2f}',
                'paper G': str(row.flops[0]),
                'ours G': f'{row.flops[1]:.2f}',
                'differ % ': f'{100 * difference(row.flops):+.2f}',
                'conv + inv G': f'{row.multiply_adds:.3f}',
            }
            for row in rows
        ],
    )
    console.print(
        f'{" and ".join(LEFT_OUT)}: without the last layers of the mask head, which '
        'the paper leaves out there; conv + inv has them.',
        highlight=False,
    )
    outside = [
        f'{row.name} ({", ".join(keys)})' for row in rows if (keys := row.outside())
    ]
    if outside:
        sys.exit(
            'Error: these are not the models of the paper, their figures differ by more'
            f' than {TOLERANCES["parameters"]:.0%} (parameters) or '
            f'{TOLERANCES["flops"]:.0%} (flops): {"; ".join(outside)}'
        )


if __name__ == '__main__':
    main()
