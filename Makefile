# make demo    set up .venv, quantize the trained tiny Omni to W8A8 and W4A16, test both on held-out questions
# make test    set up .venv, run the test suite
# make test-isa  run the suite under other instruction sets and thread counts, three times about six minutes
# make fuzz    fuzz the readers of untrusted files, a minute each; SECONDS_EACH=600 TARGETS=recipe changes that
# make docs    build the documentation into build/docs, strictly
# make release  build wheel and sdist, install the wheel into a new environment and quantize the tiny Omni with it
# Requires only Python >= 3.10 and make.

PYTHON ?= python3
VENV := .venv
# Settings of ATen, oneDNN, MKL and OpenMP: SSE only; AVX2 on two threads; everything on two threads.
ISA_SETTINGS := \
  "ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OMP_NUM_THREADS=1" \
  "ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OMP_NUM_THREADS=2" \
  "OMP_NUM_THREADS=2"
SECONDS_EACH ?= 60
TARGETS ?=
RUN := "$(CURDIR)/$(VENV)/bin/python"
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: install demo test test-isa test-full test-clients fuzz lint types docs release clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
	@echo "Making $(VENV): about 0.5 GB of downloads and 2 to 5 minutes with CPU builds of torch, 3 GB with those for CUDA"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	@echo "1/2 torch and torchvision: the larger part of the download; pip prints nothing until it is done"
	$(PIP) torch torchvision
	@echo "2/2 the package with transformers and the tools for development: a minute or two"
	$(PIP) --editable '.[dev]'
	@touch $@

demo: install
	@echo "Quantizing the tiny Omni twice, and 320 questions to all three models: two to four minutes on two cores"
	rm -rf demo-out
	$(RUN) examples/demo.py demo-out --max_samples 320

test: install
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-isa: install
	set -e; for setting in $(ISA_SETTINGS); do echo "== $$setting"; env $$setting $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder; done

test-full: install
	$(RUN) -m pytest -m full

fuzz: $(VENV)-fuzz/installed
	$(VENV)-fuzz/bin/python tests/fuzz/run.py $(TARGETS) --seconds $(SECONDS_EACH)

# atheris has wheels only for some Python versions, so it gets an environment of its own.
$(VENV)-fuzz/installed: $(VENV)/installed
	$(RUN) -m venv $(VENV)-fuzz
	$(RUN) -c 'import site; print(site.getsitepackages()[0])' > \
	  "$$($(VENV)-fuzz/bin/python -c 'import site; print(site.getsitepackages()[0])')/tests.pth"
	$(VENV)-fuzz/bin/python -m pip --disable-pip-version-check install --quiet 'atheris==2.3.0'
	@touch $@

test-clients: install
	$(RUN) tests/clients/run.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

types: install
	$(RUN) -m mypy msmodelslim_omni

docs: $(VENV)-tools/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)-tools/bin/python -m mkdocs build --strict --quiet --site-dir build/docs

release: $(VENV)-tools/installed
	$(VENV)-tools/bin/python .ci/release.py

# The tools for documentation and packages, without the package itself and without torch.
$(VENV)-tools/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)-tools
	$(VENV)-tools/bin/python -m pip --disable-pip-version-check install --quiet 'mkdocs-material>=9.5,<10' build twine
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-fuzz $(VENV)-tools build dist demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
