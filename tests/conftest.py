"A browser for the pages, and Hypothesis profiles: `ci` draws the same few examples every time, `nightly` thousands of new ones (HYPOTHESIS_PROFILE=nightly; DDCL_EXAMPLES says how many)."
import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

slow_is_fine = dict(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
settings.register_profile("ci", max_examples=20, derandomize=True, database=None, **slow_is_fine)
settings.register_profile("nightly", max_examples=int(os.environ.get("DDCL_EXAMPLES", 2000)), **slow_is_fine)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM: pytest.skip("browser checks need chromium, which was not found")
    api = pytest.importorskip("playwright.sync_api", reason="browser checks need playwright, which is not installed")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()
