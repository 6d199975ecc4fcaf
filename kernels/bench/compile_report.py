"""Compile every kernel for sm_80, sm_90 and sm_100, no GPU needed, and print registers, spills and shared memory of
each, how it multiplies, and how many of its loads are 16 bytes wide.

    python kernels/bench/compile_report.py [--csv]

The shapes are those of GPT-2-small (up to 37 destinations of a layer, k 64) and an 8B Llama (49 destinations, d 4096,
k 128, up to 1057 sources). They share the tiles of mixes and projections, which depend on J, dtype and precision alone;
d and k are multiples of 16 in both. Attention has 32 keys of k 64 or 64 of k 128 in a tile.
Variants: `full`, as the engine runs them: all optional operands given, masks that start anywhere and whose rows are of
any length; `aligned`: masks that start at multiples of 16 bytes, in rows of multiples of 16; `bare`: no optional
operands; `ones`: every size is 1, which Triton compiles in as a constant.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product

import torch
import triton  # type: ignore[import-untyped]
from oakernels.attention import attend_kernel, attend_tiles
from oakernels.attention_backward import attend_backward_kernel, attend_backward_tiles
from oakernels.masked_mix import mix_kernel, mix_tiles
from oakernels.masked_mix_backward import MIX_BACKWARD_TILES, mix_backward_kernel
from oakernels.projection import PROJECT_BACKWARD_TILES, project_backward_kernel
from oakernels.rms import rms_backward_kernel, rms_kernel, rms_tiles
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.backends.nvidia.compiler import get_ptxas  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

KERNELS = {
    "mix": mix_kernel,
    "mix_backward": mix_backward_kernel,
    "project_backward": project_backward_kernel,
    "attend": attend_kernel,
    "attend_backward": attend_backward_kernel,
    "rms": rms_kernel,
    "rms_backward": rms_backward_kernel,
}
SIZES = {
    "mix": (16, 64),
    "mix_backward": (1,),
    "project_backward": (1,),
    **dict.fromkeys(("attend", "attend_backward"), (32, 64)),
    **dict.fromkeys(("rms", "rms_backward"), (768, 4096)),
}
ARITHMETIC = {"ieee": (torch.float32, "ieee"), "tf32": (torch.float32, "tf32"), "bf16": (torch.bfloat16, "ieee")}
WITHOUT_PRODUCTS = ("rms", "rms_backward")
OPTIONAL = {"mix": ("rstd",), "project_backward": ("bias",), "attend": ("softcap",), "attend_backward": ("softcap",)}
SUMS = ("rstd", "masks", "partial")  # fp32 whatever the dtype
POINTERS = ("x", "base", "delta", "dx", "d_delta", "y", "dy", "weight", "bias", *SUMS)
POINTERS += ("z", "dz", "q", "dq", "dk", "dv", "key", "value", "clean_keys", "clean_values")
OF_NO_DTYPE = {"first": "*i64", "hidden": "*i1", "eps": "fp32", "scale": "fp32", "softcap": "fp32"}
ALIGNED = ("d", "k", "n")
ARCHITECTURES = (80, 90, 100)
FAILED = "does not compile"


@dataclass(frozen=True)
class Build:
    """A kernel as one launch would have it compiled."""

    kernel: str
    size: int  # destinations of a program, or 1; of attention its keys; of the RMS scale its numbers
    arithmetic: str
    arch: int
    variant: str  # full, aligned, bare or ones


@dataclass(frozen=True)
class Report:
    """What became of it; registers of a thread, shared memory of a block."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    products: str  # wgmma, tcgen05 (sm_100), mma or fma; none
    wide_loads: int  # of 16 bytes, in the code as it stands
    loads: int  # from global memory, all
    to_nearest: bool  # factors are rounded to TF32, not cut off


def builds() -> list[Build]:
    """What the report has a line or a part of one for."""
    each = [
        (kernel, size, arithmetic)
        for kernel, sizes in SIZES.items()
        for size, arithmetic in product(sizes, ARITHMETIC)
        if not (kernel in WITHOUT_PRODUCTS and arithmetic == "tf32")
    ]
    full = [Build(*kind, arch, "full") for kind, arch in product(each, ARCHITECTURES)]
    with_products = [kernel for kernel in KERNELS if kernel not in WITHOUT_PRODUCTS]
    variants = product(with_products, ("aligned", "bare", "ones"))
    return full + [Build(kernel, max(SIZES[kernel]), "tf32", 90, variant) for kernel, variant in variants]


