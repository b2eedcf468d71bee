// faults.hpp: while a launch runs, a processor fault in a kernel ends the launch, not the process; and a kernel
// that never ends can be stopped.
//
// Both work alike: the signal handler rewrites the interrupted thread's registers so that, on return, it runs
// abandon(worker) on a spare stack, which goes back to the scheduler. A fault is always taken so. A request to
// stop is taken so only when the interrupted instruction is the kernel's own; inside the C library or this engine it
// could leave a lock behind, so there it is ignored, and the sender tries again until it hits.
#pragma once

#include <signal.h>
#include <string.h>
#include <ucontext.h>

#include "worker.hpp"

namespace emu {

constexpr int kStopSignal = SIGURG;  // ignored by default, so a late one does no harm (Go uses it in the same way)
constexpr int kSignals[] = {kStopSignal, SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr size_t kSignalStackBytes = 64 * 1024;

inline pthread_key_t worker_key() {
  static const pthread_key_t key = [] { pthread_key_t k; pthread_key_create(&k, nullptr); return k; }();
  return key;
}

inline struct sigaction& previous_action(int signal) { static struct sigaction actions[65]; return actions[signal]; }

[[noreturn]] inline void abandon(Worker* w) {
  void* unused;
  emu_switch(&unused, w->scheduler);
  __builtin_unreachable();
}

// One past the interrupted instruction's first byte: elsewhere a pc is a return address, which lies behind its call.
inline void* interrupted_pc(const ucontext_t* c) {
#if defined(__x86_64__)
  return reinterpret_cast<void*>(c->uc_mcontext.gregs[REG_RIP] + 1);
#else
  return reinterpret_cast<void*>(c->uc_mcontext.pc + 1);
#endif
}

inline void continue_in_abandon(ucontext_t* c, Worker* w) {
  // Lower half: the signal's own stack. Upper half: for abandon().
  const uintptr_t top = (reinterpret_cast<uintptr_t>(w->signal_stack.get()) + 2 * kSignalStackBytes) & ~uintptr_t(63);
#if defined(__x86_64__)
  c->uc_mcontext.gregs[REG_RSP] = static_cast<greg_t>(top - 8);  // as after a call
  c->uc_mcontext.gregs[REG_RDI] = reinterpret_cast<greg_t>(w);
  c->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<greg_t>(&abandon);
#else
  c->uc_mcontext.sp = top;
  c->uc_mcontext.regs[0] = reinterpret_cast<uintptr_t>(w);
  c->uc_mcontext.pc = reinterpret_cast<uintptr_t>(&abandon);
#endif
}

inline const char* fault_text(const Worker* w, int signal, const siginfo_t* info) {
  if (signal == SIGFPE) return "division by zero (or of the smallest integer by -1)";
  if (signal == SIGILL) return "trap: code that must not be reached was reached";
  if (w->stacks->in_guard(info->si_addr)) return "out of local memory: a thread's stack has 112 KiB here";
  if (info->si_addr == nullptr) return "misaligned vector access or null pointer";
  return "access to an unmapped address";
}

inline void on_signal(int signal, siginfo_t* info, void* context) {
  auto* w = static_cast<Worker*>(pthread_getspecific(worker_key()));
  auto* c = static_cast<ucontext_t*>(context);
  Fiber* f = w ? w->current : nullptr;
  if (f && signal == kStopSignal) {
    if (!w->run.text.contains(reinterpret_cast<uintptr_t>(interrupted_pc(c)))) return;
    w->begin_error(f, EMU_STOPPED, interrupted_pc(c));
    return continue_in_abandon(c, w);
  }
  if (f) {
    EmuError& e = w->begin_error(f, EMU_FAULT, interrupted_pc(c));
    e.address = reinterpret_cast<uintptr_t>(info->si_addr);
    strncpy(e.text, fault_text(w, signal, info), sizeof e.text - 1);
    return continue_in_abandon(c, w);
  }
  // Not ours: whoever was there before decides.
  const struct sigaction& before = previous_action(signal);
  if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
  if (before.sa_handler == SIG_IGN) return;
  if (before.sa_handler != SIG_DFL) return before.sa_handler(signal);
  if (signal == kStopSignal) return;
  sigaction(signal, &before, nullptr);  // default: the instruction runs again and the process ends as usual
}

// Handlers are installed while at least one launch runs, and what was there is restored after the last.
class SignalHandlers {
 public:
  SignalHandlers() {
    std::lock_guard<std::mutex> lock(mutex());
    if (users()++ > 0) return;
    worker_key();
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    for (int s : kSignals) sigaction(s, &action, &previous_action(s));
  }
  ~SignalHandlers() {
    std::lock_guard<std::mutex> lock(mutex());
    if (--users() > 0) return;
    for (int s : kSignals) sigaction(s, &previous_action(s), nullptr);
  }

 private:
  static std::mutex& mutex() { static std::mutex m; return m; }
  static int& users() { static int n = 0; return n; }
};

}  // namespace emu
