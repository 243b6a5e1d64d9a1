"""What the converters share: find the download, read it, write all or nothing."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np


@contextmanager
def open_download(path: Path, folders: Collection[str], source: str) -> Iterator[Path]:
    """Give the folder of a download that holds all of ``folders``.

    Args:
        path (Path): A folder, or a ``.zip`` file of one. The wanted folder may
            lie up to two levels below, as in an unpacked GitHub archive.
        folders (Collection[str]): Names of the sub-folders the data consists of.
        source (str): Where the data comes from, for the error messages.

    Yields:
        Path: The folder that holds ``folders``; temporary if ``path`` is a zip.

    Raises:
        FileNotFoundError: If ``path`` does not exist or no folder in it has
            all the sub-folders.
        ValueError: If ``path`` is a file but no zip, or a damaged one.
    """
    if not path.exists():
        raise FileNotFoundError(f'{path} does not exist: expected {source}')
    with tempfile.TemporaryDirectory() as unpacked:
        root = path
        if path.is_file():
            if not zipfile.is_zipfile(path):
                raise ValueError(
                    f'{path} is neither a folder nor a zip file: expected {source}'
                )
            print(f'Unpacking {path}', flush=True)
            try:
                shutil.unpack_archive(path, unpacked, 'zip')
            # The last where a changed byte asks for a password or another method.
            except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
                raise ValueError(
                    f'{path} cannot be unpacked, so it is probably damaged ({error!r}):'
                    ' download it again'
                ) from error
            root = Path(unpacked)
        candidates = [root, *sorted(root.glob('*/')), *sorted(root.glob('*/*/'))]
        missing = [
            [name for name in folders if not (candidate / name).is_dir()]
            for candidate in candidates
        ]
        best = min(range(len(candidates)), key=lambda i: len(missing[i]))
        if missing[best]:
            where = path / candidates[best].relative_to(root)
            raise FileNotFoundError(
                f'{where} lacks the folder(s) {", ".join(missing[best])}: '
                f'expected {source}'
            )
        yield candidates[best]


def write_image(path: Path, image: np.ndarray, jpeg_quality: int = 95) -> None:
    """Write an image in the format of its suffix.

    Args:
        path (Path): File to write; its folder is made if needed.
        image (np.ndarray): [H, W] or [H, W, 3] BGR, uint8.
        jpeg_quality (int): For ``.jpg``, 0 to 100. Defaults to 95.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    params = [cv2.IMWRITE_JPEG_QUALITY, jpeg_quality] if path.suffix == '.jpg' else []
    if not cv2.imwrite(str(path), image, params):
        raise OSError(f'image {path} cannot be written: is the disk full?')


@contextmanager
def staged_output(out: Path, entries: Collection[str]) -> Iterator[Path]:
    """Give an empty folder that takes the place of ``out`` if all goes well.

    After an error or Ctrl-C ``out`` is what it was before, so a half-written
    data set never looks like a whole one.

    Args:
        out (Path): Folder of the data set.
        entries (Collection[str]): Names the data set has at its top level. An
            existing ``out`` with anything else in it is not ours to replace.

    Yields:
        Path: The folder to write to, beside ``out``.

    Raises:
        FileExistsError: If ``out`` is a file or holds other things.
    """
    out = out.resolve()
    if out.is_file():
        raise FileExistsError(f'output {out} is a file: name a folder')
    others = sorted({p.name for p in out.glob('*')} - set(entries))
    if others:
        raise FileExistsError(
            f'output {out} holds other things ({", ".join(others[:3])}): name '
            f'a new folder, or one with nothing but {", ".join(sorted(entries))}'
        )
    staging = out.with_name(f'.{out.name}.partial')
    replaced = out.with_name(f'.{out.name}.replaced')
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        shutil.rmtree(replaced, ignore_errors=True)
        if out.exists():
            out.rename(replaced)
        try:
            staging.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class CocoSplit:
    """A split in COCO format, filled image by image.

    Args:
        classes (Sequence[str]): Names of the categories, which count from 1.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self.classes = list(classes)
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def add_image(self, file_name: str, width: int, height: int) -> None:
        """Add an image; what is annotated next is on it."""
        image = dict(file_name=file_name, width=width, height=height)
        self.images.append(dict(id=len(self.images) + 1, **image))

    def annotate(self, cls: str, box: list[float], area: float, **more: Any) -> None:
        """Annotate the last image: a box (x, y, width, height), in pixels."""
        self.annotations.append(
            dict(
                id=len(self.annotations) + 1,
                image_id=len(self.images),
                category_id=self.classes.index(cls) + 1,
                bbox=box,
                area=area,
                iscrowd=0,
                **more,
            )
        )

    def write(self, path: Path) -> None:
        """Write the annotation file, making its folder."""
        categories = [dict(id=i, name=cls) for i, cls in enumerate(self.classes, 1)]
        content = dict(
            images=self.images, annotations=self.annotations, categories=categories
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))


def run_converter(
    convert: Callable[[Path, Path], None],
    description: str,
    default_out: str,
) -> None:
    """Command line of a converter: ``INPUT [--out OUT]``.

    Bad input ends with one line on stderr and exit code 1.

    Args:
        convert (Callable): Takes the input and the output path.
        description (str): What the converter does, for ``--help``.
        default_out (str): Default of ``--out``, the data root of the configs.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('input', type=Path, help='folder or zip file to read')
    parser.add_argument(
        '--out',
        type=Path,
        default=Path(default_out),
        help='folder of the data set to write (default: %(default)s)',
    )
    args = parser.parse_args()
    try:
        convert(args.input, args.out)
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')
