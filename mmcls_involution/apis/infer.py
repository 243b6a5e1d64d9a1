"""Run a detector, a segmenter or a classifier on images and videos.

    python -m mmcls_involution infer INPUT [INPUT ...] --config CONFIG [--weights W] ...

An INPUT is an image, a video, a folder with images and videos in it, a pattern in
quotes such as 'photos/**/*.jpg', or - for a list of them on standard input, one a line.
Into --out-dir go

- a picture NAME.jpg of each image, an .mp4 of each video;
- results.json: of a detector boxes and masks in COCO's result format, of a segmenter
  the files NAME_labels.png with a class for each pixel, of a classifier labels and
  scores;
- images.json: the images and categories that those ids mean, in COCO's format; so
  pycocotools reads the two as COCO('images.json').loadRes('results.json').

What cannot be read is named and passed over; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from mmcls_involution.apis.inferencer import (
    add_model_arguments,
    build_inferencer,
    class_names,
    draw,
    preprocess,
)
from mmcls_involution.apis.vis_kernels import draw_kernels, look
from mmcls_involution.console import console, progress
from mmcls_involution.data.images import open_image, there
from mmcls_involution.engine.errors import UserError

IMAGES = {'.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}
VIDEOS = {'.avi', '.m4v', '.mkv', '.mov', '.mp4', '.webm'}


@dataclass(frozen=True)
class Frame:
    """An image, or one of a video.

    Attributes:
        file: Where it comes from; of a video with ``#`` and the number of the frame.
        name: Of what is written about it, without a suffix; no two have the same.
        image: ``[H, W, 3]``, uint8, BGR; None where it cannot be read.
        fault: Why it cannot be read; '' where it can.
        video: Name of the video, '' of an image.
        rate: Frames per second of the video.
    """

    file: str
    name: str
    image: np.ndarray | None = None
    fault: str = ''
    video: str = ''
    rate: float = 0


def find_files(inputs: Iterable[str]) -> list[Path]:
    """The images and videos that the arguments of the command mean.

    Raises:
        UserError: If there is nothing at one of them.
    """
    files: list[Path] = []
    for text in inputs:
        path = Path(text).expanduser()
        if text == '-':
            lines = [line.strip() for line in sys.stdin]
            files += find_files(line for line in lines if line and line != '-')
        elif path.is_dir():
            found = sorted(
                file
                for file in path.rglob('*')
                if file.suffix.lower() in IMAGES | VIDEOS and file.is_file()
            )
            if not found:
                raise UserError(f'No image or video in {path}{there(path)}.')
            files += found
        elif path.is_file():
            files.append(path)
        else:
            matches = map(Path, glob.glob(str(path), recursive=True))
            found = sorted(file for file in matches if file.is_file())
            if not found:
                raise UserError(f'No such file, folder or pattern: {text}.')
            files += found
    if not files:
        raise UserError('No image or video was named: standard input is empty.')
    return files


def count(files: Iterable[Path]) -> int:
    """How many frames there are, as far as the videos say."""
    return sum(
        max(1, int(cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT)))
        if file.suffix.lower() in VIDEOS and _text(str(file)) == str(file)
        else 1
        for file in files
    )


def frames(files: Iterable[Path], videos: bool = True) -> Iterator[Frame]:
    """Read images and videos (or images alone), one frame after the other."""
    taken: set[str] = set()
    for file in files:
        name = _free(_text(file.stem), taken)
        if videos and file.suffix.lower() in VIDEOS:
            yield from _video(file, name, taken)
            continue
        try:
            yield Frame(str(file), name, open_image(file))
        except ValueError as error:
            yield Frame(str(file), name, fault=str(error))


def _text(name: str) -> str:
    """A name with bytes that are no UTF-8 escaped: OpenCV crashes at them."""
    return name.encode(errors='backslashreplace').decode()


def _free(name: str, taken: set[str]) -> str:
    """Take a name; where it is taken, the first free one of NAME_2, NAME_3, ..."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f'{name}_{number}'
    taken.add(free)
    return free


def _video(file: Path, name: str, taken: set[str]) -> Iterator[Frame]:
    if _text(str(file)) != str(file):
        fault = (
            f'{file} has a name that is no UTF-8, which OpenCV cannot open: rename it'
        )
        yield Frame(str(file), name, fault=fault)
        return
    video = cv2.VideoCapture(str(file))
    rate = video.get(cv2.CAP_PROP_FPS) or 25
    number = 0
    while (read := video.read())[0]:
        title = _free(f'{name}_{number:06}', taken)
        yield Frame(f'{file}#{number}', title, read[1], video=name, rate=rate)
        number += 1
    video.release()
    if not number:
        yield Frame(str(file), name, fault=f'{file} is no video that OpenCV can read')


