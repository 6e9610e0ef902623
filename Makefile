# Train, sample, score, and search for EMM. `make help` lists what there is.
# Files are targets: what exists is not made again, and no target depends on a source file,
# so that a git checkout retrains nothing.

DATA      ?= cifar10
N         ?= 1000
RES       ?= 0
CLASSES   ?= 0
LABELS    ?= none
ARCH      ?= ddpmpp
WIDTH     ?= 128
BLOCKS    ?= 2
BATCH     ?= 512
EPOCHS    ?= 40000
SEED      ?= 0
SEEDS     ?=
DEVICES   ?=
SAMPLES   ?= 10000
N_MIN     ?= 500
N_MAX     ?= 0
EPS       ?= 0.1
TOLERANCE ?= 0.1
RUNS      ?= runs
RESULTS   ?= paper/results
FLAGS     ?=
PEER      ?=
GPU_DATA  ?=
SCALE     ?= cpu
PLAN      ?=
PYTHON    ?= .venv/bin/python

# what would go wrong later is said now
VARIABLES = DATA N RES CLASSES LABELS ARCH WIDTH BLOCKS BATCH EPOCHS SEED SEEDS DEVICES SAMPLES N_MIN N_MAX EPS TOLERANCE \
            RUNS RESULTS FLAGS PEER GPU_DATA SCALE PLAN PYTHON DEMO
WORDS     = SEEDS DEVICES FLAGS PYTHON DEMO
given    := $(strip $(foreach v,$(.VARIABLES),$(if $(filter command,$(origin $(v))),$(v))))
unknown  := $(filter-out $(VARIABLES) SHELL MAKEFLAGS,$(given))
$(if $(unknown),$(error $(unknown): no such variable; `make help` lists what there is))
$(foreach v,$(filter-out $(WORDS),$(VARIABLES)),$(if $(word 2,$($(v))),$(error $(v)=$($(v)): give a value without spaces)))
samples := '$(subst ',x,$(SAMPLES))'
wrong := $(shell case $(samples) in (''|0*|*[!0-9]*) echo 1;; (????????*) [ $(samples) -le 10000000 ] || echo 1;; esac)
$(if $(wrong),$(error SAMPLES=$(SAMPLES): give a whole number from 1 to 10000000))

# names hold every variable that changes the result; default ones of data and model are left out
empty :=
space := $(empty) $(empty)
# the --device among options, for the stages after
device = $(filter --device=%,$(subst --device$(space),--device=,$(strip $(1))))
part   = $(if $(filter-out $(2),$($(1))),-$(3)$(subst :,,$($(1))))
comma := ,
flags := $(subst $(space),,$(subst --,-,$(subst $(comma),.,$(subst /,_,$(subst :,,$(subst =,,$(FLAGS)))))))
data  := $(subst :,-class-,$(subst /,-,$(subst ../,up-,$(patsubst %/,%,$(patsubst /%,root-%,$(DATA))))))
NAME  := $(data)$(call part,RES,0,r)$(call part,CLASSES,0,c)$(call part,LABELS,none,)$(call part,ARCH,ddpmpp,)-w$(WIDTH)-b$(BLOCKS)-B$(BATCH)-e$(EPOCHS)-s$(SEED)$(flags)
RUN    = $(RUNS)/$(NAME)-n$(N)
SEARCH = $(RUNS)/$(NAME)-emm$(if $(SEEDS),-seeds$(subst $(space),.,$(strip $(SEEDS))))
LAST  := $(shell echo $$(($(SAMPLES) - 1)))
SCORE  = samples-0-$(LAST)
OPTIONS = --data $(DATA) --resolution $(RES) --classes $(CLASSES) --labels $(LABELS) --arch $(ARCH) --width $(WIDTH) \
          --blocks $(BLOCKS) --batch $(BATCH) --epochs $(EPOCHS) --seed $(SEED) $(FLAGS)

EMM_OPTIONS = $(if $(SEEDS),--train-seeds $(subst $(space),$(comma),$(strip $(SEEDS)))) $(if $(DEVICES),--devices $(subst $(space),$(comma),$(strip $(DEVICES))))

