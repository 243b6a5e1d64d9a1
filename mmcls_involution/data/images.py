"""Images: reading them, and what is wrong with those that cannot be read."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from mmcls_involution.data.rules import Finding


def read_image(path: Path, flags: int = cv2.IMREAD_COLOR) -> np.ndarray:
    """Read an image, or say which file is missing or broken.

    Args:
        path (Path): Image file.
        flags (int): OpenCV's read mode. Defaults to colour, BGR.

    Returns:
        np.ndarray: [H, W, 3], or [H, W] where ``flags`` and the file say so.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be decoded.
    """
    if not path.is_file():
        raise FileNotFoundError(f'image {path} is missing')
    # Not cv2.imread: it fills up a JPEG that is cut short, and only prints a warning.
    content = np.fromfile(path, dtype=np.uint8)
    image = cv2.imdecode(content, flags) if content.size else None
    if image is None:
        raise ValueError(
            f'image {path} cannot be decoded: it is damaged, download it again'
        )
    return image


def open_image(path: Path) -> np.ndarray:
    """Read an image that a person has named, if it is whole and not huge.

    Args:
        path (Path): Of an existing file.

    Returns:
        np.ndarray: ``[H, W, 3]``, uint8, BGR.

    Raises:
        ValueError: If it is not; the message says so, without a full stop.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('error', Image.DecompressionBombWarning)
            Image.open(path).close()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        limit = Image.MAX_IMAGE_PIXELS / 1e6
        raise ValueError(
            f'{path} has more than {limit:.0f} megapixels: make it smaller first'
        ) from None
    except (OSError, ValueError):  # no image, or one with a megabyte of text
        pass  # OpenCV may know it
    if check_image(str(path), None)[0]:
        raise ValueError(
            f'{path} cannot be decoded: it is damaged, cut short or no image'
        )
    return read_image(path)


def check_image(
    path: str, expected: tuple[int, int] | None
) -> tuple[list[Finding], tuple[int, int] | None]:
    """Decode an image in full; give what is wrong, and its width and height.

    Args:
        path (str): Of the image.
        expected (tuple[int, int], optional): The size that its annotations say.
    """
    try:
        height, width = read_image(Path(path)).shape[:2]
        if int(cv2.__version__.split('.')[0]) < 5:
            # It may fill up a JPEG that is cut short. Pillow never does.
            with Image.open(path) as file:
                file.load()
    except FileNotFoundError:
        detail = 'does not exist'
        if os.path.lexists(path):
            detail = 'is a folder' if os.path.isdir(path) else 'is a link to nothing'
        return [Finding('missing image', path, detail)], None
    except (
        OSError,
        SyntaxError,
        ValueError,
        cv2.error,
        Image.DecompressionBombError,
    ) as error:
        return [Finding('undecodable image', path, why_unread(error))], None
    size = width, height
    if expected in (None, size):
        return [], size
    return [other_size(path, size, expected)], size


def why_unread(error: Exception, content: str = 'cannot be decoded') -> str:
    """What kept a file from being read: the system, which says so, or its content."""
    if isinstance(error, OSError) and error.errno:
        return f'cannot be read: {os.strerror(error.errno)}.'
    return content


def other_size(path: str, size: tuple[int, int], expected: tuple[int, int]) -> Finding:
    """Say that an image is not of the width and height that its annotations say."""
    detail = f'is {times(size)}, its annotations say {times(expected)}'
    if expected == size[::-1]:
        detail += ' (turned by its EXIF orientation?)'
    return Finding('image size', path, detail)


def times(size: tuple[int, int]) -> str:
    """A width and a height as text."""
    return f'{size[0]}x{size[1]}'


def image_size(path: str) -> tuple[int, int] | None:
    """Width and height that a file's header says; None where there is none.

    Turned as the orientation says, which OpenCV minds and Pillow does not.
    """
    try:
        with Image.open(path) as file:
            # Pillow itself has turned the size of a TIFF file.
            turned = file.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            turned = turned and file.format != 'TIFF'
            return file.size[::-1] if turned else file.size
    except Exception:  # Pillow raises of damaged files what comes, SyntaxError too
        return None


def there(folder: Path) -> str:
    """What is in a folder where something was looked for in vain."""
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return '; the folder is empty'
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return f'; there are {", ".join(names[:3])}{more}'


def backslash(name: str) -> str:
    """Why a file of this name may be missing where \\ separates no folders, or ''."""
    if '\\' not in name or os.sep == '\\':
        return ''
    return 'a backslash separates no folders here: write / in its place'
