// Packed 4-bit weights to int8, four at a time, in registers.
//
// Word c of a block of 32 weights holds the codes of k = 4c..4c+3 in the low nibbles of its bytes and those of
// k = 16+4c..16+4c+3 in the high nibbles: `lo` and `hi` are two registers of an mma m16n8k32 A fragment.
#pragma once

// m * (u - 8) of every code u, m in [0, 15]. One multiply-add makes four products: u * m + 128 - 8 * m lies in
// [8, 233], so nothing carries from byte to byte; flipping the top bits then subtracts 128.
__device__ __forceinline__ void unpack_s4(unsigned word, unsigned m, unsigned& lo, unsigned& hi) {
    const unsigned offset = 0x80808080u - 0x08080808u * m;
    lo = ((word & 0x0f0f0f0fu) * m + offset) ^ 0x80808080u;
    hi = (((word >> 4) & 0x0f0f0f0fu) * m + offset) ^ 0x80808080u;
}

// table[u] of every code u; the 16 int8 entries of `table` lie in order in four registers.
__device__ __forceinline__ void unpack_codebook(unsigned word, const unsigned (&table)[4], unsigned& lo, unsigned& hi) {
    // A byte permutation looks up four nibbles among eight entries: both halves of the table, then bit 3 picks.
    const unsigned entry = word & 0x77777777u;
    const unsigned pick = 0x32103210u | ((word >> 1) & 0x44444444u);
    const unsigned first = __byte_perm(__byte_perm(table[0], table[1], entry & 0xffffu),
                                       __byte_perm(table[2], table[3], entry & 0xffffu), pick & 0xffffu);
    const unsigned second = __byte_perm(__byte_perm(table[0], table[1], entry >> 16),
                                        __byte_perm(table[2], table[3], entry >> 16), pick >> 16);
    lo = __byte_perm(first, second, 0x6420);
    hi = __byte_perm(first, second, 0x7531);
}
