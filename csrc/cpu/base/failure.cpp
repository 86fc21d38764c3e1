#include "cpu/base/failure.h"

#include <new>
#include <stdexcept>

#include "cpu/base/interrupt.h"

namespace nowag::cpu {

Status failure() {
    try {
        throw;
    } catch (const Interrupted&) {
        return Status::interrupted;
    } catch (const std::bad_alloc&) {
        return Status::out_of_memory;
    } catch (const std::length_error&) {  // of a vector beyond the address space
        return Status::out_of_memory;
    }
}

}  // namespace nowag::cpu
