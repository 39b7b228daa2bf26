"""spandrel's upscalers with random weights, and their files in each spelling of the keys."""

import re
import sys
from types import ModuleType
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

_NAMES = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
_STAND_INS = {name: ModuleType(name) for name in _NAMES}
for _name in ("InterpolationMode", "normalize", "rotate"):
    setattr(_STAND_INS[_NAMES[-1]], _name, None)

# Two architectures that are not used here import torchvision, whose wheels need another torch than the tests.
with patch.dict(sys.modules, _STAND_INS):
    spandrel = pytest.importorskip("spandrel", reason="install it with pip install --no-deps spandrel")
    from spandrel.architectures.Compact import Compact
    from spandrel.architectures.ESRGAN import ESRGAN

_RRDB = {"num_filters": 16, "num_blocks": 2}
UPSCALERS = {
    "ESRGAN": (4, lambda: ESRGAN(**_RRDB, scale=4)),
    "ESRGAN x2": (2, lambda: ESRGAN(**_RRDB, scale=2)),
    "ESRGAN x1": (1, lambda: ESRGAN(**_RRDB, scale=1)),
    "ESRGAN x8": (8, lambda: ESRGAN(**_RRDB, scale=8)),
    "Real-ESRGAN x2": (2, lambda: ESRGAN(**_RRDB, scale=4, in_nc=12, shuffle_factor=2)),
    "Real-ESRGAN x1": (1, lambda: ESRGAN(**_RRDB, scale=4, in_nc=48, shuffle_factor=4)),
    "Compact": (4, lambda: Compact(num_feat=16, num_conv=4, upscale=4)),
    "Compact x2": (2, lambda: Compact(num_feat=16, num_conv=3, upscale=2)),
    "Compact x1": (1, lambda: Compact(num_feat=16, num_conv=3, upscale=1)),
}
"""The scale, and what makes the network."""


def random_upscaler(kind):
    """A network whose layers change what they get, and whose residuals are not small."""
    torch.manual_seed(0)
    net = UPSCALERS[kind][1]().eval()
    for parameter in net.parameters():
        spread = 0.08 if parameter.ndim == 4 else 0.1
        torch.nn.init.normal_(parameter, 0.2 * (parameter.ndim == 1), spread)
    return net


def upscale(net, image):
    """What a network makes of an RGB image of Pillow's."""
    values = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
    with torch.no_grad():
        upscaled = net(values)[0].clamp(0, 1).permute(1, 2, 0)
    return Image.fromarray((upscaled * 255).round().numpy().astype(np.uint8))


def load_with_spandrel(path):
    """What spandrel makes of a file."""
    return spandrel.ModelLoader().load_from_file(path).model.eval()


def bsrgan_keys(state):
    """A state of the old ESRGAN under the keys of BSRGAN's code."""
    last = max(int(name.split(".")[1]) for name in state)
    blocks = max(int(name.split(".")[3]) for name in state if name.startswith("model.1.sub."))
    names = {"0": "conv_first", f"1.sub.{blocks}": "trunk_conv", f"{last - 2}": "HRconv", f"{last}": "conv_last"}
    names |= {f"{3 * index}": f"upconv{index}" for index in range(1, (last - 4) // 3 + 1)}

    def rename(name):
        place, kind = name.removeprefix("model.").rsplit(".", 1)
        found = re.sub(r"^1\.sub\.(\d+)\.(RDB\d)\.(conv\d)\.0$", r"RRDB_trunk.\1.\2.\3", place)
        return f"{names.get(place, found)}.{kind}"

    return {rename(name): tensor for name, tensor in state.items()}


_BASIC = {"RRDB_trunk": "body", "trunk_conv": "conv_body", "HRconv": "conv_hr", "upconv": "conv_up", "RDB": "rdb"}


def basicsr_keys(state):
    """A state of the old ESRGAN under the keys of BasicSR, which Real-ESRGAN has."""
    renamed = {}
    for name, tensor in bsrgan_keys(state).items():
        for old, new in _BASIC.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed
