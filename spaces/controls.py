"""The parts of the page: fields, galleries, messages, looks."""

import html
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import gradio as gr
from library import bundled_tokenizers
from uploads import FORMATS, MAX_BYTES

from dinotok.command_line import one_line
from dinotok.quickstart import photograph

EXAMPLES = {
    "cat": "chelsea.jpg",
    "coffee": "coffee.jpg",
    "rocket": "rocket.jpg",
    "astronaut": "astronaut.jpg",
    "eye": "retina.jpg",
    "galaxies": "hubble_deep_field.jpg",
}
PAIRS = (("cat", "coffee"), ("rocket", "astronaut"), ("eye", "galaxies"))
TAKEN = f"{', '.join(FORMATS)}, up to {MAX_BYTES // 2**20} MB"
# Focus has to be seen, galleries and captions whole, and tables without the empty head that Markdown needs.
CSS = """
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
.whole .grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
.whole .grid-wrap { overflow: visible !important; }
.whole, .whole .gallery-container { height: auto !important; }
.whole .caption-label { max-width: 100%; font-size: var(--text-xs); }
#mixture img { width: 100%; object-fit: contain; }
.facts thead { display: none; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { min-width: 8em; width: 1%; }
@media (max-width: 640px) { .gradio-container { padding: 8px !important; } }
"""


@contextmanager
def messages() -> Iterator[None]:
    """Show what a visitor can mend as a message; all else is "Error" to visitors, and a trace in the log only."""
    try:
        yield
    except (ValueError, OSError, MemoryError, ImportError) as error:
        # The text may repeat what a visitor typed, and gradio renders HTML.
        text = html.escape(one_line(error), quote=False)
        raise gr.Error(text, duration=20, print_exception=False) from error


def upload_field(label: str, elem_id: str) -> gr.Image:
    """A place to drop a picture, which hands on the path of the file.

    gradio would open the file with every decoder there is, before our limits, and end in a trace if it cannot.
    """
    image = gr.Image(
        label=label,
        placeholder=f"Drop a picture here, or press to choose one\n{TAKEN}",
        type="filepath",
        image_mode=None,
        sources=["upload", "clipboard"],
        height=280,
        elem_id=elem_id,
        alt_text=label,
    )
    image.preprocess = lambda payload: None if payload is None else payload.path
    return image


def example_buttons(rows: Sequence[Sequence[str]], images: list[gr.Image], label: str) -> None:
    """Buttons with names, which a screen reader can say; those with thumbnails have none."""
    paths = [[str(photograph(EXAMPLES[name])) for name in row] for row in rows]
    gr.Examples(paths, images, label=label, example_labels=[" and ".join(row) for row in rows])


def gallery(label: str, columns: int, elem_id: str) -> gr.Gallery:
    """Pictures beside each other, whole, and without the losses of gradio's usual WebP."""
    return gr.Gallery(
        label=label,
        columns=columns,
        format="png",
        object_fit="contain",
        height="auto",
        interactive=False,
        elem_id=elem_id,
        elem_classes="whole",
    )


def tokenizer_choice(page: str) -> tuple[gr.Radio, gr.Textbox]:
    names = bundled_tokenizers()
    discrete_first = sorted(names, key=lambda name: not name.endswith("-vq"))
    value = discrete_first[0] if names else None
    return gr.Radio(names, value=value, label="Tokenizer", elem_id=f"{page}-tokenizer"), hub_field(page)


def hub_field(page: str) -> gr.Textbox:
    return gr.Textbox(
        label="Or any repository of the Hub", placeholder="owner/name", max_length=200, elem_id=f"{page}-repository"
    )


def theme() -> gr.themes.Base:
    """gradio's usual looks with the fonts of the machine: the usual ones come from elsewhere."""
    return gr.themes.Default(
        font=("ui-sans-serif", "system-ui", "sans-serif"), font_mono=("ui-monospace", "Consolas", "monospace")
    )
