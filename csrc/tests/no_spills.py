"""Runs a compiler command with `-Xptxas=-v` in it and fails where a bfloat16 or float16 kernel spills registers, naming
it: `make cuda` compiles through this. Usage: no_spills.py nvcc ... kernels.cu"""

import re
import shutil
import subprocess
import sys

_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'"
    r"|Function properties for (?P<function>\w+)\s*\n"
    r".*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
)


def spilling_kernels(ptxas: str) -> tuple[list[str], int]:
    """What ptxas says of 16-bit kernels: a line for each that spills, and how many there are."""
    spilling, seen, architectures = [], 0, {}
    for match in _KERNEL.finditer(ptxas):
        if match["name"]:
            architectures[match["name"]] = match["arch"]
        elif "float16" in match["function"] and match["function"] in architectures:
            seen += 1
            if match["stores"] != "0" or match["loads"] != "0":
                bytes_ = f"{match['stores']} bytes spill stores, {match['loads']} bytes spill loads"
                spilling.append(f"{_demangled(match['function'])} on {architectures[match['function']]}: {bytes_}")
    return spilling, seen


def _demangled(name: str) -> str:
    if not shutil.which("c++filt"):
        return name
    return subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()


def main(command: list[str]) -> int:
    result = subprocess.run(command, capture_output=True, text=True)
    sys.stdout.write(result.stdout)
    told = [line for line in result.stderr.splitlines(keepends=True) if not _is_statistics(line)]
    sys.stderr.write("".join(told))
    if result.returncode:
        return result.returncode
    spilling, seen = spilling_kernels(result.stderr)
    for line in spilling:
        print(f"error: spills registers: {line}", file=sys.stderr)
    if seen != len(re.findall(r"Compiling entry function '\w*float16\w*'", result.stderr)):
        print("error: ptxas's statistics are not as no_spills.py knows them", file=sys.stderr)
        return 1
    return 1 if spilling else 0


def _is_statistics(line: str) -> bool:
    return line.startswith("ptxas info") or "bytes stack frame" in line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
