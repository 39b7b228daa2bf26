"""Images that OpenVINO draws, compared with those of the CPU provider."""

from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
from sdonnx_runtime.execution.session import Session

import sdonnx
from support.reference import psnr

SMALL = {"prompt": "a red apple", "seed": 11, "width": 64, "height": 64, "num_inference_steps": 2}
"""A request of two steps."""


@contextmanager
def node_assignments():
    """Give the list of the node assignments of all graphs that are opened meanwhile."""
    recorded, use = [], Session._use

    def recording(self, opened):
        recorded.append(opened.assignment)
        use(self, opened)

    with patch.object(Session, "_use", recording):
        yield recorded


class OnBoth:
    """A package on OpenVINO and on the CPU provider; what is loaded stays so."""

    def __init__(self, package, *, compute="f32", **options):
        given = {"threads": 1, "keep_loaded": True, **options}
        self.openvino = sdonnx.load(package, device="openvino", compute=compute, **given)
        self.cpu = sdonnx.load(package, device="cpu", **given)

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.openvino.close()
        self.cpu.close()

    def assert_same(self, least=60, **asked):
        """Check that both draw the same images, within ``least`` dB, and that OpenVINO runs all that computes.

        Returns OpenVINO's result.
        """
        request = sdonnx.Request(**{**SMALL, "guidance_scale": 5.0, **asked})
        with node_assignments() as assignments:
            found = self.openvino.generate(request)
        assert all(each.on_device and not each.on_cpu for each in assignments)
        wanted = self.cpu.generate(request)
        assert len(found.images) == len(wanted.images) == request.num_images
        for image, other in zip(found.images, wanted.images, strict=True):
            assert np.asarray(other).std() > 5, "a flat image would equal anything flat"
            assert psnr(image, other) >= least
        return found
