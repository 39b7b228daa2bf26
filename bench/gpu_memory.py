"""The peak of a GPU's memory, by NVIDIA's management library."""

import threading
import time


class PeakMemory:
    """The most memory that a GPU has had in use, beyond what it had when this was made.

    Of several GPUs, that whose use grew the most counts. Without an NVIDIA GPU, or without its library nvidia-ml-py, it
    is unknown.
    """

    def __init__(self) -> None:
        self.description = "unknown: nvidia-ml-py is not installed, or finds no GPU"
        """Names, memory, driver."""
        self._peaks: list[int] = []
        try:
            import pynvml

            pynvml.nvmlInit()
            self._gpus = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
            self._before = self._read()
            names = [f"{pynvml.nvmlDeviceGetName(gpu)}, {self._total_gb(gpu):.1f} GB" for gpu in self._gpus]
            self.description = f"{'; '.join(names)}; driver {pynvml.nvmlSystemGetDriverVersion()}"
        except Exception:  # ImportError, or one of the library's own
            return
        self._peaks = self._before
        threading.Thread(target=self._watch, daemon=True).start()

    def peak_mb(self) -> float | None:
        """The peak so far, in 10**6 bytes; None if it is unknown."""
        if not self._peaks:
            return None
        self._note()
        return max(peak - before for peak, before in zip(self._peaks, self._before, strict=True)) / 1e6

    def _watch(self) -> None:
        while True:
            self._note()
            time.sleep(0.005)

    def _note(self) -> None:
        self._peaks = [max(pair) for pair in zip(self._peaks, self._read(), strict=True)]

    def _read(self) -> list[int]:
        import pynvml

        return [int(pynvml.nvmlDeviceGetMemoryInfo(gpu).used) for gpu in self._gpus]

    def _total_gb(self, gpu: object) -> float:
        import pynvml

        return int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total) / 1e9
