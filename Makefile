# Two commands do everything: `make demo` and `make test`.
PYTHON ?= python3.11
VENV = .venv
RUN = $(VENV)/bin/python
MODEL ?=
IMAGES ?=

.PHONY: demo app test lint format tiny compare benchmark clean

demo: $(VENV)/ready
	$(RUN) -m phi3_tools demo $(if $(MODEL),--model "$(MODEL)") $(if $(IMAGES),--images "$(IMAGES)")

app: $(VENV)/ready
	GRADIO_ANALYTICS_ENABLED=False $(if $(MODEL),MODEL="$(MODEL)",HF_HUB_OFFLINE=1) $(RUN) space/app.py

test: $(VENV)/transformers-tests $(VENV)/browser $(VENV)/quantizers lint
	$(RUN) -m pytest

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

tiny: $(VENV)/ready
	$(RUN) -m phi3_tools.train_tiny

compare: $(VENV)/ready
	HF_HUB_OFFLINE=1 $(RUN) -m phi3_tools compare --models .:mean .:tower pixels --images digits --num_crops 1

benchmark: $(VENV)/ready $(VENV)/quantizers
	$(RUN) benchmarks/run.py

$(VENV)/ready: requirements-dev.txt requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -r requirements-dev.txt
	$(VENV)/bin/pip install --quiet --no-deps --editable .
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
	$(VENV)/bin/pip install --quiet --no-deps --target $@.part torchao==0.18.0 bitsandbytes==0.50.2
	mv $@.part $@

$(VENV)/browser: $(VENV)/ready
	command -v chromium || $(RUN) -m playwright install chromium
	touch $@

clean:
	rm -rf $(VENV)
