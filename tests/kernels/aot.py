"""Compile a kernel for a GPU that is not here, and read what it needs from the machine code."""

import re
import subprocess
import tempfile
from pathlib import Path

TARGETS = (75, 80, 86, 89, 90, 100, 120)
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB a program may use


def compile_variant(aot, variant, target, divisible=True):
    """Compile one variant; return {"registers", "spills", "shared"} (bytes for the last two)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    dtype = "fp16" if target == 75 else "bf16"  # sm_75 has no bfloat16 instructions
    variant = dict(variant)
    options = {k: variant.pop(k) for k in ("num_warps", "num_stages", "enable_fp_fusion")
               if k in variant}  # fmt: skip
    options.setdefault("enable_fp_fusion", True)  # as launch() does
    constant_names = [aot.kernel.arg_names[p.num] for p in aot.kernel.params if p.is_constexpr]
    runtime = [name for name in aot.kernel.arg_names if name not in constant_names]
    types = aot.types.replace("T", dtype).split()
    assert len(types) == len(runtime), (aot.kernel.__name__, len(types), runtime)
    signature = dict(zip(runtime, types, strict=True))
    assert set(constant_names) <= set(variant), (aot.kernel.__name__, constant_names)
    for name in variant:
        signature[name] = "constexpr"
    signature = {name: signature[name] for name in aot.kernel.arg_names}
    # What a launch finds out about real tensors: aligned addresses, and rows of a multiple of 16.
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if divisible and (kind.startswith("*") or name.endswith(("_stride", "_t", "_h", "width")))
    }
    source = ASTSource(aot.kernel, signature, constexprs=variant, attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return resource_usage(compiled.asm["cubin"]) | {"shared": compiled.metadata.shared}


def resource_usage(cubin):
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", text)[1])
    # Registers that did not fit go to local memory, as does an array indexed at run time.
    local = int(re.search(r"LOCAL:(\d+)", text)[1]) + int(re.search(r"STACK:(\d+)", text)[1])
    return {"registers": registers, "spills": local}
