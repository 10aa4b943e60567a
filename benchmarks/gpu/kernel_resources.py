"""Registers, spills and shared memory of the kernels over rows of logits, for sm_90 (H100, H200) without a GPU.

Command:  python -m benchmarks.gpu.kernel_resources
"""

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_kernel

from kd_core.kernels import logit_kernels
from kd_core.kernels.logit_operators import BLOCK, WARPS, reduced_block

TARGET = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
V, K = 151_936, 64
# Arguments that are no pointers to float32.
TYPES = {
    "row_stride": "i32", "out_stride": "i32", "n": "i32", "columns_ptr": "*i64", "slots_ptr": "*i64",
    "in_shard_ptr": "*i1", "out_ptr": "*bf16",
}  # fmt: skip
# A plain head, and one with everything.
FORMS = {"plain": {"BIAS": False, "CAP": False, "bias_ptr": None}, "bias and soft cap": {"BIAS": True, "CAP": True}}


def resources(name: str, form: str, T: int, statistics: dict[str, bool]) -> dict[str, Any]:
    """Compiles a kernel, and returns what one program of it takes."""
    kernel, lanes = getattr(logit_kernels, f"{name}_kernel"), triton.next_power_of_2(T)
    sizes = {"V": V, "T": T, "TEMPERATURES": lanes, "SPECIAL": K + 1, "WIDTH": triton.next_power_of_2(K + 1)}
    block = reduced_block(T, statistics["SPREAD"]) if name == "reduce_tail" else BLOCK
    every = {**sizes, "BLOCK": block, **FORMS[form], **statistics}
    constants = {argument: value for argument, value in every.items() if argument in kernel.arg_names}
    signature = {a: "constexpr" if a in constants else TYPES.get(a, "*fp32") for a in kernel.arg_names}
    # Pointers and row strides are multiples of 16, as the launcher finds them.
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, argument in enumerate(kernel.arg_names)
        if argument.endswith(("_ptr", "_stride")) and argument not in constants
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = compile_kernel(source, target=TARGET, options={"num_warps": 4 if name == "mark_support" else WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {kind: int(number) for kind, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {
        "kernel": name,
        "form": form,
        "temperatures": T,
        **statistics,
        "registers": used["REG"],
        # Registers that do not fit are spilled to the stack.
        "spilled_bytes": used["STACK"] + used["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        # What keeps a store behind the loads of other warps from the same memory.
        "barriers": len(re.findall(r"\b(?:gpu|ttg)\.barrier", compiled.asm["ttgir"])),
    }


def main() -> None:
    """Prints a line of JSON for each kernel in each of its uses: training, evaluation, and calibration at 15 τ."""
    for form in FORMS:
        uses = [("mark_support", 1, {}), ("write_dlogits", 1, {}), ("write_dlogits", 2, {})]
        uses += [("reduce_tail", T, {"SUM": mean, "SPREAD": False}) for T in (1, 2, 3, 15) for mean in (False, True)]
        uses += [("reduce_tail", 1, {"SUM": False, "SPREAD": True})]
        for name, T, statistics in uses:
            print(json.dumps(resources(name, form, T, statistics)))


if __name__ == "__main__":
    main()
