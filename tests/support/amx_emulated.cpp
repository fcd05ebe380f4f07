// The product with csrc/micro_amx.cpp on any x86 processor with AVX2: tiles are arrays here.
#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "product_check.h"

struct Tiles {
    bool configured = false;
    int bytes[8], rows[8];
    uint8_t data[8][16][64];
};
static thread_local Tiles tiles;  // as a processor's: each thread has its own

static void require(bool holds) {
    if (!holds) std::abort();  // where a processor would raise a fault
}
static void load_config(const void* p) {
    auto c = static_cast<const uint8_t*>(p);
    require(c[0] == 1);
    for (int i = 1; i < 16; ++i) require(c[i] == 0);
    std::memset(&tiles, 0, sizeof tiles);
    for (int t = 0; t < 8; ++t) {
        uint16_t bytes;
        std::memcpy(&bytes, c + 16 + 2 * t, 2);
        tiles.bytes[t] = bytes, tiles.rows[t] = c[48 + t];
        require(bytes <= 64 && tiles.rows[t] <= 16);
    }
    for (int t = 8; t < 16; ++t) require(!c[16 + 2 * t] && !c[17 + 2 * t] && !c[48 + t]);
    tiles.configured = true;
}
static void release() { tiles.configured = false; }
static void zero(int t) {
    require(tiles.configured && tiles.rows[t] > 0);
    std::memset(tiles.data[t], 0, sizeof tiles.data[t]);
}
static void load_tile(int t, const void* from, int64_t stride) {
    zero(t);
    for (int i = 0; i < tiles.rows[t]; ++i)
        std::memcpy(tiles.data[t][i], static_cast<const char*>(from) + i * stride, size_t(tiles.bytes[t]));
}
static void store_tile(int t, void* to, int64_t stride) {
    require(tiles.configured);
    for (int i = 0; i < tiles.rows[t]; ++i)
        std::memcpy(static_cast<char*>(to) + i * stride, tiles.data[t][i], size_t(tiles.bytes[t]));
}
static float widened(const uint8_t* p) {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return fastpref::as_float(uint32_t(bits) << 16);
}
static void multiply_tiles(int sum, int a, int b) {
    require(tiles.configured && tiles.rows[b] * 4 == tiles.bytes[a] && tiles.rows[sum] == tiles.rows[a] &&
            tiles.bytes[sum] == tiles.bytes[b]);
    for (int m = 0; m < tiles.rows[a]; ++m)
        for (int k = 0; k < tiles.bytes[a] / 4; ++k)
            for (int n = 0; n < tiles.bytes[b] / 4; ++n) {
                float cell;
                uint8_t *to = tiles.data[sum][m] + 4 * n, *x = tiles.data[a][m] + 4 * k,
                        *y = tiles.data[b][k] + 4 * n;
                std::memcpy(&cell, to, 4);
                cell += widened(x) * widened(y);
                cell += widened(x + 2) * widened(y + 2);
                std::memcpy(to, &cell, 4);
            }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define FP_AMX
#define _tile_loadconfig load_config
#define _tile_release release
#define _tile_zero zero
#define _tile_loadd load_tile
#define _tile_stored store_tile
#define _tile_dpbf16ps multiply_tiles
#include "micro_amx.cpp"

int main() { return !product_check::is_right(fastpref::amx_bf16_kernel, fastpref::Dtype::bf16); }
