# Fetches Debian's libonnxruntime-dev (85 KB, ONNX Runtime 1.21.0) from the suite `trixie` and unpacks it; nothing is
# installed, no root is needed, and apt's own state stays untouched: everything it writes goes below DESTINATION.
#
# The mirror is the one that this machine's apt sources name for its own Debian release, so that proxies, local mirrors
# and offline copies keep working.

# Sets OUT to the URIs of the apt sources below APT_DIR that serve `main` of Debian's release RELEASE or of a release that
# Debian names by its state. Such a mirror has trixie too.
function(sparamx_debian_mirrors APT_DIR RELEASE OUT)
  set(_uris "")
  set(_suites "^(${RELEASE}|trixie|stable|oldstable|testing|unstable|sid)$")

  file(GLOB _lists ${APT_DIR}/sources.list ${APT_DIR}/sources.list.d/*.list)
  foreach(_file IN LISTS _lists)
    # Brackets and semicolons would upset CMake's lists.
    file(READ "${_file}" _text)
    string(REGEX REPLACE "\\[[^]\n]*\\]" "" _text "${_text}")
    string(REPLACE ";" " " _text "${_text}")
    string(REPLACE "\n" ";" _lines "${_text}")
    foreach(_line IN LISTS _lines)
      if(_line MATCHES "^[ \t]*deb[ \t]+([^ \t]+)[ \t]+([^ \t]+)[ \t]+(.*)$")
        set(_uri "${CMAKE_MATCH_1}")
        set(_suite "${CMAKE_MATCH_2}")
        set(_components " ${CMAKE_MATCH_3} ")
        if(_suite MATCHES "${_suites}" AND _components MATCHES "[ \t]main[ \t]")
          list(APPEND _uris "${_uri}")
        endif()
      endif()
    endforeach()
  endforeach()

  file(GLOB _lists ${APT_DIR}/sources.list.d/*.sources)
  foreach(_file IN LISTS _lists)
    file(READ "${_file}" _text)
    string(REGEX REPLACE "[][;]" " " _text "${_text}")
    string(REGEX REPLACE "(^|\n)#[^\n]*" "" _text "${_text}")
    string(REGEX REPLACE "\n[ \t]+" " " _text "\n${_text}")
    string(REGEX REPLACE "\n\n+" ";" _stanzas "${_text}")
    foreach(_stanza IN LISTS _stanzas)
      set(_stanza "\n${_stanza}\n")
      foreach(_field Types URIs Suites Components Enabled)
        set(_${_field} "")
        string(TOLOWER "${_field}" _key)
        if(_stanza MATCHES "\n(${_field}|${_key}):[ \t]*([^\n]*)")
          string(REGEX REPLACE "[ \t]+" ";" _${_field} "${CMAKE_MATCH_2}")
        endif()
      endforeach()
      set(_serves FALSE)
      foreach(_suite IN LISTS _Suites)
        if(_suite MATCHES "${_suites}")
          set(_serves TRUE)
        endif()
      endforeach()
      if(_serves AND "deb" IN_LIST _Types AND "main" IN_LIST _Components AND NOT "no" IN_LIST _Enabled)
        list(APPEND _uris ${_URIs})
      endif()
    endforeach()
  endforeach()

  list(REMOVE_ITEM _uris "")
  list(REMOVE_DUPLICATES _uris)
  set(${OUT} "${_uris}" PARENT_SCOPE)
endfunction()

# Sets ROOT_OUT to the unpacked package's root folder, or REASON_OUT to one sentence that says why there is none.
function(sparamx_debian_onnxruntime_headers DESTINATION ROOT_OUT REASON_OUT)
  set(${ROOT_OUT} "" PARENT_SCOPE)
  set(${REASON_OUT} "" PARENT_SCOPE)
  if(EXISTS "${DESTINATION}/root/usr/include/onnxruntime")
    set(${ROOT_OUT} "${DESTINATION}/root" PARENT_SCOPE)
    return()
  endif()

  find_program(_apt_get apt-get NO_CACHE)
  find_program(_apt_config apt-config NO_CACHE)
  find_program(_dpkg_deb dpkg-deb NO_CACHE)
  if(NOT _apt_get OR NOT _apt_config OR NOT _dpkg_deb)
    set(${REASON_OUT} "this machine has no apt-get or no dpkg-deb" PARENT_SCOPE)
    return()
  endif()
  set(_keyring /usr/share/keyrings/debian-archive-keyring.gpg)
  if(NOT EXISTS "${_keyring}")
    set(${REASON_OUT} "Debian's keyring ${_keyring} is missing" PARENT_SCOPE)
    return()
  endif()
  set(_release stable)
  if(EXISTS /etc/os-release)
    file(STRINGS /etc/os-release _codename REGEX "^VERSION_CODENAME=" LIMIT_COUNT 1)
    if(_codename MATCHES "=\"?([a-z]+)")
      set(_release "${CMAKE_MATCH_1}")
    endif()
  endif()
  sparamx_debian_mirrors(/etc/apt "${_release}" _mirrors)
  if(NOT _mirrors)
    set(${REASON_OUT} "the apt sources of this machine name no Debian mirror" PARENT_SCOPE)
    return()
  endif()

  file(REMOVE_RECURSE "${DESTINATION}")
  file(MAKE_DIRECTORY "${DESTINATION}/lists/partial" "${DESTINATION}/cache/archives/partial" "${DESTINATION}/log"
       "${DESTINATION}/empty" "${DESTINATION}/deb")
  file(WRITE "${DESTINATION}/status" "")

  # The machine's proxy and retry settings, but none of its hooks (APT::Update::Post-Invoke may clean system folders).
  execute_process(COMMAND "${_apt_config}" dump --no-empty OUTPUT_VARIABLE _settings ERROR_QUIET)
  string(REPLACE ";" "" _settings "\n${_settings}")
  string(REGEX MATCHALL "\nAcquire::[^\n]*" _acquire "${_settings}")
  list(FILTER _acquire EXCLUDE REGEX "Acquire::IndexTargets")
  list(TRANSFORM _acquire APPEND "\\;")
  list(JOIN _acquire "" _acquire)
  file(
    WRITE "${DESTINATION}/apt.conf"
    "${_acquire}
Dir::Etc::Main \"/dev/null\";
Dir::Etc::Parts \"${DESTINATION}/empty\";
Dir::Etc::SourceList \"${DESTINATION}/sources.list\";
Dir::Etc::SourceParts \"/dev/null\";
Dir::Etc::Preferences \"/dev/null\";
Dir::Etc::PreferencesParts \"/dev/null\";
Dir::State \"${DESTINATION}\";
Dir::State::Lists \"${DESTINATION}/lists\";
Dir::State::status \"${DESTINATION}/status\";
Dir::Cache \"${DESTINATION}/cache\";
Dir::Log \"${DESTINATION}/log\";
APT::Architecture \"amd64\";
APT::Architectures \"amd64\";
APT::Sandbox::User \"\";
APT::Get::List-Cleanup \"false\";
Acquire::Languages \"none\";
Acquire::Retries \"1\";
Acquire::http::Timeout \"15\";
Acquire::https::Timeout \"15\";
")

  set(_complaint "")
  foreach(_mirror IN LISTS _mirrors)
    file(WRITE "${DESTINATION}/sources.list" "deb [signed-by=${_keyring}] ${_mirror} trixie main\n")
    execute_process(
      COMMAND "${CMAKE_COMMAND}" -E env "APT_CONFIG=${DESTINATION}/apt.conf" "LC_ALL=C" "${_apt_get}" -q update
              --error-on=any
      COMMAND_ECHO NONE
      TIMEOUT 180
      RESULT_VARIABLE _result
      OUTPUT_VARIABLE _output
      ERROR_VARIABLE _output)
    if(_result EQUAL 0)
      execute_process(
        COMMAND "${CMAKE_COMMAND}" -E env "APT_CONFIG=${DESTINATION}/apt.conf" "LC_ALL=C" "${_apt_get}" -q download
                libonnxruntime-dev
        WORKING_DIRECTORY "${DESTINATION}/deb"
        TIMEOUT 120
        RESULT_VARIABLE _result
        OUTPUT_VARIABLE _output
        ERROR_VARIABLE _output)
    endif()
    file(GLOB _deb "${DESTINATION}/deb/libonnxruntime-dev_*.deb")
    if(_result EQUAL 0 AND _deb)
      execute_process(COMMAND "${_dpkg_deb}" -x "${_deb}" "${DESTINATION}/root" RESULT_VARIABLE _result
                      ERROR_VARIABLE _output)
      if(_result EQUAL 0)
        break()
      endif()
    endif()
    # apt ends with a general sentence; the first error says what went wrong.
    string(REGEX MATCH "(E|Err|W): *[^\n]*" _first "${_output}")
    string(APPEND _complaint " ${_mirror}: ${_first} (${_result})")
  endforeach()

  # Package lists are large and of no further use.
  file(REMOVE_RECURSE "${DESTINATION}/lists" "${DESTINATION}/cache")
  if(EXISTS "${DESTINATION}/root/usr/include/onnxruntime")
    set(${ROOT_OUT} "${DESTINATION}/root" PARENT_SCOPE)
  else()
    file(REMOVE_RECURSE "${DESTINATION}/root")
    set(${REASON_OUT} "no mirror gave libonnxruntime-dev of trixie:${_complaint}" PARENT_SCOPE)
  endif()
endfunction()
