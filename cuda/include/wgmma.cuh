// wgmma with A in registers (weights, unpacked there) and B in shared memory, K-major (activations), for each width of B:
// int8, and half or bfloat16 where the low-rank branch needs them. D has N/2 registers a thread: register i of lane l of
// warp w is row 16 w + l/4 + 8 (i/2 % 2), column 8 (i/4) + 2 (l%4) + i%2 (PTX ISA, "Register Fragments for wgmma").
#pragma once

#define QDIFF_INT_REGISTER(x) "+r"(x)
#define QDIFF_FLOAT_REGISTER(x) "+f"(x)

// clang-format off
// The operands of D: their numbers in the instruction, and the registers.
#define QDIFF_D16 \
    "%0, %1, %2, %3, %4, %5, %6, %7"
#define QDIFF_OUT16(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7])
#define QDIFF_D32 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define QDIFF_OUT32(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15])
#define QDIFF_D64 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QDIFF_OUT64(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15]), kind(d[16]), \
    kind(d[17]), kind(d[18]), kind(d[19]), kind(d[20]), kind(d[21]), kind(d[22]), kind(d[23]), kind(d[24]), \
    kind(d[25]), kind(d[26]), kind(d[27]), kind(d[28]), kind(d[29]), kind(d[30]), kind(d[31])
#define QDIFF_D96 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47"
#define QDIFF_OUT96(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15]), kind(d[16]), \
    kind(d[17]), kind(d[18]), kind(d[19]), kind(d[20]), kind(d[21]), kind(d[22]), kind(d[23]), kind(d[24]), \
    kind(d[25]), kind(d[26]), kind(d[27]), kind(d[28]), kind(d[29]), kind(d[30]), kind(d[31]), kind(d[32]), \
    kind(d[33]), kind(d[34]), kind(d[35]), kind(d[36]), kind(d[37]), kind(d[38]), kind(d[39]), kind(d[40]), \
    kind(d[41]), kind(d[42]), kind(d[43]), kind(d[44]), kind(d[45]), kind(d[46]), kind(d[47])
#define QDIFF_D128 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QDIFF_OUT128(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15]), kind(d[16]), \
    kind(d[17]), kind(d[18]), kind(d[19]), kind(d[20]), kind(d[21]), kind(d[22]), kind(d[23]), kind(d[24]), \
    kind(d[25]), kind(d[26]), kind(d[27]), kind(d[28]), kind(d[29]), kind(d[30]), kind(d[31]), kind(d[32]), \
    kind(d[33]), kind(d[34]), kind(d[35]), kind(d[36]), kind(d[37]), kind(d[38]), kind(d[39]), kind(d[40]), \
    kind(d[41]), kind(d[42]), kind(d[43]), kind(d[44]), kind(d[45]), kind(d[46]), kind(d[47]), kind(d[48]), \
    kind(d[49]), kind(d[50]), kind(d[51]), kind(d[52]), kind(d[53]), kind(d[54]), kind(d[55]), kind(d[56]), \
    kind(d[57]), kind(d[58]), kind(d[59]), kind(d[60]), kind(d[61]), kind(d[62]), kind(d[63])
#define QDIFF_D160 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
    "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define QDIFF_OUT160(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15]), kind(d[16]), \
    kind(d[17]), kind(d[18]), kind(d[19]), kind(d[20]), kind(d[21]), kind(d[22]), kind(d[23]), kind(d[24]), \
    kind(d[25]), kind(d[26]), kind(d[27]), kind(d[28]), kind(d[29]), kind(d[30]), kind(d[31]), kind(d[32]), \
    kind(d[33]), kind(d[34]), kind(d[35]), kind(d[36]), kind(d[37]), kind(d[38]), kind(d[39]), kind(d[40]), \
    kind(d[41]), kind(d[42]), kind(d[43]), kind(d[44]), kind(d[45]), kind(d[46]), kind(d[47]), kind(d[48]), \
    kind(d[49]), kind(d[50]), kind(d[51]), kind(d[52]), kind(d[53]), kind(d[54]), kind(d[55]), kind(d[56]), \
    kind(d[57]), kind(d[58]), kind(d[59]), kind(d[60]), kind(d[61]), kind(d[62]), kind(d[63]), kind(d[64]), \
    kind(d[65]), kind(d[66]), kind(d[67]), kind(d[68]), kind(d[69]), kind(d[70]), kind(d[71]), kind(d[72]), \
    kind(d[73]), kind(d[74]), kind(d[75]), kind(d[76]), kind(d[77]), kind(d[78]), kind(d[79])
