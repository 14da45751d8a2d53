# `cmake --install`: the headers, the library and the package that find_package(flexdit) reads. The library is static:
# its C++ interface promises no stable ABI, so a program takes the one it was compiled with into itself. libflexdit_c is shared.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/flexdit)
get_filename_component(onednn_folder ${ONEDNN_LIBRARY} DIRECTORY)
install(TARGETS flexdit EXPORT flexdit ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY csrc/include/flexdit DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT development)
install(EXPORT flexdit NAMESPACE flexdit:: FILE flexdit-targets.cmake DESTINATION ${package_folder}
        COMPONENT development)
if(FLEXDIT_C_API)
  install(TARGETS flexdit_c EXPORT flexdit_c LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT development
          INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
  install(EXPORT flexdit_c NAMESPACE flexdit:: FILE flexdit-c-targets.cmake DESTINATION ${package_folder}
          COMPONENT development)
endif()
configure_package_config_file(cmake/flexdit-config.cmake.in flexdit-config.cmake INSTALL_DESTINATION ${package_folder})
write_basic_package_version_file(flexdit-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/flexdit-config.cmake ${CMAKE_CURRENT_BINARY_DIR}/flexdit-config-version.cmake
        DESTINATION ${package_folder} COMPONENT development)
