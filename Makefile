# Two commands do it all: make serve, and make test.  Each sets up what is missing first.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := serve

PYTHON ?= python3
FACE_MODEL ?= 1
export FACE_MODEL

# Which dlib: patched (built here, fast), stock (built here, as released) or prebuilt (the wheel
# dlib-bin, for machines that can't compile).
CAN_COMPILE := $(shell command -v c++ > /dev/null && $(PYTHON) -c 'import os.path, sysconfig; \
	print(*[1] * os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2> /dev/null)
DLIB ?= $(if $(CAN_COMPILE),patched,prebuilt)

# All of this CPU's instructions, but no fused multiply-add, which would move boxes.
CXXFLAGS ?= -march=native -ffp-contract=off
export CXXFLAGS

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
INSTALLED := $(VENV)/installed-$(DLIB)
TOOL := PYTHONPATH=tests $(BIN)/python tests/tools
FOR_TESTS := setup all-models $(VENV)/installed-tests tests/photos

# A key with a dollar sign is taken as it is.
ifdef API_KEY
override API_KEY := $(value API_KEY)
export API_KEY
endif
KEY := $(if $(API_KEY),,api.key)

# A system upgrade can replace the Python that the environment was made with.
ifneq ($(wildcard $(VENV)/installed-base),)
ifneq ($(shell $(BIN)/python -c 'import gunicorn; print(1)' 2> /dev/null),1)
$(info Python has changed since $(VENV) was made: making it again)
$(shell rm -rf $(VENV)/pyvenv.cfg $(VENV)/installed-* vendor/wheels)
endif
endif

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: FACE_MODEL=1..4 HOST= PORT= API_KEY= DLIB=patched|stock|prebuilt PYTHON="

serve: setup $(KEY) ## run the service, on port 5000 unless PORT says otherwise
	@echo "How to use it from Nextcloud: README.md.  Ctrl-C stops it."
	@exec $(BIN)/python facerecognition-external-model.py

setup: $(INSTALLED) download-models ## install what is missing, and download FACE_MODEL's files

test: $(FOR_TESTS) ## run all tests, or those of PYTEST="-k load"
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pytest tests $(PYTEST)

soak: $(FOR_TESTS) ## run the reliability tests at length, half an hour
	SOAK=1 $(BIN)/pytest -rA tests/test_trust.py tests/test_hostile.py tests/test_proxy.py $(PYTEST)

bench: $(FOR_TESTS) $(VENV)/stock $(VENV)/onnx ## compare with stock dlib, 15 minutes
	@$(TOOL)/bench.py $(VENV)/stock/bin/python $(VENV)/onnx/bin/python

memory: $(FOR_TESTS) ## measure the memory of each model
	@$(TOOL)/memory.py

convolutions: $(VENV)/installed-base ## check the patch's convolutions against the definition
	@vendor/dlib.sh source
	@tests/tools/convolutions.sh vendor/build/dlib-20.0.1

try: setup $(KEY) ## draw the faces of PHOTO=family.jpg, or compare PHOTO="one.jpg two.jpg"
	@$(if $(findstring tests/photos,$(PHOTO)),$(MAKE) -s tests/photos)
	@$(BIN)/python tests/tools/try.py $(PHOTO)

audit: $(INSTALLED) ## look for known vulnerabilities in what is installed
	@$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip -q install pip-audit
	$(VENV)/audit/bin/pip-audit --path $(BIN)/../lib/python3*/site-packages

docker: ## build the image facerecognition
	docker build $(DOCKER_BUILD) -t facerecognition .

docker-test: $(VENV)/installed-tests tests/photos ## build the image, and check it
	@if docker info > /dev/null 2>&1; then \
		$(MAKE) --no-print-directory docker && \
		IMAGE=facerecognition $(BIN)/pytest -rs tests/test_docker.py $(PYTEST); \
	else echo "No Docker engine answers here: the image is neither built nor checked"; fi

install: setup api.key ## as root: have systemd run the service, now and after every boot
	@[ $$(id -u) = 0 ] || { echo "Only root can do that: sudo make install"; exit 1; }
	@chown --reference=. api.key
	@$(MAKE) --no-print-directory units
	systemctl daemon-reload
	systemctl enable --now facerecognition.socket facerecognition.service

uninstall: ## undo make install, and leave the files here
	-systemctl disable --now facerecognition.service facerecognition.socket
	rm -f "$(UNITS)/facerecognition.socket" "$(UNITS)/facerecognition.service"
	systemctl daemon-reload

# The service runs as the owner of this folder.
UNITS ?= /etc/systemd/system
units:
	@sed "s|^ListenStream=.*|ListenStream=$(if $(HOST),$(HOST):)$(or $(PORT),5000)|" \
		.systemd/facerecognition.socket > "$(UNITS)/facerecognition.socket"
	@sed -e "s|/opt/facerecognition-external-model|$(CURDIR)|" -e "s|^User=.*|User=$$(stat -c %U .)|" \
		-e "s|FACE_MODEL=1|FACE_MODEL=$(FACE_MODEL)|" \
		.systemd/facerecognition.service > "$(UNITS)/facerecognition.service"

clean: ## delete everything that make has made here, except api.key
	rm -rf $(VENV) vendor/models vendor/wheels vendor/build tests/photos
	find . -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache | xargs rm -rf

.PHONY: help serve setup test soak bench memory convolutions try audit docker docker-test \
	install uninstall units clean download-models all-models


# ---- The virtual environment ----

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than Python 3.11: make PYTHON=python3.13 ..."; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) || { \
		rm -rf $(VENV); echo "Python's venv is missing: apt install python3-venv"; exit 1; }

$(VENV)/installed-base: $(VENV)/pyvenv.cfg requirements.txt
	@echo "Installing Flask, gunicorn, NumPy and Pillow"
	@rm -f $(VENV)/installed-*
	@grep -v ^dlib requirements.txt | $(PIP) install -r /dev/stdin && touch $@

vendor/wheels/patched: vendor/dlib.sh vendor/dlib.patch vendor/dlib.sha256 | $(VENV)/installed-base
	@vendor/dlib.sh wheel $@ && touch $@

INSTALL_patched = $(PIP) install --no-deps vendor/wheels/patched/*.whl
INSTALL_stock = CXXFLAGS= $(PIP) install -r requirements.txt
INSTALL_prebuilt = sed s/^dlib/dlib-bin/ requirements.txt | $(PIP) install -r /dev/stdin
$(if $(INSTALL_$(DLIB)),,$(error DLIB is $(DLIB), but can be patched, stock or prebuilt))

$(INSTALLED): $(VENV)/installed-base $(if $(filter patched,$(DLIB)),vendor/wheels/patched)
	@[ $(DLIB) = patched ] || echo "Installing the $(DLIB) dlib, 20 times as slow as the one that" \
		"make builds after: apt install g++ make patch python3-dev"
	@rm -f $(VENV)/installed-{patched,stock,prebuilt}
	@$(PIP) uninstall -y dlib dlib-bin 2> /dev/null
	@$(INSTALL_$(DLIB)) && touch $@

$(VENV)/installed-tests: $(INSTALLED) tests/requirements.txt
	@echo "Installing what the tests need"
	@$(PIP) install -r tests/requirements.txt && touch $@

# What the benchmark compares with.
$(VENV)/stock: PACKAGES := --no-binary dlib dlib==20.0.1 flask numpy pillow
$(VENV)/onnx: PACKAGES := onnx onnxruntime
$(VENV)/stock $(VENV)/onnx: | $(VENV)/pyvenv.cfg
	@echo "Installing $(PACKAGES) in $@, once; to build dlib takes about 7 minutes on two cores"
	@$(PYTHON) -m venv $@.part && CXXFLAGS= $@.part/bin/pip -q install $(PACKAGES)
	@rm -rf $@ && mv $@.part $@


# ---- Downloads and the key ----

download-models: | $(VENV)/pyvenv.cfg ## download the files of FACE_MODEL
	@vendor/models.sh $(FACE_MODEL)

all-models: | $(VENV)/pyvenv.cfg
	@vendor/models.sh 1 2 3 4

api.key:
	@umask 077 && openssl rand -base64 32 > $@ 2> /dev/null || \
		$(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(32))' > $@
	@host=$$(hostname -I 2> /dev/null | cut -d' ' -f1); printf '%s\n' \
		"A new API key is in api.key.  Add these lines to Nextcloud's config/config.php:" "" \
		"  'facerecognition.external_model_url' => 'http://$${host:-THIS-MACHINE}:$${PORT:-5000}'," \
		"  'facerecognition.external_model_api_key' => '$$(cat $@)'," "" \
		'Then run there: php occ face:setup -m 5, and see "Use from Nextcloud" in README.md.' ""

# Portraits of two presidents, in the public domain, and NASA's of Eileen Collins.
tests/photos: | $(VENV)/pyvenv.cfg
	@echo "Downloading photos for the tests"
	@rm -rf $@.part && mkdir -p $@.part
	@$(PIP) download --no-deps --no-binary face_recognition --only-binary scikit-image -d $@.part \
		face_recognition==1.3.0 scikit-image==0.26.0
	@tar xzf $@.part/face_recognition-1.3.0.tar.gz -C $@.part --strip-components 3 \
		--wildcards '*/test_images/*.jpg' '*/test_images/*.png'
	@$(BIN)/python -m zipfile -e $@.part/scikit_image*.whl $@.part/skimage
	@mv $@.part/skimage/skimage/data/astronaut.png $@.part
	@rm -rf $@.part/skimage $@.part/*.whl $@.part/*.gz && mv $@.part $@
