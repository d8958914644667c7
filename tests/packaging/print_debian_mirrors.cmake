# Prints the mirrors that sparamx_debian_mirrors finds: cmake -DAPT_DIR=... -DRELEASE=... -P print_debian_mirrors.cmake
cmake_minimum_required(VERSION 3.25)
include("${CMAKE_CURRENT_LIST_DIR}/../../cmake/DebianOnnxRuntimeHeaders.cmake")
sparamx_debian_mirrors("${APT_DIR}" "${RELEASE}" MIRRORS)
message("${MIRRORS}")
