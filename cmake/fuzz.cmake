# FLEXDIT_FUZZ: the libFuzzer targets alone, of the sources that read files; nothing else is looked for or built.
#   CXX=clang++ cmake -S . -B build/fuzz -DFLEXDIT_FUZZ=ON && cmake --build build/fuzz
#   build/fuzz/fuzz_config -max_total_time=60 -dict=csrc/tests/data/fuzz/config.dict NEW csrc/tests/data/fuzz/config
if(NOT CMAKE_CXX_COMPILER_ID MATCHES "Clang")
  message(FATAL_ERROR "FLEXDIT_FUZZ=ON needs clang for libFuzzer, the compiler is ${CMAKE_CXX_COMPILER_ID}: set CXX=clang++")
endif()
file(GLOB file_sources CONFIGURE_DEPENDS csrc/io/*.cpp)
foreach(target fuzz_safetensors fuzz_config)
  add_executable(${target} csrc/tests/${target}.cpp ${file_sources} csrc/model/config_json.cpp csrc/model/schedule.cpp)
  target_include_directories(${target} PRIVATE csrc csrc/include)
  target_compile_options(${target} PRIVATE -g -O1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all)
  target_link_options(${target} PRIVATE -fsanitize=fuzzer,address,undefined)
endforeach()
