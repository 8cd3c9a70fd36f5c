"""Every kernel waits for the one before it: they are launched before that has ended (cuda/include/dependent.cuh).

Those that may read weights before it has, do so only if they are told (`early`), and wait all the same for the rest.
"""

import re

import pytest

from qdiff.ops._cuda_sources import cuda_source_dir

WAIT = "wait_for_kernel_before();"
UNLESS_EARLY = re.compile(r"wait_for_kernel_before_unless\((\w+)\.early\);")
KERNEL = re.compile(r"__global__[^{]*\(const __grid_constant__ Params (\w+)\)\s*\{")


def faults(source: str) -> list[str]:
    """What is wrong with the kernels of a source, none of which may look at its parameter before it waits."""
    source = re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)
    kernels = list(KERNEL.finditer(source))
    if len(kernels) != len(re.findall(r"\b__global__\b", source)):
        return ["a kernel with other parameters than `const __grid_constant__ Params`"]
    found = []
    for kernel in kernels:
        body = source[kernel.end() :]
        unless = UNLESS_EARLY.search(body)
        if unless and unless[1] == kernel[1] and UNLESS_EARLY.sub("", source).count(WAIT):
            before, wait = body[: unless.start()], WAIT
        else:
            before, wait, _ = body.partition(WAIT)
        if not wait or before.count("{") != before.count("}"):
            found.append("a kernel that does not wait, or not always")
        elif re.search(rf"\b({kernel[1]}|return)\b", before):
            found.append("a kernel that uses its parameter, or returns, before it waits")
    return found


@pytest.mark.parametrize("path", sorted(cuda_source_dir().glob("*.cu")), ids=lambda path: path.stem)
def test_kernels_wait_first(path):
    source = path.read_text(encoding="utf-8")
    assert "__global__" in source
    assert not faults(source)


@pytest.mark.parametrize(
    "body",
    [
        "{ use(p); }",
        "{ use(p.x); wait_for_kernel_before(); }",
        "{ if (threadIdx.x) { wait_for_kernel_before(); } use(p); }",
        "{ // wait_for_kernel_before();\n use(p); }",
        "{ if (blockIdx.x) return; wait_for_kernel_before(); use(p); }",
        "{ wait_for_kernel_before_unless(p.early); use(p); }",
        "{ wait_for_kernel_before_unless(p.late); use(p); wait_for_kernel_before(); }",
        "{ use(p); wait_for_kernel_before_unless(p.early); wait_for_kernel_before(); }",
    ],
)
def test_races_are_seen(body):
    start = 'extern "C" __global__ void __launch_bounds__(32, 1) name(const __grid_constant__ Params p) '
    assert faults(start + body)
    assert not faults(start + "{ int a = 0; wait_for_kernel_before(); use(p); }")
    assert not faults(
        start + "{ wait_for_kernel_before_unless(p.early); weights(p); wait_for_kernel_before(); use(p); }"
    )
    assert faults("__global__ void name(int a) { wait_for_kernel_before(); }")
