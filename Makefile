# Two commands, each of which does its own set-up in a fresh clone:
#   make train   the whole story, from the shipped tiny model to a table, plots and a page
#   make test    the tests; `make long` runs those that take minutes
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
OUT ?= runs/train
export HF_HUB_OFFLINE ?= 1
# glibc hands large blocks back to the system after every use and gets them page by page again; for a
# model this small that is a third of the time of a step. Ignored where the C library is another.
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# A process for each file: the first two fork commands, so no other test may have started threads in their process;
# the commands of the last go on from each other's files.
ALONE := tests/test_mutated_inputs.py tests/test_mutated_files.py tests/test_unwritable.py tests/test_documented_commands.py

SITE := import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: train test long quick paper study tiny docs check clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[train,sb3,human,quantize,openenv,ocr,docs,dev]"
	$(RUN) -m pip install --quiet -c constraints.txt --no-deps openenv
	touch $@

# verifiers wants an older openai and a newer mcp than the others do: an environment of its own, on top of the first.
$(VENV)/verifiers/.installed: $(VENV)/.installed environments/ivt_grounding/pyproject.toml
	$(RUN) -m venv $(VENV)/verifiers
	below=$$($(RUN) -c "$(SITE)"); \
	echo "import site; site.addsitedir('$$below')" > "$$($(VENV)/verifiers/bin/python -c "$(SITE)")/below.pth"
	$(VENV)/verifiers/bin/python -m pip install --quiet -c environments/ivt_grounding/constraints.txt \
		-e environments/ivt_grounding
	touch $@

train: $(VENV)/.installed
	$(RUN) -m experiments.study --out $(OUT)

# The paper's own recipe on the scenes and both versions of its table (docs/paper.md).
paper: $(VENV)/.installed
	$(RUN) -m experiments.paper --out runs/paper

# The same with three seeds, more samples and splits, and GRPO from half the warm start (docs/results.md): hours.
study: $(VENV)/.installed
	$(RUN) -m experiments.study --out runs/study --seeds 3 --half --samples 2000 --swap-samples 300 --map-samples 1000 \
		--splits test test_distractors test_small test_search

# A tiny model from scratch, the next one: minutes on a GPU, hours on two cores (docs/experiments.md).
tiny: $(VENV)/.installed
	$(RUN) -m ivt_agents.vlm.pretrain --out runs/tiny_qwen3vl

# The documentation, without a network: build/docs/index.html
docs: $(VENV)/.installed
	$(RUN) -m sphinx -W --keep-going -q -d build/docs-trees docs build/docs

check: $(VENV)/.installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p build/typing && ln -sfn ../../agents build/typing/ivt_agents
	$(VENV)/bin/mypy

# What runs for minutes: several processes, runs that are killed, builds, servers, long trainings.
LONG := $(wildcard $(addprefix tests/test_,$(addsuffix .py,accelerate_configs docs docs_notebook documented_commands gpu_benchmark grpo kills \
	learning mutated_files mutated_inputs not_finite packaging paper real_models resume run_folders served server_hostile \
	sharding study teachers trl unwritable verifiers viewer_hostile)))
# Without browsers, servers and whatever needs a model, too.
SLOW := $(LONG) $(wildcard $(addprefix tests/test_,$(addsuffix *.py,against checkpointing cli continued controls decode evaluate \
	failures fetch footprint generation growth large layouts marks metrics_glossary model opener packing play policy pretraining \
	report rollout_command sb3 scenes screens server sft small_splits swaps tiny trackers unusable viewer wrappers_sb3)))
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest

test: check
	$(PYTEST) -n 3 $(addprefix --ignore=,$(LONG))

quick: $(VENV)/.installed
	@$(PYTEST) -n 2 $(addprefix --ignore=,$(SLOW))

long: $(VENV)/verifiers/.installed
	$(PYTEST) -n 3 $(filter-out $(ALONE),$(LONG))
	$(PYTEST) -n 4 --dist loadfile $(ALONE)

clean:
	rm -rf $(VENV) runs build dist *.egg-info
