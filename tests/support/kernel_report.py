"""What runs where: of each target and family, the nodes without a kernel, and those that compute sizes and token ids.

PYTHONPATH=tests python -m support.kernel_report
"""

import sys
from collections import Counter

from sdonnx_export.models.components import COMPONENTS, build, components_in

from support.kernels import CUDA, DIRECTML, NEWEST, WEBGPU, assign
from support.published import SHALLOW, shallow_checkpoint

MADE_FOR = {"cuda": CUDA, "directml": DIRECTML, "webgpu": WEBGPU}


def main():
    """Print a line for each component of each family, for each target on its device and the generic one on all."""
    for target, provider in [*MADE_FOR.items(), *(("generic", each) for each in MADE_FOR.values())]:
        sys.stdout.write(f"\n{target} on {provider} ({NEWEST[provider]})\n")
        for family in SHALLOW:
            checkpoint = shallow_checkpoint(family)
            for name in components_in(checkpoint):
                part = checkpoint.parts[COMPONENTS[name].part]
                model = build(name, part, "fp32" if target == "generic" else "fp16", target=target)
                sys.stdout.write(describe(f"{family} {name}", model, provider))


def describe(label, model, provider):
    """Say how many nodes have no kernel, which are refused, and which compute sizes and token ids."""
    found = assign(model, provider)
    whole = f"  {label}: {len(model.graph)} nodes, {len(found.missing)} without a kernel; "
    lines = [f"{whole}of sizes and ids without one: {count(found.on_cpu)}, with one: {count(found.of_sizes)}"]
    return "".join(f"{line}\n" for line in (*lines, *(f"    {each}" for each in (*found.missing, *found.broken))))


def count(nodes):
    """How often each operator occurs."""
    found = Counter(each.split(" (")[0] for each in nodes)
    return " ".join(f"{found[name]} {name}" for name in sorted(found)) or "none"


if __name__ == "__main__":
    main()
