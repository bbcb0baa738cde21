// The threads of a block as fibers of one thread: fast, and the same interleaving on every run. A fiber runs thread
// after thread until one must wait; only then is another begun, so a kernel without barriers needs no switch at all.
#pragma once

#include <functional>
#include <memory>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace shim {

class Block;
struct Thread {
    dim3 thread;
    int linear = 0;
    Block* block = nullptr;
};
inline thread_local Thread* self = nullptr;

#if defined(__x86_64__)
// A stack that waits. It is changed by hand: swapcontext also asks the system for the signal mask, twice each time.
struct Context {
    void* top = nullptr;
};

__attribute__((naked, noinline, no_sanitize("address", "undefined"))) inline void change_stack(void**, void*) {
    asm("pushq %rbp\n\tpushq %rbx\n\tpushq %r12\n\tpushq %r13\n\tpushq %r14\n\tpushq %r15\n\t"
        "movq %rsp, (%rdi)\n\tmovq %rsi, %rsp\n\t"
        "popq %r15\n\tpopq %r14\n\tpopq %r13\n\tpopq %r12\n\tpopq %rbx\n\tpopq %rbp\n\tret");
}

inline void change(Context& from, Context& to) { change_stack(&from.top, to.top); }

// What change_stack takes off a new stack: six registers and where to go; then the stack is as after a call.
inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    const uintptr_t end = (reinterpret_cast<uintptr_t>(stack) + size) / 16 * 16;
    void** top = reinterpret_cast<void**>(end) - 8;
    for (int n = 0; n < 8; ++n) top[n] = nullptr;
    top[6] = reinterpret_cast<void*>(entry);
    context.top = top;
}
#else
struct Context {
    ucontext_t context{};
};

inline void change(Context& from, Context& to) { swapcontext(&from.context, &to.context); }

inline void prepare(Context& context, char* stack, size_t size, void (*entry)()) {
    getcontext(&context.context);
    context.context.uc_stack.ss_sp = stack;
    context.context.uc_stack.ss_size = size;
    context.context.uc_link = nullptr;
    makecontext(&context.context, entry, 0);
}
#endif

struct Fiber {
    static constexpr size_t kStack = 256 << 10;
    Context context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    Thread thread;
    const uint64_t* waits_for = nullptr;  // resumes when *waits_for differs from `seen`
    uint64_t seen = 0;
    bool done = true;
    void* fake_stack = nullptr;
};

class Scheduler {
  public:
    // Calls body() once per thread of the block.
    void run(Block* block, int threads, const dim3& shape, const std::function<void()>& body) {
        block_ = block, threads_ = threads, shape_ = shape, body_ = &body, next_ = 0;
        for (;;) {
            bool progress = false, blocked = false;
            for (size_t f = 0; f < fibers_.size() || next_ < threads_; ++f) {
                if (f == fibers_.size()) fibers_.push_back(std::make_unique<Fiber>());
                Fiber& fiber = *fibers_[f];
                if (fiber.done ? next_ < threads_ : *fiber.waits_for != fiber.seen) {
                    if (fiber.done) begin(fiber);
                    resume(fiber);
                    progress = true;
                }
                blocked = blocked || !fiber.done;
            }
            if (!blocked) return;
            if (!progress) die("deadlock: threads of a block wait at different barriers");
        }
    }

    // Suspends the running fiber until *generation differs from `seen`.
    void wait(const uint64_t* generation, uint64_t seen) {
        Fiber* fiber = current_;
        fiber->waits_for = generation, fiber->seen = seen;
        leave(*fiber, false);
    }

    static Scheduler& instance() {
        static Scheduler scheduler;
        return scheduler;
    }

  private:
    static void entry() {
        Scheduler& scheduler = instance();
        scheduler.arrive(nullptr);
        scheduler.work();
    }

    void work();

    void begin(Fiber& fiber) {
        fiber.done = false;
        prepare(fiber.context, fiber.stack.get(), Fiber::kStack, &Scheduler::entry);
    }

    void resume(Fiber& fiber) {
        current_ = &fiber;
        self = &fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(&fake_stack_, fiber.stack.get(), Fiber::kStack);
        change(context_, fiber.context);
        __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#else
        change(context_, fiber.context);
#endif
    }

    void leave(Fiber& fiber, bool forever) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, stack_, stack_size_);
        change(fiber.context, context_);
        arrive(fiber.fake_stack);
#else
        (void)forever;
        change(fiber.context, context_);
#endif
    }

    void arrive(void* fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
        __sanitizer_finish_switch_fiber(fake_stack, &stack_, &stack_size_);
#else
        (void)fake_stack;
#endif
    }

    std::vector<std::unique_ptr<Fiber>> fibers_;
    Context context_;
    Fiber* current_ = nullptr;
    Block* block_ = nullptr;
    int threads_ = 0, next_ = 0;
    dim3 shape_;
    const std::function<void()>* body_ = nullptr;
    void* fake_stack_ = nullptr;
    const void* stack_ = nullptr;
    size_t stack_size_ = 0;
};

// A barrier of `expected` threads; those that have left the kernel no longer count.
class Barrier {
  public:
    explicit Barrier(int expected = 0) : expected_(expected) {}
    uint64_t generation() const { return generation_; }

    void wait() {
        const uint64_t seen = generation_;
        if (++arrived_ == expected_) {
            arrived_ = 0, ++generation_;
        } else {
            Scheduler::instance().wait(&generation_, seen);
        }
    }

    void leave() {
        --expected_;
        if (expected_ > 0 && arrived_ == expected_) arrived_ = 0, ++generation_;
    }

  private:
    int expected_, arrived_ = 0;
    uint64_t generation_ = 0;
};

}  // namespace shim

#include "block.h"

namespace shim {

inline void Scheduler::work() {
    Fiber& fiber = *current_;
    while (next_ < threads_) {
        fiber.thread = thread_of(block_, next_++);
        (*body_)();
        block_->leave(fiber.thread.linear);
    }
    fiber.done = true;
    leave(fiber, true);
}

// Runs the kernel on every thread of the grid.
inline void run_grid(const Shape& shape, const std::function<void()>& body) {
    static Arena arena;
    for (int64_t index = 0; index < shape.grid.x; ++index) {
        Block block(shape, static_cast<unsigned>(index), &arena);
        Scheduler::instance().run(&block, block.threads(), shape.block, body);
    }
}

}  // namespace shim
