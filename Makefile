# A thin face of tools/course.py, which says what each command does. Another Python: make PYTHON=python3.12 lab
PYTHON ?= python3

.PHONY: lab test exercises bench notebooks
lab test exercises bench notebooks:
	@$(PYTHON) tools/course.py $@
