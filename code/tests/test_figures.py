"""The figures of the pages: those of Results are in files in git, and nothing else is."""

import json
import re
import sys

import pytest

from conftest import CODE

sys.path.insert(0, str(CODE / 'bench'))
import tables  # noqa: E402

NUMBER = re.compile(r'\d+\.\d+|\d+ ?%')


def figures_outside(text):
    """Numbers with a fraction or a percent sign that stand in no table made of files, no code and no link."""
    text = tables.MARK.sub('', text)
    text = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)', '', text, flags=re.S)
    return NUMBER.findall(text)


@pytest.mark.parametrize('page', tables.PAGES, ids=lambda path: str(path.relative_to(CODE.parent)))
def test_tables_equal_their_result_files(page):
    found = tables.MARK.findall(page.read_text())
    assert found
    for _, name, shown, _ in found:
        assert shown == getattr(tables, name)(), f'{name}: python3 bench/tables.py writes it anew'


def test_results_page_has_no_other_figures():
    text = (CODE.parent / 'README.md').read_text()
    assert not figures_outside(text.split('\n## Results\n', 1)[1].split('\n## ', 1)[0])
    assert not figures_outside((CODE / 'results/README.md').read_text())


def test_figure_without_file_is_detected():
    assert figures_outside('kNN 91.3, or 40 % of it; `--learning_rate=0.5` is code') == ['91.3', '40 %']
    assert not figures_outside('<!-- figures: demo -->\n| 91.3 |\n<!-- end -->')


def test_result_files_are_of_runs_without_paths():
    names = {path.name for path in (CODE / 'results').iterdir() if path.is_dir()}
    assert names
    for name in names:
        folder = CODE / 'results' / name
        about = json.loads((folder / 'run.json').read_text())
        assert about['versions']['torch']
        assert tables.curve(name, 'loss') or tables.curve(name, 'knn_top1')
    for path in (CODE / 'results').rglob('*.json*'):
        assert not re.search(r'"[^"]*(?<![\w.])/(?:root|home|work|tmp|Users)/', path.read_text()), path
    assert sum(path.stat().st_size for path in (CODE / 'results').rglob('*')) < 4e6


@pytest.mark.parametrize('change', [0.3, -5.0])
def test_changed_result_file_changes_table(change, monkeypatch):
    before, result = tables.clothing(), tables.result
    monkeypatch.setattr(tables, 'result', lambda *of: {**result(*of), 'top1': result(*of)['top1'] + change})
    assert tables.clothing() != before
