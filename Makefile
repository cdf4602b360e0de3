# Two commands do everything: `make demo` and `make test`. `make check` is the short one, for the modules alone.
PYTHON ?= python3.11
VENV = .venv
CHECK = .venv-check
RUN = $(VENV)/bin/python
MODEL ?=
IMAGES ?=

# Nothing is compiled ahead, but Python keeps what it compiles: of all packages' modules few are ever imported.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo app test check versions lint types format tiny compare benchmark clean

demo: $(VENV)/ready
	$(VENV)/bin/phi3-embed demo $(IMAGES) $(if $(MODEL),--model "$(MODEL)")

app: $(VENV)/ready
	GRADIO_ANALYTICS_ENABLED=False $(if $(MODEL),MODEL="$(MODEL)",HF_HUB_OFFLINE=1) $(RUN) space/app.py

test: $(VENV)/transformers-tests $(VENV)/browser $(VENV)/quantizers lint
	$(RUN) -m pytest --durations=20

check: $(CHECK)/ready
	$(CHECK)/bin/ruff check .
	$(CHECK)/bin/ruff format --check .
	$(CHECK)/bin/pyright --pythonpath $(CHECK)/bin/python *_phi3_embed.py tests/typed_program.py
	$(CHECK)/bin/python -m pytest -m "not full_size and not slow" @tests/modules.txt

# The modules' tests on the oldest transformers that requirements.txt admits, the one before, and the newest.
versions: $(VENV)/ready
	$(RUN) -m nox

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/ready
	$(VENV)/bin/pyright

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

tiny: $(VENV)/ready
	$(RUN) -m phi3_tools.train_tiny

compare: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(VENV)/bin/phi3-embed compare digits --model .:mean --model .:tower --model pixels --num-crops 1

benchmark: $(VENV)/ready $(VENV)/quantizers
	$(RUN) benchmarks/run.py

$(VENV)/ready: requirements-dev.txt requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-compile -r requirements-dev.txt
	$(VENV)/bin/pip install --quiet --no-deps --editable .
	touch $@

# requirements.txt and what the tests themselves need, at the versions of requirements-dev.txt.
$(CHECK)/ready: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv $(CHECK)
	$(CHECK)/bin/pip install --quiet --no-compile -c requirements-dev.txt -r requirements.txt -r tests/requirements.txt
	$(CHECK)/bin/pip install --quiet --no-deps --editable .
	touch $@

# The common tests of the installed transformers, which only its source distribution has.
$(VENV)/transformers-tests: $(VENV)/ready
	rm -rf $@ $@.part
	$(VENV)/bin/pip download --quiet --no-deps --no-binary transformers -c requirements-dev.txt -d $@.part transformers
	tar -xzf $@.part/transformers-*.tar.gz -C $@.part --strip-components=1 --wildcards '*/tests/*.py'
	mv $@.part $@

# In a folder of their own: wherever transformers or peft find them, they warn of what is not for CPUs.
$(VENV)/quantizers: $(VENV)/ready
	rm -rf $@ $@.part
	$(VENV)/bin/pip install --quiet --no-compile --no-deps --target $@.part torchao==0.18.0 bitsandbytes==0.50.2
	mv $@.part $@

$(VENV)/browser: $(VENV)/ready
	command -v chromium || $(RUN) -m playwright install chromium
	touch $@

clean:
	rm -rf $(VENV) $(CHECK)
