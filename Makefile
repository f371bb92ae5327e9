# Recipes for developers; `tools/run test` is what CI runs.
.PHONY: help kernels bench mutants
PYTHON ?= .venv/bin/python

help:   ## this list
	@sed -n 's/^\([a-z0-9.%-]*\):.*## /\1: /p' $(MAKEFILE_LIST)

kernels: kernel-5.10 kernel-6.1 kernel-6.12 kernel-newest   ## the probe's tests under other kernels (QEMU, about 4 min each)

# The guest sees this folder read-only under /src; its Python packages are those that tools/kernels names.
# A guest that hangs or dies before its command ends (124, 125) is started once more; a test that fails is not.
kernel-%:   ## the probe's tests under one kernel: 5.10, 6.1, 6.12, newest
	@export TIMEOUT=$${TIMEOUT:-600}; rc=0; for try in 1 2; do rc=0; \
	  tools/kernels/run-in-kernel.sh $* 'cd /src && KPROBE_GUEST=1 CI=true python3 -m pytest -q -p no:cacheprovider -o addopts="" tests/probe/kernel' || rc=$$?; \
	  case $$rc in 124|125) echo "kernel-$*: no result from the guest (status $$rc), try $$try of 2" >&2 ;; *) break ;; esac; \
	done; exit $$rc

mutants:   ## mutation testing of causality/ (COUNT=120 SEED=1): the score, and the survivors to look at
	$(PYTHON) tools/mutants.py --count $${COUNT:-120} --seed $${SEED:-1}