ifeq ($(PYTHON),.venv/bin/python)
READY := .venv/ready
endif

EXPERIMENTS = optimum size epochs epochs-emm resolution classes mixture width depth embedding skips skips-ncsn batch batch-emm weight-decay ema labels random-labels unique \
              capacity membership copied attracted repeats halves labels-apart images-a-label labels-given data augmentation augmentation-price objectives optimizer same-distance network network-emm samplers \
              noise-levels price

# with quotes and all, for paper.experiments
export FLAGS

.PHONY: help setup train sample memorize emm plot demo paper $(EXPERIMENTS) dynamics report lint test chaos bench bench-emm bench-gpu check-gpu kernel-report clean
.NOTPARALLEL:

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "variables, with their defaults:"
	@awk '/^[A-Z_]+ +\?=/ {name = $$1; sub(/^[A-Z_]+ +\?= */, ""); printf "  %s=%s", name, $$0} END {print ""}' $(firstword $(MAKEFILE_LIST)) | fold -s -w 110
	@echo "  FLAGS takes any option of train.py (train, sample, memorize) or emm.py (emm); see their --help"
	@echo "experiments take SCALE SEEDS FLAGS PLAN RUNS RESULTS: $(EXPERIMENTS)" | fold -s -w 110
	@echo "directories of these variables:"
	@echo "  train, sample, memorize: $(RUN)"
	@echo "  emm, plot:               $(SEARCH)"

setup: $(READY) ## make .venv from requirements.txt (once); PYTHON=... uses an environment of yours

.venv/ready: requirements.txt
	@python3 -c "import run"  # says which Python is needed
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

train: $(RUN)/model.safetensors ## train one model on N images

sample: $(RUN)/$(SCORE).npz ## and draw SAMPLES samples of it

memorize: $(RUN)/$(SCORE).json ## and count the memorized ones; draws them beside their originals
	@$(PYTHON) memorize.py --samples $(RUN)/$(SCORE).npz --train $(RUN) --out $< $(call device,$(FLAGS))

$(RUN)/model.safetensors: | $(READY)
	$(PYTHON) train.py --out $(@D) --n $(N) $(OPTIONS)

$(RUN)/$(SCORE).npz: $(RUN)/model.safetensors
	$(PYTHON) sample.py --run $(@D) --seeds 0-$(LAST) --out $@ $(call device,$(FLAGS))

$(RUN)/$(SCORE).json: $(RUN)/$(SCORE).npz
	$(PYTHON) memorize.py --samples $< --train $(@D) --out $@ --pairs $(@D)/$(SCORE)-pairs.png --csv $(@D)/$(SCORE)-pairs.csv $(call device,$(FLAGS)) > /dev/null

emm: | $(READY) ## find EMM from N_MIN images up: trains, samples and scores every size it needs
	$(PYTHON) emm.py --out $(SEARCH) --n-min $(N_MIN) --n-max $(N_MAX) --eps $(EPS) --tolerance $(TOLERANCE) --sample-count $(SAMPLES) $(OPTIONS) $(EMM_OPTIONS)
	$(PYTHON) plot.py --emm $(SEARCH)/emm.json

plot: | $(READY) ## draw that search again
	$(PYTHON) plot.py --emm $(SEARCH)/emm.json

# The recipe that memorizes on a CPU: a small network, a high constant rate, no dropout, an average that follows.
DEMO = --data digits --width 8 --blocks 1 --channel-mult 2,2 --batch 64 --learning-rate 4e-3 --epochs 3000 \
       --steps-min 1500 --warmup-steps 50 --dropout 0 --ema-halflife 10 --ema-rampup-steps 50 --snapshots 2 \
       --sizes 10,20,40,80 --sample-count 1000

