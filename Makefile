# Every target makes what it needs first: .venv/ and the real ComfyUI in .comfyui/ (about 6 GB, once).
# COMFYUI_DIR=/path/to/ComfyUI uses that one instead; PYTHON=python3.12 picks the Python that .venv/ is made from.
# JOBS are the tests that run side by side, each with one thread and about 3 GB of memory.

PYTHON ?= python3
RUN = .venv/bin/python -m
JOBS ?= 2

.PHONY: help setup demo test test-old serve lint types package locales train evaluate calibrate bench

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup:  ## only the set-up
	@$(PYTHON) tools/setup.py

demo: setup  ## edit images in a real ComfyUI, with and without ToPi, side by side
	@$(RUN) topi_demo.demo $(ARGS)

test: setup  ## all tests; ARGS="tests/core -k select" picks some
	@$(PYTHON) tools/setup.py browser
	@$(PYTHON) tools/setup.py lpips
	@OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) --dist loadfile $(ARGS)

test-old: setup  ## the comfy tests on the oldest ComfyUI that the pack claims; ARGS picks some
	@$(PYTHON) tools/setup.py oldest
	@COMFYUI_DIR=.comfyui/0.16.3 OMP_NUM_THREADS=1 $(RUN) pytest -n $(JOBS) --dist loadfile $(or $(ARGS),tests/comfy)

serve: setup  ## ComfyUI's page with the pack in it; ARGS="--port 9000" goes to ComfyUI
	@$(RUN) tools.serve $(ARGS)

package: setup  ## the archive that ComfyUI's registry hands out, in dist/
	@$(RUN) tools.package $(ARGS)

locales: setup  ## write the English texts of the nodes anew, from their schemas
	@$(RUN) tools.locales

train: setup  ## train the demo model anew (hours)
	@$(RUN) topi_demo.train $(ARGS)

evaluate: setup  ## measure the demo model on held-out scenes
	@$(RUN) topi_demo.evaluate $(ARGS)

bench: setup  ## a short benchmark of fidelity and speed; bench/fidelity.py and bench/speed.py have all of it
	@rm -f demo_output/fidelity.jsonl demo_output/speed.jsonl
	@$(RUN) bench.fidelity --sets main --panels open --only "fewer steps: 10" "tolerance 0.05" -n 2 --out demo_output/fidelity.jsonl
	@$(RUN) bench.speed --architectures flux1-kontext --sides 256 --references 1 --rows 1 --kept 0.5 --repeats 1 \
		--out demo_output/speed.jsonl

calibrate: setup  ## find the demo model's layers anew, and draw their chart (minutes)
	@$(RUN) topi_demo.calibrate $(ARGS)

lint:  ## check style and formatting; needs neither torch nor ComfyUI
	@$(PYTHON) tools/setup.py lint
	@$(RUN) ruff check .
	@$(RUN) ruff format --check .

types: setup  ## check the types of topi_core and nodes
	@$(RUN) basedpyright
