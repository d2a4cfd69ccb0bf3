"""What `qcourse.lab` offers to notebooks; `__init__.py` loads each name on first use."""

from . import tiny_triton as tiny_triton
from .claims import settle as settle
from .decoded import decode_weights as decode_weights
from .figures import BLUE as BLUE
from .figures import GREEN as GREEN
from .figures import GREY as GREY
from .figures import ORANGE as ORANGE
from .figures import grid_figure as grid_figure
from .figures import new_figure as new_figure
from .lesson_model import load_lesson_model as load_lesson_model
from .llama_drawing import llama_block_figure as llama_block_figure
from .machine_code import instructions as instructions
from .published import INT4_BATCHES as INT4_BATCHES
from .published import INT4_ON_H100 as INT4_ON_H100
from .stored import stored_results as stored_results
from .widgets import click_the_bits as click_the_bits
from .widgets import time_a_step as time_a_step
from .widgets import watch_the_grid as watch_the_grid