def tiles(build: Build) -> dict[str, int]:
    """The build's tile sizes and launch options."""
    dtype, precision = ARITHMETIC[build.arithmetic]
    return {
        "mix": lambda: mix_tiles(build.size, dtype, precision),
        "mix_backward": lambda: MIX_BACKWARD_TILES,
        "project_backward": lambda: PROJECT_BACKWARD_TILES,
        "attend": lambda: attend_tiles(20, build.size, 2 * build.size, dtype, precision),
        "attend_backward": lambda: attend_backward_tiles(build.size, 2 * build.size, dtype, precision),
        "rms": lambda: rms_tiles(build.size),
        "rms_backward": lambda: rms_tiles(build.size),
    }[build.kernel]()


def compile_one(build: Build) -> Report:
    """Compile to PTX with Triton, and assemble that; what the compiler refuses is said, and in the report."""
    kernel, (dtype, precision) = KERNELS[build.kernel], ARITHMETIC[build.arithmetic]
    constants = {
        **tiles(build),
        "BASE_PER_TOKEN": build.variant == "full",
        "ADD": build.variant == "full",
        "PRECISION": precision,
        "UP": False,
    }
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    options["enable_fp_fusion"] = True
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
        elif build.variant == "bare" and name in OPTIONAL.get(build.kernel, ()):
            signature[name], values[index,] = "constexpr", None
        elif name in POINTERS:
            element = "fp32" if name in SUMS or dtype == torch.float32 else "bf16"
            signature[name] = f"*{element}"
            if name != "masks" or build.variant == "aligned":
                attributes[index,] = [["tt.divisibility", 16]]
        elif name in OF_NO_DTYPE:
            signature[name] = OF_NO_DTYPE[name]
        elif build.variant == "ones" and not kernel.params[index].do_not_specialize:
            signature[name], values[index,] = "constexpr", 1
        else:
            signature[name] = "i32"
            if name in ALIGNED or (build.variant == "aligned" and name in ("mask_stride", "destination_stride")):
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=values, attrs=attributes)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=options)
    except RuntimeError as error:
        print(f"{build}: {error}", file=sys.stderr)
        return Report(0, 0, 0, FAILED, 0, 0, False)
    registers, spilled = _assemble(compiled.asm["ptx"], build.arch)
    ptx = compiled.asm["ptx"]
    kinds = {"wgmma.mma": "wgmma", "tcgen05.mma": "tcgen05", "mma.sync": "mma"}
    without = "none" if build.kernel in WITHOUT_PRODUCTS else "fma"
    products = next((kind for instruction, kind in kinds.items() if instruction in ptx), without)
    wide, loads = _loads(ptx)
    return Report(registers, spilled, compiled.metadata.shared, products, wide, loads, "cvt.rna.tf32.f32" in ptx)


def _loads(ptx: str) -> tuple[int, int]:
    """Instructions that load 16 bytes a thread from global memory, and all that load from there."""
    copied = re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)
    loaded = re.findall(r"ld\.global\S*", ptx)
    wide = sum(int(size, 0) == 16 for size in copied) + sum(".v4.b32" in name for name in loaded)
    return wide, len(copied) + len(loaded)


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers of a thread and the bytes it spills, as ptxas reports them."""
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert target is not None
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        command = [get_ptxas(arch).path, "-v", "--gpu-name", target[1], path, "-o", os.devnull]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    assert registers is not None and spilled is not None, log
    return int(registers[1]), int(spilled[1])


def main() -> None:
    """The command line: compile everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", action="store_true", help="comma-separated, not a Markdown table")
    markdown = not parser.parse_args().csv
    todo = builds()
    with ProcessPoolExecutor(2) as pool:
        rows = [
            {**asdict(build), **asdict(report)} for build, report in zip(todo, pool.map(compile_one, todo), strict=True)
        ]
    if markdown:
        print("registers / bytes spilled / KiB of shared memory / how products are made / loads of 16 bytes, of all")
        print("| kernel | size | arithmetic | variant |" + "".join(f" sm_{arch} |" for arch in ARCHITECTURES))
        print("|" + "---|" * (4 + len(ARCHITECTURES)))
        lines: dict[tuple[str, ...], dict[int, str]] = {}
        for row in rows:
            key = tuple(str(row[name]) for name in ("kernel", "size", "arithmetic", "variant"))
            entry = f"{row['registers']} / {row['spilled_bytes']} / {row['shared_bytes'] / 1024:g} / {row['products']}"
            entry += f" / {row['wide_loads']}, {row['loads']}"
            lines.setdefault(key, {})[row["arch"]] = entry
        for key, entries in lines.items():
            print("| " + " | ".join((*key, *(entries.get(arch, "") for arch in ARCHITECTURES))) + " |")
    else:
        writer = csv.DictWriter(sys.stdout, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
