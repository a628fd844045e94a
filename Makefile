# Two commands do everything: `make demo` and `make test`. Environments are made here, in .venv and .venvs, and nowhere else.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what is imported, and keeps it, whatever its environment says: torch and transformers anew take a process 10 s. All at once takes as long as installing.
unexport PYTHONDONTWRITEBYTECODE
PIP := -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt
ENVIRONMENTS := triton transformers-5.5.4 transformers-4.57.6 megatron bitsandbytes ray trl torchao modelopt quark mlx s3
BESIDE := bitsandbytes mlx trl triton ray s3 megatron quark
PEFTS := 0.18.1 0.19.1 0.21.2
CELLS := 5.23.0+0.18.1 5.23.0+0.19.1 4.57.6+0.19.1 4.57.6+0.21.2 5.5.4+0.18.1 5.5.4+0.21.2
PYTEST := -m pytest --durations 5
# What no release of transformers has a say in is tried beside the newest alone.
OF_NO_RELEASE := defaults joined lora moments native_memory
# The other tests of devices register one of their own, which torch then takes for the accelerator of the process, before a GPU; this one has processes of its own.
ON_A_DEVICE := $(addprefix tests/oracles/test_,devices.py::test_every_encoding_computes_elsewhere_by_every_backend load.py native.py lora_peft.py lora_trainer.py run.py tune.py::test_the_command)

# No test asks the Hub. PEFT would, for what it knows already, and waits half a minute where there is no network.
export HF_HUB_OFFLINE := 1

.PRECIOUS: .venvs/%/ready
.PHONY: demo test lint environments matrix matrix-peft bench gpu gpu-models docs clean

demo: .venv/ready
	$(BIN)/moeglot demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal --durations 20 tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

environments: $(ENVIRONMENTS:%=.venvs/%/ready) $(PEFTS:%=.venvs/peft-%/ready)

# The oracles again, in an environment for each other library and version that we speak to. Each is one process: with --jobs 2, as fast as two cores allow.
matrix: $(ENVIRONMENTS:%=matrix-%) $(CELLS:%=peft-%)

matrix-torchao matrix-modelopt matrix-quark matrix-mlx matrix-megatron: matrix-%: .venvs/%/ready
	OMP_NUM_THREADS=1 .venvs/$*/bin/python $(PYTEST) tests/oracles/test_$**.py

matrix-bitsandbytes: .venvs/bitsandbytes/ready
	OMP_NUM_THREADS=1 .venvs/bitsandbytes/bin/python $(PYTEST) tests/oracles/test_bitsandbytes*.py tests/oracles/test_unsloth.py

matrix-quark: export TORCH_EXTENSIONS_DIR := $(CURDIR)/.venvs/quark/extensions

# 690 MB installed. Where there is a GPU, the tests that need one run too; elsewhere they say that they are skipped.
matrix-triton: .venvs/triton/ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venvs/triton/bin/python $(PYTEST) tests/gpu/test_interpreted.py tests/gpu/test_between.py tests/gpu/test_refused.py tests/gpu/test_benchmark.py
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venvs/triton/bin/python $(PYTEST) tests/oracles/test_lora.py -k "triton or kernels"
	OMP_NUM_THREADS=1 .venvs/triton/bin/python $(PYTEST) tests/gpu

matrix-trl: .venvs/trl/ready
	OMP_NUM_THREADS=1 .venvs/trl/bin/python $(PYTEST) tests/oracles/test_trl.py tests/oracles/test_tune.py::test_the_command

matrix-ray: .venvs/ray/ready
	.venvs/ray/bin/python $(PYTEST) tests/oracles/test_ray.py

# It has aiohttp, which one of the tests of stores needs.
matrix-s3: .venvs/s3/ready
	.venvs/s3/bin/python $(PYTEST) tests/oracles/test_s3.py tests/test_remote.py::test_a_server_of_plain_http

# PEFT with every transformers, at square sizes: the cells that are no environment of their own, which has its PEFT and tries all sizes.
matrix-peft: $(CELLS:%=peft-%)

