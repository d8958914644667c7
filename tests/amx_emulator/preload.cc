// The emulator inside a process: the signal handler that decodes, and the functions that take the place of libc's.
#include <cerrno>
#include <csignal>
#include <cstdarg>
#include <cstdlib>
#include <cstring>

#include <atomic>

#include <cpuid.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#include "amx_emulator.h"
#include "tiles.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

// glibc's own, under the name that programs do not use.
extern "C" int __sigaction(int signal, const struct sigaction* action, struct sigaction* old) noexcept;

namespace amx_emulator {
namespace {

// --- What is pretended
// -------------------------------------------------------------------------------------------------

constexpr uint32_t kBf16Bit = 1u << 22, kTileBit = 1u << 24, kInt8Bit = 1u << 25;  // CPUID leaf 7, EDX
constexpr uint64_t kTileConfigState = 1u << 17, kTileDataState = 1u << 18;         // XCR0

struct Pretended {
  bool is_cpu_with_amx = true, has_bf16 = true, has_int8 = true, saves_tiles = true, grants = true, grants_all = false;
};

Pretended FromEnvironment() {
  Pretended p;
  const char* name = std::getenv("SPARAMX_AMX_EMULATOR");
  if (name == nullptr || std::strcmp(name, "full") == 0) return p;
  if (std::strcmp(name, "everyone") == 0)
    p.grants_all = true;
  else if (std::strcmp(name, "refused") == 0)
    p.grants = false;
  else if (std::strcmp(name, "absent") == 0)
    p.is_cpu_with_amx = false;
  else if (std::strcmp(name, "unsaved") == 0)
    p.saves_tiles = false;
  else if (std::strcmp(name, "no_bf16") == 0)
    p.has_bf16 = false;
  else if (std::strcmp(name, "no_int8") == 0)
    p.has_int8 = false;
  else
    std::abort();
  return p;
}

const Pretended& Pretends() {
  static const Pretended pretended = FromEnvironment();
  return pretended;
}

std::atomic<bool> permitted;
thread_local bool request_is_the_librarys;

// --- The tile state
// ----------------------------------------------------------------------------------------------------

// Reserved when the thread starts: a signal handler must not allocate.
__attribute__((tls_model("initial-exec"))) thread_local State state;

// On a CPU with AMX the configuration lies in the signal frame (component 17 of the XSAVE area, uncompacted). Nobody
// tells the handler of an LDTILECFG in between, which zeroes the tiles; so it leaves a mark in the frame's
// configuration, in a field that no instruction here reads natively and that every LDTILECFG overwrites.
constexpr uint8_t kSeenMark = 255;
uint32_t config_offset;  // 0: the CPU has no AMX

uint8_t* FrameConfig(ucontext_t* context) {
  constexpr size_t kSoftwareBytes = 464, kMagic = 0x46505853;
  auto* frame = reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs);
  uint32_t magic;
  uint64_t states;
  std::memcpy(&magic, frame + kSoftwareBytes, sizeof magic);
  std::memcpy(&states, frame + kSoftwareBytes + 8, sizeof states);
  if (config_offset == 0 || magic != kMagic || (states & kTileConfigState) == 0) return nullptr;
  return frame + config_offset;
}

constexpr size_t kPresentStates = 512;  // XSTATE_BV

std::atomic<uint64_t> counts[AMX_INSTRUCTIONS][AMX_TILES];
std::atomic<amx_emulator_observer> observer;

void Count(amx_instruction instruction, int tile) {
  counts[instruction][tile].fetch_add(1, std::memory_order_relaxed);
}

void TakeConfigFrom(ucontext_t* context) {
  const uint8_t* frame_config = FrameConfig(context);
  if (frame_config == nullptr) return;
  uint64_t present;
  std::memcpy(&present, reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs) + kPresentStates, sizeof present);
  Config config;
  std::memcpy(&config, frame_config, sizeof config);
  if ((present & kTileConfigState) == 0) {
    state.Release();
  } else if (config.start_row != kSeenMark) {
    state.LoadConfig(config);
    Count(AMX_LDTILECFG, 0);
  }
}

void LeaveConfigIn(ucontext_t* context) {
  uint8_t* frame_config = FrameConfig(context);
  if (frame_config == nullptr) return;
  uint8_t* present_at = reinterpret_cast<uint8_t*>(context->uc_mcontext.fpregs) + kPresentStates;
  uint64_t present;
  std::memcpy(&present, present_at, sizeof present);
  present = state.config.palette == 0 ? present & ~kTileConfigState : present | kTileConfigState;
  std::memcpy(present_at, &present, sizeof present);
  Config config = state.config;
  if (config.palette != 0) config.start_row = kSeenMark;
  std::memcpy(frame_config, &config, sizeof config);
}

