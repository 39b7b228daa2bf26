"""Models distilled to a few steps are known by their names, wherever they are opened from."""

import pytest
from sdonnx_export.checkpoints.few_steps import few_steps
from sdonnx_export.checkpoints.open import open_checkpoint
from support import families
from support.ldm import save_ldm


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("sd_turbo", 1),
        ("stabilityai/sd-turbo", 1),
        ("sd_xl_turbo_1.0_fp16", 1),
        ("sdxl_lightning_4step", 4),
        ("sdxl_lightning_1step_x0", 1),
        ("Hyper-SDXL-1step-Unet", 1),
        ("ByteDance/SDXL-Lightning", 4),
        ("realisticVisionV60B1_v51HyperVAE", 4),
        ("juggernautXL_hyper8StepV10", 8),
        ("jibMixRealisticXL_v10Lightning46Step", 4),
        ("turbo-labs/stable-diffusion-v1-5", None),
        ("hyperrealism_v30", None),
        ("hyper-realistic", None),
        ("sd_xl_base_1.0", None),
        ("v1-5-step2000", None),
    ],
)
def test_names_of_models_of_few_steps(name, steps):
    expected = {} if steps is None else {"num_inference_steps": steps, "guidance_scale": 1.0}
    assert few_steps(name) == expected


def test_names_tell_of_directories_of_hub_ids_and_of_files(tmp_path, monkeypatch):
    pipe = families.sd1()
    pipe.save_pretrained(tmp_path / "sd-turbo")
    save_ldm(pipe, tmp_path / "sd_turbo.safetensors")
    cache = tmp_path / "hub" / "models--ByteDance--SDXL-Lightning-4step"
    pipe.save_pretrained(cache / "snapshots" / "abc123")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    sources = {
        str(tmp_path / "sd-turbo"): 1,
        str(tmp_path / "sd_turbo.safetensors"): 1,
        "ByteDance/SDXL-Lightning-4step": 4,
    }
    for source, steps in sources.items():
        assert open_checkpoint(source).defaults == {"num_inference_steps": steps, "guidance_scale": 1.0}