peft-5.23.0+%: PLACE = .venv
peft-5.5.4+%: PLACE = .venvs/transformers-5.5.4
peft-4.57.6+%: PLACE = .venvs/transformers-4.57.6
$(CELLS:%=peft-%): .venv/ready .venvs/transformers-4.57.6/ready .venvs/transformers-5.5.4/ready $(PEFTS:%=.venvs/peft-%/ready)
	OMP_NUM_THREADS=1 PYTHONPATH=.venvs/peft-$(lastword $(subst +, ,$@)) $(PLACE)/bin/python $(PYTEST) tests/oracles/test_peft.py -k "not neither and not 2i"

.venvs/peft-%/ready: .venv/ready
	$(BIN)/python $(PIP) --no-deps --target .venvs/peft-$* peft==$*
	touch $@

matrix-%: .venvs/%/ready
	OMP_NUM_THREADS=1 .venvs/$*/bin/python $(PYTEST) tests/oracles $(OF_NO_RELEASE:%=--ignore tests/oracles/test_%.py)

# Everything that this machine can measure; on an idle one, or the ratios mean little. bitsandbytes lives in an environment of its own.
bench: .venv/ready .venvs/bitsandbytes/ready .venvs/ray/ready
	$(BIN)/python benchmarks/kernels.py
	.venvs/bitsandbytes/bin/python benchmarks/kernels.py --only nf4 --results benchmarks/results/kernels-bitsandbytes.json
	$(BIN)/python benchmarks/streaming.py --peers
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/coded.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/sizing.py
	$(BIN)/python benchmarks/experts.py
	.venvs/ray/bin/python benchmarks/ray.py

# On a machine with a GPU, whatever Python has torch and Triton there: the tests that need one, and the figures. `make gpu PYTHON=python3 TO=folder`, within 10 minutes.
# The tests compile a hundred kernels, a second or two each: eight at a time where pytest-xdist is.
TO ?= benchmarks/results
gpu:
	mkdir -p $(TO)
	-OMP_NUM_THREADS=1 PYTHONPATH=src timeout 240 $(PYTHON) $(PYTEST) $$($(PYTHON) -c "import xdist" 2>/dev/null && echo --numprocesses 8 --dist worksteal) tests/gpu/test_cuda.py > $(TO)/test_cuda.txt 2>&1; tail -40 $(TO)/test_cuda.txt
	PYTHONPATH=src $(PYTHON) benchmarks/gpu.py --results $(TO)/gpu.json

# There too, with transformers, PEFT and pytest-xdist: the oracles that judge a CPU judge the GPU. `make gpu-models PYTHON=python3 TO=folder`, within 5 minutes.
gpu-models:
	mkdir -p $(TO)
	MOEGLOT_DEVICE=cuda OMP_NUM_THREADS=1 PYTHONPATH=src timeout 280 $(PYTHON) $(PYTEST) --numprocesses 8 --maxfail 20 $(ON_A_DEVICE) > $(TO)/test_models.txt 2>&1; \
	    status=$$?; tail -40 $(TO)/test_models.txt; exit $$status

docs: .venv/ready
	$(BIN)/python $(PIP) --editable '.[docs]'
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict

# torch first and pinned: another package would pull in a build for CUDA.
.venv/ready: pyproject.toml constraints.txt tests/environments/transformers-5.23.0.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) torch
	$(BIN)/python $(PIP) --requirement tests/environments/transformers-5.23.0.txt --editable '.[transformers,fast,test,lint]'
	$(BIN)/python $(PIP) --no-deps --ignore-requires-python --requirement tests/environments/openai.txt
	touch $@

# Quark asks for much that what we run of it does not import. It compiles a kernel when it is imported first, in seconds; without g++ and ninja its tests skip.
.venvs/quark/ready: private PIP := $(PIP) --no-deps

# Libraries that go beside the packages of .venv: these stand behind their own.
$(BESIDE:%=.venvs/%/ready): .venvs/%/ready: .venv/ready tests/environments/%.txt
	$(PYTHON) -m venv .venvs/$*
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" > \
	    $$(.venvs/$*/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth
	.venvs/$*/bin/python $(PIP) --requirement tests/environments/$*.txt
	touch $@

.venvs/%/ready: pyproject.toml constraints.txt tests/environments/%.txt
	$(PYTHON) -m venv .venvs/$*
	.venvs/$*/bin/python $(PIP) torch
	.venvs/$*/bin/python $(PIP) --requirement tests/environments/$*.txt --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venvs build dist site
