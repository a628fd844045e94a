# Two commands do everything: `make demo` and `make test`. Environments are made here, in .venv and .venvs, and nowhere else.
PYTHON ?= python3
BIN := .venv/bin
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
ENVIRONMENTS := transformers-4.57.6 transformers-5.5.4 torchao modelopt bitsandbytes mlx trl triton ray s3 megatron
BESIDE := bitsandbytes mlx trl triton ray s3 megatron
PEFTS := 0.18.1 0.19.1 0.21.2
CELLS := $(foreach peft,0.18.1 0.19.1,.venv/$(peft)) $(foreach peft,0.19.1 0.21.2,.venvs/transformers-4.57.6/$(peft)) $(foreach peft,0.18.1 0.21.2,.venvs/transformers-5.5.4/$(peft))
SPREAD := --numprocesses auto --dist worksteal

.PRECIOUS: .venvs/%/ready
.PHONY: demo test lint environments matrix bench docs clean

demo: .venv/ready
	$(BIN)/moeglot demo

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) --durations 20 tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

environments: $(ENVIRONMENTS:%=.venvs/%/ready) $(PEFTS:%=.venvs/peft-%/ready)

# The oracles again, in an environment for each other library and version that we speak to.
matrix: $(ENVIRONMENTS:%=matrix-%) matrix-peft

matrix-torchao matrix-modelopt matrix-mlx matrix-megatron: matrix-%: .venvs/%/ready
	OMP_NUM_THREADS=1 .venvs/$*/bin/python -m pytest $(SPREAD) tests/oracles/test_$**.py

matrix-bitsandbytes: .venvs/bitsandbytes/ready
	OMP_NUM_THREADS=1 .venvs/bitsandbytes/bin/python -m pytest $(SPREAD) tests/oracles/test_bitsandbytes.py tests/oracles/test_bitsandbytes_golden.py tests/oracles/test_bitsandbytes_checkpoints.py tests/oracles/test_unsloth.py

# 690 MB installed. Where there is a GPU, the tests that need one run too; elsewhere they say that they are skipped.
matrix-triton: .venvs/triton/ready
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venvs/triton/bin/python -m pytest $(SPREAD) tests/gpu/test_interpreted.py tests/gpu/test_refused.py
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 .venvs/triton/bin/python -m pytest $(SPREAD) tests/oracles/test_lora.py -k "triton or kernels"
	OMP_NUM_THREADS=1 .venvs/triton/bin/python -m pytest $(SPREAD) tests/gpu

matrix-trl: .venvs/trl/ready
	OMP_NUM_THREADS=1 .venvs/trl/bin/python -m pytest $(SPREAD) tests/oracles/test_trl.py tests/oracles/test_tune.py::test_the_command

matrix-ray matrix-s3: matrix-%: .venvs/%/ready
	.venvs/$*/bin/python -m pytest tests/oracles/test_$*.py

# PEFT with every transformers: the cells that are no environment of their own, which has its PEFT.
matrix-peft: .venv/ready .venvs/transformers-4.57.6/ready .venvs/transformers-5.5.4/ready $(PEFTS:%=.venvs/peft-%/ready)
	set -e; for cell in $(CELLS); do \
	    OMP_NUM_THREADS=1 PYTHONPATH=.venvs/peft-$${cell##*/} $${cell%/*}/bin/python -m pytest $(SPREAD) tests/oracles/test_peft.py; \
	done

.venvs/peft-%/ready: .venv/ready
	$(BIN)/python $(PIP) --no-deps --target .venvs/peft-$* peft==$*
	touch $@

matrix-%: .venv/ready .venvs/%/ready
	OMP_NUM_THREADS=1 .venvs/$*/bin/python -m pytest $(SPREAD) tests/oracles

# Everything that this machine can measure; on an idle one, or the ratios mean little. bitsandbytes lives in an environment of its own.
bench: .venv/ready .venvs/bitsandbytes/ready .venvs/ray/ready
	$(BIN)/python benchmarks/kernels.py
	.venvs/bitsandbytes/bin/python benchmarks/kernels.py --only nf4 --results benchmarks/results/kernels-bitsandbytes.json
	$(BIN)/python benchmarks/streaming.py --peers
	$(BIN)/python benchmarks/merging.py
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/sizing.py
	$(BIN)/python benchmarks/experts.py
	.venvs/ray/bin/python benchmarks/ray.py

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
