// Lets the memory of one shared library run out, for tests/test_out_of_memory.py: the calls that it
// makes for memory go through here. Loaded beside it, whatever other allocator is in the process.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<int64_t> asked{0};
std::atomic<int64_t> first_refused{INT64_MAX}, last_refused{INT64_MAX};

// Whether this call is one of those to be refused.
bool refused() {
    const int64_t number = asked.fetch_add(1);
    return number >= first_refused && number <= last_refused;
}

void* new_bytes(size_t bytes) {
    if (refused()) throw std::bad_alloc();
    return ::operator new(bytes);
}
void* new_array(size_t bytes) {
    if (refused()) throw std::bad_alloc();
    return ::operator new[](bytes);
}
void* new_aligned(size_t bytes, std::align_val_t alignment) {
    if (refused()) throw std::bad_alloc();
    return ::operator new(bytes, alignment);
}
void* malloc_bytes(size_t bytes) { return refused() ? nullptr : std::malloc(bytes); }
void* calloc_bytes(size_t count, size_t size) {
    return refused() ? nullptr : std::calloc(count, size);
}
void* realloc_bytes(void* memory, size_t bytes) {
    return refused() ? nullptr : std::realloc(memory, bytes);
}
void* aligned_bytes(size_t alignment, size_t bytes) {
    return refused() ? nullptr : std::aligned_alloc(alignment, bytes);
}

struct Replacement {
    const char* name;
    void* function;
};
const Replacement kReplacements[] = {
    {"_Znwm", reinterpret_cast<void*>(new_bytes)},
    {"_Znam", reinterpret_cast<void*>(new_array)},
    {"_ZnwmSt11align_val_t", reinterpret_cast<void*>(new_aligned)},
    {"malloc", reinterpret_cast<void*>(malloc_bytes)},
    {"calloc", reinterpret_cast<void*>(calloc_bytes)},
    {"realloc", reinterpret_cast<void*>(realloc_bytes)},
    {"aligned_alloc", reinterpret_cast<void*>(aligned_bytes)},
};

// Writes to a slot that the loader may have made read-only.
void store(void** slot, void* value) {
    const auto page_size = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    void* page = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(slot) & ~(page_size - 1));
    if (mprotect(page, page_size, PROT_READ | PROT_WRITE) != 0) std::abort();
    *slot = value;
}

// Points the library's slots for the functions above, which its relocations tell, to them.
int replace_in(const link_map& library, const ElfW(Rela) * begin, size_t bytes,
               const ElfW(Sym) * symbols, const char* names) {
    int replaced = 0;
    for (size_t i = 0; i < bytes / sizeof(ElfW(Rela)); ++i) {
        const char* name = names + symbols[ELF64_R_SYM(begin[i].r_info)].st_name;
        for (const Replacement& replacement : kReplacements) {
            if (std::strcmp(name, replacement.name) != 0) continue;
            store(reinterpret_cast<void**>(library.l_addr + begin[i].r_offset),
                  replacement.function);
            ++replaced;
        }
    }
    return replaced;
}

}  // namespace

extern "C" {

// Takes over the loaded library of this path; how many slots were found.
int take_over(const char* path) {
    void* handle = dlopen(path, RTLD_NOW | RTLD_NOLOAD);
    link_map* library = nullptr;
    if (handle == nullptr || dlinfo(handle, RTLD_DI_LINKMAP, &library) != 0) return 0;
    const ElfW(Sym)* symbols = nullptr;
    const ElfW(Rela)* plt = nullptr, *other = nullptr;
    const char* names = nullptr;
    size_t plt_bytes = 0, other_bytes = 0;
    for (const ElfW(Dyn)* entry = library->l_ld; entry->d_tag != DT_NULL; ++entry) {
        const ElfW(Addr) at = entry->d_un.d_ptr;
        if (entry->d_tag == DT_SYMTAB) symbols = reinterpret_cast<const ElfW(Sym)*>(at);
        if (entry->d_tag == DT_STRTAB) names = reinterpret_cast<const char*>(at);
        if (entry->d_tag == DT_JMPREL) plt = reinterpret_cast<const ElfW(Rela)*>(at);
        if (entry->d_tag == DT_RELA) other = reinterpret_cast<const ElfW(Rela)*>(at);
        if (entry->d_tag == DT_PLTRELSZ) plt_bytes = entry->d_un.d_val;
        if (entry->d_tag == DT_RELASZ) other_bytes = entry->d_un.d_val;
    }
    return replace_in(*library, plt, plt_bytes, symbols, names) +
           replace_in(*library, other, other_bytes, symbols, names);
}

// From now on calls are counted from 0, and those numbered first to last refused.
void refuse(int64_t first, int64_t last) {
    first_refused = INT64_MAX;
    last_refused = last;
    asked = 0;
    first_refused = first;
}

// How many calls there were.
int64_t calls() { return asked; }
}
