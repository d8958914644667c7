# Finds the C and C++ headers of ONNX Runtime. No library of ONNX Runtime is linked, and its Python wheel has no headers.
#
# Four ways, tried in this order:
#   variable   ONNXRUNTIME_INCLUDE_DIR, a CMake or an environment variable
#   installed  a package installed on this machine (CMAKE_PREFIX_PATH counts)
#   archive    the official release archive of ONNX Runtime 1.21.0, downloaded and checked by its SHA-256
#   debian     Debian's libonnxruntime-dev, downloaded and unpacked into the build tree (see DebianOnnxRuntimeHeaders.cmake)
# SPARAMX_ORT_HEADERS names the one way to use; `auto`, the default, tries them all.
#
# Result: the imported target OnnxRuntimeHeaders::OnnxRuntimeHeaders, OnnxRuntimeHeaders_INCLUDE_DIR,
# OnnxRuntimeHeaders_API_VERSION and OnnxRuntimeHeaders_WAY.

set(SPARAMX_ORT_HEADERS auto CACHE STRING "Where the ONNX Runtime headers come from")
set_property(CACHE SPARAMX_ORT_HEADERS PROPERTY STRINGS auto variable installed archive debian)
set(SPARAMX_ORT_ARCHIVE_URL
    "https://github.com/microsoft/onnxruntime/releases/download/v1.21.0/onnxruntime-linux-x64-1.21.0.tgz"
    CACHE STRING "The release archive that holds the ONNX Runtime headers")
set(SPARAMX_ORT_ARCHIVE_SHA256 "7485c7e7aac6501b27e353dcbe068e45c61ab51fbaf598d13970dfae669d20bf"
    CACHE STRING "SHA-256 of SPARAMX_ORT_ARCHIVE_URL")
set(SPARAMX_ORT_DOWNLOAD_DIR "${CMAKE_BINARY_DIR}/onnxruntime-headers"
    CACHE PATH "Where downloaded headers are kept; build folders may share one")
mark_as_advanced(SPARAMX_ORT_ARCHIVE_URL SPARAMX_ORT_ARCHIVE_SHA256 SPARAMX_ORT_DOWNLOAD_DIR)

# The plugin is written against this version of the API; ONNX Runtime keeps older versions working.
set(_ort_minimum_api 21)
set(_ort_download_dir "${SPARAMX_ORT_DOWNLOAD_DIR}")

# Sets OUT to the folder with both headers: BASE itself or where a source tree, a release or Debian keeps them below it.
function(_ort_locate BASE OUT)
  foreach(_suffix "" /onnxruntime /onnxruntime/core/session /include /include/onnxruntime
                  /include/onnxruntime/core/session)
    if(EXISTS "${BASE}${_suffix}/onnxruntime_c_api.h" AND EXISTS "${BASE}${_suffix}/onnxruntime_cxx_api.h")
      set(${OUT} "${BASE}${_suffix}" PARENT_SCOPE)
      return()
    endif()
  endforeach()
  set(${OUT} "" PARENT_SCOPE)
endfunction()

function(_ort_read_api_version DIR OUT)
  file(STRINGS "${DIR}/onnxruntime_c_api.h" _line REGEX "^#define ORT_API_VERSION [0-9]+" LIMIT_COUNT 1)
  string(REGEX MATCH "[0-9]+" _version "${_line}")
  set(${OUT} "${_version}" PARENT_SCOPE)
endfunction()

# Every way sets `dir` to a folder with headers, or `reason` to why it found none.

macro(_ort_try_variable)
  set(_given "${ONNXRUNTIME_INCLUDE_DIR}")
  if(NOT _given)
    set(_given "$ENV{ONNXRUNTIME_INCLUDE_DIR}")
  endif()
  if(NOT _given)
    set(reason "ONNXRUNTIME_INCLUDE_DIR is not set")
  else()
    _ort_locate("${_given}" dir)
    if(NOT dir)
      set(reason "ONNXRUNTIME_INCLUDE_DIR=${_given} holds no onnxruntime_c_api.h with onnxruntime_cxx_api.h")
      # What someone set by hand is meant: going on to another way would hide the mistake.
      set(_ort_stop TRUE)
    endif()
  endif()
endmacro()

macro(_ort_try_installed)
  find_path(
    _ort_installed_dir onnxruntime_cxx_api.h
    PATH_SUFFIXES onnxruntime onnxruntime/core/session
    NO_CACHE)
  if(_ort_installed_dir)
    string(REGEX REPLACE "/+$" "" _ort_installed_dir "${_ort_installed_dir}")
    _ort_locate("${_ort_installed_dir}" dir)
  endif()
  if(NOT dir)
    set(reason "no onnxruntime_cxx_api.h in the include folders of this machine or of CMAKE_PREFIX_PATH")
  endif()
  unset(_ort_installed_dir)
endmacro()

