// Programmatic dependent launch (sm_90 and later): a kernel may be set up while the one before it on the stream still
// runs. Every kernel of this folder waits before its first access to what that one may have written, and lets the next one
// in only then: so what was written earlier is there from the start. That goes for weights if the host says so
// (qdiff/ops/_settled.py).
#pragma once

__device__ __forceinline__ void wait_for_kernel_before() {
#if !defined(QDIFF_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// A predicate and not a branch, which takes registers of w4a16_linear.
__device__ __forceinline__ void wait_for_kernel_before_unless(unsigned long long early) {
#if !defined(QDIFF_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("{\n.reg .pred early;\nsetp.ne.u64 early, %0, 0;\n@!early griddepcontrol.wait;\n}\n" ::"l"(early) : "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_in() {
#if !defined(QDIFF_EMULATE) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