// --- Decoding
// ----------------------------------------------------------------------------------------------------------

struct Instruction {
  amx_instruction kind;
  int tile, a, b;  // a and b: operands of a product
  int length;
  uint8_t* address;
  int64_t stride;
};

int64_t Register(const ucontext_t* context, int number) {
  constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
  return context->uc_mcontext.gregs[kOrder[number]];
}

constexpr int kNone = 0, k66 = 1, kF3 = 2, kF2 = 3;  // the prefixes, as VEX has them
constexpr uint8_t kRegisters = 3;                    // "mod" of ModRM

// The memory operand of ModRM at `p`. Tile loads and stores take base and stride from it, the others base alone.
void DecodeMemory(const ucontext_t* context, const uint8_t* code, int rex_x, int rex_b, Instruction* i) {
  const uint8_t* p = code + i->length - 1;  // ModRM
  const int mod = *p >> 6, rm = *p & 7;
  int64_t base = 0, stride = 0;
  bool has_base = true, from_rip = false;
  ++p;
  if (rm == 4) {
    const int scale = *p >> 6, index = (*p >> 3 & 7) + rex_x, base_register = *p & 7;
    ++p;
    if (index != 4) stride = Register(context, index) * (int64_t{1} << scale);
    has_base = !(base_register == 5 && mod == 0);
    if (has_base) base = Register(context, base_register + rex_b);
  } else if (rm == 5 && mod == 0) {
    has_base = false;
    from_rip = true;
  } else {
    base = Register(context, rm + rex_b);
  }
  if (mod == 1) {
    base += static_cast<int8_t>(*p++);
  } else if (mod == 2 || !has_base) {
    int32_t displacement;
    std::memcpy(&displacement, p, sizeof displacement);
    base += displacement;
    p += sizeof displacement;
  }
  i->length = static_cast<int>(p - code);
  if (from_rip) base += reinterpret_cast<int64_t>(code) + i->length;
  i->address = reinterpret_cast<uint8_t*>(base);
  i->stride = stride;
}

// Reads the instruction at `code`; false if it is none of AMX, or a form that only fs, gs or 32-bit addresses have.
bool Decode(const ucontext_t* context, const uint8_t* code, Instruction* i) {
  if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false;  // VEX.128.0F38.W0
  const int rex_r = (~code[1] >> 7 & 1) * 8, rex_x = (~code[1] >> 6 & 1) * 8, rex_b = (~code[1] >> 5 & 1) * 8;
  const int vvvv = ~code[2] >> 3 & 15, prefix = code[2] & 3, mod = code[4] >> 6;
  const int reg = (code[4] >> 3 & 7) + rex_r, rm = code[4] & 7;
  *i = {};
  i->length = 5;
  const auto memory = [&](amx_instruction kind, int tile) {
    i->kind = kind;
    i->tile = tile;
    DecodeMemory(context, code, rex_x, rex_b, i);
    return vvvv == 0;
  };
  const auto product = [&](amx_instruction kind) {
    i->kind = kind;
    i->tile = reg;
    i->a = rm + rex_b;
    i->b = vvvv;
    return mod == kRegisters && reg < 8 && rex_b == 0 && vvvv < 8;
  };
  switch (code[3]) {
    case 0x49:
      if (mod != kRegisters && reg == 0) {
        if (prefix == kNone) return memory(AMX_LDTILECFG, 0);
        if (prefix == k66) return memory(AMX_STTILECFG, 0);
      } else if (prefix == kNone && code[4] == 0xc0) {
        i->kind = AMX_TILERELEASE;
        return vvvv == 0;
      } else if (prefix == kF2 && mod == kRegisters && rm == 0 && reg < 8) {
        i->kind = AMX_TILEZERO;
        i->tile = reg;
        return vvvv == 0;
      }
      return false;
    case 0x4b:
      if (mod == kRegisters || rm != 4 || reg >= 8) return false;
      if (prefix == kF2) return memory(AMX_TILELOADD, reg);
      if (prefix == k66) return memory(AMX_TILELOADDT1, reg);
      if (prefix == kF3) return memory(AMX_TILESTORED, reg);
      return false;
    case 0x5c:
      return prefix == kF3 && product(AMX_TDPBF16PS);
    case 0x5e:
      return product(prefix == kF2   ? AMX_TDPBSSD
                     : prefix == kF3 ? AMX_TDPBSUD
                     : prefix == k66 ? AMX_TDPBUSD
                                     : AMX_TDPBUUD);
    default:
      return false;
  }
}

