"""`Form`: the fields of a run file as widgets, made from the schema.

The run file's text is the only state: a widget writes what is entered into it, also what is wrong,
so that nothing typed is lost when a part of the form is built again. That happens only where its
structure changes: another kind, another item of a list, a section that is switched on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nicegui import ui
from nicegui.elements.mixins.validation_element import ValidationElement
from nicegui.elements.mixins.value_element import ValueElement

from onewan.config.edits import Checked, RunText
from onewan.config.inputs import Input, plain, run_inputs
from onewan.document_edits import inline
from onewan.documents import KeyPath, get_path
from onewan.web.elements import text

_ITEMS = {"sources": "source", "prompts": "prompt", "embeddings": "embedding"}
"""What an item of a list is called."""


@dataclass(eq=False)
class _Widget:
    field: Input
    element: ValueElement[Any]
    told: ui.label
    """Shows a problem for which the element has no place of its own."""


@dataclass(eq=False)
class _Box:
    """A part of the form whose structure depends on the run file."""

    element: ui.element
    shape: Callable[[], Hashable]
    fill: Callable[[], None]
    built: Hashable = None


class Form:
    """The form of `run`. `before` is called before a change, and says whether it may be made;
    `changed` after it."""

    def __init__(
        self, run: RunText, before: Callable[[], bool], changed: Callable[[], None]
    ) -> None:
        self._run, self._before, self._changed = run, before, changed
        self._widgets: dict[KeyPath, _Widget] = {}
        self._boxes: dict[KeyPath, _Box] = {}
        self._more: list[tuple[KeyPath, ui.expansion, frozenset[KeyPath]]] = []
        self._rare: dict[str, ui.element] = {}
        self._checked = Checked(None, {}, [])
        self._defaults: Any = {}
        self._quiet = False

    def build(self) -> None:
        """Make the widgets, in the present element."""
        for field in run_inputs():
            with ui.element("section").classes("ow-card ow-part") as card:
                card.props(f'aria-label="{field.label}"')
                text("h2", field.label)
                _about(field.help)
                if field.section is not None and field.kind == "section":
                    self._fields(field.inner())
                else:
                    self._field(field)
            if not (field.essential or self._run.is_given(field.path)):
                self._rare[field.name] = card
        self.show_all(False)

    def show_all(self, shown: bool) -> None:
        """Show the sections without essential fields too, or hide them."""
        for card in self._rare.values():
            card.set_visibility(shown)

    def refresh(self) -> None:
        """Show what the run file has, after its text was changed elsewhere."""
        for path, box in list(self._boxes.items()):
            if self._boxes.get(path) is box and box.shape() != box.built:
                self._fill(path)
        self._quiet = True
        for widget in self._widgets.values():
            self._show(widget)
        self._quiet = False

    def show(self, checked: Checked) -> None:
        """Show what is wrong at each field, and the values that fields have if they are not
        given."""
        self._checked = checked
        if checked.config is not None:
            self._defaults = checked.config.model_dump(mode="json")
        for widget in self._widgets.values():
            self._tell(widget)
            self._quiet = True
            self._hint(widget)
            self._quiet = False

    def reveal(self, path: KeyPath) -> None:
        """Open what hides the field at `path`, and move there."""
        if str(path[0]) in self._rare:
            self._rare[str(path[0])].set_visibility(True)
        for _ in range(len(path)):  # what is opened may have parts of its own
            for at, expansion, within in list(self._more):
                if path[: len(at)] == at and any(path[: len(p)] == p for p in within):
                    expansion.open()
        near = [p for p in self._widgets if p[: len(path)] == path or path[: len(p)] == p]
        if near:
            element = self._widgets[max(near, key=len)].element
            place = f"getHtmlElement({element.id}).scrollIntoView({{block: 'center'}})"
            ui.run_javascript(place)
            element.run_method("focus")

    # ---------------------------------------------------------------------------------- parts

    def _fields(self, fields: Sequence[Input]) -> None:
        """The essential fields, and those that are given; the others where they are asked for."""
        first = [f for f in fields if f.essential or f.required or self._run.is_given(f.path)]
        rest = [field for field in fields if field not in first]
        for field in first:
            self._field(field)
        if not rest:
            return
        title = f"More settings ({len(rest)})" if first else f"Settings ({len(rest)})"
        with ui.expansion(title).classes("ow-more") as more:
            content = ui.element("div").classes("ow-fields")
        self._more.append((rest[0].path[:-1], more, frozenset(field.path for field in rest)))

        def fill() -> None:
            if more.value and not content.default_slot.children:
                with content:
                    for field in rest:
                        self._field(field)
                self.show(self._checked)

        more.on_value_change(fill)

    def _field(self, field: Input) -> None:
        if field.kind == "list":
            self._list(field)
        elif field.kind == "union":
            self._union(field)
        elif field.kind == "section":
            self._section(field)
        else:
            self._value(field)

    def _box(self, path: KeyPath, shape: Callable[[], Hashable], fill: Callable[[], None]) -> None:
        self._boxes[path] = _Box(ui.element("div").classes("ow-fields"), shape, fill)
        self._fill(path)

    def _fill(self, path: KeyPath) -> None:
        box = self._boxes[path]
        for known in (self._widgets, self._boxes):
            for inner in [p for p in known if p[: len(path)] == path and p != path]:
                del known[inner]
        self._more = [more for more in self._more if more[0][: len(path)] != path]
        box.built = box.shape()
        box.element.clear()
        with box.element:
            box.fill()

    def _section(self, field: Input) -> None:
        with ui.element("div").classes("ow-group"):
            text("h3", field.label)
            if not field.nullable:
                _about(field.help)
                self._fields(field.inner())
                return
            switch = ui.checkbox("On", value=self._shown(field))
            self._add(field, switch.props(f'aria-label="{field.label}: on"'))
            self._box(
                field.path,
                lambda: self._shown(field),
                lambda: self._fields(field.inner()) if self._shown(field) else None,
            )

    def _union(self, field: Input) -> None:
        union = field.union
        assert union is not None
        options = {kind: kind for kind in union.sections}
        if field.nullable:
            options = {"": "As for the whole run", **options}
        with ui.element("div").classes("ow-group"):
            label = f"{field.label}: {union.keyed.key}"
            self._add(field, ui.select(options, label=label, value=self._shown(field)))
            self._box(
                field.path,
                lambda: self._shown(field),
                lambda: self._kind(field, self._shown(field)),
            )

    def _kind(self, field: Input, kind: str) -> None:
        section = field.union.sections.get(kind) if field.union is not None else None
        if section is not None and field.union is not None:
            about = section.model_fields[field.union.keyed.key].description or ""
            _about(" ".join(about.split()))
            self._fields(field.inner(kind))

    def _list(self, field: Input) -> None:
        if len(field.path) > 1:
            text("h3", field.label)
            _about(field.help)
        self._box(field.path, lambda: self._count(field), lambda: self._items(field))

    def _count(self, field: Input) -> int:
        items = self._run.value(field.path)
        return len(items) if isinstance(items, list) else 0

    def _items(self, field: Input) -> None:
        what, count = _ITEMS.get(field.name, "entry"), self._count(field)
        for index in range(count):
            name = f"{what} {index + 1}"
            with ui.element("div").classes("ow-item").props(f'role="group" aria-label="{name}"'):
                with ui.element("div").classes("ow-row"):
                    text("h4", name.capitalize()).classes("ow-grow")
                    self._button("arrow_upward", f"Move {name} up", index > 0).on_click(
                        partial(self._do, partial(self._run.exchange, field.path, index - 1))
                    )
                    self._button("arrow_downward", f"Move {name} down", index + 1 < count).on_click(
                        partial(self._do, partial(self._run.exchange, field.path, index))
                    )
                    self._button("delete", f"Remove {name}").on_click(
                        partial(self._do, partial(self._run.remove_item, field.path, index))
                    )
                self._fields(field.items(index))
        add = ui.button(f"Add {'an' if what[0] in 'aeiou' else 'a'} {what}", icon="add")
        add.props("flat no-caps").on_click(
            partial(self._do, partial(self._run.add_item, field.path))
        )

    def _button(self, icon: str, label: str, usable: bool = True) -> ui.button:
        button = ui.button(icon=icon).props(f'flat round dense aria-label="{label}"')
        button.set_enabled(usable)
        return button.tooltip(label)

    # --------------------------------------------------------------------------------- values

    def _value(self, field: Input) -> None:
        shown = self._shown(field)
        with ui.element("div").classes("ow-field"):
            element: ValueElement[Any]
            if field.kind == "switch":
                element = ui.checkbox(field.label, value=shown)
            elif field.kind in ("choice", "choices"):
                many = field.kind == "choices"
                element = ui.select(
                    self._options(field), label=field.label, value=shown, multiple=many
                )
            elif field.kind in ("long_text", "lines", "paths"):
                element = ui.textarea(field.label, value=shown).props("autogrow rows=1")
            else:
                element = ui.input(field.label, value=shown)
            if field.unit:
                element.props(f'suffix="{field.unit}"')
            self._hint(self._add(field, element))
            about = f"{field.help} ({field.bounds})" if field.bounds else field.help
            help_text = _about(about).classes("ow-help")
            element.props(f'aria-describedby="c{help_text.id}"')

    def _add(self, field: Input, element: ValueElement[Any]) -> _Widget:
        if field.kind != "switch" and not isinstance(element, ui.checkbox):
            element.props("outlined dense stack-label debounce=250").classes("ow-wide")
        told = ui.label().classes("ow-bad")
        told.set_visibility(False)
        widget = self._widgets[field.path] = _Widget(field, element, told)
        element.on_value_change(lambda event: self._entered(field, event.value))
        self._tell(widget)
        return widget

    def _shown(self, field: Input) -> Any:
        """What the widget of a field shows."""
        value = self._run.value(field.path)
        if field.kind == "section":
            return value is not None
        if field.union is not None:
            return (
                "" if field.nullable and value is None else self._run.kind(field.path, field.union)
            )
        if field.kind == "switch":
            return bool(field.default if value is None else value)
        if field.kind == "choices":
            return value if isinstance(value, list) else plain(field.default) or []
        if value is None and field.default is not None and self._run.is_given(field.path):
            return "null"
        return field.shown(value)

    def _options(self, field: Input) -> dict[Any, str]:
        """The choices of a field, and what else the run file has."""
        options = {choice: choice for choice in field.choices}
        shown = self._shown(field)
        if field.kind == "choice":
            if field.nullable and field.default is not None:
                options["null"] = "null"
            if not field.required:
                default = self._default(field)
                options = {"": f"Default: {default}" if default else "Default", **options}
            shown = [shown]
        return {**options, **{str(v): f"{v} (unknown)" for v in shown if v not in options}}

    def _default(self, field: Input) -> str:
        """The value that a field has if it is not given."""
        if field.default_text or self._run.is_given(field.path):
            return field.default_text
        return field.shown(plain(get_path(self._defaults, field.path)))

    def _hint(self, widget: _Widget) -> None:
        field, element = widget.field, widget.element
        if isinstance(element, ui.select) and field.union is None:
            options = self._options(field)
            if options != element.options:
                element.set_options(options, value=self._shown(field))
        elif field.kind not in ("switch", "section", "union"):
            hint = self._default(field).replace("\n", ", ")
            if element.props.get("placeholder", "") != hint:
                element.props["placeholder"] = hint

    def _show(self, widget: _Widget) -> None:
        shown, element = self._shown(widget.field), widget.element
        if element.value == shown:
            return
        if isinstance(element, ui.select) and widget.field.union is None:
            element.set_options(self._options(widget.field), value=shown)
        elif not isinstance(element, ui.select) or shown in element.options:
            element.set_value(shown)

    def _tell(self, widget: _Widget) -> None:
        path, union = widget.field.path, widget.field.union
        own = [path] if union is None else [path, (*path, union.keyed.key)]
        problem = next((p for at in own if (p := self._checked.by_field.get(at))), None)
        if isinstance(widget.element, ValidationElement):
            widget.element.error = problem
        else:
            widget.told.set_text(problem or "")
            widget.told.set_visibility(bool(problem))

    def _entered(self, field: Input, value: Any) -> None:
        if self._quiet or value == self._shown(field):
            return
        path = field.path

        def change() -> None:
            if field.union is not None:
                self._run.choose(path, field.union, value or None)
            elif field.kind == "section":
                self._run.switch(path, bool(value))
            elif field.kind == "switch":
                self._run.enter(field, json.dumps(bool(value)))
            elif field.kind == "choices":
                self._run.enter(field, inline(list(value)) if value else "")
            else:
                self._run.enter(field, value or "")

        self._do(change)

    def _do(self, change: Callable[[], None]) -> None:
        if self._before():
            change()
            self.refresh()
            self._changed()
        else:
            self.refresh()


def _about(words: str) -> ui.label:
    return ui.label(words.replace("`", "")).classes("ow-muted")


def problem_lines(checked: Checked) -> Iterator[tuple[KeyPath | None, str]]:
    """Each problem as a line, with the field that it is about."""
    for path, problem in checked.by_field.items():
        yield path, f"{'.'.join(map(str, path))}: {problem}"
    for line in checked.others:
        yield None, line
