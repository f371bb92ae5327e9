# Recipes for developers; `tools/run test` is what CI runs.
.PHONY: help kernels bench mutants
PYTHON ?= .venv/bin/python

help:   ## this list
	@sed -n 's/^\([a-z0-9.%-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

kernels: kernel-5.10 kernel-6.1 kernel-6.12 kernel-newest   ## the probe's tests under other kernels (QEMU, about 4 min each)

# The guest sees this folder read-only under /src; its Python packages are those that tools/kernels names.
kernel-%:   ## the probe's tests under one kernel: 5.10, 6.1, 6.12, newest
	tools/kernels/run-in-kernel.sh $* 'cd /src && KPROBE_GUEST=1 CI=true python3 -m pytest -q -p no:cacheprovider -o addopts="" tests/probe/kernel'

mutants:   ## mutation testing of causality/ (COUNT=120 SEED=1): the score, and the survivors to look at
	$(PYTHON) tools/mutants.py --count $${COUNT:-120} --seed $${SEED:-1}
