"""Convert pictogram's U-Net to OpenVINO, and quantize it to int8 on its own trajectories.

python bench/openvino_pictogram.py DIR                          # DIR/fp32/unet.xml, DIR/int8/unet.xml
python bench/quality.py --unet DIR/int8/unet.xml --reference pictogram
"""

import argparse
from pathlib import Path

import openvino_models
from quality import FIRST_SEED, Judge
from sdonnx_models import DEFAULT

import sdonnx
from sdonnx.benchmark.worker import measure_image
from sdonnx.loading import find_model


def unet_inputs(package: str, images: int) -> list[openvino_models.Feeds]:
    """Record the U-Net's inputs for some of the judge's captions, with seeds that the judge does not use."""
    opened = sdonnx.Package.open(find_model(package))
    pipe = sdonnx.Pipeline(opened)
    requests = [pipe.resolve(case.caption, seed=case.seed - FIRST_SEED).request for case in Judge().cases(images)]
    runs = [measure_image(opened, request, {"device": "cpu"}) for request in requests]
    return [call.inputs for run in runs for call in run.calls["unet"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--images", type=int, default=12, help="number of images to calibrate on")
    args = parser.parse_args()
    source, target = (args.directory / precision / "unet.xml" for precision in ("fp32", "int8"))
    openvino_models.convert(Path(__file__).parents[1] / "models" / "pictogram" / "checkpoint", "unet", source)
    openvino_models.quantize(source, unet_inputs(DEFAULT, args.images), target)
    print(f"{target}: pictogram's U-Net in int8")


if __name__ == "__main__":
    main()
