"""``python -m sdonnx``, and the script ``sdonnx``: the command line."""

import os
import sys


def main() -> None:
    """Run the command line; a signal also ends it while libraries load."""
    try:
        from sdonnx.cli.signals import SIGNALS

        SIGNALS.exit_at_once()
    except KeyboardInterrupt:
        os.write(2, b"stopped\n")
        os._exit(130)
    from sdonnx_runtime.errors import SdonnxError
    from sdonnx_runtime.libraries import required

    try:
        with required("pip install --force-reinstall sdonnx"):
            from sdonnx.cli.app import main as run
    except SdonnxError as error:
        sys.exit(f"error: {error}")
    run()


if __name__ == "__main__":
    main()
