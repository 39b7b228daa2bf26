"""diffusers with circular padding, as users patch it there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
from diffusers.models.downsampling import Downsample2D
from torch import nn
from torch.nn.functional import conv2d, pad


@contextmanager
def circular(*models: nn.Module, axes: str) -> Iterator[None]:
    """Pad circularly along x, y or xy in all convolutions, and where a VAE's encoder pads before one."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (each for model in models for each in model.modules()):
            if isinstance(module, nn.Conv2d) and axes == "xy":
                patch.setattr(module, "padding_mode", "circular")
            elif isinstance(module, nn.Conv2d):
                patch.setattr(module, "_conv_forward", partial(_convolve, module, axes))
            elif isinstance(module, Downsample2D) and module.padding == 0:
                patch.setattr(module, "forward", partial(_downsample, module, axes))
        yield


def pad_along(axes: str, x, left: int, right: int, top: int, bottom: int):
    """With the opposite border along ``axes``, with zeros along others."""
    across, down = (left, right, 0, 0), (0, 0, top, bottom)
    x = pad(x, across, mode="circular" if "x" in axes else "constant")
    return pad(x, down, mode="circular" if "y" in axes else "constant")


def _convolve(conv: nn.Conv2d, axes: str, x, weight, bias):
    top, left = conv.padding
    return conv2d(pad_along(axes, x, left, left, top, top), weight, bias, conv.stride, 0, conv.dilation, conv.groups)


def _downsample(module: Downsample2D, axes: str, x, *_):
    return module.conv(pad_along(axes, x, 0, 1, 0, 1))