def predict(
    inferencer: Any, batch: Sequence[Frame]
) -> Iterator[tuple[Frame, Any, str]]:
    """Predict a batch; what fails is tried one by one.

    Args:
        inferencer (Any): From :func:`build_inferencer`.
        batch (Sequence[Frame]): Images of any sizes.

    Yields:
        tuple: Each frame with its data sample, or None and what was wrong.
    """
    readable = [frame for frame in batch if not frame.fault]
    yield from ((frame, None, frame.fault) for frame in batch if frame.fault)
    if not readable:
        return
    try:
        data = preprocess(inferencer, [frame.image for frame in readable])
        samples = inferencer.forward(data)
    except (RuntimeError, ValueError, AssertionError, cv2.error) as error:
        if len(readable) > 1:  # of several sizes, or one of them is at fault
            for frame in readable:
                yield from predict(inferencer, [frame])
            return
        frame = readable[0]
        yield frame, None, f'{frame.file}: {type(error).__name__}: {error}'
        return
    for frame, sample in zip(readable, samples, strict=True):
        yield frame, sample.cpu(), ''


def picture_of(
    inferencer: Any, frame: Frame, sample: Any, score_thr: float
) -> tuple[np.ndarray, str]:
    """A prediction on its image, RGB, and ''.

    Where it cannot be drawn, the image as it is, and why: MMSegmentation's visualizer
    stops at an image of one pixel, matplotlib at one of 65,536 in a row.
    """
    try:
        return draw(inferencer, frame.image, sample, score_thr), ''
    except Exception as error:  # each library has its own
        reason = f'{type(error).__name__}: {error}'
        fault = f'The prediction of {frame.file} cannot be drawn: {reason}'
        return np.ascontiguousarray(frame.image[..., ::-1]), fault


def label_map(sample: Any) -> np.ndarray:
    """The label of each pixel, ``[H, W]``, of as many bits as they need."""
    labels = sample.pred_sem_seg.data[0].numpy()
    labels = labels.astype(np.int64)  # of one logit, out_channels=1, they are float32
    return labels.astype(np.min_scalar_type(labels.max()))


def as_results(sample: Any, image_id: int, name: str, classes: Any) -> list[dict]:
    """A prediction as entries of results.json; see the module for their form."""
    if hasattr(sample, 'pred_sem_seg'):
        return [dict(image_id=image_id, label_map=f'{name}_labels.png')]
    if not hasattr(sample, 'pred_instances'):
        if not hasattr(sample, 'pred_score'):
            found = ', '.join(sorted(sample.keys())) or 'nothing'
            raise UserError(
                f'The model predicts {found}. What can be written are boxes and masks '
                '(pred_instances), label maps (pred_sem_seg) and scores of classes '
                '(pred_score): use the Inferencer of its toolbox.'
            )
        scores = sample.pred_score.tolist()
        label = int(np.argmax(scores))
        result = dict(image_id=image_id, category_id=label + 1, score=scores[label])
        if classes:
            result['class'] = classes[label]
        return [dict(result, scores=scores)]
    instances = sample.pred_instances
    results = []
    for (x1, y1, x2, y2), score, label in zip(
        instances.bboxes.tolist(),
        instances.scores.tolist(),
        instances.labels.tolist(),
        strict=True,
    ):
        box = [x1, y1, x2 - x1, y2 - y1]
        results.append(
            dict(image_id=image_id, category_id=label + 1, bbox=box, score=score)
        )
    if 'masks' in instances:
        from mmdet.structures.mask import encode_mask_results

        masks = encode_mask_results(np.asarray(instances.masks))
        for result, mask in zip(results, masks, strict=True):
            mask['counts'] = mask['counts'].decode()
            result['segmentation'] = mask
    return results


def _keep(files: Iterable[Path], out_dir: Path) -> None:
    """Refuse a folder for results that has inputs: their names are those of results."""
    folder = out_dir.resolve()
    for file in files:
        if folder in (file.parent.resolve(), file.resolve().parent):
            raise UserError(
                f'{file} lies in --out-dir {out_dir}, where a picture would be written '
                'over it: name another folder for the results.'
            )


def _write(path: Path, image: np.ndarray) -> None:
    if not cv2.imwrite(str(path), image):  # which raises nothing
        raise UserError(f'Cannot write {path}: is the folder writable, the disk full?')


