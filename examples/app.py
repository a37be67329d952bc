"""A demo in the browser: choose a rule, density and alpha, see the curve, the map and the bytes, and ask all models.

    python examples/app.py     # offline, with the base and donor of `make demo` in demo_out/, which it offers to make
    python examples/app.py --base B --donor D --train train.jsonl --validation validation.jsonl --port 7861

Needs `pip install 'peft-graft[app]'`. explore.py computes everything; this file only lays out the page.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
from transformers import HfArgumentParser

from explore import RULES, ExploreArguments, Explorer, Point, Setting, demo_is_made, make_demo, table

# System fonts, because Gradio would download its own.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
# Gradio passes it to functions that have it as a default, and shows the bars of the Trainer and of the fits, too.
PROGRESS = gr.Progress(track_tqdm=True)
Updates = tuple[Any, ...]
NO_DONOR = "There is no donor yet. **Make the demo's donor** (about two minutes), or name a base and a donor below."


@dataclass
class AppArguments(ExploreArguments):
    """Flags: those of `ExploreArguments`, and the address to serve on."""

    host: str = field(
        default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 also serves other machines."}
    )
    port: int = field(default=7860, metadata={"help": "Port to listen on."})
    open_browser: bool = field(default=False, metadata={"help": "Open the page in a browser."})


class App:
    """The actions of the page's buttons. All visitors share one explorer.

    Args:
        args: Flags, see `--help`.
    """

    def __init__(self, args: AppArguments) -> None:
        self.args = args
        self.explorer: Explorer | None = None
        self.point: Point | None = None

    def open(self, base: str, donor: str, train: str, validation: str, progress: Any = PROGRESS) -> Updates:
        """Load base and donor, and measure them."""
        given = {"base": base, "donor": donor, "train": train, "validation": validation}
        fields = {name: getattr(self.args, name) for name in ExploreArguments.__dataclass_fields__}
        args = replace(ExploreArguments(**fields), **{name: text.strip() or None for name, text in given.items()})
        if not demo_is_made(args):
            return (gr.update(), NO_DONOR, *self.pictures())
        if self.explorer is None or self.explorer.args != args:  # else the page was only reloaded
            before, self.explorer, self.point = self.explorer, Explorer(args, progress), None
            if before is not None:
                before.close()
        names = self.explorer.names
        return (self.explorer.example, f"{names['donor']} on {names['base']}", *self.pictures())

    def make(self, progress: Any = PROGRESS) -> None:
        """Make the demo's donor."""
        progress(0.0, "making the demo's donor")
        make_demo(self.args)

    def graft(self, selection: str, exponent: float, alpha: str, progress: Any = PROGRESS) -> Updates:
        """Make and measure a graft, and show it."""
        progress(0.0, f"{selection} at density {10**exponent:.1e}")
        self.point = self.ready().run(Setting(selection, float(f"{10**exponent:.3g}"), alpha.strip()))
        return self.pictures()

    def curve(self, selection: str, alpha: str, progress: Any = PROGRESS) -> Iterator[Updates]:
        """Graft at five densities, and redraw the curve after each."""
        for _ in self.ready().curve(selection, alpha.strip(), progress=progress):
            yield self.pictures()

    def ask(self, text: str) -> list[dict[str, float] | None]:
        """Ask base, donor and graft to classify a sentence."""
        answers = self.ready().ask(text)
        return [answers.get(name) for name in ("base", "donor", "graft")]

    def budget(self, exponent: float) -> str:
        """Return the density and number of entries at a position of the slider."""
        density = float(f"{10**exponent:.3g}")
        entries = "" if self.explorer is None else f": {round(density * self.explorer.eligible):,} entries"
        return f"density {density:.3g}{entries}"

    def pictures(self) -> Updates:
        """Return the table, the curve and the map of all measured points."""
        if self.explorer is None:
            return "", None, None
        drawn = None if self.point is None else self.explorer.skill_map(self.point)
        return table(self.explorer, self.point), self.explorer.recovery(), drawn

    def ready(self) -> Explorer:
        """Return the explorer.

        Raises:
            ValueError: No base and donor are open.
        """
        if self.explorer is None:
            raise ValueError("base and donor must be open, got none. Make the demo's donor, or name and open a pair.")
        return self.explorer


