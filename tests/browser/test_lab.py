"""The course as a reader uses it: JupyterLab in a real browser."""

import json
import urllib.request
from collections.abc import Callable

import pytest
from driver import TOKEN, Notebook, Server
from playwright.sync_api import Page, expect

from qcourse.models.smollm2_files import find_smollm2

SOLUTION = "def symmetric_scale(x, bits):\n    return x.abs().max() / (2 ** (bits - 1) - 1)"
KNOWN_MISTAKES = {
    "qmax off by one": "def symmetric_scale(x, bits):\n    return x.abs().max() / 2 ** (bits - 1)",
    "the largest value, not the largest magnitude": SOLUTION.replace(".abs()", ""),
}

pytestmark = pytest.mark.browser


def test_the_lab_lists_the_notebooks(page: Page, lab: Server) -> None:
    page.goto(f"{lab.url}/lab?reset&token={TOKEN}")
    listing = page.locator(".jp-DirListing-content")
    expect(listing).to_contain_text("exercises")
    listing.get_by_text("notebooks", exact=True).dblclick()
    for lesson in (lab.folder / "notebooks").glob("*.ipynb"):
        expect(listing).to_contain_text(lesson.name)


def test_readers_are_not_asked_about_news(lab: Server) -> None:
    name = "@jupyterlab/apputils-extension:notification"
    url = f"{lab.url}/lab/api/settings/{name}?token={TOKEN}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        properties = json.load(answer)["schema"]["properties"]
    assert properties["fetchNews"]["default"] == "false"
    assert properties["checkForUpdates"]["default"] is False


def test_the_model_of_lesson_00_answers(open_notebook: Callable[[str], Notebook]) -> None:
    try:
        find_smollm2()
    except FileNotFoundError:
        pytest.skip("SmolLM2's file is not on this machine")
    lesson = open_notebook("notebooks/00_start_here.ipynb")
    lesson.menu("Edit", "Clear Outputs of All Cells")
    answer = lesson.cell("chat(lm.model, question)")
    expect(answer).not_to_contain_text("Paris")
    for words in ("load_lesson_model()", "import chat_prompt", "def chat("):
        lesson.run(lesson.cell(words))
    lesson.run(answer)
    expect(answer).to_contain_text("Paris")


def test_the_drawing_of_lesson_00_is_there_before_anything_runs(
    open_notebook: Callable[[str], Notebook],
) -> None:
    cell = open_notebook("notebooks/00_start_here.ipynb").cell("llama_block_figure(")
    expect(cell.locator("img")).to_be_visible()


def test_the_picture_of_lesson_01_is_there_before_anything_runs(
    open_notebook: Callable[[str], Notebook],
) -> None:
    cell = open_notebook("notebooks/01_quantizer.ipynb").cell("watch_the_grid(")
    expect(cell.locator("img")).to_be_visible()


def test_the_slider_of_lesson_01_moves_the_picture_and_the_words(
    open_notebook: Callable[[str], Notebook],
) -> None:
    lesson = open_notebook("notebooks/01_quantizer.ipynb")
    lesson.run_all()
    cell = lesson.cell("watch_the_grid(")
    readout = cell.locator(".widget-html-content")
    expect(readout).to_contain_text("entropy")
    words, pixels = readout.inner_text(), lesson.picture(cell)
    assert "of 16 codes" in words
    lesson.press_on_slider(cell, "ArrowLeft", times=2)
    expect(readout).to_contain_text("of 4 codes")
    lesson.wait_for_another_picture(cell, pixels)


def test_the_batch_of_lesson_10_makes_the_cache_longer(
    open_notebook: Callable[[str], Notebook],
) -> None:
    lesson = open_notebook("notebooks/10_roofline.ipynb")
    cell = lesson.cell("time_a_step(")
    lesson.run(cell)
    readout = cell.locator(".widget-html-content")
    expect(readout.last).to_contain_text("bound by memory")
    words, pixels = readout.last.inner_text(), lesson.picture(cell)
    lesson.press_on_slider(cell, "ArrowRight", times=2)
    expect(readout.last).not_to_have_text(words)
    lesson.wait_for_another_picture(cell, pixels)


def test_a_bit_of_lesson_09_is_clicked(open_notebook: Callable[[str], Notebook]) -> None:
    lesson = open_notebook("notebooks/09_low_bit_floats.ipynb")
    cell = lesson.cell("click_the_bits(")
    lesson.run(cell)
    readout = cell.locator(".widget-html-content")
    expect(readout).to_contain_text("(1 + 5/8) = 13")
    pixels = lesson.picture(cell)
    cell.locator("button.widget-toggle-button").first.click()
    expect(readout).to_contain_text("= -13")
    lesson.wait_for_another_picture(cell, pixels)


def test_an_exercise_is_solved_and_a_known_mistake_is_named(
    open_notebook: Callable[[str], Notebook],
) -> None:
    sheet = open_notebook("exercises/01_quantizer.ipynb")
    sheet.run_all()
    answer, check = sheet.cell("def symmetric_scale("), sheet.cell('check("01.1"')
    expect(check).to_contain_text("01.1 not written yet")
    for name, source in KNOWN_MISTAKES.items():
        sheet.rewrite(answer, source)
        sheet.run(answer)
        sheet.run(check)
        expect(check).to_contain_text(f"Looks like: {name}.")
    sheet.rewrite(answer, SOLUTION)
    sheet.run(answer)
    sheet.run(check)
    expect(check).to_contain_text("01.1 passed, 1 of 1 point")
