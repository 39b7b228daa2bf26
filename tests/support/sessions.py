"""Written graphs run by ONNX Runtime's CPU provider, as they are."""

import numpy as np
import onnx_ir as ir
import onnxruntime


def open_as_written(model, level="ORT_DISABLE_ALL"):
    """A session of the CPU's; the graph of one run is not worth optimizing."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def run_as_written(model, feeds, level="ORT_DISABLE_ALL"):
    """The outputs of a graph."""
    return open_as_written(model, level).run(None, {name: np.asarray(value) for name, value in feeds.items()})
