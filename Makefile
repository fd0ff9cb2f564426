# make demo   train a small multimodal model in four stages, test it, write out/demo/report.html
# make moving   the same with time in it: clips of two shapes that move, out/moving
# make test   run every test
# make test-full   the long matrices of kills, ranks and tuning modes (half an hour on two cores)
# make test-page   serve.py's page and API, with gradio and openai, in a Chromium if there is one
# make test-gguf   exported GGUF files in the real llama.cpp, of the package xllamacpp
# make guide  build the guide as one page to read offline, out/guide.html
# make test-guide   run every command and every line of code in the guide (three minutes on two cores)
# make lint   check style: ruff, what no formatter forbids, and the floors of the imports
#
# PYTHON=python3.12   the Python to use, 3.11 or newer
# PIP_ARGS="..."      more for pip: the index of PyTorch's CPU builds, say (README.md)
PYTHON ?= python3
PIP_ARGS ?=
PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)

# Two processes of one thread each. On two quiet cores they see a tenth to a fifth more pictures a second than
# one process of two threads.
demo: .venv/installed
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --nproc-per-node 2 train.py
	$(PY) evaluate.py --model out/demo --task world --data out/demo/world
	$(PY) evaluate.py --model out/demo --task world --data out/demo/world --blank
	$(PY) -m demo.report out/demo

moving: .venv/installed
	test -d out/moving/world || $(PY) -m demo.moving out/moving/world
	OMP_NUM_THREADS=1 $(PY) -m torch.distributed.run --nproc-per-node 2 train.py recipes/moving.toml
	$(PY) evaluate.py --model out/moving --task moving --data out/moving/world
	$(PY) evaluate.py --model out/moving --task moving --data out/moving/world --one-frame

# One process per core. Tests of one file stay in one process, because they share what is slow to make.
# Files go out in the order of tests/conftest.py, the longest first. Bytecode is kept even where the
# environment forbids it: hundreds of short scripts would each compile the project again.
test: .venv/installed .venv/hf4/installed
	PYTHONDONTWRITEBYTECODE= $(PY) -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-full: .venv/installed
	$(PY) -m pytest -m full -s

test-page: .venv/installed .venv/page/installed
	PYTHONPATH=.venv/page $(PY) -m pytest tests/test_serve.py

test-gguf: .venv/installed .venv/llama/installed
	PYTHONPATH=.venv/llama $(PY) -m pytest tests/checkpoints/test_llama_cpp.py tests/checkpoints/test_llama_cpp_vision.py

guide: .venv/installed
	$(PY) -m guide.build

# The chapters that ask a trained model take the demo's.
test-guide: .venv/installed
	test -f out/demo/model.safetensors || $(MAKE) demo
	$(PY) -m guide.run --all

lint: .venv/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest tests/test_style.py tests/test_floors.py

clean:
	rm -rf .venv out .pytest_cache .ruff_cache

# Installed again only when what to install has changed.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
		{ echo "error: $(PYTHON): not Python 3.11 or newer; fix: install one, then make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c "import ensurepip, venv" 2>/dev/null || \
		{ echo "error: $(PYTHON): it comes without venv or pip; fix: apt install python3-venv, or make PYTHON=another"; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt ".[dev]"
	touch $@

# The other transformers that exported models are tested with, beside the environment's own: for PYTHONPATH.
.venv/hf4/installed: .venv/installed Makefile
	rm -rf .venv/hf4
	$(PIP) --no-deps --target .venv/hf4 \
		transformers==4.57.1 tokenizers==0.22.2 huggingface-hub==0.36.2 requests urllib3 charset-normalizer idna certifi
	touch $@

# Apart from the others: gradio wants an older Pillow.
.venv/page/installed: .venv/installed Makefile
	rm -rf .venv/page
	$(PIP) --target .venv/page "gradio>=6.7" openai playwright
	touch $@

# llama.cpp with its server, in one wheel. Files are written for this version, and newer ones.
.venv/llama/installed: .venv/installed Makefile
	rm -rf .venv/llama
	$(PIP) --no-deps --target .venv/llama xllamacpp==2026.10.11549
	touch $@

.PHONY: demo moving test test-full test-page test-gguf guide test-guide lint clean