macro(_ort_try_archive)
  _ort_locate("${_ort_download_dir}/archive/include" dir)
  if(NOT dir)
    set(_archive "${_ort_download_dir}/archive.tgz")
    # One byte first: a machine whose packets go nowhere shall find out in seconds, a slow one may take its time.
    file(DOWNLOAD "${SPARAMX_ORT_ARCHIVE_URL}" "${_archive}" RANGE_START 0 RANGE_END 0 TIMEOUT 10 TLS_VERIFY ON
         STATUS _status)
    list(POP_FRONT _status _code)
    if(_code EQUAL 0)
      # Without EXPECTED_HASH, which would end the whole configuration when the connection breaks.
      file(DOWNLOAD "${SPARAMX_ORT_ARCHIVE_URL}" "${_archive}" TIMEOUT 600 INACTIVITY_TIMEOUT 20 TLS_VERIFY ON
           STATUS _status)
      list(POP_FRONT _status _code)
    endif()
    if(NOT _code EQUAL 0)
      set(reason "${SPARAMX_ORT_ARCHIVE_URL} could not be downloaded (${_status})")
    else()
      file(SHA256 "${_archive}" _sha256)
      if(NOT _sha256 STREQUAL SPARAMX_ORT_ARCHIVE_SHA256)
        set(reason "${SPARAMX_ORT_ARCHIVE_URL} has the SHA-256 ${_sha256}, not ${SPARAMX_ORT_ARCHIVE_SHA256}")
      else()
        file(ARCHIVE_EXTRACT INPUT "${_archive}" DESTINATION "${_ort_download_dir}/unpacked" PATTERNS "*/include/*")
        file(GLOB _unpacked "${_ort_download_dir}/unpacked/*/include")
        file(MAKE_DIRECTORY "${_ort_download_dir}/archive")
        file(RENAME "${_unpacked}" "${_ort_download_dir}/archive/include")
        _ort_locate("${_ort_download_dir}/archive/include" dir)
        if(NOT dir)
          set(reason "${SPARAMX_ORT_ARCHIVE_URL} holds no headers")
        endif()
      endif()
    endif()
    file(REMOVE "${_archive}")
  endif()
endmacro()

macro(_ort_try_debian)
  include(DebianOnnxRuntimeHeaders)
  sparamx_debian_onnxruntime_headers("${_ort_download_dir}/debian" _debian_root reason)
  if(_debian_root)
    _ort_locate("${_debian_root}/usr/include" dir)
    if(NOT dir)
      set(reason "Debian's package holds no headers")
    endif()
  endif()
endmacro()

if(SPARAMX_ORT_HEADERS STREQUAL "auto")
  set(_ort_ways variable installed archive debian)
elseif(SPARAMX_ORT_HEADERS MATCHES "^(variable|installed|archive|debian)$")
  set(_ort_ways "${SPARAMX_ORT_HEADERS}")
else()
  message(FATAL_ERROR "SPARAMX_ORT_HEADERS=${SPARAMX_ORT_HEADERS}: "
                      "it must be auto, variable, installed, archive or debian")
endif()

set(_ort_reasons "")
set(_ort_stop FALSE)
set(OnnxRuntimeHeaders_INCLUDE_DIR "")
foreach(_way IN LISTS _ort_ways)
  set(dir "")
  set(reason "")
  cmake_language(CALL "_ort_try_${_way}")
  if(dir)
    _ort_read_api_version("${dir}" _api)
    if(_api AND _api GREATER_EQUAL _ort_minimum_api)
      set(OnnxRuntimeHeaders_INCLUDE_DIR "${dir}")
      set(OnnxRuntimeHeaders_API_VERSION "${_api}")
      set(OnnxRuntimeHeaders_WAY "${_way}")
      break()
    endif()
    set(reason "${dir} has the API version ${_api}, which is below ${_ort_minimum_api} (ONNX Runtime 1.21)")
  endif()
  # find_package_handle_standard_args takes a semicolon in its message for the start of another argument.
  string(REPLACE ";" "," reason "${reason}")
  string(APPEND _ort_reasons "\n  ${_way}: ${reason}")
  if(_ort_stop)
    break()
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  OnnxRuntimeHeaders
  REQUIRED_VARS OnnxRuntimeHeaders_INCLUDE_DIR
  VERSION_VAR OnnxRuntimeHeaders_API_VERSION
  REASON_FAILURE_MESSAGE
    "tried:${_ort_reasons}\nAny one of these four ways gives them:
  1. set ONNXRUNTIME_INCLUDE_DIR to a folder with onnxruntime_c_api.h and onnxruntime_cxx_api.h (1.21 is best)
  2. install a package with the headers, or add its prefix to CMAKE_PREFIX_PATH
  3. let this machine reach ${SPARAMX_ORT_ARCHIVE_URL}
  4. on Debian 12 or newer, let this machine reach a Debian mirror that is in its apt sources (suite trixie)\n")

if(OnnxRuntimeHeaders_FOUND)
  message(STATUS "ONNX Runtime headers: ${OnnxRuntimeHeaders_INCLUDE_DIR} "
                 "(${OnnxRuntimeHeaders_WAY}, API version ${OnnxRuntimeHeaders_API_VERSION})")
  if(NOT TARGET OnnxRuntimeHeaders::OnnxRuntimeHeaders)
    add_library(OnnxRuntimeHeaders::OnnxRuntimeHeaders INTERFACE IMPORTED)
    # SYSTEM is implied for an imported target: our warnings are not for headers that others wrote.
    set_target_properties(OnnxRuntimeHeaders::OnnxRuntimeHeaders PROPERTIES INTERFACE_INCLUDE_DIRECTORIES
                                                                            "${OnnxRuntimeHeaders_INCLUDE_DIR}")
  endif()
endif()
