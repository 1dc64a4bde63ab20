# The module _cuda: kernels for NVIDIA GPUs, compiled without one. It loads on machines without a
# driver too: the CUDA runtime is linked in, and looks for the driver when it is first called.

# 12.8 is the first that knows sm_120 and can compress for size.
set(TB_NVCC_LEAST 12.8)

# Says why there are no CUDA kernels: an error where they were asked for.
macro(tb_without_cuda reason)
  if(TB_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TB_CUDA=ON, but ${reason}")
  endif()
  message(STATUS "No CUDA kernels: ${reason}")
  return()
endmacro()

# A look at the paths costs nothing; only what is found there is tried out.
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(TB_NVCC nvcc HINTS ENV CUDA_PATH ENV CUDA_HOME /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT TB_NVCC)
    tb_without_cuda("nvcc was not found; put it on PATH or set CUDACXX")
  endif()
  set(ENV{CUDACXX} ${TB_NVCC})
endif()

# Machine code for the GPUs of 2020 to 2025 that tbfast is tested for (sm_80 also runs on 8.x, sm_100
# on 10.x), and PTX that the driver compiles for all others from 9.0 on.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120-real 90-virtual)
endif()
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  tb_without_cuda("nvcc does not work with this C++ compiler; CMake's log says why")
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS TB_NVCC_LEAST)
  tb_without_cuda("nvcc ${TB_NVCC_LEAST} is needed, and this is ${CMAKE_CUDA_COMPILER_VERSION}")
endif()

# What is compiled in, in the words of nvcc, for _cuda.targets().
set(targets "")
foreach(architecture ${CMAKE_CUDA_ARCHITECTURES})
  string(REGEX REPLACE "-(real|virtual)$" "" number ${architecture})
  if(NOT architecture MATCHES "-virtual$")
    list(APPEND targets sm_${number})
  endif()
  if(NOT architecture MATCHES "-real$")
    list(APPEND targets compute_${number})
  endif()
endforeach()
list(JOIN targets " " targets)

# Python is known to the .cpp files only, CUDA to the .cu files only.
file(GLOB TB_CUDA_SOURCES CONFIGURE_DEPENDS csrc/bind_cuda*.cpp csrc/cuda/*.cpp csrc/cuda/*.cu)
pybind11_add_module(_cuda MODULE ${TB_CUDA_SOURCES})
target_include_directories(_cuda PRIVATE csrc)
target_compile_definitions(_cuda PRIVATE TB_CUDA_TARGETS="${targets}"
                                         TB_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
set_target_properties(_cuda PROPERTIES CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON
                                       CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden)
target_compile_options(_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:--compress-mode=size>)
if(NOT MSVC)
  target_compile_options(_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-Wall,-Wextra>")
  target_link_options(_cuda PRIVATE -static-libstdc++ -static-libgcc)
endif()
if(TB_WERROR)
  target_compile_options(_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Werror all-warnings>")
endif()
install(TARGETS _cuda DESTINATION tbfast)
message(STATUS "CUDA kernels for ${targets}, by nvcc ${CMAKE_CUDA_COMPILER_VERSION}")