def told(act: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an action so that the page shows an error's message instead of "Error"."""

    @contextmanager
    def as_message() -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error

    # wraps keeps the signature, in which gradio looks for its Progress
    @functools.wraps(act)
    def run(*args: Any, **kwargs: Any) -> Any:
        with as_message():
            return act(*args, **kwargs)

    @functools.wraps(act)
    def run_on(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with as_message():
            yield from act(*args, **kwargs)

    return run_on if inspect.isgeneratorfunction(act) else run


def build(args: AppArguments) -> gr.Blocks:
    """Lay out the page.

    Args:
        args: Flags, see `--help`.

    Returns:
        The page, ready to launch.
    """
    app = App(args)
    # One action at a time, because grafting changes the model that answers.
    alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Blocks(title="peft-graft", analytics_enabled=False) as page:
        gr.Markdown("# peft-graft\nHow little of a fine-tuned donor does its base need?")
        status = gr.Markdown(elem_id="status")
        make = gr.Button("Make the demo's donor", visible=not demo_is_made(args), elem_id="make")
        with gr.Accordion("Base, donor and data", open=not demo_is_made(args)):
            with gr.Row():
                base = gr.Textbox(args.base or "", label="base", placeholder="the demo's", elem_id="base")
                donor = gr.Textbox(args.donor or "", label="donor", placeholder="the demo's", elem_id="donor")
                train = gr.Textbox(args.train, label="rows for mask and alpha", elem_id="train")
                validation = gr.Textbox(
                    args.validation or "", label="rows to measure on", placeholder="the demo's", elem_id="validation"
                )
            reopen = gr.Button("Open", elem_id="open")
        with gr.Row():
            with gr.Column(scale=2):
                selection = gr.Radio(list(RULES), value="magnitude", label="selection", elem_id="selection")
                exponent = gr.Slider(-5, -1, value=-3, step=0.25, label="density, as a power of ten", elem_id="density")
                budget = gr.Markdown(elem_id="budget")
                alpha = gr.Dropdown(
                    ["auto", "1"], value="auto", allow_custom_value=True, label="alpha: auto or a number"
                )
                with gr.Row():
                    graft = gr.Button("Graft", variant="primary", elem_id="graft")
                    curve = gr.Button("Draw its curve", elem_id="curve")
            with gr.Column(scale=3):
                scores = gr.Markdown(elem_id="scores", min_height=180)
        with gr.Row():
            recovery = gr.Plot(show_label=False, elem_id="recovery")
            where = gr.Plot(show_label=False, elem_id="where")
        with gr.Row():
            text = gr.Textbox(label="A sentence", lines=2, scale=4, elem_id="sentence")
            ask = gr.Button("Ask all three", scale=1, elem_id="ask")
        with gr.Row():
            answers = [gr.Label(label=name, elem_id=f"says-{name}") for name in ("base", "donor", "graft")]

        shown, source = [scores, recovery, where], [base, donor, train, validation]
        opened = {"fn": told(app.open), "inputs": source, "outputs": [text, status, *shown], **alone}
        known = {
            "fn": lambda place: (app.budget(place), gr.update(visible=app.explorer is None)),
            "inputs": exponent,
            "outputs": [budget, make],
        }
        page.load(**opened).then(**known)
        reopen.click(**opened).then(**known)
        make.click(told(app.make), outputs=[], **alone).success(**opened).then(**known)
        exponent.change(app.budget, exponent, budget)
        grafted = graft.click(told(app.graft), [selection, exponent, alpha], shown, **alone)
        grafted.success(told(app.ask), text, answers, **alone)
        curve.click(told(app.curve), [selection, alpha], shown, **alone)
        ask.click(told(app.ask), text, answers, **alone)
        text.submit(told(app.ask), text, answers, **alone)
    return page


def main() -> None:
    """Read the flags and serve the page."""
    (args,) = HfArgumentParser(AppArguments, description=__doc__.partition("\n")[0]).parse_args_into_dataclasses()
    page = build(args)
    page.launch(server_name=args.host, server_port=args.port, inbrowser=args.open_browser, theme=THEME, share=False)


if __name__ == "__main__":
    main()
