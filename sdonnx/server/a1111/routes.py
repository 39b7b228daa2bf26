"""The routes of AUTOMATIC1111's API."""

from collections.abc import Mapping

from starlette.routing import Route

from sdonnx.server.a1111 import extras, generate, listings, options, progress
from sdonnx.server.a1111.errors import Handler, answer_errors
from sdonnx.server.a1111.listings import constant

_GET: Mapping[str, Handler] = {
    "/sdapi/v1/cmd-flags": constant({}),
    "/sdapi/v1/embeddings": listings.embeddings,
    "/sdapi/v1/extensions": constant([]),
    "/sdapi/v1/face-restorers": constant([]),
    "/sdapi/v1/hypernetworks": constant([]),
    "/sdapi/v1/latent-upscale-modes": constant([{"name": "Latent"}]),
    "/sdapi/v1/loras": listings.loras,
    "/sdapi/v1/memory": listings.memory,
    "/sdapi/v1/options": options.get_options,
    "/sdapi/v1/progress": progress.get_progress,
    "/sdapi/v1/prompt-styles": listings.prompt_styles,
    "/sdapi/v1/realesrgan-models": constant([]),
    "/sdapi/v1/samplers": constant(listings.SAMPLERS),
    "/sdapi/v1/schedulers": constant(listings.SCHEDULERS),
    "/sdapi/v1/script-info": constant(listings.SCRIPT_INFO),
    "/sdapi/v1/scripts": constant(listings.SCRIPTS),
    "/sdapi/v1/sd-models": listings.sd_models,
    "/sdapi/v1/sd-modules": listings.sd_modules,
    "/sdapi/v1/sd-vae": listings.sd_vaes,
    "/sdapi/v1/upscalers": listings.upscalers,
    "/internal/pending-tasks": progress.pending_tasks,
    "/controlnet/control_types": listings.control_type_list,
    "/controlnet/model_list": listings.control_models,
    "/controlnet/module_list": constant(listings.CONTROL_MODULES),
    "/controlnet/settings": constant({"control_net_unit_count": 3}),
    "/controlnet/version": constant({"version": 2}),
}

_POST: Mapping[str, Handler] = {
    "/sdapi/v1/extra-batch-images": extras.extra_batch_images,
    "/sdapi/v1/extra-single-image": extras.extra_single_image,
    "/sdapi/v1/img2img": generate.img2img,
    "/sdapi/v1/interrogate": extras.interrogate,
    "/sdapi/v1/interrupt": progress.interrupt,
    "/sdapi/v1/options": options.post_options,
    "/sdapi/v1/png-info": extras.png_info,
    "/sdapi/v1/refresh-checkpoints": listings.refresh,
    "/sdapi/v1/refresh-embeddings": listings.refresh,
    "/sdapi/v1/refresh-loras": constant(None),
    "/sdapi/v1/refresh-vae": listings.refresh,
    "/sdapi/v1/reload-checkpoint": constant({}),
    "/sdapi/v1/skip": progress.skip,
    "/sdapi/v1/txt2img": generate.txt2img,
    "/sdapi/v1/unload-checkpoint": constant({}),
    "/controlnet/detect": extras.detect_controls,
    "/internal/progress": progress.task_progress,
}


def routes() -> list[Route]:
    """The routes, for `sdonnx.server.app`."""
    return [
        *(Route(path, answer_errors(handler), methods=["GET"]) for path, handler in _GET.items()),
        *(Route(path, answer_errors(handler), methods=["POST"]) for path, handler in _POST.items()),
    ]
