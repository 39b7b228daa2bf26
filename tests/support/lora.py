"""Files of adapters with random weights, in each of the ways that trainers write them."""

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import save_file

from support.ldm import ldm_unet

RANK = 3
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
KERNELS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv")


def encoders(pipe):
    """By kohya's names of them."""
    second = getattr(pipe, "text_encoder_2", None)
    return {"te": pipe.text_encoder} if second is None else {"te1": pipe.text_encoder, "te2": second}


def layers(module, ends):
    """The layers whose names end so."""
    return {name: layer for name, layer in module.named_modules() if name.endswith(tuple(ends))}


def low_rank(layer, seed, *, rank=RANK):
    """Random factors ``up`` and ``down`` of a layer's change, of the size of its weight."""
    generator = torch.Generator().manual_seed(seed)
    out, inputs, *kernel = layer.weight.shape
    spread = layer.weight.std() / rank**0.5
    up = torch.randn(out, rank, *[1] * len(kernel), generator=generator) * spread
    return up, torch.randn(rank, inputs, *kernel, generator=generator) * 0.7


def kohya(pipe, *, kernels=False, original=False, text=True):
    """kohya's; with ``original`` the U-Net's layers are called as in the original layout."""
    state = {}
    chosen = layers(pipe.unet, LINEAR + (KERNELS if kernels else ()))
    places = {name: f"lora_unet_{name}" for name in chosen}
    if original:
        places = {name: f"lora_unet_{ldm_unet(pipe.unet, name + '.')[:-1]}" for name in chosen}
    named = [(places[name], layer) for name, layer in chosen.items()]
    for prefix, encoder in encoders(pipe).items() if text else ():
        named += [(f"lora_{prefix}_{name}", layer) for name, layer in layers(encoder, TEXT).items()]
    for seed, (name, layer) in enumerate(named):
        up, down = low_rank(layer, seed)
        name = name.replace(".", "_")
        state |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down}
        state[f"{name}.alpha"] = torch.tensor(2.0)  # diffusers knows no others for single layers of attention
    return state


def peft(pipe):
    """What diffusers saves today."""
    state = {}
    for seed, (name, layer) in enumerate(layers(pipe.unet, LINEAR + KERNELS).items()):
        up, down = low_rank(layer, seed)
        state |= {f"unet.{name}.lora_A.weight": down, f"unet.{name}.lora_B.weight": up}
    parts = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
    for prefix, encoder in encoders(pipe).items():
        for seed, (name, layer) in enumerate(layers(encoder, TEXT).items()):
            up, down = low_rank(layer, seed + 1000)
            name = f"{parts[prefix]}.{name}"
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    return state


def dora(pipe):
    """The same with a norm for each of the U-Net's outputs."""
    state = peft(pipe)
    for seed, name in enumerate(sorted(name for name in state if name.startswith("unet.") and ".lora_B." in name)):
        up = state[name]
        norms = torch.rand(len(up), generator=torch.Generator().manual_seed(seed)) + 0.7
        norms = norms.reshape(1, -1, 1, 1) if up.ndim == 4 else norms
        state[name.replace("lora_B.weight", "lora_magnitude_vector")] = norms
    return {name: value for name, value in state.items() if name.startswith("unet.")}


def old_diffusers(pipe):
    """What diffusers saved before: attention processors, and text layers of another name."""
    state = {}
    for seed, (name, layer) in enumerate(layers(pipe.unet, ("to_q", "to_k", "to_v", "to_out.0")).items()):
        up, down = low_rank(layer, seed)
        attention, _, which = name.removesuffix(".0").rpartition(".")
        place = f"unet.{attention}.processor.{which}_lora"
        state |= {f"{place}.down.weight": down, f"{place}.up.weight": up}
    for seed, (name, layer) in enumerate(layers(pipe.text_encoder, TEXT[:4]).items()):
        up, down = low_rank(layer, seed + 1000)
        place = f"text_encoder.{name}.lora_linear_layer"
        state |= {f"{place}.down.weight": down, f"{place}.up.weight": up}
    return state


def save(state, path, dtype=torch.float32, metadata=None):
    """In one file; alphas stay as they are."""
    save_file({name: value.to(dtype).contiguous() for name, value in state.items()}, path, metadata)
    return path


MODULES = {
    "locon": (LoConModule, {}),
    "locon with a kernel in the middle": (LoConModule, {"use_tucker": True}),
    "dora of outputs": (LoConModule, {"weight_decompose": True, "wd_on_out": True}),
    "dora of inputs": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "loha": (LohaModule, {}),
    "loha with kernels": (LohaModule, {"use_tucker": True}),
    "loha, decomposed": (LohaModule, {"weight_decompose": True}),
    "lokr": (LokrModule, {"factor": 4}),
    "lokr of one full matrix": (LokrModule, {"factor": 2, "lora_dim": 64}),
    "lokr of low rank on both sides": (LokrModule, {"factor": 16, "decompose_both": True, "lora_dim": 2}),
    "lokr with kernels": (LokrModule, {"factor": 4, "use_tucker": True}),
    "lokr, full": (LokrModule, {"factor": 4, "full_matrix": True}),
    "lokr, decomposed": (LokrModule, {"factor": 4, "weight_decompose": True}),
}
"""LyCORIS's kinds."""


def lycoris_network(pipe, kind):
    """LyCORIS's modules put into a U-Net, in whose forward passes they are from then on; their tensors."""
    state = {}
    for seed, (name, layer) in enumerate(layers(pipe.unet, LINEAR + KERNELS).items()):
        module = lycoris(layer, kind, seed).eval()
        module.apply_to()
        tensors = {key: value.clone() for key, value in module.state_dict().items()}
        state |= {f"lora_unet_{name.replace('.', '_')}.{key}": value for key, value in tensors.items()}
    return state


def lycoris(layer, kind, seed):
    """One of LyCORIS's modules of a layer, with random weights."""
    module, options = MODULES[kind]
    torch.manual_seed(seed)
    made = module("lora_unet_x", layer, **{"lora_dim": RANK, "alpha": 2.0, **options})
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif name != "scalar" and not name.startswith("org"):
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return made
