"""The strengths of the erasers that a visitor has chosen, each with a slider and a button.

The browser draws the rows from the component's value, and their events are the component's own. If each row were
components of Gradio, they would be made again whenever the choice changes, and an event of a row that has just gone
would be an error 500.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from spm_hub.errors import UsageError

MOST = 3.0
_USUAL = 1.0

_ROWS = """<div class="spm-scroll">${Object.entries(value || {}).map(
    ([name, strength]) => [name.replace(/[&<>"]/g, sign => `&#${sign.charCodeAt(0)};`), strength]
).map(([name, strength]) => `
<div class="spm-strength" role="group" aria-label="${name}">
<label for="strength-${name}">${name}</label>
<input type="range" id="strength-${name}" name="${name}" min="0" max="${most}" step="0.05" value="${strength}">
<output for="strength-${name}">${Number(strength).toFixed(2)}</output>
<button type="button" id="recover-${name}" value="${name}" aria-label="Recover ${name}">Recover</button>
</div>`).join('')}</div>
${Object.keys(value || {}).length > 1 ? '<button type="button" id="recover-all">Recover all</button>' : ''}"""

_EVENTS = """
element.addEventListener('input', event => {
    props.value = {...props.value, [event.target.name]: Number(event.target.value)};
});
element.addEventListener('click', event => {
    if (event.target.tagName !== 'BUTTON') return;
    trigger('recover', {names: event.target.value ? [event.target.value] : Object.keys(props.value)});
});
"""


def rows(names: Sequence[str]) -> Any:
    """Return the component. Its value are strengths by name; it sends `recover` with the names of erasers."""
    return gr.HTML(
        of(names, {}), html_template=_ROWS, js_on_load=_EVENTS, most=MOST, elem_id="strengths", apply_default_css=False
    )


def of(names: Sequence[str], known: Mapping[str, Any] | None) -> dict[str, float]:
    """Return the strength of each of these erasers, as the browser sends it, or the usual one.

    Raises UsageError for a strength that the page does not offer.
    """
    found = {name: (known or {}).get(name, _USUAL) for name in names}
    for name, value in found.items():
        if not isinstance(value, int | float) or not 0 <= value <= MOST:
            raise UsageError(f"the strength of {name} is {value!r}; it is a number from 0 to {MOST:g}")
    return {name: float(value) for name, value in found.items()}
