"""Scores: their names, units and tolerances, and how they compare with the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Metric:
    """How a score is named, shown and compared.

    Args:
        label: Its usual name.
        scale: Times MMEngine's value gives per cent.
        digits: After the point, as far as the evaluator computes it.
        tolerance: Difference to the paper, in per cent, that another seed may make;
            None for what the paper does not report.
        reason: Where the tolerance comes from.
    """

    label: str
    scale: float = 1
    digits: int = 2
    tolerance: float | None = None
    reason: str = ''


COCO_REASON = (
    'authors of COCO models call differences of 0.2 to 0.3 AP between repeated runs '
    'normal (GitHub facebookresearch/moco#39, PeizeSun/SparseR-CNN#62, '
    'facebookresearch/Mask2Former#46)'
)
IMAGENET_REASON = (
    'the best and the worst of 50 seeds of ResNet-50 on ImageNet lie 0.5 apart (arXiv '
    '2109.08203), so most of them within 0.2 of the mean'
)
METRICS = {
    'coco/bbox_mAP': Metric('box AP', 100, 1, 0.3, COCO_REASON),
    'coco/segm_mAP': Metric('mask AP', 100, 1, 0.3, COCO_REASON),
    'mIoU': Metric(
        'mIoU',
        tolerance=0.5,
        reason='repeated runs on Cityscapes have a standard deviation of about 0.4 '
        '(GitHub locuslab/mdeq#4), and single ones stray farther '
        '(open-mmlab/mmsegmentation#1208)',
    ),
    'accuracy/top1': Metric('top-1', tolerance=0.2, reason=IMAGENET_REASON),
    'accuracy/top5': Metric('top-5', tolerance=0.2, reason=IMAGENET_REASON),
    'single-label/f1-score': Metric('F1, mean over classes'),
}


def per_cent(key: str, scores: dict[str, Any]) -> float | None:
    """A score in the paper's unit; None where it was not or could not be computed."""
    value = scores.get(key)
    if not isinstance(value, int | float) or value != value:
        return None
    if key.startswith('coco/') and value < 0:  # pycocotools' sign for undefined
        return None
    return value * METRICS.get(key, Metric(key)).scale


def metrics_of(scores: dict[str, Any], paper: dict[str, float]) -> list[str]:
    """Which scores to show: the paper's, else those we know, else all."""
    return list(paper) or [key for key in METRICS if key in scores] or list(scores)


def compare(scores: dict[str, Any], facts: dict[str, dict]) -> list[dict[str, str]]:
    """Rows of the table: what the paper has, what we have, and the verdict.

    Args:
        scores: Of our test, as MMEngine names and scales them; may be empty.
        facts: The config's entry in configs/paper.yml; may be empty.
    """
    paper, resnet = facts.get('scores', {}), facts.get('resnet50', {})
    rows = []
    for key in metrics_of(scores, paper) or ['']:
        metric = METRICS.get(key, Metric(key))
        ours = per_cent(key, scores)
        row = dict(
            metric=metric.label or 'score',
            paper=str(paper[key]) if key in paper else 'none: not in the paper',
            resnet=str(resnet[key]) if key in resnet else '',
            ours='none' if ours is None else f'{ours:.{metric.digits}f}',
            difference='',
            tolerance='' if key not in paper else f'±{metric.tolerance}',
            verdict='not measured' if ours is None else 'nothing to compare with',
        )
        if ours is not None and key in paper:
            # As many digits as the paper and the evaluator have, lest 39.2 be farther
            # than 0.3 from 39.5.
            difference = round(ours - paper[key], metric.digits)
            row['difference'] = f'{difference:+.{metric.digits}f}'
            row['verdict'] = (
                'within tolerance'
                if abs(difference) <= metric.tolerance
                else ('above the paper' if difference > 0 else 'below the paper')
            )
        rows.append(row)
    return rows
