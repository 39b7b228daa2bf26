"""Stable Diffusion on ONNX Runtime, without PyTorch.

    import sdonnx

    pipe = sdonnx.load("my-package")
    result = pipe.generate("a photograph of an astronaut riding a horse", seed=32)
    result.images[0].save("horse.png")

General layout:

    load                          opens a package, by directory, bundled name or Hub id
    Package, Pipeline             what it opens, and what generates
    Request, Control, IPAdapter, Lora, FAST  what to generate
    Stream, Progress              one generation, step by step
    Result, Timings, save_png     its images
    make_grid                     all of them in one
    load_upscaler, Upscaler       opens an upscaler's package, and enlarges images with it
    Safety                        what a safety checker says of one
    Plan, ComponentPlan           predicted memory and time
    SdonnxError                   the root of RequestError, PackageError, DeviceError, SafetyError, ExportError
"""

TYPE_CHECKING = False  # as typing's, which is not imported: Ctrl-C must find little to break when a process starts
if TYPE_CHECKING:
    from sdonnx.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> object:
        """Import the public names with the first of them."""
        from importlib import import_module

        api = import_module("sdonnx.api")
        globals().update({each: getattr(api, each) for each in ("__all__", *api.__all__)})
        if name not in globals():
            raise AttributeError(f"module 'sdonnx' has no attribute '{name}'")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})


del TYPE_CHECKING
