"""What is inferred from config files equals what diffusers' pipelines make of the same files."""

import inspect
import json

import diffusers
import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from sdonnx_runtime.packages.manifest import Source
from sdonnx_runtime.packages.optimum_layout import PIPELINES, infer_manifest
from support import families

OLD = {
    "DDIM": lambda: DDIMScheduler(steps_offset=0, clip_sample=True),
    "PNDM": lambda: PNDMScheduler(steps_offset=2, skip_prk_steps=False),
    "Euler": lambda: EulerDiscreteScheduler(steps_offset=0),
}
CHANNELS = {"Inpaint": 9, "InstructPix2Pix": 8, "Depth2Img": 5}


def tiny_unet(pipeline, **config):
    channels = next((count for task, count in CHANNELS.items() if task in pipeline), 4)
    make = families.xl_unet if "XL" in pipeline else families.unet
    unet = make(in_channels=channels, sample_size=16)
    unet.register_to_config(**config)
    return unet


def save(root, pipeline, unet, scheduler):
    """Write the config files of optimum's layout."""
    encoders = ("text_encoder", "text_encoder_2") if "XL" in pipeline else ("text_encoder",)
    configs = {
        "model_index.json": {"_class_name": pipeline},
        "unet/config.json": dict(unet.config),
        "vae_decoder/config.json": {"block_out_channels": [32, 64, 64, 64]},
        **{f"{name}/config.json": {"num_hidden_layers": 2} for name in encoders},
    }
    for path, config in configs.items():
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text(json.dumps(config))
    scheduler.save_pretrained(root / "scheduler")


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_each_pipeline_repairs_its_configs_as_in_diffusers(tmp_path, pipeline):
    """Stable Diffusion's set clip_sample, steps_offset or sample_size in old configs; the others leave theirs."""
    kind = getattr(diffusers, pipeline)
    absent = dict.fromkeys(set(inspect.signature(kind).parameters) - {"requires_safety_checker"})
    for (name, make), version in zip(OLD.items(), ("0.8.1", "0.9.0", "0.10.2"), strict=True):
        unet, scheduler, root = tiny_unet(pipeline, _diffusers_version=version), make(), tmp_path / name
        root.mkdir()
        save(root, pipeline, unet, scheduler)
        checks = {"requires_safety_checker": False} if "requires_safety_checker" in absent else {}
        pipe = kind(**{**absent, "unet": unet, "scheduler": scheduler, **checks})
        found = infer_manifest(root, source=Source(name="test", exporter="optimum"))
        for key in ("clip_sample", "skip_prk_steps", "steps_offset"):
            assert found.scheduler.get(key) == pipe.scheduler.config.get(key, found.scheduler.get(key)), (name, key)
        assert found.defaults.size == pipe.unet.config.sample_size * 8, name
