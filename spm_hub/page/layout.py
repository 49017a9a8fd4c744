"""The page in Gradio: four tabs over one studio that all visitors share."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from uuid import uuid4

import gradio as gr
from PIL import Image

from spm_hub.page import markup, strengths
from spm_hub.page.lessons import METHODS, Progress, School
from spm_hub.page.studio import Frame, Studio, checked_number, in_words

TITLE = "spm-hub: erasers for text-to-image models"
_FONTS = ("system-ui", "sans-serif")
_MONOSPACED = ("ui-monospace", "monospace")
_FIRST = "snoopy"
"""The eraser that is chosen at first, where there is one of this name."""
_SEARCH = "Type to search among those of the registry."
_MOST_SEED = 2**32 - 1
_TIDY = 3600
"""Seconds after which the files of pictures are deleted."""
_VISITORS = 16
"""Visitors that are answered at once; the pipeline itself draws in batches."""


class Page:
    """The page's components and what their events do; build it with `make`."""

    def __init__(self, studio: Studio, school: School, *, steps: int = 25, hub: bool = True) -> None:
        """Take the steps of a picture by default; hub: whether erasers on the Hub can be searched."""
        self._studio, self._school, self._steps, self._hub = studio, school, steps, hub

    def make(self) -> Any:
        """Return the page as `gradio.Blocks`."""
        with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(_TIDY, _TIDY)) as blocks:
            bases = list(self._studio.bases)
            with gr.Row(equal_height=True):
                with gr.Column(scale=4, min_width=300):
                    gr.Markdown("# spm-hub\nErase a concept from a model, see the difference, and take it back.")
                with gr.Column(scale=5, min_width=300):
                    base = gr.Dropdown(bases, value=bases[0], label="Base model", elem_id="base")
            with gr.Tab("Draw", id="draw"):
                chosen = self._draw_tab(base)
            with gr.Tab("Train", id="train"):
                trained = self._train_tab(base, chosen)
            with gr.Tab("Report", id="report"):
                reported = self._report_tab()
            with gr.Tab("Compare", id="compare"):
                compared = self._compare_tab(base)
            lists = [chosen, reported, *compared]
            blocks.load(self._refresh, lists, lists, show_progress="hidden")
            trained.then(self._refresh, lists, lists, show_progress="hidden")
        blocks.queue(default_concurrency_limit=_VISITORS)
        return blocks

    def _draw_tab(self, base: Any) -> Any:
        names = self._studio.names()
        first = [_FIRST] if _FIRST in names else names[:1]
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                chosen, known = self._choice(first)
                prompt = gr.Textbox(label="Prompt", value=_example(first), elem_id="prompt", max_lines=2)
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=100)
                    steps = gr.Slider(
                        1, self._studio.limits.steps, self._steps, step=1, label="Steps", elem_id="steps", min_width=180
                    )
                with gr.Row():
                    draw = gr.Button("Draw", variant="primary", elem_id="draw", min_width=120)
                    stop = gr.Button("Stop", elem_id="stop-drawing", min_width=120)
                if self._hub:
                    self._hub_search(chosen)
            with gr.Column(scale=5, min_width=300):
                said = gr.HTML(markup.remark("Choose erasers, type a prompt, and press Draw or Enter."), elem_id="said")
                with gr.Row():
                    without = _picture("Without", "without")
                    with_ = _picture("With", "with")
                why = gr.HTML(elem_id="why")
        inputs = [base, chosen, known, prompt, seed, steps]
        outputs = [without, with_, said, why]
        recovered = known.recover(_without, [chosen, known], [chosen, known], show_progress="hidden").then(
            self._draw, inputs, outputs, show_progress="hidden", trigger_mode="always_last"
        )
        event = gr.on(
            [draw.click, prompt.submit], self._draw, inputs, outputs, show_progress="hidden", cancels=[recovered]
        )
        known.recover(None, cancels=[event])
        stop.click(lambda: markup.remark("stopped"), None, said, cancels=[event, recovered], show_progress="hidden")
        return chosen

    def _choice(self, first: list[str]) -> tuple[Any, Any]:
        """Return the choice of erasers, and their strengths."""
        chosen = gr.Dropdown(
            self._studio.names(), value=first, multiselect=True, label="Erasers", elem_id="erasers",
            info=_SEARCH if first else "There is none yet: train one.",
        )  # fmt: skip
        everything = gr.Button("Choose all", size="sm", elem_id="choose-all")
        known = strengths.rows(first)
        everything.click(self._everything, None, chosen, show_progress="hidden")
        chosen.change(strengths.of, [chosen, known], known, show_progress="hidden")
        return chosen, known

    def _everything(self) -> Any:
        names = self._studio.names()
        return gr.update(choices=names, value=names)

    def _hub_search(self, chosen: Any) -> None:
        with gr.Accordion("Find erasers on the Hub", open=False):
            words = gr.Textbox(label="Words", placeholder="van gogh", elem_id="hub-words", max_lines=1)
            search = gr.Button("Search", elem_id="hub-search")
            found = gr.Dropdown([], label="Found", elem_id="hub-found", interactive=True)
            fetch = gr.Button("Get it", elem_id="hub-get")
            said = gr.HTML(elem_id="hub-said")
            gr.on([search.click, words.submit], self._search, words, [found, said], show_progress="minimal")
            fetch.click(self._fetch, [found, chosen], [chosen, said], show_progress="minimal")

    def _train_tab(self, base: Any, chosen: Any) -> Any:
        gr.Markdown("A new eraser is kept in the registry, and everybody who uses this page can choose it.")
        concept = gr.Textbox(label="Concept to erase", placeholder="church", elem_id="concept", max_lines=1)
        method = gr.Radio(list(METHODS), value=METHODS[0], label="Method", elem_id="method")
        steps = gr.Slider(10, 300, 100, step=10, label="Steps (spm)", elem_id="training-steps")
        with gr.Row():
            train = gr.Button("Train", variant="primary", elem_id="train")
            stop = gr.Button("Stop", elem_id="stop-training")
        said = gr.HTML(markup.remark("instant takes seconds; spm some minutes."), elem_id="trained")
        curve = gr.HTML(elem_id="curve")
        pictures = gr.HTML(elem_id="pictures")
        outputs = [said, curve, pictures, chosen]
        event = gr.on(
            [train.click, concept.submit], self._train, [base, concept, method, steps, chosen], outputs,
            show_progress="hidden",
        )  # fmt: skip
        stop.click(self._stop, None, said, show_progress="hidden")
        return event

    def _report_tab(self) -> Any:
        names = self._studio.names()
        which = gr.Dropdown(names, value=names[0] if names else None, label="Eraser", elem_id="reported")
        read = gr.Button("Read its report", variant="primary", elem_id="read")
        shown = gr.HTML(elem_id="report-text")
        gr.on([read.click, which.input], self._report, which, shown, show_progress="hidden")
        return which

    def _compare_tab(self, base: Any) -> list[Any]:
        names = self._studio.names()
        with gr.Row():
            pair = [
                gr.Dropdown(
                    names, value=names[index] if index < len(names) else None, label=f"Eraser {index + 1}",
                    elem_id=f"compared-{index + 1}",
                )
                for index in range(2)
            ]  # fmt: skip
        with gr.Row():
            prompt = gr.Textbox(
                label="Prompt", value=_example(names), elem_id="compared-prompt", max_lines=2, scale=4, min_width=240
            )
            seed = gr.Number(0, label="Seed", precision=0, elem_id="compared-seed", min_width=100)
        draw = gr.Button("Compare", variant="primary", elem_id="compare")
        said = gr.HTML(elem_id="compared-said")
        with gr.Row():
            pictures = [
                _picture(label, f"compared-{key}")
                for label, key in (("Without", "bare"), ("Eraser 1", "one"), ("Eraser 2", "two"))
            ]
        why = gr.HTML(elem_id="compared-why")
        gr.on(
            [draw.click, prompt.submit], self._compare, [base, *pair, prompt, seed], [*pictures, said, why],
            show_progress="hidden",
        )  # fmt: skip
        return pair

    def _draw(
        self, base: str, chosen: list[str], known: Mapping[str, Any], prompt: str, seed: Any, steps: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Draw without and with the chosen erasers, side by side."""
        keep = gr.skip()
        try:
            acting = strengths.of(chosen, known)
            number = checked_number("Seed", seed, 0, _MOST_SEED)
            count = checked_number("Steps", steps, 1, self._studio.limits.steps)
            yield keep, keep, markup.remark("waiting for its turn"), keep
            why = markup.gammas(self._studio.explain(base, prompt, list(acting)), acting)
            for frame in self._studio.draw(base, prompt, [{}, acting], seed=number, steps=count):
                yield *map(_own, frame.pictures), markup.remark(_state(frame)), why
        except Exception as error:
            yield keep, keep, markup.remark(in_words(error), wrong=True), keep

    def _compare(
        self, base: str, one: str | None, two: str | None, prompt: str, seed: Any
    ) -> Iterator[tuple[Any, ...]]:
        """Draw without an eraser, with one, and with another."""
        keep = gr.skip()
        if not one or not two:
            yield keep, keep, keep, markup.remark("choose two erasers", wrong=True), keep
            return
        try:
            number = checked_number("Seed", seed, 0, _MOST_SEED)
            names = dict.fromkeys((one, two), 1.0)
            yield keep, keep, keep, markup.remark("waiting for its turn"), keep
            why = markup.gammas(self._studio.explain(base, prompt, list(names)), names)
            alike = (
                f"Their changes have the cosine {self._studio.similarity(one, two):.3f}: 1 is the same, 0 unrelated."
            )
            sets = [{}, {one: 1.0}, {two: 1.0}]
            for frame in self._studio.draw(base, prompt, sets, seed=number, steps=self._steps):
                yield *map(_own, frame.pictures), markup.remark(_state(frame)), f"{why}<p>{alike}</p>"
        except Exception as error:
            yield keep, keep, keep, markup.remark(in_words(error), wrong=True), keep

    def _train(
        self, base: str, concept: str, method: str, steps: Any, chosen: list[str], request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Train an eraser, and choose it once it is finished."""
        keep = gr.skip()
        drawn = -1
        try:
            for now in self._school.train(str(request.session_hash), base, concept, method, int(steps)):
                pictures = markup.pictures(now.pictures) if len(now.pictures) != drawn else keep
                drawn = len(now.pictures)
                update = (
                    gr.update(choices=self._studio.names(), value=[*chosen, now.name], info=_SEARCH)
                    if now.name
                    else keep
                )
                yield markup.remark(_lesson(now)), markup.curve(now.losses, now.total), pictures, update
        except Exception as error:
            yield markup.remark(in_words(error), wrong=True), keep, keep, keep

    def _stop(self, request: gr.Request) -> str:
        stopped = self._school.stop(str(request.session_hash))
        return markup.remark("stopping after this step" if stopped else "no training of yours is going on")

    def _report(self, name: str | None) -> str:
        try:
            return markup.report(self._studio.manifest(name)) if name else markup.remark("choose an eraser", wrong=True)
        except Exception as error:
            return markup.remark(in_words(error), wrong=True)

    def _search(self, words: str) -> tuple[Any, str]:
        from spm_hub.hub.search import search

        try:
            found = search(words)
        except Exception as error:
            return gr.skip(), markup.remark(in_words(error), wrong=True)
        said = f"{len(found)} found" if found else f"nothing on the Hub matches {words!r}"
        choices = [(f"{one.repo}: {', '.join(one.erases) or 'unknown'}", one.repo) for one in found]
        return gr.update(choices=choices, value=choices[0][1] if choices else None), markup.remark(said)

    def _fetch(self, repo: str | None, chosen: list[str]) -> tuple[Any, str]:
        if not repo:
            return gr.skip(), markup.remark("search first, and choose one of those found", wrong=True)
        try:
            name = self._studio.fetch(repo)
        except Exception as error:
            return gr.skip(), markup.remark(in_words(error), wrong=True)
        return gr.update(choices=self._studio.names(), value=[*chosen, name], info=_SEARCH), markup.remark(
            f"{name} is here"
        )

    def _refresh(self, *values: Any) -> list[Any]:
        """Return the present names for every list of erasers; others may have trained some meanwhile."""
        names = self._studio.names()
        return [gr.update(choices=names, value=_among(value, names)) for value in values]


def launch_options() -> dict[str, Any]:
    """Return how the page looks: fonts of the visitor's machine, nothing from other hosts."""
    # The theme's own colours of buttons and labels have too little contrast to read well.
    theme = gr.themes.Soft(font=_FONTS, font_mono=_MONOSPACED).set(
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        block_title_text_color="*primary_700",
        block_label_text_color="*primary_700",
        block_info_text_color="*neutral_600",
        body_background_fill="*neutral_50",
    )
    return {"theme": theme, "css": markup.STYLE, "ssr_mode": False, "footer_links": [], "show_error": True}


def free_port(host: str) -> int:
    """Return a port that nothing listens on."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _picture(label: str, name: str) -> Any:
    """Return the place of a picture; a small one is enlarged."""
    return gr.Image(
        label=label, interactive=False, elem_id=name, elem_classes="spm-picture", min_width=120, format="png",
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _own(picture: Image.Image | None) -> Any:
    """Return a picture as one that no other visitor has, or nothing new where there is none yet.

    Gradio keeps pictures in files by their content. It would write the file of an equal one again while it is being
    sent to somebody.
    """
    if picture is None:
        return gr.skip()
    own = picture.copy()
    own.info["visit"] = uuid4().hex
    return own


def _among(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [name for name in value if name in names]
    return value if value in names else next(iter(names), None)


def _example(names: Sequence[str]) -> str:
    """Return a prompt that shows what the first of these erasers does."""
    return f"{names[0].replace('-', ' ')} on the beach" if names else "a dog on the beach"


def _without(
    event: gr.EventData, chosen: Sequence[str], known: Mapping[str, Any]
) -> tuple[list[str], dict[str, float]]:
    """Take erasers out of those that a visitor has chosen."""
    left = [name for name in chosen if name not in event.names]
    return left, strengths.of(left, known)


def _state(frame: Frame) -> str:
    if frame.drawn:
        return "drawn, from the same noise"
    return f"step {frame.step} of {frame.total}" if frame.step else "waiting for its turn"


def _lesson(now: Progress) -> str:
    if now.name:
        return f"{now.verdict}; it is chosen on the first tab"
    return now.verdict or (f"step {now.step} of {now.total}" if now.step else "loading the model")