// --- Executing
// ---------------------------------------------------------------------------------------------------------

Fault Execute(const Instruction& i) {
  switch (i.kind) {
    case AMX_LDTILECFG: {
      Config config;
      std::memcpy(&config, i.address, sizeof config);
      return state.LoadConfig(config);
    }
    case AMX_STTILECFG:
      std::memcpy(i.address, &state.config, sizeof state.config);
      return Fault::kNone;
    case AMX_TILERELEASE:
      state.Release();
      return Fault::kNone;
    case AMX_TILEZERO:
      return state.Zero(i.tile);
    case AMX_TILELOADD:
    case AMX_TILELOADDT1:
      return state.Load(i.tile, i.address, i.stride);
    case AMX_TILESTORED:
      return state.Store(i.tile, i.address, i.stride);
    case AMX_TDPBF16PS:
      return state.Multiply(Product::kBf16, i.tile, i.a, i.b);
    case AMX_TDPBSSD:
      return state.Multiply(Product::kSignedSigned, i.tile, i.a, i.b);
    case AMX_TDPBSUD:
      return state.Multiply(Product::kSignedUnsigned, i.tile, i.a, i.b);
    case AMX_TDPBUSD:
      return state.Multiply(Product::kUnsignedSigned, i.tile, i.a, i.b);
    case AMX_TDPBUUD:
      return state.Multiply(Product::kUnsignedUnsigned, i.tile, i.a, i.b);
    case AMX_INSTRUCTIONS:
      break;
  }
  return Fault::kInvalidOpcode;
}

bool NeedsPermission(amx_instruction kind) {
  return kind != AMX_LDTILECFG && kind != AMX_STTILECFG && kind != AMX_TILERELEASE;
}

struct sigaction application_action;  // what the application wants of SIGILL

// Hands an instruction that is not ours, or that faults, to the application; its default is to end by it.
void PassOn(int signal, siginfo_t* info, void* context) {
  if (application_action.sa_flags & SA_SIGINFO) return application_action.sa_sigaction(signal, info, context);
  if (application_action.sa_handler != SIG_DFL && application_action.sa_handler != SIG_IGN)
    return application_action.sa_handler(signal);
  struct sigaction by_default = {};
  __sigaction(SIGILL, &by_default, nullptr);  // the instruction is repeated, and ends the process
}

// The signal stays blocked until the handler returns, so that it is delivered at the faulting instruction.
void RaiseGeneralProtection(ucontext_t* context) {
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGSEGV);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  sigdelset(&context->uc_sigmask, SIGSEGV);
  raise(SIGSEGV);
}

// Executes the instruction at the instruction pointer and moves that on.
Fault Step(ucontext_t* context) {
  greg_t& rip = context->uc_mcontext.gregs[REG_RIP];
  Instruction i;
  if (!Decode(context, reinterpret_cast<const uint8_t*>(rip), &i)) return Fault::kInvalidOpcode;
  if (NeedsPermission(i.kind) && !permitted.load(std::memory_order_relaxed)) return Fault::kInvalidOpcode;
  if (i.kind == AMX_TILELOADD || i.kind == AMX_TILELOADDT1 || i.kind == AMX_TILESTORED)
    if (const amx_emulator_observer observe = observer.load()) observe(i.kind, i.tile, i.address, i.stride);
  const Fault fault = Execute(i);
  if (fault != Fault::kNone) return fault;
  Count(i.kind, i.tile);
  rip += i.length;
  return Fault::kNone;
}

// Executes all AMX instructions that follow at once, too: a trap costs far more than an instruction.
void OnIllegalInstruction(int signal, siginfo_t* info, void* untyped_context) {
  const int saved_errno = errno;
  auto* context = static_cast<ucontext_t*>(untyped_context);
  TakeConfigFrom(context);
  const Fault fault = Step(context);
  if (fault == Fault::kNone)
    while (Step(context) == Fault::kNone) continue;
  LeaveConfigIn(context);
  errno = saved_errno;
  if (fault == Fault::kGeneralProtection) RaiseGeneralProtection(context);
  if (fault == Fault::kInvalidOpcode) PassOn(signal, info, untyped_context);
}

