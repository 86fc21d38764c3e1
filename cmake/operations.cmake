# Which sources the operations of csrc/include/nowag/operations.h have:
#   NOWAG_CPU_SOURCES           csrc/cpu/<room>/<stem>.cpp and <stem>_<concern>.cpp
#   NOWAG_CPU_SOURCES_<level>   csrc/cpu/<room>/<stem>_<level>.cpp, one instruction set each
#   NOWAG_CUDA_SOURCES          csrc/cuda/<room>/<stem>*.cu
# A room is the first word of its stems; base/ serves all rooms. An operation without its files, and
# a file without its operation, end the configuration.
set(list csrc/include/nowag/operations.h)
set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${list})
file(READ ${list} text)
foreach(each EACH ALONE)
  string(REGEX MATCHALL "\n    ${each}\\([a-z_0-9]+, [a-z_0-9]+\\)" ${each} "${text}")
  list(TRANSFORM ${each} REPLACE "[^(]*\\(([a-z_0-9]+),.*" "\\1")
  list(REMOVE_DUPLICATES ${each})
endforeach()
list(REMOVE_ITEM ALONE ${EACH})

set(claimed)
foreach(stem IN LISTS EACH ALONE)
  string(REGEX MATCH "^[a-z0-9]+" room ${stem})
  set(files include/nowag/${stem}.h cpu/${room}/${stem}.cpp)
  if(NOT stem IN_LIST ALONE)
    list(APPEND files cuda/${room}/${stem}.cu)
  endif()
  foreach(file IN LISTS files)
    if(NOT EXISTS ${CMAKE_SOURCE_DIR}/csrc/${file})
      message(FATAL_ERROR "${list} names the stem ${stem}, but there is no csrc/${file}")
    endif()
  endforeach()
  file(GLOB files CONFIGURE_DEPENDS
       csrc/cpu/${room}/${stem}.cpp csrc/cpu/${room}/${stem}_*.cpp
       csrc/cuda/${room}/${stem}.cu csrc/cuda/${room}/${stem}_*.cu)
  list(APPEND claimed ${files})
endforeach()
list(REMOVE_DUPLICATES claimed)

file(GLOB all CONFIGURE_DEPENDS csrc/cpu/*/*.cpp csrc/cuda/*/*.cu)
foreach(source IN LISTS all)
  if(NOT source MATCHES "/base/[^/]+$" AND NOT source IN_LIST claimed)
    message(FATAL_ERROR "${source} belongs to no operation of ${list}: it must be named after a "
                        "stem there, and lie in the room of the stem's first word")
  endif()
  if(source MATCHES "\\.cu$")
    list(APPEND NOWAG_CUDA_SOURCES ${source})
  elseif(source MATCHES "_(scalar|avx2|avx512|avx512vbmi)\\.cpp$")
    list(APPEND NOWAG_CPU_SOURCES_${CMAKE_MATCH_1} ${source})
  else()
    list(APPEND NOWAG_CPU_SOURCES ${source})
  endif()
endforeach()