#define QDIFF_D192 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
    "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define QDIFF_OUT192(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15]), kind(d[16]), \
    kind(d[17]), kind(d[18]), kind(d[19]), kind(d[20]), kind(d[21]), kind(d[22]), kind(d[23]), kind(d[24]), \
    kind(d[25]), kind(d[26]), kind(d[27]), kind(d[28]), kind(d[29]), kind(d[30]), kind(d[31]), kind(d[32]), \
    kind(d[33]), kind(d[34]), kind(d[35]), kind(d[36]), kind(d[37]), kind(d[38]), kind(d[39]), kind(d[40]), \
    kind(d[41]), kind(d[42]), kind(d[43]), kind(d[44]), kind(d[45]), kind(d[46]), kind(d[47]), kind(d[48]), \
    kind(d[49]), kind(d[50]), kind(d[51]), kind(d[52]), kind(d[53]), kind(d[54]), kind(d[55]), kind(d[56]), \
    kind(d[57]), kind(d[58]), kind(d[59]), kind(d[60]), kind(d[61]), kind(d[62]), kind(d[63]), kind(d[64]), \
    kind(d[65]), kind(d[66]), kind(d[67]), kind(d[68]), kind(d[69]), kind(d[70]), kind(d[71]), kind(d[72]), \
    kind(d[73]), kind(d[74]), kind(d[75]), kind(d[76]), kind(d[77]), kind(d[78]), kind(d[79]), kind(d[80]), \
    kind(d[81]), kind(d[82]), kind(d[83]), kind(d[84]), kind(d[85]), kind(d[86]), kind(d[87]), kind(d[88]), \
    kind(d[89]), kind(d[90]), kind(d[91]), kind(d[92]), kind(d[93]), kind(d[94]), kind(d[95])
#define QDIFF_D256 \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, " \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, " \
    "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, " \
    "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, " \
    "%86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, %104, " \
    "%105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, " \
    "%122, %123, %124, %125, %126, %127"