__attribute__((constructor)) void Start() {
  unsigned size, offset, c, d;
  if (__get_cpuid_count(13, 17, &size, &offset, &c, &d) != 0 && size == sizeof(Config)) config_offset = offset;
  Pretends();
  struct sigaction action = {};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  __sigaction(SIGILL, &action, nullptr);
}

long KernelCall(long number, long a, long b, long c, long d, long e, long f) {
  register long r10 __asm__("r10") = d;
  register long r8 __asm__("r8") = e;
  register long r9 __asm__("r9") = f;
  long result;
  __asm__ volatile("syscall"
                   : "=a"(result)
                   : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                   : "rcx", "r11", "memory");
  if (result >= 0 || result < -4095) return result;
  errno = static_cast<int>(-result);
  return -1;
}

// The kernel's answers to questions about tile data, as Documentation/arch/x86/xstate.rst describes them.
long AnswerPermission(long request, long argument) {
  constexpr long kGetSupported = 0x1021, kGetPermitted = 0x1022;
  const bool librarys = request_is_the_librarys;
  request_is_the_librarys = false;
  if (request == kGetSupported || request == kGetPermitted) {
    const long result = KernelCall(SYS_arch_prctl, request, argument, 0, 0, 0, 0);
    if (result != 0) return result;
    auto* states = reinterpret_cast<uint64_t*>(argument);
    *states &= ~(kTileConfigState | kTileDataState);
    if (request == kGetSupported && Pretends().is_cpu_with_amx) *states |= kTileConfigState | kTileDataState;
    if (request == kGetPermitted && permitted) *states |= kTileConfigState | kTileDataState;
    return 0;
  }
  if (!Pretends().is_cpu_with_amx || !Pretends().saves_tiles) {
    errno = EOPNOTSUPP;
    return -1;
  }
  if (!Pretends().grants || !(librarys || Pretends().grants_all)) {
    errno = EPERM;
    return -1;
  }
  permitted = true;
  return 0;
}

}  // namespace
}  // namespace amx_emulator

// --- What others call
// --------------------------------------------------------------------------------------------------

EXPORTED void sparamx_amx_emulator_pretend(uint64_t* xcr0, uint32_t* leaf7_edx) {
  using namespace amx_emulator;
  const Pretended& p = Pretends();
  request_is_the_librarys = p.is_cpu_with_amx && p.saves_tiles && p.has_bf16 && p.has_int8;
  *xcr0 &= ~(kTileConfigState | kTileDataState);
  *leaf7_edx &= ~(kBf16Bit | kTileBit | kInt8Bit);
  if (!p.is_cpu_with_amx) return;
  if (p.saves_tiles) *xcr0 |= kTileConfigState | kTileDataState;
  *leaf7_edx |= kTileBit | (p.has_bf16 ? kBf16Bit : 0) | (p.has_int8 ? kInt8Bit : 0);
}

EXPORTED long syscall(long number, ...) noexcept {
  constexpr long kRequestPermission = 0x1023, kFirstQuestion = 0x1021, kTileData = 18;
  long a[6];
  va_list arguments;
  va_start(arguments, number);
  for (long& value : a) value = va_arg(arguments, long);
  va_end(arguments);
  if (number == SYS_arch_prctl && a[0] >= kFirstQuestion && a[0] <= kRequestPermission)
    if (a[0] != kRequestPermission || a[1] == kTileData) return amx_emulator::AnswerPermission(a[0], a[1]);
  return amx_emulator::KernelCall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

// Python's fault handler, among others, wants SIGILL for itself: it gets what the emulator does not execute.
EXPORTED int sigaction(int signal, const struct sigaction* action, struct sigaction* old) noexcept {
  using amx_emulator::application_action;
  if (signal != SIGILL) return __sigaction(signal, action, old);
  if (old != nullptr) *old = application_action;
  if (action != nullptr) application_action = *action;
  return 0;
}

EXPORTED void amx_emulator_read_counts(amx_emulator_counts* counts) {
  for (int i = 0; i < AMX_INSTRUCTIONS; ++i)
    for (int t = 0; t < AMX_TILES; ++t) counts->of[i][t] = amx_emulator::counts[i][t];
}

EXPORTED void amx_emulator_reset_counts(void) {
  for (auto& of_instruction : amx_emulator::counts)
    for (auto& count : of_instruction) count = 0;
}

EXPORTED int amx_emulator_is_configured(void) {
  if (amx_emulator::config_offset == 0) return amx_emulator::state.config.palette != 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low & amx_emulator::kTileConfigState) != 0;
}

EXPORTED void amx_emulator_observe(amx_emulator_observer observer) {
  amx_emulator::observer = observer;
}
