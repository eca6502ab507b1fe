"""Find functions in source text, blank them, put others in their place. Text in, text out: nothing is
imported, nothing runs.

A function is named as in ladder.py: "rectify.py:Decoder.forward" is a file and a name in it.
"""

from __future__ import annotations

import ast
import io
import keyword
import re
import textwrap
import tokenize
from collections.abc import Iterable

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def split(function: str) -> tuple[str, str]:
    """ "rectify.py:Decoder.forward" → ("rectify.py", "Decoder.forward")."""
    file, _, name = function.partition(":")
    return file, name


def find(source: str, name: str) -> ast.FunctionDef | None:
    """The definition of "function" or "Class.method"; the last one, as Python has it. None: there is none.

    Raises SyntaxError, or whatever else ast.parse makes of the text.
    """
    scope, found = ast.parse(source), None
    *classes, last = name.split(".")
    for one in classes:
        scope = next((node for node in scope.body if isinstance(node, ast.ClassDef) and node.name == one),
                     None)
        if scope is None:
            return None
    for node in scope.body:
        if isinstance(node, FUNCTIONS) and node.name == last:
            found = node
    return found


def first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    """Of the definition with its decorators, counted from 1."""
    return min([node.lineno, *(one.lineno for one in node.decorator_list)])


def body_lines(source: str, node: ast.FunctionDef) -> tuple[int, int]:
    """First and last line of the body behind the docstring, counted from 1, its comments included."""
    has_docstring = ast.get_docstring(node, clean=False) is not None
    statements = node.body[1:] if has_docstring else node.body
    if not statements:
        raise ValueError(f"{node.name}: expected a body behind the docstring, found none.")
    before = node.body[0].end_lineno if has_docstring else node.lineno
    if statements[0].lineno <= before:
        raise ValueError(f"{node.name}: expected its body on lines of its own, found it beside its head.")
    first, lines = statements[0].lineno, source.split("\n")
    while lines[first - 2].strip().startswith("#"):
        first -= 1
    if has_docstring:
        first = node.body[0].end_lineno + 1
    return first, node.end_lineno


def text_of(source: str, name: str) -> str:
    """The whole definition, decorators and all, as it stands in the file. Raises ValueError if there is none.
    """
    node = found_or_raise(source, name)
    return "\n".join(source.split("\n")[first_line(node) - 1:node.end_lineno])


def body_of(source: str, name: str) -> str:
    """The body behind the docstring. Raises ValueError if there is no such function."""
    first, last = body_lines(source, found_or_raise(source, name))
    return "\n".join(source.split("\n")[first - 1:last])


def found_or_raise(source: str, name: str) -> ast.FunctionDef:
    node = find(source, name)
    if node is None:
        raise ValueError(f"expected a function {name}, found none. Was it renamed? Then exercises/ladder.py "
                         "needs its new name.")
    return node


def blank(source: str, messages: dict[str, str]) -> str:
    """The source with each named function's body replaced by an exception with its message."""
    for name, message in messages.items():
        node = found_or_raise(source, name)
        first, last = body_lines(source, node)
        indent = " " * node.body[0].col_offset
        said = textwrap.wrap(message, width=110 - len(indent) - 12, drop_whitespace=False)
        pieces = [f'{indent}    "{piece}"' for piece in (one.replace('"', "'") for one in said)]
        lines = source.split("\n")
        lines[first - 1:last] = [f"{indent}raise NotImplementedError(", *pieces[:-1], pieces[-1] + ")"]
        source = "\n".join(lines)
    return source


def transplant(source: str, submitted: str, names: Iterable[str]) -> str:
    """The source with the named functions as they stand in `submitted`, and what these may need besides.

    That is imports, and functions, classes and constants at the top level whose name the source does not
    have: helpers of somebody's own. All else of `submitted` is left behind. Raises ValueError for a function
    that `submitted` does not have.
    """
    for name in names:
        node = find(submitted, name)
        if node is None:
            raise ValueError(f"expected a function {name}, found none. Was it renamed or deleted?")
        theirs = submitted.split("\n")[first_line(node) - 1:node.end_lineno]
        ours = found_or_raise(source, name)
        if node.col_offset != ours.col_offset:
            theirs = textwrap.indent(textwrap.dedent("\n".join(theirs)), " " * ours.col_offset).split("\n")
        lines = source.split("\n")
        lines[first_line(ours) - 1:ours.end_lineno] = theirs
        source = "\n".join(lines)
    helpers = own_helpers(source, submitted)
    if not helpers:
        return source
    # before what runs when the file is a script; behind all that a helper may use
    head, mark, tail = source.rpartition('\n\nif __name__ == "__main__":')
    if mark and "FLAGS = " not in tail:
        return f"{head}\n\n{helpers}\n{mark}{tail}"
    return f"{source}\n\n{helpers}\n"


def own_helpers(source: str, submitted: str) -> str:
    known = set()
    for node in ast.parse(source).body:
        known |= bound_by(node)
    kept = []
    for node in ast.parse(submitted).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            new = bool(bound_by(node) - known)
        else:
            new = bool(bound_by(node)) and not bound_by(node) & known
        if new:
            start = first_line(node) if isinstance(node, (*FUNCTIONS, ast.ClassDef)) else node.lineno
            kept.append("\n".join(submitted.split("\n")[start - 1:node.end_lineno]))
    return "\n\n".join(kept)


def bound_by(node: ast.stmt) -> set[str]:
    """The names that a statement at the top level gives a meaning: a definition, an import, a constant."""
    if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {(one.asname or one.name).split(".")[0] for one in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {one.id for one in targets if isinstance(one, ast.Name)}


# ------------------------------------------------------------------------------- what gives a solution away

LEAST = 14              # words of code; shorter statements stand everywhere: return x, B, T, E = x.shape
WORD = re.compile(r"[^\W\d]\w*|\d+(?:\.\d+)?(?:e-?\d+)?|\*\*|//|->|[=<>!]=|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Code or prose as a row of words, without spacing, and without names except those behind a dot.

    `scale * pooled @ query.T` and `s*z @ w.T` are the same row.
    """
    found, before = [], ""
    for word in WORD.findall(text):
        name = word.isidentifier() and not keyword.iskeyword(word) and before != "."
        found.append("name" if name else word)
        before = word
    return found


def without_comments(code: str) -> str:
    """Code without comments and with dedent; code that cannot be read comes back as it is."""
    code = textwrap.dedent(code)
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (tokenize.TokenError, IndentationError, SyntaxError):
        return code
    lines = code.split("\n")
    for token in reversed(tokens):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return "\n".join(lines)


def telltales(body: str) -> dict[str, str]:
    """What would give a body away: its words → its text, for the body and every statement and expression.

    A body that is short as a whole is kept with its names, for there is little else to tell it by.
    """
    body = without_comments(body)
    found = {}
    if len(words_of(body)) < LEAST:
        return {" ".join(WORD.findall(body)): body.strip()}
    pieces = [body]
    for node in ast.walk(ast.parse(body)):
        if isinstance(node, (ast.stmt, ast.expr)):
            pieces.append(ast.get_source_segment(body, node))
    for piece in pieces:
        words = words_of(piece)
        if len(words) >= LEAST:
            found[" ".join(words)] = piece.strip()
    return found


def given_away(text: str, tales: dict[str, str]) -> list[str]:
    """The pieces of `telltales` that stand in a text, code or prose, under whatever names."""
    named = f" {' '.join(WORD.findall(text))} "
    nameless = f" {' '.join(words_of(text))} "
    return [piece for words, piece in tales.items() if f" {words} " in nameless or f" {words} " in named]
