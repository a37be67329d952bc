"""The model card of a saved adapter: what it is, how to load it, what was measured."""

from .card import CARD_FILE, adopt_edits, refresh_card, save_card
from .summary import WEIGHTS_FILE, Saved, fetch_adapter, installed_versions, read_saved

__all__ = [
    "CARD_FILE",
    "WEIGHTS_FILE",
    "Saved",
    "adopt_edits",
    "fetch_adapter",
    "installed_versions",
    "read_saved",
    "refresh_card",
    "save_card",
]
