# The CUDA module: built where nvcc is found and works, unless NOWAG_CUDA says otherwise.
if(NOT NOWAG_CUDA MATCHES "^(auto|0|1)$")
  message(FATAL_ERROR "NOWAG_CUDA must be unset (auto), 0 or 1, not '${NOWAG_CUDA}'")
endif()
if(NOWAG_CUDA STREQUAL "0")
  return()
endif()

# sm_80 and sm_90 code, and sm_90 PTX for whatever comes later.
if(NOWAG_CUDA_ARCHS)
  set(CMAKE_CUDA_ARCHITECTURES ${NOWAG_CUDA_ARCHS})
else()
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90)
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOWAG_CUDA STREQUAL "1")
    message(FATAL_ERROR "NOWAG_CUDA=1, but there is no nvcc that works with this C++ compiler: put "
                        "CUDA 12 or later on PATH (or set CUDACXX to its nvcc), or unset NOWAG_CUDA")
  endif()
  message(STATUS "nowag_ext: no working nvcc found, building without CUDA")
  return()
endif()

enable_language(CUDA)
find_package(CUDAToolkit 12 REQUIRED)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)

# As for the CPU: the kernels' objects know no Python.
add_library(cuda_settings INTERFACE)
target_include_directories(cuda_settings INTERFACE csrc/include csrc)
target_link_libraries(cuda_settings INTERFACE CUDA::cudart_static)
# --fmad=false: only the fused multiply-adds that a header asks for (include/nowag/kmeans.h).
target_compile_options(cuda_settings INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -fvisibility=hidden>
  $<$<COMPILE_LANGUAGE:CUDA>:--fmad=false -Xcompiler=-Wall,-Wextra,-fvisibility=hidden>)
if(NOWAG_WERROR)
  target_compile_options(cuda_settings INTERFACE
    $<$<COMPILE_LANGUAGE:CXX>:-Werror> $<$<COMPILE_LANGUAGE:CUDA>:-Werror=all-warnings
    -Xptxas=--warn-on-spills,--warn-on-local-memory-usage,--warning-as-error>)
endif()

add_library(cuda_kernels OBJECT ${NOWAG_CUDA_SOURCES})
target_link_libraries(cuda_kernels PRIVATE cuda_settings)
set_target_properties(cuda_kernels PROPERTIES CUDA_RUNTIME_LIBRARY Static)

pybind11_add_module(_cuda NO_EXTRAS csrc/bindings/cuda_module.cpp)
target_link_libraries(_cuda PRIVATE cuda_settings cuda_kernels)
set_target_properties(_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static LINKER_LANGUAGE CXX)

install(TARGETS _cuda LIBRARY DESTINATION .)
