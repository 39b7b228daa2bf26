"""Open a file of tensors of either format, which its content tells and not its name."""

from pathlib import Path

from sdonnx_runtime.errors import RequestError
from sdonnx_runtime.files.kinds import describe_file
from sdonnx_runtime.files.safetensors import is_safetensors, open_safetensors
from sdonnx_runtime.files.tensor_file import TensorFile
from sdonnx_runtime.files.torch_file import is_torch_file, open_torch_file


def open_tensors(path: Path) -> TensorFile:
    """Open a safetensors file or one of ``torch.save``.

    Raises:
        RequestError: it is missing, damaged, hostile, or anything else, which the message names.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise RequestError(f"{path} can't be read ({error.strerror or error}); give an existing file") from None
    if is_safetensors(head):
        return open_safetensors(path)
    if is_torch_file(head):
        return open_torch_file(path)
    what = describe_file(path) or "is not a file of tensors; give a .safetensors file, or one of torch.save"
    raise RequestError(f"{path} {what}")
