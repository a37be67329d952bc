"""What every test starts from: no network, one thread, a home of its own for caches, and known random numbers."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator

# Before anything of Hugging Face is imported: these are read once, at import.
_HOME = tempfile.mkdtemp(prefix="peft-graft-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
os.environ.update(
    HF_HOME=_HOME,
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    ACCELERATE_USE_CPU="true",
    OMP_NUM_THREADS="1",  # for the processes that tests start
)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # `nohup` leaves it ignored, also for the processes that tests start

pytest_plugins = ["compatibility", "tiny_world"]


@pytest.fixture(autouse=True)
def _known_random_numbers() -> Iterator[None]:
    """Start every test from one seed and leave the generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
