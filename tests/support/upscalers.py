"""Tiny random upscalers."""

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn


class Compact(nn.Module):
    """Real-ESRGAN's SRVGGNetCompact: convs with PReLU, and what they add to the enlarged image."""

    def __init__(self, *, scale, width=8, convs=2):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1), nn.PReLU(width)]
        for _ in range(convs):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.ModuleList([*layers, nn.Conv2d(width, 3 * scale**2, 3, padding=1)])
        self.scale = scale

    def forward(self, image):
        values = image
        for layer in self.body:
            values = layer(values)
        return nn.functional.pixel_shuffle(values, self.scale) + nn.functional.interpolate(
            image, scale_factor=self.scale, mode="nearest"
        )

    def upscale(self, image):
        """Upscale an RGB image of Pillow's."""
        values = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]
        with torch.no_grad():
            upscaled = self(values)[0].clamp(0, 1).permute(1, 2, 0)
        return Image.fromarray((upscaled * 255).round().numpy().astype(np.uint8))


def compact(path, *, scale, seed=0):
    """Save the weights of one, and return it."""
    torch.manual_seed(seed)
    model = Compact(scale=scale).eval()
    model.body[-1].weight.data *= 16  # it changes the image visibly
    save_file(model.state_dict(), path)
    return model
