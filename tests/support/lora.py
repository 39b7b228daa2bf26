"""Files of adapters with random weights, in each of the ways that trainers write them."""

import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from lycoris.modules.full import FullModule
from lycoris.modules.glora import GLoRAModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from sdonnx_runtime.adapters.lora import Lora
from sdonnx_runtime.adapters.merging import match_loras

from support.ldm import ldm_unet

RANK = 3
LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "time_emb_proj")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
NORMS = ("norm", "norm1", "norm2", "norm3", "conv_norm_out")
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


def merged(state, path, *, scale=1.0, **options):
    """A U-Net's state dict with a file merged into it, and the names of what that changed."""
    adapters = match_loras("the model", {"unet": state.keys()}, [Lora(path=path, scale=scale)], **options)
    found = dict(state)
    for name, deltas in adapters.deltas.get("unet", {}).items():
        values = state[name].numpy().copy()
        values = values if name.endswith(".bias") else values.reshape(len(values), -1)
        for delta, each in deltas:
            values = delta.apply(values, each)
        found[name] = torch.from_numpy(values).reshape(state[name].shape)
    return found, set(adapters.deltas.get("unet", {}))


def save(state, path, dtype=torch.float32, metadata=None):
    """In one file, converted to a dtype unless that is None."""
    saved = {name: value.to(value.dtype if dtype is None else dtype) for name, value in state.items()}
    save_file(
        {name: value.clone(memory_format=torch.contiguous_format) for name, value in saved.items()}, path, metadata
    )
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
    "lora with rslora": (LoConModule, {"rs_lora": True, "lora_dim": 4}),
    "lora with a trained scalar": (LoConModule, {"use_scalar": True}),
    "glora": (GLoRAModule, {}),
    "full": (FullModule, {}),
    "oft": (DiagOFTModule, {}),
    "oft with a constraint": (DiagOFTModule, {"constraint": 2**-7}),
    "oft, rescaled": (DiagOFTModule, {"rescaled": True}),
    "boft": (ButterflyOFTModule, {"lora_dim": 8}),
    "boft, rescaled, with a constraint": (ButterflyOFTModule, {"lora_dim": 8, "rescaled": True, "constraint": 2**-7}),
    "ia3 of outputs": (IA3Module, {}),
    "ia3 of inputs": (IA3Module, {"train_on_input": True}),
}
"""LyCORIS's kinds for linear and conv layers."""


def lycoris_network(pipe, kind):
    """LyCORIS's modules put into a U-Net, in whose forward passes they are from then on; their tensors."""
    state = {}
    ends = {"norm": NORMS, "full": ("conv_in", "conv_out", "conv1", "to_q", "linear_1")}.get(kind, LINEAR + KERNELS)
    for seed, (name, layer) in enumerate(layers(pipe.unet, ends).items()):
        module = lycoris(layer, kind, seed).eval()
        if kind != "full":
            module.apply_to()
        tensors = {key: value.clone() for key, value in module.state_dict().items()}
        state |= {f"lora_unet_{name.replace('.', '_')}.{key}": value for key, value in tensors.items()}
    return state


def lycoris(layer, kind, seed, dtype=torch.float32):
    """One of LyCORIS's modules of a layer, with random weights that are numbers of a dtype."""
    module, options = (NormModule, {}) if kind == "norm" else MODULES[kind]
    torch.manual_seed(seed)
    made = module("lora_unet_x", layer, **{"lora_dim": RANK, "alpha": 2.0, **options})
    if kind == "full":
        made.apply_to()  # its tensors are differences from then on
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if kind == "full":
                parameter.add_((0.3 * torch.randn_like(parameter)).to(dtype).float())
            elif name == "scalar":
                parameter.fill_(2.0)
            elif "dora_scale" in name or "rescale" in name:
                parameter.copy_((parameter * (1 + 0.2 * torch.rand_like(parameter))).to(dtype))
            elif not name.startswith("org"):
                parameter.copy_((torch.randn_like(parameter) * 0.3).to(dtype))
    return made
