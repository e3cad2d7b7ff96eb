// A CUDA thread runs on the CPU as a fiber with a stack of its own. Every switch is announced to ThreadSanitizer and
// AddressSanitizer; for ThreadSanitizer a switch does not synchronize, so a missing barrier is a data race in every order of
// the threads.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#define EMU_TSAN(...) __VA_ARGS__
#define EMU_OUTLINE __attribute__((noinline))  // a stack frame of its own, so that `IgnoreAccesses` covers it
#else
#define EMU_TSAN(...)
#define EMU_OUTLINE
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN(...) __VA_ARGS__
#else
#define EMU_ASAN(...)
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emu {

// For its lifetime ThreadSanitizer ignores all accesses: those of the emulator are not the kernel's.
struct IgnoreAccesses {
    IgnoreAccesses() { EMU_TSAN(AnnotateIgnoreReadsBegin("", 0); AnnotateIgnoreWritesBegin("", 0);) }
    ~IgnoreAccesses() { EMU_TSAN(AnnotateIgnoreWritesEnd("", 0); AnnotateIgnoreReadsEnd("", 0);) }
};

struct Context {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    size_t stack_bytes = 0;
    bool done = false;
    void* tsan = nullptr;
    void* fake_stack = nullptr;  // AddressSanitizer's
#if !defined(__x86_64__)
    ucontext_t machine;
#endif
};

#if defined(__x86_64__)
extern "C" void emu_switch(void** save, void* to);
asm(R"(
.section .text.emu_switch,"axG",@progbits,emu_switch,comdat
.weak emu_switch
emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp,(%rdi)
    movq %rsi,%rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.text
)");
#endif

// Prepares `context` so that the first switch to it calls `entry`.
inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
    context.stack = stack;
    context.stack_bytes = bytes;
    EMU_TSAN(context.tsan = __tsan_create_fiber(0);)
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack + bytes) - 2;  // the stack's alignment at `entry` is that after a call
    *top = reinterpret_cast<void*>(entry);
    context.stack_pointer = top - 6;  // the six registers that emu_switch restores
#else
    getcontext(&context.machine);
    context.machine.uc_stack.ss_sp = stack;
    context.machine.uc_stack.ss_size = bytes;
    makecontext(&context.machine, entry, 0);
#endif
}

// Leaves `from` and continues `to`.
EMU_OUTLINE inline void switch_context(Context& from, Context& to) {
    EMU_ASAN(__sanitizer_start_switch_fiber(from.done ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);)
#if defined(__x86_64__)
    void** save = &from.stack_pointer;
    void* next = to.stack_pointer;
#endif
    EMU_TSAN(__tsan_switch_to_fiber(to.tsan, 1 /* orders nothing */);)
#if defined(__x86_64__)
    emu_switch(save, next);
#else
    swapcontext(&from.machine, &to.machine);
#endif
    EMU_ASAN(__sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);)
}

// Memory for stacks and shared memory, unmapped by the destructor. The page behind it is not accessible.
class Mapping {
public:
    explicit Mapping(size_t bytes) : bytes_(bytes) {
        data_ = mmap(nullptr, bytes + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data_ == MAP_FAILED || mprotect(static_cast<char*>(data_) + bytes, PAGE, PROT_NONE) != 0) {
            throw std::runtime_error("cuda_emu: out of memory for stacks");
        }
        EMU_ASAN(__asan_unpoison_memory_region(data_, bytes);)
    }
    ~Mapping() { munmap(data_, bytes_ + PAGE); }
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    char* data() const { return static_cast<char*>(data_); }

private:
    static constexpr size_t PAGE = 4096;
    void* data_;
    size_t bytes_;
};

}  // namespace emu
