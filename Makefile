# A thin face of tools/course.py, which says what each command does.
# Another Python: make PYTHON=python3.12 lab. Another build of PyTorch: make lab TORCH=cpu (or cuda).
PYTHON ?= python3
TORCH ?= auto

.PHONY: lab check test exercises bench notebooks portability
lab check test exercises bench notebooks portability:
	@$(PYTHON) tools/course.py $@ --torch=$(TORCH)
