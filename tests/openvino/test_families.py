"""Images of every family on OpenVINO, in float32: those of the CPU provider."""

import numpy as np
import pytest
from PIL import Image
from support import families
from support.drawing import OnBoth
from support.images import disc, photograph

PHOTOGRAPH = photograph()
DEPTH = Image.fromarray(np.random.default_rng(3).integers(0, 60000, (50, 70)).astype(np.uint16))
REPAINTED = {"image": PHOTOGRAPH, "mask_image": disc()}
SAME_GRAPHS = ("sd2 768", "sd-turbo")
"""Other settings of sd2 base. The inpainting models of sd2 and sdxl have their graphs with sd1 inpaint's input."""

CASES = {
    **{name: (make, {}) for name, make in families.TEXT_TO_IMAGE.items() if name not in SAME_GRAPHS},
    "sd1 inpaint": (families.WITH_IMAGES["sd1 inpaint"], REPAINTED),
    "pix2pix": (families.WITH_IMAGES["pix2pix"], {"image": PHOTOGRAPH}),
    "refiner": (families.refiner, {"image": PHOTOGRAPH, "strength": 0.5}),
    "depth": (families.depth, {"image": PHOTOGRAPH, "depth_image": DEPTH, "strength": 0.6}),
    "lcm": (families.lcm, {}),
}


@pytest.fixture(scope="module")
def exported(export_once, tmp_path_factory):
    """A function that exports a family's pipeline, saved as in tests/parity, so that it is exported once for both."""
    folder = tmp_path_factory.mktemp("families")

    def get(name):
        place = folder / name.replace(" ", "-")
        if not place.exists():
            CASES[name][0]().save_pretrained(place / "directory")
            export_once(place / "directory", place / "package")
        return place / "package"

    return get


@pytest.mark.usefixtures("openvino")
@pytest.mark.parametrize("name", CASES)
def test_a_family_draws_what_the_cpu_provider_does(exported, name):
    with OnBoth(exported(name)) as package:
        package.assert_same(**CASES[name][1])


@pytest.mark.usefixtures("openvino")
def test_a_refiner_goes_on_where_the_base_model_stops(exported):
    with OnBoth(exported("sdxl"), refiner=exported("refiner")) as package:
        package.assert_same(refiner_start=0.5)
