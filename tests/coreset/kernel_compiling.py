"""Compile the Triton kernel that compresses for a GPU, without one."""

POINTERS = {
    "keys": "*bf16",
    "values": "*bf16",
    "mass": "*fp32",
    "valid": "*i1",
    "bound": "*fp32",
    "centre": "*fp32",
    "roots": "*fp32",
    "noise": "*fp32",
    "source_out": "*i64",
    "valid_out": "*i1",
    "keys_out": "*bf16",
    "values_out": "*bf16",
    "weights_out": "*fp32",
}
NUMBERS = {"fold": "i64", "root": "fp32"}
SIZES = {"LIMIT": 3e38, "KEEP": True, "CLIPPED": True, "D": 80, "D_V": 128, "T": 16, "R": 16, "BLOCK": 32}


def compile_kernel(kernel, capability, *, without=(), warps=4, **sizes):
    """Compile one kernel: bytes of its binary.

    Args:
        kernel: jitted function.
        capability: of the GPU, 90 for 9.0.
        without: pointers that are None.
        warps: of a program.
        **sizes: numbers known to the compiler.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in without or name in SIZES:
            signature[name] = "constexpr"
            constants[place,] = None if name in without else (SIZES | sizes)[name]
            continue
        signature[name] = POINTERS.get(name) or NUMBERS.get(name, "i32")
        if name in POINTERS or name.startswith(("key_", "value_", "noise_")):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": 1})


def compile_slots(capability):
    """Compile the kernel with all that is optional: bytes of the binary."""
    from wildcat_kv.coreset.kernels.slots import bin_slots

    return len(compile_kernel(bin_slots, capability).asm["cubin"])
