"""What ``sdonnx serve`` was told."""

from dataclasses import dataclass, field
from pathlib import Path

LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Names by which a machine reaches itself."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a server, which stay as they are while it runs."""

    packages: tuple[Path, ...]
    """Directories of packages, the default model first."""
    model_folders: tuple[Path, ...] = ()
    """Directories whose subdirectories are packages; read again on request."""
    output: Path = field(default_factory=lambda: Path("sdonnx-images"))
    """Directory of the finished images."""
    host: str = "127.0.0.1"
    port: int = 7860
    token: str | None = None
    """What clients have to send, as Bearer token, as password of Basic, or in the page's cookie."""
    allowed_hosts: tuple[str, ...] = ()
    """Further host names by which clients may address the server."""
    cors: tuple[str, ...] = ()
    """Origins of pages that may use the server from a browser, such as ``https://lite.koboldai.net``."""
    lora_folder: Path | None = None
    embedding_folder: Path | None = None
    wildcard_folder: Path | None = None
    styles: Path | None = None
    """AUTOMATIC1111's styles.csv; read again on each request that names a style."""
    device: str = "auto"
    compute: str = "auto"
    """What the device computes in, as of `sdonnx.load`."""
    threads: int | None = None
    cache: bool = True
    """Keep compiled graphs on disk, as of `sdonnx.load`."""
    memory: str = "auto"
    max_queued: int = 32
    """Jobs that may wait."""
    max_queued_pixels: int = 4 * 4096 * 4096
    """Pixels of the images that those jobs were given, unless one alone has more; 3 to 4 bytes each."""
    max_body: int = 64 << 20
    """Bytes of a request's body."""
    max_pixels: int = 4096 * 4096
    """Pixels of an image, given or generated."""
    max_prompt: int = 32_000
    """Characters of a prompt, as at OpenAI: parsing and encoding take time and memory in proportion."""
    max_steps: int = 200
    max_images: int = 64
    """Images of a job, or of a request that resizes some."""
    max_controls: int = 10
    """Control images of a job; AUTOMATIC1111's extension has 10 at most."""
    as_asked: bool = False
    """Whether distilled packages take more steps and guidance than they were made for."""
    log_prompts: bool = False
    safety: str = "off"
    """What is done with images that a safety checker flags: off, mark, blur or refuse."""
    provenance: bool = True
    """Whether images say in XMP that they are AI-generated."""