demo: | $(READY) ## the whole job in minutes on a CPU, offline: an EMM, its plot, a sheet of copied digits
	$(PYTHON) emm.py --out demo $(DEMO)
	$(PYTHON) plot.py --emm demo/emm.json
	@# of the largest size the last weights, and, on as many images, the closed-form optimum
	for file in demo/n*/snapshot-*.safetensors demo/n*/model.safetensors; do [ ! -f $$file ] || last=$$file; done; \
	run=$$(dirname $$last) && \
	$(PYTHON) sample.py --run $$last --seeds 0-499 $(call device,$(DEMO)) && \
	$(PYTHON) memorize.py --samples $$run --train $$run --pairs demo/pairs.png $(call device,$(DEMO)) && \
	$(PYTHON) sample.py --optimum --run $$run --seeds 0-499 --out demo/optimum.npz $(call device,$(DEMO)) && \
	$(PYTHON) memorize.py --samples demo/optimum.npz --train $$run --pairs demo/pairs-optimum.png \
		--out demo/optimum.json $(call device,$(DEMO))
	@echo "plots: demo/emm.png, demo/trajectory.png   samples beside their nearest digits: demo/pairs.png, of the optimum demo/pairs-optimum.png"
	@$(PYTHON) -c 'import json; found, optimum = (json.load(open("demo/" + name)) for name in ("emm.json", "optimum.json")); \
	sizes = sorted((p["n"], p["ratio"]) for p in found["probes"]); \
	print("Copies among the samples:", ", ".join("{:.0%} on {} digits".format(r, n) for n, r in sizes) + ".", \
	found["statement"].partition(" (")[0] + ". The closed-form optimum copies {:.0%}.".format(optimum["ratio"]))'

experiment = $(PYTHON) -m paper.experiments --name $(1) --scale $(SCALE) --runs $(RUNS) --out $(RESULTS) $(if $(SEEDS),--seeds $(subst $(space),$(comma),$(strip $(SEEDS)))) $(if $(FLAGS),--also="$$FLAGS") $(if $(PLAN),--dry-run)

$(EXPERIMENTS): | $(READY)
	$(call experiment,$@)

paper: | $(READY) ## every experiment of the paper, or one by its name, such as `make width`; SCALE=cpu, gpu or paper, PLAN=1 prints what it costs
	$(call experiment,all)

dynamics: | $(READY) ## when memorization sets in and when samples are good, over |D| and steps; EMM over the epochs
	$(PYTHON) -m paper.dynamics --scale $(SCALE) --runs $(RUNS) --out $(RESULTS) $(if $(SEEDS),--seeds $(subst $(space),$(comma),$(strip $(SEEDS)))) $(if $(PLAN),--dry-run)

report: | $(READY) ## one page of all results of SCALE, and a figure of all: report.md
	$(PYTHON) -m paper.report --scale $(SCALE) --results $(RESULTS) --out report.md

lint: | $(READY) ## check the style of the code with ruff, as pyproject.toml sets it
	$(PYTHON) -m ruff check

test: | $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n 2 --dist loadfile tests

chaos: | $(READY) ## kill, damage and mislead the stages for half an hour, and count what survives
	$(PYTHON) tests/chaos.py

bench: | $(READY) ## nearest two, the closed-form optimum and a step beside their peers, on DATA; an hour and a half alone on the machine
	$(PYTHON) bench/step.py --data $(DATA) $(if $(PEER),--peer $(PEER))
	$(PYTHON) bench/nearest.py --data $(DATA)
	$(PYTHON) bench/optimum.py --data $(DATA)

bench-emm: | $(READY) ## emm.py beside a plain full grid: EMM, images trained, samples, seconds; and a simulation of both
	$(PYTHON) bench/simulate_search.py
	$(PYTHON) bench/emm_grid.py

bench-gpu: | $(READY) ## is all right on this GPU, and how fast: at most 8 minutes; photographs in GPU_DATA, the published code in PEER
	PYTHON=$(PYTHON) DATA=$(GPU_DATA) PEER=$(PEER) bash bench/gpu.sh

check-gpu: | $(READY) ## is all right on this GPU: at most 3 minutes
	PYTHON=$(PYTHON) bash bench/gpu.sh checks

kernel-report: | $(READY) ## what the Triton kernels compile to for each GPU, and its roofline; needs no GPU
	$(PYTHON) bench/kernel_report.py

clean: ## remove the demo and caches; runs, data and .venv stay
	rm -rf demo .pytest_cache .hypothesis .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -r {} +
