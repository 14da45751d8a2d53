# make demo: the main job. make demo-video: the same on clips. make test: all tests. Each sets up .venv and builds what is missing.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
CMAKE = $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFLEXDIT_PYTHON=OFF \
        -DPython_EXECUTABLE=$(abspath $(BIN)/python)
# Tests and demo run on the CPU; `make FLEXDIT_CUDA=AUTO ...` compiles the CUDA kernels for the Python module, too.
FLEXDIT_CUDA ?= OFF
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt) CMakeLists.txt setup.py pyproject.toml \
           flexdit_ext/version.py

# Processes of pytest; most tests are one thread's work.
TEST_JOBS ?= 2

# The wheel has CUDA kernels where nvcc is found; OFF leaves them out.
WHEEL_CUDA ?= AUTO

.PHONY: demo demo-text demo-video test pytest ctest cuda sanitize bench gpu wheel try-wheel stubs lint clean

demo: $(VENV)/.built
	$(BIN)/python examples/digits/run.py --out out

# FlexPixArt on digits with captions. TEXT="--text-encoder DIR" takes a T5 encoder from a folder, with transformers.
demo-text: $(VENV)/.built
	$(BIN)/python examples/captions/run.py --out out/text $(TEXT)

demo-video: $(VENV)/.built
	$(BIN)/python examples/video/run.py --out out/video

test: pytest ctest

pytest: $(VENV)/.built build/ctest/build.ninja
	$(BIN)/cmake --build build/ctest --target _C_emulated flexdit flexdit_c
	FLEXDIT_EMULATED=build/ctest GOMP_SPINCOUNT=1000 OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(TEST_JOBS) --dist loadfile

ctest: build/ctest/build.ninja
	$(BIN)/cmake --build build/ctest
	$(BIN)/ctest --test-dir build/ctest -j2 --output-on-failure

# The C++ tests, and for python_tests the library and the CUDA kernels on the emulator as a Python module.
build/ctest/build.ninja: $(VENV)/.installed CMakeLists.txt
	$(CMAKE) -B build/ctest -DFLEXDIT_TESTS=ON -DFLEXDIT_CUDA=OFF -DFLEXDIT_PYTHON_EMULATED=ON \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) >/dev/null

# Compiles the CUDA kernels with nvcc for sm_80 and sm_90a, and the Python module with them; 16-bit kernels that spill
# registers fail. No GPU is needed.
cuda: $(VENV)/.installed
	$(CMAKE) -B build/cuda -DFLEXDIT_CUDA=ON -DFLEXDIT_PYTHON=ON -DCMAKE_LIBRARY_OUTPUT_DIRECTORY=$(abspath build/cuda) \
	  -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
	  "-DCMAKE_CUDA_COMPILER_LAUNCHER=$(abspath $(BIN)/python);$(abspath csrc/tests/no_spills.py)" >/dev/null
	$(BIN)/cmake --build build/cuda

# The C++ tests under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/.installed
	$(CMAKE) -B build/sanitize -DFLEXDIT_TESTS=ON -DFLEXDIT_CUDA=OFF -DFLEXDIT_SANITIZE=address,undefined >/dev/null
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize -j2 --output-on-failure

bench: $(VENV)/.built
	$(BIN)/python bench/cpu_model.py

# On a GPU machine: build, test, sanitize and measure in ten minutes, no network needed. bench/GPU.md says how.
gpu:
	$(PYTHON) bench/gpu.py $(GPU)

# dist/: the sdist and a manylinux wheel for this Python, CUDA kernels for all release architectures included.
wheel: $(VENV)/.installed-wheel
	$(BIN)/python packaging/build_wheel.py --cuda $(WHEEL_CUDA)

# The wheel in fresh environments: TRY="cpu none", also cuda.
TRY ?= cpu none
try-wheel: $(VENV)/.installed-wheel
	$(BIN)/python packaging/try_wheel.py dist/*.whl $(TRY)

# flexdit_ext/_C.pyi, after a change in csrc/python.
stubs: $(VENV)/.built
	$(BIN)/python -m pip install --quiet pybind11-stubgen
	$(BIN)/python -m pybind11_stubgen flexdit_ext._C -o build/stubs
	mv build/stubs/flexdit_ext/_C.pyi flexdit_ext/_C.pyi
	$(BIN)/ruff check --quiet --select I --fix flexdit_ext/_C.pyi && $(BIN)/ruff format flexdit_ext/_C.pyi

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/.installed: requirements/test.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/test.txt
	touch $@

$(VENV)/.installed-wheel: requirements/wheel.txt $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -r requirements/wheel.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" FLEXDIT_CMAKE_ARGS="-DFLEXDIT_CUDA=$(FLEXDIT_CUDA) $$FLEXDIT_CMAKE_ARGS" \
	  $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist out $(VENV)/.built flexdit_ext/*.so *.egg-info
