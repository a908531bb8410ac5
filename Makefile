# make serve runs the service, make test the tests.  Each sets up first what is missing.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := serve

PYTHON ?= python3
export FACE_MODEL ?= 1
MODELS := $(FACE_MODEL)

# Which dlib: built (here, and fast), prebuilt (slow, for machines that can't compile), or a wheel.
CAN_COMPILE := $(shell command -v c++ > /dev/null && $(PYTHON) -c 'import os.path, sysconfig; \
	print(*[1] * os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2> /dev/null)
DLIB ?= $(if $(CAN_COMPILE),built,prebuilt)
DLIB_MARK = $(VENV)/installed-$(subst %,,$(notdir $(DLIB)))
SLOW = SLOW: the prebuilt dlib takes 5 to 50 times as long as ours.  For ours: \
	sudo apt install g++ python3-dev && make DLIB=built setup

VENV := .venv
BIN := $(VENV)/bin
PIP := $(PYTHON) vendor/environment.py
TOOL := PYTHONPATH=tests $(BIN)/python tests/tools

# A key with a dollar sign is taken as it is.
override API_KEY := $(value API_KEY)
export API_KEY

# How others reach the service.
ADDRESS = $(or $(filter-out :: 0.0.0.0,$(HOST)),$(firstword $(shell hostname -I 2> /dev/null)),localhost)
URL = http://$(if $(findstring :,$(ADDRESS)),[$(ADDRESS)],$(ADDRESS)):$(or $(PORT),5000)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: FACE_MODEL=1..4 HOST= PORT= API_KEY= DLIB=built|prebuilt|WHEEL PYTHON="

serve: setup $(if $(API_KEY),,api.key) ## run the service
	@SHOWN_ADDRESS=$(URL) exec $(BIN)/python -m gunicorn -c .deploy/gunicorn.conf.py

setup: download-models ## install what is missing, and download FACE_MODEL's files
	@flock -n vendor true || echo "Waiting for another make"
	@flock vendor $(MAKE) --no-print-directory $(DLIB_MARK) $(ALSO)
	@echo "$(if $(filter prebuilt,$(DLIB)),$(SLOW),Ready: model $(MODELS), dlib $(DLIB))"

test bench memory: MODELS := 1 2 3 4
test bench memory engine show docker-test: ALSO := $(VENV)/installed-tests tests/photos
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

engine: setup ## check our engine's parts, on each level of CPU that can be run here
	@tests/tools/engine.sh $(QUICK)

show: MODELS := 1 3
show: setup ## draw what MODELS="1 3" find in PHOTO=family.jpg at AREAS="1 4" megapixels
	@$(TOOL)/show.py "$(PHOTO)" "$(MODELS)" "$(or $(AREAS),1 4)"

fresh-test: ## as root: run all tests as a user of a bare Debian, BASE=trixie or bookworm
	@tests/tools/fresh.sh $(or $(BASE),trixie)

docker-test: setup ## build the image facerecognition, and check it
	@docker info > /dev/null 2>&1 || { echo "No Docker engine answers here"; exit 1; }
	docker build $(DOCKER_BUILD) -t facerecognition .
	@IMAGE=facerecognition $(BIN)/python -m pytest -rs tests/test_docker.py $(PYTEST)

clean: ## delete everything that make has made here, except api.key
	rm -rf $(VENV)/whole $(VENV) vendor/models vendor/wheels vendor/build tests/photos
	find . \( -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache \) -prune -exec rm -rf {} +

.PHONY: help serve setup test download-models install uninstall bench memory engine show fresh-test \
	docker-test clean always

# What setup makes, one make at a time.
$(VENV)/pyvenv.cfg: always
	@$(PIP)

$(VENV)/installed-base: $(VENV)/pyvenv.cfg requirements.txt
	@echo "Installing Flask, gunicorn, NumPy and Pillow"
	@grep -v ^dlib requirements.txt | $(PIP) install -r /dev/stdin && touch $@

# The dlib that make has chosen, without another one.
$(DLIB_MARK): $(VENV)/installed-base $(wildcard vendor/dlib/*)
	@echo "Installing dlib"
	@case "$(DLIB)" in \
		built) vendor/dlib/build.sh wheel vendor/wheels && set -- --no-deps vendor/wheels/*.whl;; \
		prebuilt) set -- "$$(sed -n s/^dlib/dlib-bin/p requirements.txt)";; \
		*) set -- --no-deps "$(DLIB)";; \
	esac && rm -f $(VENV)/installed-{built,prebuilt,*.whl} && \
		$(PIP) uninstall -y dlib dlib-bin && $(PIP) install "$$@" && touch $@

$(VENV)/installed-tests: $(VENV)/installed-base tests/requirements.txt
	@echo "Installing what the tests need"
	@$(PIP) install -r tests/requirements.txt && touch $@

tests/photos $(VENV)/stock $(VENV)/onnx: | $(VENV)/pyvenv.cfg
	@tests/tools/get.sh $@

api.key:
	@umask 077 && $(PYTHON) -c 'import secrets; print(secrets.token_urlsafe(32))' > $@.part
	@mv $@.part $@
	@echo "A new key is in api.key.  Nextcloud needs it, and the address: README.md tells how."