#define QDIFF_OUT256(kind) \
    kind(d[0]), kind(d[1]), kind(d[2]), kind(d[3]), kind(d[4]), kind(d[5]), kind(d[6]), kind(d[7]), kind(d[8]), \
    kind(d[9]), kind(d[10]), kind(d[11]), kind(d[12]), kind(d[13]), kind(d[14]), kind(d[15]), kind(d[16]), \
    kind(d[17]), kind(d[18]), kind(d[19]), kind(d[20]), kind(d[21]), kind(d[22]), kind(d[23]), kind(d[24]), \
    kind(d[25]), kind(d[26]), kind(d[27]), kind(d[28]), kind(d[29]), kind(d[30]), kind(d[31]), kind(d[32]), \
    kind(d[33]), kind(d[34]), kind(d[35]), kind(d[36]), kind(d[37]), kind(d[38]), kind(d[39]), kind(d[40]), \
    kind(d[41]), kind(d[42]), kind(d[43]), kind(d[44]), kind(d[45]), kind(d[46]), kind(d[47]), kind(d[48]), \
    kind(d[49]), kind(d[50]), kind(d[51]), kind(d[52]), kind(d[53]), kind(d[54]), kind(d[55]), kind(d[56]), \
    kind(d[57]), kind(d[58]), kind(d[59]), kind(d[60]), kind(d[61]), kind(d[62]), kind(d[63]), kind(d[64]), \
    kind(d[65]), kind(d[66]), kind(d[67]), kind(d[68]), kind(d[69]), kind(d[70]), kind(d[71]), kind(d[72]), \
    kind(d[73]), kind(d[74]), kind(d[75]), kind(d[76]), kind(d[77]), kind(d[78]), kind(d[79]), kind(d[80]), \
    kind(d[81]), kind(d[82]), kind(d[83]), kind(d[84]), kind(d[85]), kind(d[86]), kind(d[87]), kind(d[88]), \
    kind(d[89]), kind(d[90]), kind(d[91]), kind(d[92]), kind(d[93]), kind(d[94]), kind(d[95]), kind(d[96]), \
    kind(d[97]), kind(d[98]), kind(d[99]), kind(d[100]), kind(d[101]), kind(d[102]), kind(d[103]), kind(d[104]), \
    kind(d[105]), kind(d[106]), kind(d[107]), kind(d[108]), kind(d[109]), kind(d[110]), kind(d[111]), \
    kind(d[112]), kind(d[113]), kind(d[114]), kind(d[115]), kind(d[116]), kind(d[117]), kind(d[118]), \
    kind(d[119]), kind(d[120]), kind(d[121]), kind(d[122]), kind(d[123]), kind(d[124]), kind(d[125]), \
    kind(d[126]), kind(d[127])

// The strings number the operands that follow D: a0..a3, the descriptor of B, whether D is added to or overwritten.
#define QDIFF_WGMMA(SHAPE, TAIL, N, KIND, A0, A1, A2, A3, DESC, ADD) \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" ADD ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N SHAPE \
                 " {" QDIFF_D##N "}, {%" A0 ", %" A1 ", %" A2 ", %" A3 "}, %" DESC ", p" TAIL ";\n}\n" \
                 : QDIFF_OUT##N(KIND) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(desc), "r"(add))
#define QDIFF_WGMMA_S8(N, ...) \
    __device__ __forceinline__ void wgmma_s8(unsigned (&d)[N / 2], const unsigned (&a)[4], unsigned long long desc, int add) { \
        QDIFF_WGMMA("k32.s32.s8.s8", "", N, QDIFF_INT_REGISTER, __VA_ARGS__); \
    }
#define QDIFF_WGMMA_HALF(N, ...) \
    __device__ __forceinline__ void wgmma_f16(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long desc, int add) { \
        QDIFF_WGMMA("k16.f32.f16.f16", ", 1, 1, 0", N, QDIFF_FLOAT_REGISTER, __VA_ARGS__); \
    } \
    __device__ __forceinline__ void wgmma_bf16(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long desc, int add) { \
        QDIFF_WGMMA("k16.f32.bf16.bf16", ", 1, 1, 0", N, QDIFF_FLOAT_REGISTER, __VA_ARGS__); \
    }

QDIFF_WGMMA_S8(16, "8", "9", "10", "11", "12", "13")
QDIFF_WGMMA_S8(32, "16", "17", "18", "19", "20", "21")
QDIFF_WGMMA_S8(64, "32", "33", "34", "35", "36", "37")
QDIFF_WGMMA_S8(96, "48", "49", "50", "51", "52", "53")
QDIFF_WGMMA_S8(128, "64", "65", "66", "67", "68", "69")
QDIFF_WGMMA_S8(160, "80", "81", "82", "83", "84", "85")
QDIFF_WGMMA_S8(192, "96", "97", "98", "99", "100", "101")
QDIFF_WGMMA_S8(256, "128", "129", "130", "131", "132", "133")
QDIFF_WGMMA_HALF(16, "8", "9", "10", "11", "12", "13")
QDIFF_WGMMA_HALF(32, "16", "17", "18", "19", "20", "21")
// clang-format on