def write_picture(
    out_dir: Path, frame: Frame, picture: np.ndarray, videos: dict, stack: ExitStack
) -> None:
    """Write a picture, RGB, or append it to its video."""
    picture = picture[..., ::-1]
    if not frame.video:
        _write(out_dir / f'{frame.name}.jpg', picture)
        return
    size = frame.image.shape[1::-1]
    if frame.video not in videos:
        path, kind = out_dir / f'{frame.video}.mp4', cv2.VideoWriter.fourcc(*'mp4v')
        video = cv2.VideoWriter(str(path), kind, _mpeg4_rate(frame.rate), size)
        if not video.isOpened():  # nor does this raise anything
            raise UserError(
                f'Cannot write {path}: is the folder writable, the disk full, or is '
                "OpenCV's codec for MPEG-4 missing?"
            )
        videos[frame.video] = video
        stack.callback(video.release)
    videos[frame.video].write(cv2.resize(picture, size))


def _mpeg4_rate(rate: float) -> float:
    """The closest rate of which OpenCV makes a fraction that MPEG-4 can hold.

    OpenCV takes as many decimals as it needs, up to three, and MPEG-4 a number up to
    65535 above the powers of ten.
    """
    rounded = ((round(rate, digits), 10**digits) for digits in (3, 2, 1, 0))
    return next((r for r, power in rounded if r * power <= 65535), 65535)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument('inputs', nargs='+', metavar='INPUT', help='see above')
    add_model_arguments(parser)
    parser.add_argument(
        '--out-dir', default='outputs', help='folder for the results (default: outputs)'
    )
    parser.add_argument(
        '--score-thr',
        type=float,
        default=0.3,
        help='score from which boxes and masks are drawn; results.json has all '
        '(default: 0.3)',
    )
    parser.add_argument(
        '--batch-size', type=int, default=1, help='images at a time (default: 1)'
    )
    parser.add_argument(
        '--kernels',
        action='store_true',
        help='draw NAME_kernels.png too: heat maps of the generated kernels',
    )


def main(args: argparse.Namespace) -> None:
    """The command ``infer``."""
    if args.batch_size < 1:
        raise UserError(f'--batch-size must be at least 1, got {args.batch_size}.')
    out_dir = Path(args.out_dir)
    if (name := _text(str(out_dir))) != str(out_dir):
        raise UserError(
            f'--out-dir: {name} is no UTF-8, and OpenCV cannot write there: name '
            'another folder.'
        )
    files = find_files(args.inputs)
    _keep(files, out_dir)
    inferencer = build_inferencer(args.config, args.weights, args.device)
    out_dir.mkdir(parents=True, exist_ok=True)
    classes = class_names(inferencer)
    images, results, faults, videos = [], [], [], {}

    def batches() -> Iterator[list[Frame]]:
        source = frames(files)
        while batch := list(islice(source, args.batch_size)):
            yield batch

    def finish(frame: Frame, sample: Any) -> None:
        height, width = frame.image.shape[:2]
        image_id = len(images) + 1
        picture, undrawn = picture_of(inferencer, frame, sample, args.score_thr)
        if undrawn:
            text = _text(f'{undrawn}. The picture is the image.')
            console.print(text, highlight=False)
        write_picture(out_dir, frame, picture, videos, stack)
        if hasattr(sample, 'pred_sem_seg'):
            _write(out_dir / f'{frame.name}_labels.png', label_map(sample))
        if args.kernels:
            figure = draw_kernels(look(inferencer, frame.image))
            figure.savefig(out_dir / f'{frame.name}_kernels.png', dpi=110)
        images.append(
            dict(id=image_id, file_name=frame.file, width=width, height=height)
        )
        results.extend(as_results(sample, image_id, frame.name, classes))

    total = -(-count(files) // args.batch_size)
    with ExitStack() as stack, torch.no_grad():
        for batch in progress(batches(), 'Inference', total):
            for frame, sample, fault in predict(inferencer, batch):
                if fault:
                    faults.append(fault)
                    console.print(_text(f'Passed over: {fault}'), highlight=False)
                else:
                    finish(frame, sample)
    categories = [dict(id=i, name=str(c)) for i, c in enumerate(classes or [], 1)]
    for name, content in (
        ('images.json', dict(images=images, annotations=[], categories=categories)),
        ('results.json', results),
    ):
        (out_dir / name).write_text(json.dumps(content))
    console.print(f'{len(images)} images, {len(faults)} passed over: {out_dir}')
    if faults:
        sys.exit(1)
