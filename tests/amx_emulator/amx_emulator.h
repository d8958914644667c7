/* AMX in software, for tests: tile instructions that the CPU or the operating system refuses (SIGILL) are executed on a
 * tile state of each thread, to the bit as Intel's manual has them.
 *
 * Loaded into a process (linked, or by LD_PRELOAD), the emulator
 *   - makes the feature detection of sparamx-onnx see AMX (sparamx_amx_emulator_pretend in cpp/runtime/cpu.cc);
 *   - answers arch_prctl(ARCH_REQ_XCOMP_PERM) in the kernel's place. Only the library's own request is granted: ONNX
 *     Runtime, and whoever else asks, is refused and keeps to AVX-512, on every machine alike;
 *   - executes tile instructions from then on. Before it they end the process by SIGILL, as on Linux.
 *
 * On a CPU with AMX the kernel is never asked for the permission, so instructions with tile data trap all the same.
 * LDTILECFG, STTILECFG and TILERELEASE run natively there; the handler finds the configuration in the signal frame.
 *
 * SPARAMX_AMX_EMULATOR, read when the process starts, changes what is pretended:
 *   full (or unset)  AMX with bf16 and int8
 *   everyone         the same, and every request is granted: ONNX Runtime's AMX kernels are emulated too, where CPUID
 *                    shows it AMX
 *   refused          AMX, and a kernel that refuses the permission
 *   absent           a CPU without AMX
 *   unsaved          AMX, but an operating system that does not save tiles (XCR0)
 *   no_bf16, no_int8 AMX without one of the products
 */
#ifndef AMX_EMULATOR_H
#define AMX_EMULATOR_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum amx_instruction {
  AMX_LDTILECFG,
  AMX_STTILECFG,
  AMX_TILERELEASE,
  AMX_TILEZERO,
  AMX_TILELOADD,
  AMX_TILELOADDT1,
  AMX_TILESTORED,
  AMX_TDPBF16PS,
  AMX_TDPBSSD,
  AMX_TDPBSUD,
  AMX_TDPBUSD,
  AMX_TDPBUUD,
  AMX_INSTRUCTIONS
};
enum { AMX_TILES = 8 };

/* How often all threads executed an instruction, by the tile that it names first (its destination; of TILESTORED, its
 * source; 0 where it names none). On a CPU with AMX, LDTILECFG is counted when the first tile instruction after it
 * traps, STTILECFG and TILERELEASE only where they follow a trapping instruction at once. */
typedef struct amx_emulator_counts {
  uint64_t of[AMX_INSTRUCTIONS][AMX_TILES];
} amx_emulator_counts;

__attribute__((visibility("default"))) void amx_emulator_read_counts(amx_emulator_counts* counts);
__attribute__((visibility("default"))) void amx_emulator_reset_counts(void);

/* Whether the calling thread has a tile configuration loaded. */
__attribute__((visibility("default"))) int amx_emulator_is_configured(void);

/* Called before every TILELOADD and TILESTORED, from a signal handler on the thread at hand; NULL: nobody. */
typedef void (*amx_emulator_observer)(enum amx_instruction instruction, int tile, const void* address, int64_t stride);
__attribute__((visibility("default"))) void amx_emulator_observe(amx_emulator_observer observer);

#ifdef __cplusplus
}
#endif
#endif
