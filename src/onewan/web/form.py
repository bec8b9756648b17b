"""`Form`: the fields of a run file as inputs, made from the schema.

The run file's text is the only state: what is entered is written into it, also what is wrong, so
that nothing typed is lost when a part of the form is built again. That happens only where its
structure changes: another kind, another item of a list, a section that is switched on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nicegui import ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement
from nicegui.elements.mixins.validation_element import ValidationElement
from nicegui.elements.mixins.value_element import ValueElement

from onewan.config.edits import Checked, RunText
from onewan.config.inputs import Input, run_inputs
from onewan.documents import KeyPath
from onewan.web.elements import box, button, card, text

_ITEMS = {"sources": "source", "prompts": "prompt", "embeddings": "embedding"}
"""What an item of a list is called."""


@dataclass(eq=False)
class _Widget:
    field: Input
    element: ValueElement[Any]
    told: TextElement
    """Shows a problem for which the element has no place of its own."""


@dataclass(eq=False)
class _Part:
    """A part of the form whose structure depends on the run file."""

    field: Input
    element: Element
    built: Any = None
    """What the field showed when the part was made."""


class Form:
    """The form of `run`, in the present element. `before` is called before a change, and says
    whether it may be made; `changed` after it."""

    def __init__(
        self, run: RunText, before: Callable[[], bool], changed: Callable[[], None]
    ) -> None:
        self._run, self._before, self._changed = run, before, changed
        self._widgets: dict[KeyPath, _Widget] = {}
        self._parts: dict[KeyPath, _Part] = {}
        self._more: dict[KeyPath, ui.expansion] = {}
        """What has to be opened for a field to be there."""
        self._rare: dict[KeyPath, Element] = {}
        """The sections without essential fields."""
        self._checked = Checked(None, {}, [])
        for field in run_inputs():
            with card(field.label, "ow-part") as section:
                _about(field.help)
                if field.kind == "section":
                    self._fields(field.inner())
                else:
                    self._field(field)
            if not (field.essential or self._run.is_given(field.path)):
                self._rare[field.path] = section
        self.show_all(False)

    def show_all(self, shown: bool) -> None:
        """Show the sections without essential fields too, or hide them."""
        for section in self._rare.values():
            section.set_visibility(shown)

    def refresh(self) -> None:
        """Show what the run file has, after its text was changed elsewhere."""
        for path, part in list(self._parts.items()):
            if self._parts.get(path) is part and self._run.shown(part.field) != part.built:
                self._fill(part)
        for widget in self._widgets.values():
            self._update(widget)

    def show(self, checked: Checked) -> None:
        """Show what is wrong at each field, and the values that fields have if they are not
        given."""
        self._checked = checked
        self.refresh()

    def change(self, change: Callable[[], None]) -> None:
        """Make a change of the run file, if it may be made, and show what the file has then."""
        if self._before():
            change()
            self._changed()
        self.refresh()

    def reveal(self, path: KeyPath) -> None:
        """Open what hides the field at `path`, and move there."""
        if section := self._rare.get(path[:1]):
            section.set_visibility(True)
        for count in range(1, len(path) + 1):  # what is opened may have parts of its own
            if more := self._more.get(path[:count]):
                more.open()
        near = [p for p in self._widgets if p[: len(path)] == path or path[: len(p)] == p]
        if near:
            element = self._widgets[max(near, key=len)].element
            ui.run_javascript(f"revealField({element.id})")

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
            content = box("ow-fields")
        self._more |= dict.fromkeys((field.path for field in rest), more)

        def fill() -> None:
            if more.value and not content.default_slot.children:
                with content:
                    for field in rest:
                        self._field(field)

        more.on_value_change(fill)

    def _field(self, field: Input) -> None:
        if field.kind == "list":
            if len(field.path) > 1:
                text("h3", field.label)
                _about(field.help)
            self._part(field)
        elif field.kind == "union":
            with box("ow-group"):
                self._value(field)
                self._part(field)
        elif field.kind == "section":
            with box("ow-group"):
                text("h3", field.label)
                if field.nullable:
                    self._value(field)
                    self._part(field)
                else:
                    _about(field.help)
                    self._fields(field.inner())
        else:
            with box("ow-field"):
                element = self._value(field)
                about = f"{field.help} ({field.bounds})" if field.bounds else field.help
                help_text = _about(about).classes("ow-help")
                element.props["aria-describedby"] = help_text.html_id

    def _part(self, field: Input) -> None:
        """The part within a list, a union or a section that may be left out."""
        part = self._parts[field.path] = _Part(field, box("ow-fields"))
        self._fill(part)

    def _fill(self, part: _Part) -> None:
        field, path = part.field, part.field.path
        for known in (self._widgets, self._parts, self._more):
            for inner in [p for p in known if p[: len(path)] == path and p != path]:
                del known[inner]
        part.built = self._run.shown(field)
        part.element.clear()
        with part.element:
            if field.kind == "list":
                self._items(field, part.built)
            elif field.union is not None and part.built:
                _about(field.help_of(part.built))
                self._fields(field.inner(part.built))
            elif part.built:
                self._fields(field.inner())

    def _items(self, field: Input, count: int) -> None:
        run, path, what = self._run, field.path, _ITEMS.get(field.name, "entry")
        for index in range(count):
            name = f"{what} {index + 1}"
            up, down = partial(run.exchange, path, index - 1), partial(run.exchange, path, index)
            remove = partial(run.remove_item, path, index)
            with box("ow-item", role="group", aria_label=name):
                with box("ow-row"):
                    text("h4", name.capitalize(), "ow-grow")
                    self._icon("arrow_upward", f"Move {name} up", up, index > 0)
                    self._icon("arrow_downward", f"Move {name} down", down, index + 1 < count)
                    self._icon("delete", f"Remove {name}", remove)
                self._fields(field.items(index))
        article = "an" if what[0] in "aeiou" else "a"
        button(
            f"Add {article} {what}", partial(self.change, partial(run.add_item, path)), icon="add"
        )

    def _icon(self, icon: str, about: str, change: Callable[[], None], usable: bool = True) -> None:
        button("", partial(self.change, change), about=about, icon=icon).set_enabled(usable)

    # --------------------------------------------------------------------------------- values

    def _value(self, field: Input) -> ValueElement[Any]:
        """The input of a field."""
        shown = self._run.shown(field)
        element: ValueElement[Any]
        if field.kind == "switch":
            element = ui.checkbox(field.label, value=shown)
        elif field.kind == "section":
            element = ui.checkbox("On", value=shown)
            element.props["aria-label"] = f"{field.label}: on"
        elif field.kind in ("union", "choice", "choices"):
            key = "" if field.union is None else f": {field.union.keyed.key}"
            many, options = field.kind == "choices", self._run.options(field)
            element = ui.select(options, label=f"{field.label}{key}", value=shown, multiple=many)
        elif field.kind in ("long_text", "lines", "paths"):
            element = ui.textarea(field.label, value=shown).props("autogrow rows=1 debounce=250")
        else:
            element = ui.input(field.label, value=shown).props("debounce=250")
        if field.unit:
            element.props["suffix"] = field.unit
        widget = _Widget(field, element, text("div", classes="ow-bad ow-told"))
        self._widgets[field.path] = widget
        self._update(widget)
        element.on_value_change(lambda event: self._entered(field, event.value))
        return element

    def _update(self, widget: _Widget) -> None:
        """Show the value, or else the default, and what is wrong."""
        field, element = widget.field, widget.element
        shown = self._run.shown(field)
        if isinstance(element, ui.select):
            options = self._run.options(field)
            if (options, shown) != (element.options, element.value):
                element.set_options(options, value=shown)
        else:
            element.set_value(shown)
        if isinstance(element, (ui.input, ui.textarea)):
            hint = self._run.default(field).replace("\n", ", ")
            if hint != element.props.get("placeholder", ""):
                element.props["placeholder"] = hint
        problem = self._checked.problem(field)
        if isinstance(element, ValidationElement):
            element.error = problem
        else:
            widget.told.set_text(problem or "")

    def _entered(self, field: Input, value: Any) -> None:
        if value != self._run.shown(field):
            self.change(lambda: self._run.enter(field, value))


def _about(words: str) -> TextElement:
    return text("div", words.replace("`", ""), "ow-muted")
