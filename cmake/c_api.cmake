# libflexdit_c: the C interface in a shared library that exports nothing else.
add_library(flexdit_c SHARED csrc/c_api/c_api.cpp csrc/c_api/sampling_api.cpp)
add_library(flexdit::flexdit_c ALIAS flexdit_c)
target_include_directories(flexdit_c INTERFACE $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include>)
target_include_directories(flexdit_c PRIVATE csrc)
target_compile_definitions(flexdit_c PRIVATE FLEXDIT_VERSION="${PROJECT_VERSION}")
target_link_libraries(flexdit_c PRIVATE flexdit)
set(exports ${CMAKE_CURRENT_SOURCE_DIR}/csrc/c_api/exports.map)
target_link_options(flexdit_c PRIVATE -Wl,--version-script=${exports})
get_filename_component(onednn_folder ${ONEDNN_LIBRARY} DIRECTORY)
set_target_properties(flexdit_c PROPERTIES LINK_DEPENDS ${exports} VERSION ${PROJECT_VERSION} SOVERSION 0
                                           INSTALL_RPATH "$ORIGIN;${onednn_folder}")
