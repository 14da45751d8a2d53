# make demo: the main job. make test: all tests. Each sets up .venv and builds what is missing.
VENV := .venv
PYTHON ?= python3
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name CMakeLists.txt) CMakeLists.txt setup.py pyproject.toml \
           flexdit_ext/version.py

.PHONY: demo test pytest ctest cuda sanitize bench lint clean

demo: $(VENV)/.built
	$(BIN)/python examples/digits/run.py --out out

test: pytest ctest

pytest: $(VENV)/.built
	$(BIN)/pytest

# The C++ tests need no Python; cmake and ninja are the environment's.
ctest: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/ctest -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFLEXDIT_PYTHON=OFF \
	  -DFLEXDIT_TESTS=ON -DFLEXDIT_CUDA=OFF -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	$(BIN)/cmake --build build/ctest
	$(BIN)/ctest --test-dir build/ctest -j2 --output-on-failure

# Compiles the CUDA kernels with nvcc for sm_80 and sm_90a; 16-bit kernels that spill registers fail. No GPU is needed,
# and nothing is run.
cuda: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFLEXDIT_PYTHON=OFF \
	  -DFLEXDIT_CUDA=ON -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DCMAKE_CUDA_FLAGS=-Xptxas=-v \
	  "-DCMAKE_CUDA_COMPILER_LAUNCHER=$(abspath $(BIN)/python);$(abspath csrc/tests/no_spills.py)" >/dev/null
	$(BIN)/cmake --build build/cuda

# The C++ tests under the address and undefined-behaviour sanitizers.
sanitize: $(VENV)/.installed
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFLEXDIT_PYTHON=OFF \
	  -DFLEXDIT_TESTS=ON -DFLEXDIT_CUDA=OFF -DFLEXDIT_SANITIZE=address,undefined -DPython_EXECUTABLE=$(abspath $(BIN)/python) >/dev/null
	$(BIN)/cmake --build build/sanitize
	$(BIN)/ctest --test-dir build/sanitize -j2 --output-on-failure

bench: $(VENV)/.built
	$(BIN)/python bench/cpu_model.py

lint: $(VENV)/.installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

$(VENV)/.installed: requirements/test.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements/test.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf build dist out $(VENV)/.built flexdit_ext/*.so *.egg-info
