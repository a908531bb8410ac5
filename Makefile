# make serve runs the service, make test the tests.  Each sets up first what is missing.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := serve

PYTHON ?= python3
export FACE_MODEL ?= 1
MODELS := $(FACE_MODEL)

# Which dlib: patched (built here, fast), or prebuilt (slow, for machines that can't compile).
CAN_COMPILE := $(shell command -v c++ > /dev/null && $(PYTHON) -c 'import os.path, sysconfig; \
	print(*[1] * os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2> /dev/null)
DLIB ?= $(if $(CAN_COMPILE),patched,prebuilt)

# All of this CPU's instructions, but no fused multiply-add, which would move boxes.
export CXXFLAGS ?= -march=native -ffp-contract=off

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
TOOL := PYTHONPATH=tests $(BIN)/python tests/tools

# A key with a dollar sign is taken as it is.
override API_KEY := $(value API_KEY)
export API_KEY

# How others reach the service.
ADDRESS = $(or $(filter-out :: 0.0.0.0,$(HOST)),$(firstword $(shell hostname -I 2> /dev/null)),localhost)
URL = http://$(if $(findstring :,$(ADDRESS)),[$(ADDRESS)],$(ADDRESS)):$(or $(PORT),5000)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: FACE_MODEL=1..4 HOST= PORT= API_KEY= DLIB=patched|prebuilt PYTHON="

serve: setup $(if $(API_KEY),,api.key) ## run the service
	@SHOWN_ADDRESS=$(URL) exec $(BIN)/python -m gunicorn -c .deploy/gunicorn.conf.py

setup: download-models ## install what is missing, and download FACE_MODEL's files
	@flock -n vendor true || echo "Waiting for another make"
	@flock vendor $(MAKE) --no-print-directory $(VENV)/installed-$(DLIB) $(ALSO)

test bench memory: MODELS := 1 2 3 4
test bench memory docker-test: ALSO := $(VENV)/installed-tests tests/photos
test: setup ## run all tests, or those of PYTEST="-k load"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -rs tests $(PYTEST)

download-models: ## only download the files of FACE_MODEL
	@$(PYTHON) vendor/models.py $(MODELS)

install: ## as root: have systemd run the service, now and after every boot
	@.deploy/install.sh

uninstall: ## undo make install, and leave the files here
	@.deploy/install.sh undo

bench: setup $(VENV)/stock $(VENV)/onnx ## compare with stock dlib, 15 minutes
	@$(TOOL)/bench.py $(VENV)/stock/bin/python $(VENV)/onnx/bin/python

memory: setup ## measure the memory of each model
	@$(TOOL)/memory.py

convolutions: setup ## check our dlib's convolutions against the definition
	@tests/tools/convolutions.sh

docker-test: setup ## build the image facerecognition, and check it
	@docker info > /dev/null 2>&1 || { echo "No Docker engine answers here"; exit 1; }
	docker build $(DOCKER_BUILD) -t facerecognition .
	@IMAGE=facerecognition $(BIN)/python -m pytest -rs tests/test_docker.py $(PYTEST)

clean: ## delete everything that make has made here, except api.key
	rm -rf $(VENV) vendor/models vendor/wheels vendor/build tests/photos
	find . \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache \) -prune -exec rm -rf {} +

.PHONY: help serve setup test download-models install uninstall bench memory convolutions docker-test \
	clean always

# What setup makes, one make at a time.
WRITABLE = @[ -w $1 ] || { echo "$(CURDIR)/$1 belongs to $$(stat -c %U $1):" \
	"sudo chown -R $$(id -un) $(CURDIR)"; exit 1; }

# An upgrade of the system can replace the Python that the environment was made with.
$(VENV)/pyvenv.cfg: always
	@$(BIN)/python -c 'import os, sysconfig as s; os.stat(s.get_path("purelib"))' 2> /dev/null || { \
		[ ! -e $@ ] || echo "Python has changed since $(VENV) was made"; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.13 ..."; exit 1; }; \
		echo "Making a virtual environment in $(VENV)"; $(PYTHON) -m venv --clear $(VENV) || { \
			rm -rf $(VENV); echo "Python's venv is missing: apt install python3-venv"; exit 1; }; }

$(VENV)/installed-base: $(VENV)/pyvenv.cfg requirements.txt
	$(call WRITABLE,$(VENV))
	@echo "Installing Flask, gunicorn, NumPy and Pillow"
	@rm -f $(VENV)/installed-*
	@grep -v ^dlib requirements.txt | $(PIP) install -r /dev/stdin && touch $@

# The dlib that make has chosen, without the other one.
INSTALL_patched = vendor/dlib/build.sh wheel vendor/wheels && $(PIP) install --no-deps vendor/wheels/*.whl
INSTALL_prebuilt = sed s/^dlib/dlib-bin/ requirements.txt | $(PIP) install -r /dev/stdin
$(VENV)/installed-$(DLIB): $(VENV)/installed-base $(wildcard vendor/dlib/*)
	$(call WRITABLE,$(VENV))
	@[ $(DLIB) = patched ] || echo "Taking a prebuilt dlib, as slow as the stock one: README.md"
	@rm -f $(VENV)/installed-{patched,prebuilt}; $(PIP) uninstall -y dlib dlib-bin 2> /dev/null
	@$(INSTALL_$(DLIB)) && touch $@

$(VENV)/installed-tests: $(VENV)/installed-base tests/requirements.txt
	$(call WRITABLE,$(VENV))
	@echo "Installing what the tests need"
	@$(PIP) install -r tests/requirements.txt && touch $@

tests/photos $(VENV)/stock $(VENV)/onnx: | $(VENV)/pyvenv.cfg
	@tests/tools/get.sh $@

api.key:
	@umask 077 && $(PYTHON) -c 'import secrets; print(secrets.token_urlsafe(32))' > $@
	@echo "A new key is in api.key.  Nextcloud needs it, and the address: README.md tells how."
