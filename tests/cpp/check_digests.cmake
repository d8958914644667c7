# Checks that the AMX kernels give the same bits natively and emulated. A CPU without AMX has nothing to compare with.
foreach(_program NATIVE EMULATED)
  execute_process(COMMAND "${${_program}}" OUTPUT_VARIABLE _${_program} ERROR_VARIABLE _${_program}_LOG
                  COMMAND_ERROR_IS_FATAL ANY)
endforeach()
if(_EMULATED MATCHES "cannot run" AND _NATIVE MATCHES "cannot run")
  return() # no AVX-512
endif()
string(REGEX MATCHALL "\n" _lines "${_EMULATED}")
list(LENGTH _lines _count)
if(NOT _count EQUAL 119 OR NOT _EMULATED_LOG MATCHES "emulated products: [1-9]")
  message(FATAL_ERROR "${_count} digests, ${_EMULATED_LOG}:\n${_EMULATED}")
endif()
if(NOT _NATIVE MATCHES "cannot run" AND NOT _NATIVE STREQUAL _EMULATED)
  message(FATAL_ERROR "natively:\n${_NATIVE}\nemulated:\n${_EMULATED}")
endif()
