"""The structure of code/: which room imports which. A room is a file or a folder that lies in code/."""

import ast
from pathlib import Path

import pytest

from conftest import CODE
from runtime.console import with_options
from runtime.options import OPTIONS

MOST_ROOMS, MOST_FLOORS, MOST_ENTRIES = 24, 7, 12
# Names that the README's layout fixes.
FIXED = [
    'cli.py',
    'config.py',
    'ckpt.py',
    'train.py',
    'evaluate.py',
    'infer.py',
    'logger.py',
    'utils.py',
    'SOTA_SSL_Models.py',
    'dataloader',
    'loss',
    'metric',
    'model',
    'optimizer',
    'tests',
]
LEAVES = ('loss', 'metric', 'model', 'optimizer', 'config')


def modules(code):
    """{dotted name: path} of all modules but the tests."""
    paths = [path.relative_to(code) for path in code.rglob('*.py')]
    return {
        '.'.join(path.with_suffix('').parts).removesuffix('.__init__'): code / path
        for path in paths
        if path.parts[0] != 'tests'
    }


def imports(code):
    """{module: modules of ours that it imports}, those within functions, too."""
    known, found = modules(code), {}
    for name, path in known.items():
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                wanted = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                wanted = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
            else:
                continue
            found[name] |= {other for other in wanted if other in known and other != name}
    return found


def room(name):
    return name.partition('.')[0]


def between_rooms(code):
    found = {}
    for name, others in imports(code).items():
        found.setdefault(room(name), set()).update(room(other) for other in others if room(other) != room(name))
    return found


def floors(graph):
    """{node: length of the longest way down}. Raises ValueError that names a circle."""
    level = {}

    def visit(node, way):
        if node in way:
            raise ValueError(' -> '.join([*way[way.index(node) :], node]))
        if node not in level:
            level[node] = 1 + max((visit(other, (*way, node)) for other in graph[node]), default=0)
        return level[node]

    for node in graph:
        visit(node, ())
    return level


def test_modules_have_no_import_circle():
    floors(imports(CODE))


def test_folders_have_few_layers_without_circle():
    level = floors(between_rooms(CODE))
    assert len(level) <= MOST_ROOMS
    assert max(level.values()) <= MOST_FLOORS


def test_leaf_folders_import_no_other_folder():
    graph = between_rooms(CODE)
    assert {name: graph[name] for name in LEAVES if graph[name]} == {}


def test_code_folder_has_few_entries():
    own = {path.name for path in CODE.iterdir() if not path.name.startswith(('.', '__'))}
    assert len(own - set(FIXED)) <= MOST_ENTRIES
    folders = {path.name for path in CODE.iterdir() if path.is_dir()}
    assert not [name for name in own if name.endswith('.py') and name.removesuffix('.py') in folders]


def test_import_circle_is_detected(tmp_path):
    for name, text in {'a.py': 'import b', 'b.py': 'def f():\n    from c import d', 'c/d.py': 'import a'}.items():
        Path(tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for graph in (imports(tmp_path), between_rooms(tmp_path)):
        with pytest.raises(ValueError, match=' -> '):
            floors(graph)


def test_dataloader_messages_use_backticks_not_options():
    """`white_level`, not --white_level; console.with_options writes the dashes where a command says it."""
    named = {
        path.name for path in (CODE / 'dataloader').rglob('*.py') for name in OPTIONS if f'--{name}' in path.read_text()
    }
    assert not named
    line = 'of a/b`c: try `batch_size=64`, a lower `num_workers`; --num_views=2 `not one'
    assert with_options(line) == 'of a/b`c: try --batch_size=64, a lower --num_workers; --num_views=2 `not one'
