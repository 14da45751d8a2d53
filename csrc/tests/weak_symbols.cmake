# Objects of one instruction set must define no weak symbol outside their namespace: the linker would keep one copy
# of it for all instruction sets, perhaps one that this machine cannot execute.
# cmake -DNM=... -DISA=... -DOBJECTS=a.o;b.o -P weak_symbols.cmake
set(found "")
foreach(object IN LISTS OBJECTS)
  execute_process(COMMAND ${NM} -C ${object} OUTPUT_VARIABLE table COMMAND_ERROR_IS_FATAL ANY)
  # W, V: weak; u: unique in the whole program. DW.ref.* points at the personality routine and holds no code.
  string(REGEX MATCHALL "[0-9a-f]+ [WVu] [^\n]+" weak "${table}")
  foreach(line IN LISTS weak)
    if(NOT line MATCHES "flexdit::cpu::${ISA}::" AND NOT line MATCHES " DW\\.ref\\.")
      string(APPEND found "${object}: ${line}\n")
    endif()
  endforeach()
  string(FIND "${table}" "flexdit::cpu::${ISA}::" place)
  if(place EQUAL -1)
    string(APPEND found "${object} has no symbol of flexdit::cpu::${ISA}\n")
  endif()
endforeach()
if(NOT found STREQUAL "")
  message(FATAL_ERROR "weak symbols that the instruction sets would share:\n${found}")
endif()
